"""The multiply-accumulates (MACs) of a model beside those of its layers, scope by scope."""

from __future__ import annotations

from collections.abc import Collection

from onnx_lowrank.core.layer import ScopeWork
from onnx_lowrank.graph.shapes import Shapes, shape_of
from onnx_lowrank.graph.walk import Place, Walk, is_op, label
from onnx_lowrank.operators import registry


def work(walk: Walk, shapes: Shapes, layers: Collection[Place]) -> tuple[ScopeWork, ...]:
    """The MACs of every scope beside those of its layers' weights, with the relations of the scopes.

    Registered operators count their MACs, with constant operands or not. Other operators count as 0.
    """
    functions = {
        (scope.function.domain, scope.function.name, scope.function.overload): path
        for path, scope in walk.scopes.items()
        if scope.function is not None
    }
    found = []
    for path, scope in walk.scopes.items():
        places = (Place(path, index) for index in range(len(scope.nodes)))
        counts = {place: node_macs(walk, shapes, place, is_layer=place in layers) for place in places}
        unknown = next((walk.node(place) for place, count in counts.items() if count is None), None)
        called = (functions.get((node.domain, node.op_type, node.overload)) for node in scope.nodes)
        branch_of = None
        if scope.parent is not None and scope.node is not None:
            holder = walk.node(Place(scope.parent, scope.node))
            branch_of = scope.node if is_op(holder, ("If",)) else None
        found.append(
            ScopeWork(
                path,
                scope.parent,
                branch_of,
                sum(filter(None, counts.values())) if unknown is None else None,
                tuple(function for function in called if function is not None),
                "" if unknown is None else label(unknown),
            )
        )
    return tuple(found)


def node_macs(walk: Walk, shapes: Shapes, place: Place, *, is_layer: bool) -> int | None:
    """MACs of one node, without a layer's weight; None if a dimension is unknown, 0 if not counted."""
    node = walk.node(place)
    operator = registry.known(node)
    if operator is None:
        return 0
    # Two at least: the families index both operands, even of a node that lacks one.
    inputs = [shape_of(walk, shapes, walk.operand(place, index)) for index in range(max(2, len(node.input)))]
    count = operator.macs_beside if is_layer else operator.macs_undecomposed
    return count(node, inputs, shape_of(walk, shapes, walk.result(place)))
