"""Make inputs from the types and shapes in the graph."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnx_lowrank.engines.engine import Feed, UnmadeError
from onnx_lowrank.engines.id_limits import id_limits
from onnx_lowrank.engines.inputs import Spec, fits, is_open, shape_text
from onnx_lowrank.errors import InputError
from onnx_lowrank.files import arrays
from onnx_lowrank.graph.dimensions import Dimension, parse, solve

_PAST = re.compile(r"past[._]?(key|value|kv|state|[0-9])")
_LENGTH = re.compile(r"len|seq|time|frame|token|step|point", re.IGNORECASE)
_SAMPLE_RATES = ("sr", "sample_rate", "sampling_rate")

# Sizes to try for free dimensions: (batch, height and width, any other axis). Strides, position tables and
# heads restrict them in ways that only a run shows. So usual sizes come first, and odd ones last.
_ATTEMPTS = (
    (4, 224, 64),
    (1, 224, 64),
    (1, 512, 512),
    (1, 64, 32),
    (1, 256, 128),
    (1, 32, 16),
    (1, 128, 8),
    (1, 16, 256),
    (1, 8, 4),
    (1, 1, 1),
)
# The first call of a decoder has an empty past; some decoders only run with a past.
_PASTS = (0, 8)


def make(
    proto: ModelProto, wanted: tuple[Spec, ...], shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> Iterator[Feed]:
    """Make inputs from the types and shapes of the graph; each feed tries other sizes of free dimensions.

    Floats are standard normal, ids are inside their embedding table, masks are ones, positions ascend. The
    past of a decoder (inputs such as past_key_values.0.key) is empty first; masks and positions fit it.
    Sizes that make the inputs larger than 1 GiB are left out.

    Args:
        proto: The model.
        wanted: Its inputs.
        shapes: Shapes that the user gave, by input.
        seed: The seed of the random numbers.

    Raises:
        InputError: A given shape does not fit the model, or all sizes make the inputs larger than 1 GiB.
        UnmadeError: An input is no tensor, so it cannot be made.
    """
    _check(wanted, shapes)
    limits, chooser = id_limits(proto), _Chooser(wanted, shapes)
    seen = set()
    refused: list[tuple[int, str]] = []
    tried = [chooser.choose(sizes) for sizes in _sizes()]
    for chosen in (*tried, _as_stated(proto, tried[0], shapes)):
        key = tuple(chosen.values())
        if key in seen:
            continue
        seen.add(key)
        size, largest = _size(wanted, chosen)
        if size > arrays.MAX_BYTES:
            refused.append((size, f"{largest!r} is {shape_text(chosen[largest])}"))
            continue
        rng, past = np.random.default_rng(seed), _past_length(wanted, chosen)
        yield {spec.name: _array(spec, chosen[spec.name], limits, past, rng) for spec in wanted}
    if len(refused) == len(seen):
        size, largest = min(refused)
        raise InputError(
            f"The inputs to make take {min(size, 2**80) / 2**30:.1f} GiB, more than 1 GiB ({largest}): "
            "give smaller ones with --input-shape or --inputs."
        )


def _as_stated(
    proto: ModelProto, chosen: Mapping[str, tuple[int, ...]], given: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Chosen shapes with every 0 that the graph states, except in shapes that the user gave.

    Some exporters write 0 for a free size, but ONNX Runtime takes it for the size.
    """
    stated = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.input}
    return {
        name: shape
        if name in given or len(shape) != len(stated[name])
        else tuple(
            0 if dim.HasField("dim_value") and dim.dim_value == 0 else size
            for dim, size in zip(stated[name], shape, strict=True)
        )
        for name, shape in chosen.items()
    }


