"""Loading models with all checks, and reading their tensors."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message
from numpy.typing import NDArray
from onnx import TensorProto

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.external import locate, spilled, whole
from onnx_lowrank.files.tensors import (
    Region,
    check,
    is_external,
    read,
    reference,
    region,
    stored_size,
    tensor_fields,
    tensors,
)

ModelProto = onnx.ModelProto
"""The type of a model in memory, for modules that may not import onnx."""


_PROTOBUF_LIMIT = 2**31 - 1
_LARGEST_INLINE = 3 * 2**29


@dataclass(frozen=True, slots=True)
class Model:
    """A model as it was loaded, or as it was rewritten.

    Attributes:
        proto: The proto, read-only by convention, without external data.
        name: The name in messages: the path as given, or "model".
        files: The real file of every external location.
        sha256: Digest of the .onnx file's bytes, followed by the bytes of its external data files in the
            sorted order of their locations. For a model from memory, digest of its deterministic
            serialization. If this would exceed protobuf's 2 GB, digest of the serialized outline without
            contents, followed by every tensor's raw_data, or by its serialization if it has no raw_data.
        path: The file that holds the model as it is; None for a model from memory or a rewritten one.
        temporary: The locations in `files` that are temporary: their tensors are inline in the loaded file
            and will be inline in the saved one.
    """

    proto: onnx.ModelProto
    name: str
    files: Mapping[str, Path]
    sha256: str
    path: Path | None = None
    temporary: frozenset[str] = frozenset()


def load(source: str | os.PathLike[str] | onnx.ModelProto, resources: ExitStack | None = None) -> Model:
    """Load a model and check it; external data is hashed, but not kept in memory.

    Args:
        source: A path, or a model in memory without external data.
        resources: Takes a temporary file with the large inline tensors of a large model, so that no copy of
            it holds them; by default they stay in the proto.

    Raises:
        InputError: The source cannot be read, is no ONNX model or is damaged, or its external data is
            missing, too short or outside the model's folder.
    """
    if isinstance(source, onnx.ModelProto):
        model = Model(source, "model", MappingProxyType({}), "")
        _check_proto(source, model.name)
        _check_tensors(model)
        return _spilled(replace(model, sha256=_digest_in_memory(source)), resources)
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"A {type(source).__name__} is no model: give a path or an onnx.ModelProto.")
    path = Path(source)
    data = _read_bytes(path)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise InputError(
            f"{path} is no binary ONNX model, or is truncated: export or copy it again."
        ) from error
    digest = hashlib.sha256(data)
    del data
    _check_proto(proto, str(path))
    model = Model(proto, str(path), MappingProxyType(locate(proto, path)), "")
    _check_tensors(model)
    for _, file in sorted(model.files.items()):
        for chunk in Region(file, 0, file.stat().st_size).chunks():
            digest.update(chunk)
    return _spilled(replace(model, sha256=digest.hexdigest(), path=path), resources)


def _spilled(model: Model, resources: ExitStack | None) -> Model:
    if resources is None:
        return model
    proto = model.proto
    if model.path is None:  # It is the caller's.
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
    proto, files = spilled(proto, resources)
    files = MappingProxyType({**model.files, **files})
    return replace(model, proto=proto, files=files, temporary=frozenset(files.keys() - model.files.keys()))


def inlined(model: Model) -> Model:
    """A model with all tensors in its proto that belong there; it needs no temporary file any more.

    A model of over 1.5 GiB stays as it is. Serialized with its tensors, it would be in memory twice, and near
    the 2 GB of protobuf. So it is saved with a data file.

    Raises:
        InputError: The file has gone.
    """
    if not model.temporary or stored_bytes(model) > _LARGEST_INLINE:
        return model
    own = {name: file for name, file in model.files.items() if name in model.temporary}
    others = {name: file for name, file in model.files.items() if name not in model.temporary}
    proto = whole(model.proto, own, model.name)
    return replace(model, proto=proto, files=MappingProxyType(others), temporary=frozenset())


def _read_bytes(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path} is a folder: name the .onnx file in it.")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is no regular file: save the model to one.")
        if status.st_size > _PROTOBUF_LIMIT:
            raise InputError(
                f"{path} has {status.st_size} bytes, over protobuf's 2 GB: save it with external data."
            )
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: check the path.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}): check the path and its permissions.") from error
    if not data:
        raise InputError(f"{path} is empty: export or copy the model again.")
    return data


def _check_tensors(model: Model) -> None:
    for tensor in tensors(model.proto):
        check(tensor, model.files, model.name)


def _check_proto(proto: onnx.ModelProto, name: str) -> None:
    # Protobuf parses some texts, and files that are cut between two top-level fields, without an error.
    if not proto.ir_version:
        raise InputError(f"{name} has no ir_version, so it is no ONNX model: export it again.")
    if not proto.HasField("graph") or (proto.ir_version >= 3 and not proto.opset_import):
        raise InputError(
            f"{name} lacks its graph or its opset_import: it is truncated, export or copy it again."
        )
    if not proto.graph.node:
        raise InputError(f"{name} has a graph without nodes: name a model that computes something.")


def serialized(proto: onnx.ModelProto) -> bytes | None:
    """The deterministic bytes of a proto, or None if they would exceed protobuf's 2 GB."""
    try:
        data: bytes = proto.SerializeToString(deterministic=True)
    except (EncodeError, ValueError):
        return None
    return data


