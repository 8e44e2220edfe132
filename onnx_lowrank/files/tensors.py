"""The tensors of a model: finding all of them and the places of their bytes, without reading the bytes.

Sizes are computed from dims and data type, never from the contents: each access to `raw_data` copies it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.regions import Region

_PACKED_BITS = {
    "UINT4": 4,
    "INT4": 4,
    "FLOAT4E2M1": 4,
    "UINT2": 2,
    "INT2": 2,
    "FLOAT6E2M3": 6,
    "FLOAT6E3M2": 6,
}
_MAX_RANK = 64  # NumPy's
_MAX_DIGITS = 20


def tensors(message: Message) -> Iterator[TensorProto]:
    """Every tensor in a proto: initializers, attributes, sparse parts, subgraphs, functions, training."""
    for name in tensor_fields(message.DESCRIPTOR):
        value = getattr(message, name)
        if isinstance(value, Message):
            value = [value] if message.HasField(name) else []
        for child in value:
            if isinstance(child, TensorProto):
                yield child
            else:
                yield from tensors(child)


@cache
def tensor_fields(descriptor: Any) -> tuple[str, ...]:
    """Names of the fields of a message type that are tensors or can contain tensors."""
    return tuple(f.name for f in descriptor.fields if f.message_type and _reaches_tensor(f.message_type))


def _reaches_tensor(descriptor: Any) -> bool:
    seen: set[str] = set()
    todo = [descriptor]
    while todo:
        current = todo.pop()
        if current.full_name == TensorProto.DESCRIPTOR.full_name:
            return True
        if current.full_name not in seen:
            seen.add(current.full_name)
            todo.extend(field.message_type for field in current.fields if field.message_type)
    return False


def is_external(tensor: TensorProto) -> bool:
    """Whether the tensor's bytes are in a file beside the model."""
    return tensor.data_location == TensorProto.EXTERNAL


def stored_size(tensor: TensorProto) -> int | None:
    """Number of bytes of a tensor of this shape in `raw_data` or in a file.

    None for strings, which cannot be stored like this, and for data types that onnx does not know.
    """
    if tensor.data_type == TensorProto.STRING:
        return None
    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except KeyError:
        return None
    bits = _PACKED_BITS.get(TensorProto.DataType.Name(tensor.data_type), 8 * dtype.itemsize)
    size: int = (prod(tensor.dims) * bits + 7) // 8
    return size


def check(tensor: TensorProto, files: Mapping[str, Path], owner: str) -> None:
    """Check that a tensor has as many bytes as its shape takes.

    Args:
        tensor: Any tensor of the model; segments of tensors are not checked.
        files: The model's external files.
        owner: The model's name, for messages.

    Raises:
        InputError: The numbers differ, a dimension is negative, or external bytes are missing.
    """
    label = f"{owner}: tensor {tensor.name!r}"
    if len(tensor.dims) > _MAX_RANK:
        raise InputError(f"{label} has {len(tensor.dims)} axes, over {_MAX_RANK}: export the model again.")
    if any(dim < 0 for dim in tensor.dims):
        raise InputError(f"{label} has the negative shape {list(tensor.dims)}: export the model again.")
    if is_external(tensor):
        region(tensor, files, owner)
        return
    if tensor.HasField("segment"):
        return
    held, taken, unit = _contents(tensor)
    if taken is not None and held != taken:
        raise InputError(
            f"{label} holds {held} {unit}, but its shape {list(tensor.dims)} takes {taken}: "
            "the file is damaged, export the model again."
        )


def _contents(tensor: TensorProto) -> tuple[int, int | None, str]:
    """The number of units that an inline tensor holds, the number that it needs (None: unknown), the unit."""
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data), stored_size(tensor), "bytes"
    try:
        field = helper.tensor_dtype_to_field(tensor.data_type)
    except KeyError:
        return 0, None, "entries"
    taken = prod(tensor.dims)
    kind = TensorProto.DataType.Name(tensor.data_type)
    if kind.startswith("COMPLEX"):
        taken *= 2
    elif _PACKED_BITS.get(kind) in (2, 4):  # an entry is a byte of packed elements, except for 6 bits
        taken = -(-taken * _PACKED_BITS[kind] // 8)
    return len(getattr(tensor, field)), taken, f"entries of {field}"


def reference(tensor: TensorProto) -> dict[str, str]:
    """The external-data entries of a tensor; the last of equal keys wins, as in onnx."""
    return {entry.key: entry.value for entry in tensor.external_data}


def region(tensor: TensorProto, files: Mapping[str, Path], owner: str) -> Region:
    """The place of an external tensor's bytes.

    Raises:
        InputError: The entries are no numbers, contradict the shape, or point outside the file.
    """
    label = f"{owner}: tensor {tensor.name!r}"
    entries = reference(tensor)
    location = entries.get("location", "")
    if location not in files:
        raise InputError(
            f"{label} refers to an external file {location!r} that was not found: pass the model by its path."
        )
    offset = _number(entries.get("offset", "0"), "offset", label)
    try:
        end = files[location].stat().st_size
    except OSError as error:
        raise InputError(f"{files[location]} cannot be read ({error.strerror}): restore it.") from error
    size = stored_size(tensor)
    length = _number(entries["length"], "length", label) if "length" in entries else size
    if length is None:
        length = max(end - offset, 0)
    if size is not None and length != size:
        raise InputError(
            f"{label} has {length} external bytes, but its shape {list(tensor.dims)} takes {size}: "
            "export the model again."
        )
    if offset + length > end:
        raise InputError(
            f"{label} ends at byte {offset + length} of {files[location]}, which has {end}: "
            "the file is truncated, copy or download it again."
        )
    return Region(files[location], offset, length)


def _number(text: str, key: str, label: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise InputError(
            f"{label} has the external {key} {text!r}, which is no size: export the model again."
        )
    return int(text)


def read(tensor: TensorProto, files: Mapping[str, Path], owner: str) -> NDArray[Any]:
    """The tensor as an array; external bytes are mapped read-only, not copied.

    Raises:
        InputError: The tensor is damaged, or of a kind that has no array (undefined, unknown, a segment).
    """
    check(tensor, files, owner)
    try:
        if is_external(tensor):
            return _mapped(tensor, region(tensor, files, owner))
        return numpy_helper.to_array(tensor)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{owner}: tensor {tensor.name!r} cannot be read ({error}): export the model again."
        ) from error


def _mapped(tensor: TensorProto, place: Region) -> NDArray[Any]:
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if place.length == 0:
        return np.empty(tuple(tensor.dims), dtype)
    data: NDArray[Any] = np.asarray(np.memmap(place.path, np.uint8, "r", place.offset, (place.length,)))
    if TensorProto.DataType.Name(tensor.data_type) in _PACKED_BITS:
        inline = onnx.TensorProto(dims=tensor.dims, data_type=tensor.data_type, raw_data=data.tobytes())
        return numpy_helper.to_array(inline)
    return data.view(dtype).reshape(tuple(tensor.dims))


def inline(name: str, values: NDArray[Any]) -> TensorProto:
    """A tensor with its bytes inside the proto."""
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    return TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=values.tobytes())
