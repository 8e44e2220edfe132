"""How many parameters a model has."""

from __future__ import annotations

from collections.abc import Container, Iterator
from math import prod

from onnx import AttributeProto, TensorProto

from onnx_lowrank.files.load import Model
from onnx_lowrank.files.regions import Region
from onnx_lowrank.files.tensors import is_external, region
from onnx_lowrank.graph.scopes import Scope, scopes

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_NARROW = {
    8: (TensorProto.INT8, TensorProto.UINT8, *(n for t, n in TensorProto.DataType.items() if "FLOAT8" in t)),
    4: (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1),
}
"""The types of narrow elements by their bits."""


def parameters(model: Model) -> int:
    """Elements of the float tensors in initializers and Constant nodes of all scopes.

    Float means float16, bfloat16, float32 and float64. A sparse tensor counts with its stored values.
    Tensors that share one region of a data file count once.
    """
    constants = (attribute for scope in scopes(model.proto) for attribute in _constants(scope))
    single = sum(
        {"value_float": 1, "value_floats": len(attribute.floats)}.get(attribute.name, 0)
        for attribute in constants
    )
    return single + _elements(model, _FLOATS)


def quantized_bytes(model: Model) -> int:
    """Bytes of the tensors whose elements have 8 bits or fewer, as quantizers store weights."""
    return sum(_elements(model, types) * bits // 8 for bits, types in _NARROW.items())


def _elements(model: Model, types: Container[int]) -> int:
    """Elements of the stored tensors of some types; those that share a region of a data file count once."""
    sizes: dict[Region | int, int] = {}
    for scope in scopes(model.proto):
        for tensor in _stored_tensors(scope):
            if tensor.data_type in types:
                # A number can never equal a Region, so inline tensors all get keys of their own.
                key = region(tensor, model.files, model.name) if is_external(tensor) else len(sizes)
                sizes[key] = prod(tensor.dims)
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