def _digest_in_memory(proto: onnx.ModelProto) -> str:
    data = serialized(proto)
    if data is not None:
        return hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256(outline(proto, 0).SerializeToString(deterministic=True))
    for tensor in tensors(proto):
        digest.update(tensor.raw_data or tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()


def array(model: Model, tensor: TensorProto) -> NDArray[Any]:
    """The contents of an inline or external tensor, read-only; external data is mapped, not copied.

    Returns:
        An array of the tensor's dims; bfloat16 and narrower types have the dtypes of ml_dtypes.

    Raises:
        InputError: The tensor's bytes do not fit its shape, or it is of a kind that has no array.
    """
    return read(tensor, model.files, model.name)


def stored_bytes(model: Model) -> int:
    """Number of bytes of the file or the serialized proto, plus the regions of external files, each once."""
    data = None if model.path is not None or model.temporary else serialized(model.proto)
    if model.path is not None:
        size = model.path.stat().st_size
    elif model.temporary:
        size = _grown(model.proto, model)
    elif data is not None:
        size = len(data)
    else:  # over 2 GB: in parts, exact up to a few bytes per tensor
        size = len(outline(model.proto, 0).SerializeToString())
        size += sum(len(tensor.raw_data or tensor.SerializeToString()) for tensor in tensors(model.proto))
    outside = (t for t in tensors(model.proto) if is_external(t) and not _is_temporary(t, model))
    places = {region(tensor, model.files, model.name) for tensor in outside}
    return size + sum(place.length for place in places)


def _is_temporary(tensor: TensorProto, model: Model) -> bool:
    return reference(tensor).get("location") in model.temporary


def _grown(message: Message, model: Model) -> int:
    """Number of bytes of a serialized message after its temporary tensors are inline; reads no tensor."""
    if isinstance(message, TensorProto) and is_external(message) and _is_temporary(message, model):
        bare = TensorProto()
        bare.CopyFrom(message)
        bare.ClearField("external_data")
        bare.ClearField("data_location")
        return bare.ByteSize() + _framed(region(message, model.files, model.name).length)
    size = message.ByteSize()
    for name in () if isinstance(message, TensorProto) else tensor_fields(message.DESCRIPTOR):
        value = getattr(message, name)
        if isinstance(value, Message):
            value = [value] if message.HasField(name) else []
        # The tag, which may have two bytes, cancels out.
        size += sum(_framed(_grown(child, model)) - _framed(child.ByteSize()) for child in value)
    return size


def _framed(length: int) -> int:
    """Number of bytes of a field that holds `length` bytes behind its length and a tag of one byte."""
    return 1 + max(1, -(-length.bit_length() // 7)) + length


def outline(source: Model | onnx.ModelProto, keep: int = 1024) -> onnx.ModelProto:
    """A light copy for shape inference and for walks: large tensors keep only name, dims and type.

    Args:
        source: A model; large contents are never read.
        keep: The most bytes of contents that stay, inline, because shape inference reads them. Contents of
            external tensors stay only if `source` is a Model, which knows their files.
    """
    light = onnx.ModelProto()
    if isinstance(source, Model):
        _copy_light(source.proto, light, source, keep)
    else:
        _copy_light(source, light, None, keep)
    return light


def _copy_light(source: Message, target: Any, model: Model | None, keep: int) -> None:
    if isinstance(source, TensorProto):
        _copy_tensor(source, target, model, keep)
        return
    deep = tensor_fields(source.DESCRIPTOR)
    for field, value in source.ListFields():
        if field.name not in deep:
            if isinstance(value, Message):
                getattr(target, field.name).CopyFrom(value)
            elif hasattr(value, "MergeFrom"):
                getattr(target, field.name).MergeFrom(value)
            else:
                setattr(target, field.name, value)
        elif isinstance(value, Message):
            getattr(target, field.name).SetInParent()
            _copy_light(value, getattr(target, field.name), model, keep)
        else:
            for item in value:
                _copy_light(item, getattr(target, field.name).add(), model, keep)


def _copy_tensor(source: TensorProto, target: TensorProto, model: Model | None, keep: int) -> None:
    size = stored_size(source)
    fits = (prod(source.dims) if size is None else size) <= keep
    if fits and not is_external(source):
        target.CopyFrom(source)
        return
    target.name, target.data_type = source.name, source.data_type
    target.dims.extend(source.dims)
    if fits and model is not None:
        target.raw_data = b"".join(region(source, model.files, model.name).chunks())
