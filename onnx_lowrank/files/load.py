"""Loading models with all checks, and reading their tensors."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message
from numpy.typing import NDArray
from onnx import TensorProto

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.calls import check_calls
from onnx_lowrank.files.external import locate, whole
from onnx_lowrank.files.regions import Region
from onnx_lowrank.files.spilling import spilled, spilled_file
from onnx_lowrank.files.tensors import (
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


_FOREIGN = {
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".safetensors"), ("PyTorch", "torch.onnx.export")),
    **dict.fromkeys((".pb", ".h5", ".keras", ".tflite"), ("TensorFlow", "tf2onnx")),
}
"""The owners of other files of models by their suffixes, and the ways to make ONNX models of them."""

_WEB = re.compile(r"https?:/")

PROTOBUF_LIMIT = 2**31 - 1
"""The most bytes of a model without a data file."""

_LARGEST_INLINE = 3 * 2**29
_ORT = b"ORTM"
"""The identifier in the bytes 4 to 8 of a file in ONNX Runtime's format."""


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
    stamps: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)


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
        return _from_memory(source, resources)
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"A {type(source).__name__} is no model: give a path or an onnx.ModelProto.")
    path = Path(source)
    with _readable(path):
        before = _regular(path)
        proto, moved, digest = _parsed(path, resources)
    _check_proto(proto, str(path))
    outside = locate(proto, path, moved)
    stamps = {path: _stamp(before)} | {file: _stamp(file.stat()) for file in outside.values()}
    files = MappingProxyType({**outside, **moved})
    model = Model(proto, str(path), files, "", path, frozenset(moved), MappingProxyType(stamps))
    _check_tensors(model)
    for _, file in sorted(outside.items()):
        for chunk in Region(file, 0, file.stat().st_size).chunks():
            digest.update(chunk)
    check_unchanged(stamps)
    return replace(model, sha256=digest.hexdigest())


def check_unchanged(stamps: Mapping[Path, tuple[int, ...]]) -> None:
    """Check that files of a model are still those that were loaded.

    Args:
        stamps: All `Model.stamps`, or a part of them.

    Raises:
        InputError: A file was written, replaced or removed.
    """
    for path, stamp in stamps.items():
        try:
            is_same = _stamp(path.stat()) == stamp
        except OSError:
            is_same = False
        if not is_same:
            raise InputError(f"{path} has changed since it was read: restore it, or run with the new one.")


def _from_memory(proto: onnx.ModelProto, resources: ExitStack | None) -> Model:
    model = Model(proto, "model", MappingProxyType({}), "")
    _check_proto(proto, model.name)
    _check_tensors(model)
    model = replace(model, sha256=_digest_in_memory(proto))
    if resources is None:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)  # The original is the caller's.
    copy, files = spilled(copy, resources)
    return replace(model, proto=copy, files=MappingProxyType(files), temporary=frozenset(files))


def _parsed(
    path: Path, resources: ExitStack | None
) -> tuple[onnx.ModelProto, Mapping[str, Path], hashlib._Hash]:
    """The proto in a file, the temporary files of its large tensors, and the digest of the file.

    Raises:
        InputError: The file is no model.
        OSError: It cannot be read.
    """
    found = None if resources is None else spilled_file(path, resources)
    data, moved = (path.read_bytes(), MappingProxyType[str, Path]({})) if found is None else found
    digest = hashlib.sha256()
    for chunk in (data,) if found is None else Region(path, 0, path.stat().st_size).chunks():
        digest.update(chunk)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        if data[4:8] == _ORT:
            raise InputError(
                f"{path} is in ONNX Runtime's own format, not ONNX: name the .onnx file it was made of."
            ) from error
        if (origin := _FOREIGN.get(path.suffix.lower())) is not None:
            owner, way = origin
            raise InputError(f"{path} is a file of {owner}, no ONNX model: convert it with {way}.") from error
        raise InputError(
            f"{path} is no binary ONNX model, or is truncated: export or copy it again."
        ) from error
    return proto, moved, digest


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Values of which one at least is another after a file was written or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def inline_locations(model: Model) -> Set[str]:
    """The locations of the tensors that are to be inline in the saved file.

    None if the model has over 1.5 GiB: that is near the 2 GB of protobuf, so it is saved with a data file.

    Raises:
        InputError: The temporary files have gone.
    """
    if not all(model.files[name].exists() for name in model.temporary):
        raise InputError(
            f"The result of {model.name} was closed, and its tensors with it: save before closing."
        )
    if not model.temporary or stored_bytes(model) > _LARGEST_INLINE:
        return frozenset()
    return model.temporary


def inlined(model: Model) -> Model:
    """A model with all tensors in its proto that belong there; it needs no temporary file any more.

    A model of over 1.5 GiB stays as it is.

    Raises:
        InputError: The file has gone.
    """
    if not inline_locations(model):
        return model
    own = {name: file for name, file in model.files.items() if name in model.temporary}
    others = {name: file for name, file in model.files.items() if name not in model.temporary}
    proto = whole(model.proto, own, model.name)
    return replace(model, proto=proto, files=MappingProxyType(others), temporary=frozenset())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of reading a model file into an InputError."""
    try:
        yield
    except FileNotFoundError as error:
        if _WEB.match(str(path)):
            raise InputError(f"{path} is no file: save it to one and name that.") from error
        raise InputError(f"{path} does not exist: check the path.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}): check the path and its permissions.") from error


def _regular(path: Path) -> os.stat_result:
    """The status of a file that can be a model.

    Raises:
        InputError: It cannot be one.
        OSError: There is no such file.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path} is a folder: name the .onnx file in it.")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is no regular file: save the model to one.")
    if status.st_size > PROTOBUF_LIMIT:
        raise InputError(
            f"{path} has {status.st_size} bytes, over protobuf's 2 GB: save it with external data."
        )
    if not status.st_size:
        raise InputError(f"{path} is empty: export or copy the model again.")
    return status


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
    check_calls(proto, name)


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
        _, _, size, _ = model.stamps[model.path]
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
    for entry, value in source.ListFields():
        if entry.name not in deep:
            if isinstance(value, Message):
                getattr(target, entry.name).CopyFrom(value)
            elif hasattr(value, "MergeFrom"):
                getattr(target, entry.name).MergeFrom(value)
            else:
                setattr(target, entry.name, value)
        elif isinstance(value, Message):
            getattr(target, entry.name).SetInParent()
            _copy_light(value, getattr(target, entry.name), model, keep)
        else:
            for item in value:
                _copy_light(item, getattr(target, entry.name).add(), model, keep)


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
