"""Models: loading with every check, reading tensors, walking scopes, saving atomically."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message
from numpy.typing import NDArray
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.atomic import check_writable, replacing
from onnx_lowrank.graph.external import locate, pack
from onnx_lowrank.graph.tensors import (
    Region,
    check,
    is_external,
    read,
    region,
    stored_size,
    tensor_fields,
    tensors,
)

ModelProto = onnx.ModelProto
"""The type of a model in memory, for the modules that do not know ONNX."""

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_PROTOBUF_LIMIT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Model:
    """A model as it was loaded, or as it was rewritten.

    Attributes:
        proto: To be read only; external data is not in it.
        name: For messages: the path as given, or "model".
        files: The real file of every external location.
        sha256: Digest of the .onnx file's bytes, followed by those of its external data files in the
            sorted order of their locations. For a model from memory, of its deterministic
            serialization; where that would exceed protobuf's 2 GB, of the serialized outline without
            any contents, followed by every tensor's raw_data or, lacking that, its serialization.
        path: The file which holds it as it is; None for a model from memory or a rewritten one.
    """

    proto: onnx.ModelProto
    name: str
    files: Mapping[str, Path]
    sha256: str
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Scope:
    """A graph or a function: the nodes that see each other's names.

    Attributes:
        path: "" for the main graph; for the graph in attribute A of node N of a scope P,
            "P/N.A" ("N.A" below the main graph; "#index" stands for an empty name or follows a
            repeated one; "A[i]" in a list of graphs); for a function "domain:name" and, if it has
            one, ":overload".
        nodes: The repeated field.
        graph: The graph, or None for a function.
        function: The function, or None for a graph.
        parent: The path of the scope around it, or None for the main graph and for functions.
        node: The index in the parent of the node that holds it.
        attribute: The name of the attribute of this node that holds it.
    """

    path: str
    nodes: Sequence[NodeProto]
    graph: GraphProto | None
    function: FunctionProto | None
    parent: str | None
    node: int | None = None
    attribute: str = ""


def load(source: str | os.PathLike[str] | onnx.ModelProto) -> Model:
    """Load a model and check it; external data is hashed, not kept.

    Args:
        source: A path, or a model in memory without external data.

    Raises:
        InputError: It cannot be read, is no ONNX model, is damaged, or its external data is missing,
            too short or outside the model's folder.
    """
    if isinstance(source, onnx.ModelProto):
        model = Model(source, "model", MappingProxyType({}), "")
        _check_proto(source, model.name)
        _check_tensors(model)
        return replace(model, sha256=_digest_in_memory(source))
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
    return replace(model, sha256=digest.hexdigest(), path=path)


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
    # A file that is cut between two top-level fields, like some text, parses without an error.
    if not proto.ir_version:
        raise InputError(f"{name} has no ir_version, so it is no ONNX model: export it again.")
    if not proto.HasField("graph") or (proto.ir_version >= 3 and not proto.opset_import):
        raise InputError(
            f"{name} lacks its graph or its opset_import: it is truncated, export or copy it again."
        )
    if not proto.graph.node:
        raise InputError(f"{name} has a graph without nodes: name a model that computes something.")


def serialized(proto: onnx.ModelProto) -> bytes | None:
    """The deterministic bytes of a proto, or None where they would exceed protobuf's 2 GB."""
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
    """A tensor's contents, wherever they are; to be read only, mapped without a copy where external.

    Returns:
        An array of the tensor's dims, bfloat16 and narrower types as those of ml_dtypes.

    Raises:
        InputError: Its bytes are not those that its shape takes, or it is of a kind without an array.
    """
    return read(tensor, model.files, model.name)


def scopes(proto: onnx.ModelProto) -> Iterator[Scope]:
    """Every scope: the main graph, its subgraphs in the order of their nodes, then the functions."""
    taken: set[str] = set()
    yield from _below(Scope("", proto.graph.node, proto.graph, None, None), taken)
    for function in proto.functions:
        path = f"{function.domain}:{function.name}" + f":{function.overload}" * bool(function.overload)
        yield from _below(Scope(_free(path, "", 0, taken), function.node, None, function, None), taken)


def _below(scope: Scope, taken: set[str]) -> Iterator[Scope]:
    yield scope
    for index, node in enumerate(scope.nodes):
        label = f"{scope.path}/" * bool(scope.path) + (node.name or f"#{index}")
        for attribute in node.attribute:
            for suffix, graph in _graphs(attribute):
                path = _free(label, f".{attribute.name}{suffix}", index, taken)
                yield from _below(
                    Scope(path, graph.node, graph, None, scope.path, index, attribute.name), taken
                )