def _check(wanted: tuple[Spec, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the user's shapes fit the model, and that every input can be made."""
    check_shapes(wanted, shapes)
    for spec in wanted:
        if spec.dtype is None:
            raise UnmadeError(f"the input {spec.name!r} is no tensor")
        if spec.shape is None and spec.name not in shapes:
            raise InputError(
                f"The input {spec.name!r} has no shape in the model: pass one, such as "
                f"--input-shape {spec.name}=1,3,224,224."
            )


def first_call(
    wanted: tuple[Spec, ...], shapes: Mapping[str, tuple[int, ...]], length: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of all inputs for one sample; the past of a decoder is empty, as at its first call.

    Args:
        wanted: The model's inputs, all of them tensors.
        shapes: Known shapes, by input.
        length: The length of free axes that do not follow from the known shapes.
    """
    sizes = {"batch": 1, "channels": 1, "spatial": length, "length": length, "past": 0}
    return _Chooser(wanted, shapes).choose(sizes)


def one_sample(
    proto: ModelProto, wanted: tuple[Spec, ...], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes of one sample, where the model leaves open no dimension but the first ones, of the batch.

    Args:
        proto: The model.
        wanted: Its inputs.
        shapes: Shapes that the user gave, by input.

    Returns:
        The shapes of the inputs that the user left open; empty if one of them has another open dimension, or
        a shape of the user does not fit.
    """
    by_name = {spec.name: spec.shape for spec in wanted}
    if not all(fits(shape, by_name.get(name) or shape) for name, shape in shapes.items() if name in by_name):
        return {}
    stated = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.input}
    open_ones = [spec for spec in wanted if spec.name not in shapes and is_open(spec)]
    for spec in open_ones:
        # ONNX Runtime takes a stated 0 for the size.
        is_zero = any(dim.HasField("dim_value") and dim.dim_value == 0 for dim in stated[spec.name])
        if is_zero or not _is_batch(spec, alone=len(wanted) == 1):
            return {}
    sizes = {"batch": 1, "channels": 1, "spatial": 1, "length": 1, "past": 0}
    made = _Chooser(wanted, shapes).choose(sizes) if open_ones else {}
    return {spec.name: made[spec.name] for spec in open_ones}


def _is_batch(spec: Spec, *, alone: bool) -> bool:
    """Whether the first dimension of an input is its only open one, and counts samples."""
    if not spec.shape or not all(isinstance(size, int) for size in spec.shape[1:]):
        return False
    name = spec.shape[0]
    name = name if isinstance(name, str) else ""
    return _kind(spec, 0, name, alone=alone) == "batch" and not _LENGTH.search(name)


def check_shapes(wanted: tuple[Spec, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the user's shapes fit the model.

    Raises:
        InputError: The model has no such input, or a shape does not fit.
    """
    by_name = {spec.name: spec for spec in wanted}
    for name, shape in shapes.items():
        if name not in by_name:
            raise InputError(
                f"The model has no input {name!r}: --input-shape takes one of {', '.join(by_name) or 'none'}."
            )
        free = by_name[name].shape
        if free is not None and not fits(shape, free):
            raise InputError(
                f"The input {name!r} has the shape {shape_text(free)} in the model, "
                f"which --input-shape {shape_text(shape)} does not fit: pass sizes for '?' and names only."
            )


def _sizes() -> Iterator[dict[str, int]]:
    """Sizes to try, by the kind of dimension."""
    for channels in (3, 1):
        for batch, spatial, length in _ATTEMPTS:
            for past in _PASTS:
                yield {
                    "batch": batch,
                    "channels": channels,
                    "spatial": spatial,
                    "length": length,
                    "past": past,
                }


class _Chooser:
    """Chooses sizes: dimensions with one name get one size; sums and products follow from their parts."""

    def __init__(self, wanted: tuple[Spec, ...], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._wanted = wanted
        self._shapes = shapes
        texts = [
            (spec, axis, size)
            for spec in wanted
            for axis, size in enumerate(spec.shape or ())
            if isinstance(size, str)
        ]
        dimensions = {text: parse(text) for _, _, text in texts}
        self._pasts = {
            name
            for spec, axis, text in texts
            for name in dimensions[text].names
            if _kind(spec, axis, name, alone=False) == "past"
        }
        self._dimensions = {
            text: _sum(text, self._pasts) or dimension for text, dimension in dimensions.items()
        }
        self._given = [
            (self._dimensions[text], shapes[spec.name][axis])
            for spec, axis, text in texts
            if spec.name in shapes
        ]

    def choose(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The shapes of all inputs; `sizes` fill the dimensions that neither the model nor the user gives."""
        # The user's shapes override the size of the past; sizes that follow from both override the others.
        known = dict.fromkeys(self._pasts, sizes["past"]) | solve(self._given, {})
        known = solve(self._given, known)
        return {
            spec.name: self._shapes[spec.name]
            if spec.name in self._shapes
            else tuple(
                size if isinstance(size, int) else self._size(spec, axis, size, sizes, known)
                for axis, size in enumerate(spec.shape or ())
            )
            for spec in self._wanted
        }

    def _size(
        self, spec: Spec, axis: int, text: str | None, sizes: Mapping[str, int], known: dict[str, int]
    ) -> int:
        """The size of a free dimension; records the sizes of its names in `known`."""
        if text is None:
            return self._guess(spec, axis, "", sizes)
        dimension = self._dimensions[text]
        for name in dimension.names:
            if name not in known:
                known[name] = self._guess(spec, axis, name, sizes)
        return dimension.size(known)

    def _guess(self, spec: Spec, axis: int, name: str, sizes: Mapping[str, int]) -> int:
        value = sizes[_kind(spec, axis, name, alone=len(self._wanted) == 1)]
        return min(value, 32) if len(spec.shape or ()) > 4 else value


def _sum(text: str, pasts: Collection[str]) -> Dimension | None:
    """The sum that the name total_X stands for if past_X is the length of a past; None for other names."""
    part = text.removeprefix("total_")
    return parse(f"past_{part} + {part}") if part != text and f"past_{part}" in pasts else None


def _kind(spec: Spec, axis: int, name: str, *, alone: bool) -> str:
    """The most likely kind of a free axis of an input.

    Args:
        spec: The input.
        axis: The axis.
        name: The name of the dimension, or of a part of it; "" if it has none.
        alone: Whether the model has no other input.
    """
    shape = spec.shape or ()
    if is_past(spec) and axis > 0:
        # (batch, heads, past, features), sometimes after an axis for keys and values.
        is_length = name.startswith("past") or (not name and axis == len(shape) - 2)
        return "past" if is_length else "batch" if name.startswith("batch") else "length"
    if len(shape) >= 4 and axis > 0:
        last = shape[-1] in (1, 3, 4)
        return "channels" if axis == (len(shape) - 1 if last else 1) else "spatial"
    if axis == 0:
        return "length" if len(shape) == 1 and (alone or is_position(spec)) else "batch"
    # (layers, batch, features): the state of a recurrent network.
    state = len(shape) == 3 and axis == 1 and isinstance(shape[0], int) and shape[0] > 1
    return "batch" if state else "length"


def is_past(spec: Spec) -> bool:
    """Whether an input is the state that a decoder kept from earlier calls, like past_key_values.0.key."""
    name, rank = spec.name.lower(), len(spec.shape or ())
    # Not past_values of rank 3: those are time series to forecast from.
    return (rank >= 4 and _PAST.match(name) is not None) or (rank == 3 and name.startswith("past_key"))


def is_position(spec: Spec) -> bool:
    """Whether an input is the positions of tokens, like position_ids."""
    return "position" in spec.name.lower() and _is_integer(np.dtype(spec.dtype))


def _is_integer(dtype: np.dtype[Any]) -> bool:
    return np.issubdtype(dtype, np.integer) or dtype.name.startswith(("int", "uint"))


def _past_length(wanted: tuple[Spec, ...], chosen: Mapping[str, tuple[int, ...]]) -> int | None:
    """Number of positions in the past of a decoder; None for a model without a past."""
    for spec in wanted:
        if is_past(spec):
            return chosen[spec.name][past_axis(spec)]
    return None


def past_axis(spec: Spec) -> int:
    """The axis of a past that counts its positions."""
    names = [str(size or "") for size in spec.shape or ()]
    return next((axis for axis, name in enumerate(names) if name.startswith("past")), -2)


def _size(wanted: tuple[Spec, ...], chosen: Mapping[str, tuple[int, ...]]) -> tuple[int, str]:
    """Bytes of all inputs, and the name of the largest input."""
    # An axis of size 0 counts as 1: NumPy bounds the other sizes of an empty array, too.
    sizes = {
        spec.name: prod(max(n, 1) for n in chosen[spec.name]) * np.dtype(spec.dtype).itemsize
        for spec in wanted
    }
    return sum(sizes.values()), max(sizes, key=sizes.__getitem__, default="")


def _array(
    spec: Spec, shape: tuple[int, ...], limits: Mapping[str, int], past: int | None, rng: np.random.Generator
) -> NDArray[Any]:
    """One input, with values that the graph most likely accepts."""
    dtype, name = np.dtype(spec.dtype), spec.name.lower()
    if dtype.kind == "O":
        return np.full(shape, "text", dtype=object)
    if "mask" in name or dtype == np.bool_:
        # use_cache_branch tells a merged decoder whether it has a past.
        return np.full(shape, name != "use_cache_branch" or past != 0, dtype)
    if np.issubdtype(dtype, np.complexfloating):
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    if not _is_integer(dtype):
        return rng.standard_normal(shape).astype(dtype)
    return _integers(spec, shape, limits.get(spec.name), past or 0, rng).astype(dtype)


def _integers(
    spec: Spec, shape: tuple[int, ...], limit: int | None, past: int, rng: np.random.Generator
) -> NDArray[Any]:
    """One input of integers, below the limit if there is one."""
    name = spec.name.lower()
    if is_position(spec):
        positions = past + (np.arange(shape[-1]) if shape else np.array(0))
        return np.broadcast_to(positions % limit if limit else positions, shape)
    if "token_type" in name:
        return np.zeros(shape, np.int64)
    if limit is not None:
        return rng.integers(limit, size=shape)
    if name in _SAMPLE_RATES:
        return np.full(shape, 16000)
    if np.dtype(spec.dtype).itemsize == 1 and len(shape) >= 3:
        return rng.integers(128, size=shape)  # Pixels.
    if len(shape) >= 2 and "len" not in name:
        return rng.integers(2, size=shape)  # Inside every table, and good as a mask.
    return np.ones(shape, np.int64)
