"""How many parameters a model has."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from onnx import AttributeProto, TensorProto

from onnx_lowrank.files.load import Model
from onnx_lowrank.files.regions import Region
from onnx_lowrank.files.tensors import is_external, region
from onnx_lowrank.graph.scopes import Scope, scopes

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def parameters(model: Model) -> int:
    """Elements of the float tensors in initializers and Constant nodes of all scopes.

    Float means float16, bfloat16, float32 and float64. A sparse tensor counts with its stored values.
    Tensors that share one region of a data file count once.
    """
    sizes: dict[Region | int, int] = {}
    for scope in scopes(model.proto):
        for tensor in _stored_tensors(scope):
            if tensor.data_type in _FLOATS:
                # A number can never equal a Region, so inline tensors all get keys of their own.
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
