"""Inputs made from the graph's own types and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnx_lowrank.engines.engine import Feed, UnsupportedError
from onnx_lowrank.engines.id_limits import id_limits
from onnx_lowrank.engines.inputs import Spec, fits, shape_text
from onnx_lowrank.errors import InputError
from onnx_lowrank.files import arrays

_SAMPLE_RATES = ("sr", "sample_rate", "sampling_rate")

# Sizes to try for free dimensions: (batch, height and width, any other axis). Models restrict them in ways
# that only a run shows (strides, position tables, heads), so the usual sizes come first, odd ones last.
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


def make(
    proto: ModelProto, wanted: tuple[Spec, ...], shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> Iterator[Feed]:
    """Inputs made from the types and shapes of the graph, with other sizes of its free dimensions each time.

    Floats are standard normal, ids lie inside their embedding table, masks are ones. Sizes with which the
    inputs are larger than 1 GiB are left out.

    Args:
        proto: The model.
        wanted: Its inputs.
        shapes: Shapes that the user gave, by input.
        seed: Of the random numbers.

    Raises:
        InputError: A given shape does not fit the model, or the inputs are larger than 1 GiB with all sizes.
        UnsupportedError: An input is no tensor, so that it cannot be made.
    """
    known = _sizes_given(wanted, shapes)
    for spec in wanted:
        if spec.dtype is None:
            raise UnsupportedError(f"the input {spec.name!r} is no tensor, so that it cannot be made")
        if spec.shape is None and spec.name not in shapes:
            raise InputError(
                f"The input {spec.name!r} has no shape in the model: pass --input-shape {spec.name}=..."
            )
    limits = id_limits(proto)
    seen = set()
    refused: list[tuple[int, str]] = []
    for channels in (3, 1):
        for batch, spatial, length in _ATTEMPTS:
            sizes = {"batch": batch, "channels": channels, "spatial": spatial, "length": length}
            chosen = _choose(wanted, shapes, known, sizes)
            key = tuple(chosen.values())
            if key in seen:
                continue
            seen.add(key)
            size, largest = _size(wanted, chosen)
            if size > arrays.MAX_BYTES:
                refused.append((size, f"{largest!r} is {shape_text(chosen[largest])}"))
                continue
            rng = np.random.default_rng(seed)
            yield {spec.name: _array(spec, chosen[spec.name], limits, rng) for spec in wanted}
    if len(refused) == len(seen):
        size, largest = min(refused)
        raise InputError(
            f"The inputs to make have {size / 2**30:.1f} GiB, more than 1 GiB ({largest}): "
            "give smaller ones with --input-shape or --inputs."
        )


def _sizes_given(wanted: tuple[Spec, ...], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of named dimensions, read off the shapes that the user gave."""
    by_name = {spec.name: spec for spec in wanted}
    sizes: dict[str, int] = {}
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
        sizes.update((s, n) for s, n in zip(free or (), shape, strict=free is not None) if isinstance(s, str))
    return sizes


def _kind(spec: Spec, axis: int, alone: bool) -> str:
    """What a free axis of an input most likely counts."""
    shape = spec.shape or ()
    if len(shape) >= 4 and axis > 0:
        last = shape[-1] in (1, 3, 4)
        return "channels" if axis == (len(shape) - 1 if last else 1) else "spatial"
    if axis == 0:
        return "length" if alone and len(shape) == 1 else "batch"
    # (layers, batch, features): the state of a recurrent network.
    state = len(shape) == 3 and axis == 1 and isinstance(shape[0], int) and shape[0] > 1
    return "batch" if state else "length"


def _choose(
    wanted: tuple[Spec, ...],
    shapes: Mapping[str, tuple[int, ...]],
    known: Mapping[str, int],
    sizes: Mapping[str, int],
) -> dict[str, tuple[int, ...]]:
    """A size for every free dimension; dimensions of one name get one size."""
    named = dict(known)
    chosen: dict[str, list[int]] = {}
    for spec in wanted:
        if spec.name in shapes:
            chosen[spec.name] = list(shapes[spec.name])
            continue
        chosen[spec.name] = []
        for axis, size in enumerate(spec.shape or ()):
            if isinstance(size, int):
                chosen[spec.name].append(size)
                continue
            value = sizes[_kind(spec, axis, len(wanted) == 1)]
            if len(spec.shape or ()) > 4:
                value = min(value, 32)
            chosen[spec.name].append(named.setdefault(size, value) if size else value)
    return {name: tuple(shape) for name, shape in chosen.items()}


def _size(wanted: tuple[Spec, ...], chosen: Mapping[str, tuple[int, ...]]) -> tuple[int, str]:
    """Bytes of all inputs, and the largest of these."""
    sizes = {spec.name: prod(chosen[spec.name]) * np.dtype(spec.dtype).itemsize for spec in wanted}
    return sum(sizes.values()), max(sizes, key=sizes.__getitem__, default="")


def _array(
    spec: Spec, shape: tuple[int, ...], limits: Mapping[str, int], rng: np.random.Generator
) -> NDArray[Any]:
    """One input: values of its type that the graph most likely accepts."""
    dtype, name = np.dtype(spec.dtype), spec.name.lower()
    if dtype.kind == "O":
        return np.full(shape, "text", dtype=object)
    if "mask" in name or dtype == np.bool_:
        return np.ones(shape, dtype)
    if np.issubdtype(dtype, np.complexfloating):
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    if not np.issubdtype(dtype, np.integer) and not dtype.name.startswith(("int", "uint")):
        return rng.standard_normal(shape).astype(dtype)
    if spec.name in limits:
        return rng.integers(limits[spec.name], size=shape).astype(dtype)
    if name in _SAMPLE_RATES:
        return np.full(shape, 16000, dtype)
    if dtype.itemsize == 1 and len(shape) >= 3:
        return rng.integers(128, size=shape).astype(dtype)  # Pixels.
    if len(shape) >= 2 and "len" not in name:
        return rng.integers(2, size=shape).astype(dtype)  # Inside every table, and good as a mask.
    return np.ones(shape, dtype)
