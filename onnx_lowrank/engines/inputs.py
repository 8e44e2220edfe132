"""Inputs to run a model on: read from a file, or made from the graph's own types and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from onnx_lowrank.engines.engine import Feed, UnsupportedError
from onnx_lowrank.engines.id_limits import id_limits
from onnx_lowrank.errors import InputError
from onnx_lowrank.files import arrays
from onnx_lowrank.files.arrays import Stored

_MAX_BYTES = 2**30
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


@dataclass(frozen=True, slots=True)
class Spec:
    """What a model says of one input.

    Attributes:
        name: The input.
        dtype: Its element type; None where it is no tensor.
        shape: Sizes; a name or None where a dimension is free. None where not even the rank is known.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None


def specs(proto: ModelProto) -> tuple[Spec, ...]:
    """The inputs that a caller must give: initializers that are inputs too have a value already."""
    given = {tensor.name for tensor in proto.graph.initializer}
    given |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    return tuple(_spec(value) for value in proto.graph.input if value.name not in given)


def read(source: str | Path | Mapping[str, Any], wanted: tuple[Spec, ...]) -> Feed:
    """Inputs from an .npz file or a mapping, each checked against the model.

    Raises:
        InputError: The file is no .npz, a name, dtype or shape is not what the model takes, or the arrays in
            the file are larger than 1 GiB.
    """
    if isinstance(source, Mapping):
        given = {name: _array_of(name, array) for name, array in source.items()}
        _check(given, wanted)
    else:
        stored = arrays.archive(Path(source), "The inputs")
        _check(stored, wanted)
        arrays.bounded(sum(array.nbytes for array in stored.values()), f"The inputs {source}")
        given = {name: array.read() for name, array in stored.items()}
    return {spec.name: _as_input(spec, given[spec.name]) for spec in wanted}


def make(
    proto: ModelProto, wanted: tuple[Spec, ...], shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> Iterator[Feed]:
    """Inputs made from the types and shapes of the graph, with other sizes of its free dimensions each time.

    Floats are standard normal, ids lie inside their embedding table, masks are ones.

    Args:
        proto: The model.
        wanted: Its inputs.
        shapes: Shapes that the user gave, by input.
        seed: Of the random numbers.

    Raises:
        InputError: A given shape does not fit the model, or the inputs are larger than 1 GiB.
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
    for channels in (3, 1):
        for batch, spatial, length in _ATTEMPTS:
            sizes = {"batch": batch, "channels": channels, "spatial": spatial, "length": length}
            chosen = _choose(wanted, shapes, known, sizes)
            key = tuple(chosen.values())
            if key not in seen:
                seen.add(key)
                _bound(wanted, chosen)
                rng = np.random.default_rng(seed)
                yield {spec.name: _array(spec, chosen[spec.name], limits, rng) for spec in wanted}


def describe(feed: Feed) -> str:
    """Names, dtypes and shapes of inputs."""
    return ", ".join(
        f"{name} {array.dtype.name} {'×'.join(map(str, array.shape)) or 'scalar'}"
        for name, array in feed.items()
    )


def _spec(value: ValueInfoProto) -> Spec:
    if value.type.WhichOneof("value") != "tensor_type":
        return Spec(value.name, None, None)
    tensor = value.type.tensor_type
    # An unknown element type is as good as none: the runtime will say what it makes of it.
    known = tensor.elem_type and tensor.elem_type in TensorProto.DataType.values()
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if known else None
    if not tensor.HasField("shape"):
        return Spec(value.name, dtype, None)
    # Exporters write 0 and -1, too, where a size is free.
    shape = tuple(d.dim_value if d.dim_value > 0 else d.dim_param or None for d in tensor.shape.dim)
    return Spec(value.name, dtype, shape)


def _array_of(name: str, value: Any) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InputError(f"The input {name!r} is no array ({error}): give one.") from error


def _check(given: Mapping[str, NDArray[Any] | Stored], wanted: tuple[Spec, ...]) -> None:
    """Compare names, dtypes and shapes with the model's inputs; data in a file is not read for it."""
    names = [spec.name for spec in wanted]
    for name in given:
        if name not in names:
            raise InputError(f"The model has no input {name!r}: its inputs are {', '.join(names)}.")
    for spec in wanted:
        if spec.name not in given:
            raise InputError(f"The inputs lack {spec.name!r}: give an array for each of {', '.join(names)}.")
        _check_one(spec, given[spec.name])


def _check_one(spec: Spec, array: NDArray[Any] | Stored) -> None:
    dtype = spec.dtype
    if dtype is None:
        raise InputError(f"The input {spec.name!r} is no tensor: leave --inputs out.")
    if not (array.dtype == dtype or _is_text(dtype, array.dtype) or same_bits(dtype, array.dtype)):
        raise InputError(
            f"The input {spec.name!r} is {dtype.name} in the model, but {array.dtype.name} was "
            "given: convert it."
        )
    if spec.shape is not None and not fits(array.shape, spec.shape):
        raise InputError(
            f"The input {spec.name!r} has the shape {shape_text(spec.shape)} in the model, "
            f"but {shape_text(array.shape)} was given: reshape it."
        )


def _as_input(spec: Spec, array: NDArray[Any]) -> NDArray[Any]:
    """An array that was checked, in the input's own dtype."""
    dtype = np.dtype(spec.dtype)
    if _is_text(dtype, array.dtype):
        return array.astype(object)
    return array if array.dtype == dtype else array.view(dtype)


def _is_text(wanted: np.dtype[Any], given: np.dtype[Any]) -> bool:
    return wanted.kind == "O" and given.kind in "US"


def same_bits(wanted: np.dtype[Any], given: np.dtype[Any]) -> bool:
    """Whether one dtype is the other without its name: .npy files keep the bits of bfloat16, not its name."""
    return (
        given.kind == "V" and given.names is None and wanted.kind == "V" and wanted.itemsize == given.itemsize
    )


def fits(shape: tuple[int, ...], wanted: tuple[int | str | None, ...]) -> bool:
    """Whether a shape is one that an input takes."""
    return len(shape) == len(wanted) and all(
        not isinstance(size, int) or size == n for n, size in zip(shape, wanted, strict=True)
    )


def shape_text(shape: tuple[int | str | None, ...]) -> str:
    """A shape as messages show it."""
    return "×".join("?" if size is None else str(size) for size in shape) or "of a scalar"


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


def _bound(wanted: tuple[Spec, ...], chosen: Mapping[str, tuple[int, ...]]) -> None:
    sizes = {spec.name: prod(chosen[spec.name]) * np.dtype(spec.dtype).itemsize for spec in wanted}
    if sum(sizes.values()) > _MAX_BYTES:
        name = max(sizes, key=sizes.__getitem__)
        raise InputError(
            f"The inputs to make have {sum(sizes.values()) / 2**30:.1f} GiB, more than 1 GiB "
            f"({name!r} is {shape_text(chosen[name])}): give smaller ones with --input-shape or --inputs."
        )


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
