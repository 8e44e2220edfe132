"""A model's inputs: their types and shapes in the graph, and arrays for them from a file or a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.errors import InputError
from onnx_lowrank.files import arrays
from onnx_lowrank.files.arrays import Stored

_FEW = 3


@dataclass(frozen=True, slots=True)
class Spec:
    """One input as the model declares it.

    Attributes:
        name: The name of the input.
        dtype: Its element type; None if it is no tensor.
        shape: A size for each dimension; a name or None for a free one. None if even the rank is unknown.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None


def specs(proto: ModelProto) -> tuple[Spec, ...]:
    """The inputs that a caller must give: all but those with an initializer, which have a value."""
    given = {tensor.name for tensor in proto.graph.initializer}
    given |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    return tuple(_spec(value) for value in proto.graph.input if value.name not in given)


def is_open(spec: Spec) -> bool:
    """Whether an input has a dimension without a size."""
    return spec.shape is None or not all(isinstance(size, int) for size in spec.shape)


def outputs(proto: ModelProto) -> tuple[Spec, ...]:
    """The outputs, with their types and shapes as the graph states them."""
    return tuple(map(_spec, proto.graph.output))


def read(source: str | Path | Mapping[str, Any], wanted: tuple[Spec, ...]) -> Feed:
    """Inputs from an .npz file or a mapping, each checked against the model.

    Raises:
        InputError: The file is no .npz, a name, dtype or shape does not fit the model, or the arrays in the
            file are larger than 1 GiB.
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


def describe(feed: Feed) -> str:
    """Names, dtypes and shapes of inputs; a run of more than three alike shows its first and last name."""
    parts = []
    for (dtype, shape), group in groupby(feed.items(), lambda item: (item[1].dtype.name, item[1].shape)):
        names = [name for name, _ in group]
        text = f"{dtype} {'×'.join(map(str, shape)) or 'scalar'}"
        if len(names) > _FEW:
            parts.append(f"{names[0]} to {names[-1]} ({len(names)} inputs) {text}")
        else:
            parts += [f"{name} {text}" for name in names]
    return ", ".join(parts)


def _spec(value: ValueInfoProto) -> Spec:
    if value.type.WhichOneof("value") != "tensor_type":
        return Spec(value.name, None, None)
    tensor = value.type.tensor_type
    # An unknown element type counts as none: the runtime will report the error.
    known = tensor.elem_type and tensor.elem_type in TensorProto.DataType.values()
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)) if known else None
    if not tensor.HasField("shape"):
        return Spec(value.name, dtype, None)
    # Some exporters write 0 or -1 for a free size.
    shape = tuple(d.dim_value if d.dim_value > 0 else d.dim_param or None for d in tensor.shape.dim)
    return Spec(value.name, dtype, shape)


def _array_of(name: str, value: Any) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InputError(f"The input {name!r} is no array ({error}): give one.") from error


def _check(given: Mapping[str, NDArray[Any] | Stored], wanted: tuple[Spec, ...]) -> None:
    """Compare names, dtypes and shapes with the model's inputs, without reading data from a file."""
    names = [spec.name for spec in wanted]
    for name in given:
        if name not in names:
            raise InputError(f"The model has no input {name!r}: name one of {', '.join(names)}.")
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
    """Convert a checked array to the input's dtype."""
    dtype = np.dtype(spec.dtype)
    if _is_text(dtype, array.dtype):
        return array.astype(object)
    return array if array.dtype == dtype else array.view(dtype)


def _is_text(wanted: np.dtype[Any], given: np.dtype[Any]) -> bool:
    return wanted.kind == "O" and given.kind in "US"


def same_bits(wanted: np.dtype[Any], given: np.dtype[Any]) -> bool:
    """Whether two dtypes have the same bits: .npy files keep the bits of bfloat16, but not its name."""
    return (
        given.kind == "V" and given.names is None and wanted.kind == "V" and wanted.itemsize == given.itemsize
    )


def fits(shape: tuple[int, ...], wanted: tuple[int | str | None, ...]) -> bool:
    """Whether a shape fits the shape of an input, whose free dimensions take any size."""
    return len(shape) == len(wanted) and all(
        not isinstance(size, int) or size == n for n, size in zip(shape, wanted, strict=True)
    )


def shape_text(shape: tuple[int | str | None, ...]) -> str:
    """Format a shape for messages."""
    return "×".join("?" if size is None else str(size) for size in shape) or "of a scalar"