def _graphs(attribute: AttributeProto) -> Iterator[tuple[str, GraphProto]]:
    if attribute.HasField("g"):
        yield "", attribute.g
    for i, graph in enumerate(attribute.graphs):
        yield f"[{i}]", graph


def _free(label: str, suffix: str, index: int, taken: set[str]) -> str:
    while label + suffix in taken:
        label += f"#{index}"
    taken.add(label + suffix)
    return label + suffix


def parameters(model: Model) -> int:
    """Elements of the float tensors in initializers and Constant nodes of all scopes.

    Float is float16, bfloat16, float32 and float64. Of a sparse tensor its stored values count;
    tensors that share one region of a data file count once.
    """
    sizes: dict[Region | int, int] = {}
    for scope in scopes(model.proto):
        for tensor in _stored_tensors(scope):
            if tensor.data_type in _FLOATS:
                key = region(tensor, model.files, model.name) if is_external(tensor) else len(sizes)
                sizes[key] = prod(tensor.dims)
        for attribute in _constants(scope):
            sizes[len(sizes)] = {"value_float": 1, "value_floats": len(attribute.floats)}.get(
                attribute.name, 0
            )
    return sum(sizes.values())


def _constants(scope: Scope) -> Iterator[AttributeProto]:
    for node in scope.nodes:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            yield from (attribute for attribute in node.attribute if not attribute.ref_attr_name)


def _stored_tensors(scope: Scope) -> Iterator[TensorProto]:
    if scope.graph is not None:
        yield from scope.graph.initializer
        yield from (sparse.values for sparse in scope.graph.sparse_initializer)
    for attribute in _constants(scope):
        if attribute.name == "value":
            yield attribute.t
        elif attribute.name == "sparse_value":
            yield attribute.sparse_tensor.values


def stored_bytes(model: Model) -> int:
    """Bytes of the file or the serialized proto, and of the regions of external files, each once."""
    data = None if model.path is not None else serialized(model.proto)
    if model.path is not None:
        size = model.path.stat().st_size
    elif data is not None:
        size = len(data)
    else:  # piecewise, to within a few bytes for each tensor
        size = len(outline(model.proto, 0).SerializeToString())
        size += sum(len(tensor.raw_data or tensor.SerializeToString()) for tensor in tensors(model.proto))
    places = {region(t, model.files, model.name) for t in tensors(model.proto) if is_external(t)}
    return size + sum(place.length for place in places)


def outline(source: Model | onnx.ModelProto, keep: int = 1024) -> onnx.ModelProto:
    """A light copy for shape inference and for walking: large tensors keep name, dims and type only.

    Args:
        source: A model; large contents are never read.
        keep: Contents of up to so many bytes stay, inline, as shape inference reads them; those of
            external tensors only if `source` is a Model, which knows their files.
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


def check_target(model: Model, path: str | os.PathLike[str]) -> None:
    """Find out early whether `save` can write a model there.

    Raises:
        InputError: The target cannot be written, or is a data file that the model itself reads.
    """
    data_target, target = _targets(Path(path))
    for file in (target, data_target) if model.files else (target,):
        check_writable(file)
        if file.exists() and any(file.samefile(read_from) for read_from in model.files.values()):
            raise InputError(f"{file} is a data file of the input model: choose another name.")


def _targets(path: Path) -> tuple[Path, Path]:
    """The data file and the model file, in the order in which they are renamed."""
    return path.parent / f"{path.name}.data", path


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model beside its target and rename it over that; a failure leaves the target as it was.

    A model with external data, or one that exceeds protobuf's 2 GB, becomes `path` and `path`.data.
    A target that is a symbolic link is replaced, not followed.

    Raises:
        InputError: The target cannot be written, or is a data file that the model itself reads.
    """
    check_target(model, path)
    data_target, target = _targets(Path(path))
    data = serialized(model.proto)
    if data is not None and not any(is_external(t) for t in tensors(model.proto)):
        with replacing(target) as (file,):
            file.write(data)
        return
    with replacing(data_target, target) as (data_file, file):
        packed = pack(model.proto, model.files, model.name, data_file, data_target.name, inline=data is None)
        data = serialized(packed)
        if data is None:
            raise InputError(f"{model.name} has over 2 GB beside its tensors' contents: split the model.")
        file.write(data)
