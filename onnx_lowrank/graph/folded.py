"""Small tensors that nodes compute from constants alone, such as the pads that exporters write."""

from __future__ import annotations

from contextlib import suppress
from math import prod
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from onnx_lowrank.files.load import Model
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.constants import UNKNOWN, infer_shapes
from onnx_lowrank.graph.walk import Place, Walk, is_op
from onnx_lowrank.graph.weights import constant

_MOST_NODES = 64
_MOST_ELEMENTS = 1024


def folded(walk: Walk, model: Model, tensor: Any) -> NDArray[Any] | None:
    """The value of a tensor of the main graph that follows from small constants; None if it does not.

    Args:
        walk: The model's walk.
        model: The model.
        tensor: The walk's tensor.
    """
    graph = _behind(walk, model, tensor)
    if graph is None:
        return None
    proto = ModelProto(ir_version=model.proto.ir_version, opset_import=model.proto.opset_import, graph=graph)
    # A tensor that cannot be inferred is unknown, as in `graph.shapes`.
    with suppress(*UNKNOWN):
        proto = infer_shapes(proto)
    values = {leaf.name: leaf for leaf in graph.initializer}
    values |= {node.output[0]: node.attribute[0].t for node in proto.graph.node if is_op(node, ("Constant",))}
    found = values.get(graph.output[0].name)
    return None if found is None else onnx.numpy_helper.to_array(found)


def _behind(walk: Walk, model: Model, tensor: Any) -> GraphProto | None:
    """A graph of the nodes that compute a tensor from constants; None if other tensors go into it."""
    nodes: dict[Place, NodeProto] = {}
    leaves: dict[str, TensorProto] = {}
    waiting = [tensor]
    while waiting:
        one = waiting.pop()
        place, (scope, name) = walk.producer(one), walk.origin(one)
        node = None if place is None else walk.node(place)
        if scope or len(nodes) > _MOST_NODES or not _is_small(walk, name, node):
            return None
        if place is None or node is None or is_op(node, ("Constant",)):
            value = constant(walk, model, one)
            if value is None:
                return None
            leaves[name] = inline(name, value)
        elif place not in nodes:
            nodes[place] = node
            operands = (walk.operand(place, index) for index in range(len(node.input)))
            waiting += [operand for operand in operands if operand is not None]
    result = ValueInfoProto(name=walk.origin(tensor)[1])
    ordered = [nodes[place] for place in sorted(nodes)]
    return GraphProto(name="small", node=ordered, initializer=leaves.values(), output=[result])


def _is_small(walk: Walk, name: str, node: NodeProto | None) -> bool:
    """Whether an initializer, or all that a node holds, is small."""
    if node is None:
        leaf = walk.initializers.get(("", name))
        return leaf is not None and prod(leaf.dims) <= _MOST_ELEMENTS
    sizes = (prod(a.t.dims) + len(a.ints) + len(a.floats) for a in node.attribute)
    return sum(sizes) <= _MOST_ELEMENTS and not any(a.HasField("g") or a.graphs for a in node.attribute)
