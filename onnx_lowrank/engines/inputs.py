"""Inputs to run a model on: read from a file, or made from the graph's own types and shapes."""

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


def describe(feed: Feed) -> str:
    """Names, dtypes and shapes of inputs; of more than three alike in a row, the first and the last name."""
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
