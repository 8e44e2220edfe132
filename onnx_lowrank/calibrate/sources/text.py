"""A text, cut into samples of one length: ids, mask, token types, positions and an empty past.

One rule holds for encoders and decoders: a sample is a window of the text with the special tokens that the
tokenizer adds to a text, and every input that the model has besides the ids gets the values of its role.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.sources.source import Claim, Kind, Need, Options, library
from onnx_lowrank.calibrate.sources.tokens import Tokenizer, is_text, tokenizer, windows
from onnx_lowrank.calibrate.table import Table, table
from onnx_lowrank.engines.inputs import Spec, shape_text
from onnx_lowrank.engines.made import check_shapes, first_call, is_position
from onnx_lowrank.engines.pasts import named_role
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.arrays import Column, InMemory

USUAL_LENGTH = 128
"""Number of tokens in a sample if neither the model nor the user gives it."""

USUAL_SAMPLES = 512
"""The most samples if the user gives no number."""

_SUFFIXES = (".txt", ".text", ".md", ".rst")
_OTHERS = (".npz", ".npy", ".pb")
_RANKS = (1, 2)  # Of ids, masks, token types and positions: with or without a batch axis.

Values = NDArray[np.int64]


def _claim(path: Path) -> Claim:
    if not path.is_file() or path.suffix.lower() in _OTHERS:
        return Claim.NONE
    return Claim.SURE if path.suffix.lower() in _SUFFIXES or is_text(path) else Claim.NONE


def _check(path: Path, options: Options) -> None:
    if options.tokenizer is None:
        raise InputError(
            f"{path} is a text, so its tokenizer is needed, too: pass the model's --tokenizer tokenizer.json."
        )
    library("tokenizers", "tokenizers", "text", path)


def _read(path: Path, need: Need, files: ExitStack) -> Table:
    _check(path, need.options)
    check_shapes(need.specs, need.shapes)
    ids = _ids_input(path, need.specs)
    known = tokenizer(need.options.tokenizer or path, path)
    length, most = _length(ids, need), need.most or USUAL_SAMPLES
    shapes = first_call(need.specs, {ids.name: _feed_shape(ids, length)}, length)
    roles = {spec.name: _role(spec, ids, shapes[spec.name], path) for spec in need.specs}
    inside = length - len(known.before) - len(known.after)
    if inside < 1:
        raise InputError(
            f"{path}: samples of {length} tokens have no room beside the {length - inside} special tokens "
            f"of {known.path}: pass a longer --input-shape {ids.name}=1,{USUAL_LENGTH}."
        )
    found = windows(path, known.encode, inside, most)
    if not len(found):
        raise InputError(
            f"{path} is too short, as it gives fewer than the {inside} tokens of one sample: "
            f"pass a longer text, or shorter samples with --input-shape {ids.name}=1,16."
        )
    samples = known.sample(found)
    _check_ids(samples, ids, need, known)
    values = {"ids": samples, "types": known.sample_types(inside)}
    columns = {
        spec.name: _column(spec, shapes[spec.name], _VALUES[roles[spec.name]](values), ids, len(samples))
        for spec in need.specs
    }
    made = table(columns, need.specs, most, str(path))
    return replace(made, extent=f"{made.extent} of {length} tokens")


def _ids_input(path: Path, specs: tuple[Spec, ...]) -> Spec:
    """The input that takes the ids of tokens: input_ids, or the only integers of no other role."""
    named = [spec for spec in specs if spec.name.lower() == "input_ids"]
    found = named or [spec for spec in specs if _is_integer(spec) and named_role(spec) is None]
    if len(found) != 1 or not _is_integer(found[0]):
        names = ", ".join(repr(spec.name) for spec in specs)
        raise InputError(
            f"{path} is a text, but not exactly one of the inputs {names} can take its tokens: "
            "give arrays in an .npz file."
        )
    (ids,) = found
    if ids.shape is not None and len(ids.shape) not in _RANKS:
        raise InputError(
            f"{path} is a text, but the input {ids.name!r} of the shape {shape_text(ids.shape)} takes no "
            "sequences of tokens: give arrays in an .npz file."
        )
    return ids


def _length(ids: Spec, need: Need) -> int:
    """Number of tokens in a sample: the model's, else the user's, else `USUAL_LENGTH`."""
    fixed = ids.shape[-1] if ids.shape else None
    if isinstance(fixed, int):
        return fixed
    positions = [need.limits.get(spec.name) for spec in need.specs if is_position(spec)]
    limits = [limit for limit in positions if limit is not None]
    if not need.shapes.get(ids.name):
        return min([USUAL_LENGTH, *limits])
    length = need.shapes[ids.name][-1]
    if limits and length > min(limits):
        raise InputError(
            f"The model has {min(limits)} positions, fewer than the {length} tokens of --input-shape: "
            f"pass {ids.name}=1,{min(limits)}."
        )
    return length


def _feed_shape(ids: Spec, length: int) -> tuple[int, ...]:
    """The shape of the ids of one feed."""
    if ids.shape is None:
        return (1, length)
    return (*(n if isinstance(n, int) else 1 for n in ids.shape[:-1]), length)


def _is_integer(spec: Spec) -> bool:
    return np.dtype(spec.dtype).kind in "iu"


def _role(spec: Spec, ids: Spec, shape: tuple[int, ...], path: Path) -> str:
    """The role of an input; its shape is that of one feed.

    Raises:
        InputError: A text gives no values for the input.
    """
    if spec is ids:
        return "ids"
    role = named_role(spec)
    if role == "past":
        _check_past(spec, shape, path)
    elif role is None or (role != "branch" and len(shape) not in _RANKS):
        raise InputError(
            f"{path}: a text gives no values for the input {spec.name!r} of the shape "
            f"{shape_text(spec.shape or ())}: give arrays in an .npz file."
        )
    return role


def _check_past(spec: Spec, shape: tuple[int, ...], path: Path) -> None:
    """Check that the past can be empty, and that nothing else of its shape is unknown."""
    given = spec.shape or ()
    if 0 not in shape:
        raise InputError(
            f"{path}: the past {spec.name!r} of the shape {shape_text(given)} has no free length, so it "
            "cannot be empty: give feeds with a past in a folder of .npz files."
        )
    pairs = zip(given[1:], shape[1:], strict=True)
    if any(size > 1 and not isinstance(known, int) for known, size in pairs):
        raise InputError(
            f"{path}: the past {spec.name!r} of the shape {shape_text(given)} has open sizes besides its "
            "batch and its length: fix them in the model, or give feeds in a folder of .npz files."
        )


def _check_ids(samples: Values, ids: Spec, need: Need, known: Tokenizer) -> None:
    """Check that all ids are in the model's vocabulary, if it is known."""
    limit, largest = need.limits.get(ids.name), int(samples.max())
    if limit is not None and largest >= limit:
        raise InputError(
            f"The tokenizer {known.path} gives the id {largest} ({known.token(largest)!r}), but the input "
            f"{ids.name!r} of the model takes ids below {limit}: pass the tokenizer of this model."
        )


_VALUES: dict[str, Callable[[dict[str, Values]], Values]] = {
    "ids": lambda values: values["ids"],
    "mask": lambda values: np.array(1),
    "types": lambda values: values["types"],
    "positions": lambda values: np.arange(len(values["types"])),
    "past": lambda values: np.array(0),
    "branch": lambda values: np.array(0),
}
"""The values of every role, which go to a sample or, by broadcasting, to each."""


def _column(spec: Spec, shape: tuple[int, ...], values: Values, ids: Spec, samples: int) -> Column:
    """The values of an input for all samples, or once for all; it takes the memory of the values alone."""
    array: NDArray[Any] = values.astype(spec.dtype)
    if spec is ids:
        return InMemory(array)
    batch = ids.shape[0] if ids.shape and len(ids.shape) > 1 else None
    first = spec.shape[0] if spec.shape else None
    if spec.shape == () or (isinstance(first, int) and first != batch):
        return InMemory(np.broadcast_to(array, shape))
    row = shape[1:] if len(shape) > 1 else shape  # An input of one axis goes to the model sample by sample.
    return InMemory(np.broadcast_to(array, (samples, *row)))


KIND = Kind("texts", _claim, _read, ("tokenizer",), _check, is_made=True)
