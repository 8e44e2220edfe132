"""A bound on the constants that a model computes: a runtime computes them before any run, of any size."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from onnx import NodeProto

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.shapes import Shape, Shapes
from onnx_lowrank.graph.walk import Place, Walk, is_op

_MOST = 1 << 28  # elements: a causal mask for 8,192 tokens takes as many, with the steps to it
_TIMES_STORED = 16  # Views, casts and copies of weights are computed constants, too.


def check_constants(walk: Walk, shapes: Shapes, owner: str) -> None:
    """Check that a model does not compute far more constants than it stores.

    Args:
        walk: The walk of the model.
        shapes: Its inferred shapes.
        owner: Its name, for messages.

    Raises:
        InputError: It does.
    """
    stored = sum(prod(tensor.dims) for tensor in walk.initializers.values())
    sparse = (s for scope in walk.scopes.values() if scope.graph for s in scope.graph.sparse_initializer)
    computed = {tensor.values.name: prod(tensor.dims) for tensor in sparse}
    constants = dict.fromkeys(walk.initializers, 1)
    for place in walk.places():
        node = walk.node(place)
        copies = _copies(walk, place, node, constants)
        for name in filter(None, node.output if copies else ()):
            constants[place.scope, name] = copies
            size = copies * _elements(shapes.get((place.scope, name)))
            if is_op(node, ("Constant",)) and not any(a.HasField("sparse_tensor") for a in node.attribute):
                stored += size
            else:
                computed[name] = computed.get(name, 0) + size
    if sum(computed.values()) > _MOST + _TIMES_STORED * stored:
        largest = max(computed, key=computed.__getitem__)
        raise InputError(
            f"{owner} stores {stored} elements, but computes constants of {sum(computed.values())}, most of "
            f"them in the tensor {largest!r}: make it an input, or export the model again."
        )


def _copies(walk: Walk, place: Place, node: NodeProto, constants: Mapping[tuple[str, str], int]) -> int:
    """How many texts an element of a node's result joins, 1 for numbers; 0 if the result is no constant."""
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        return 0
    if is_op(node, ("Shape", "Size")):
        return 1
    operands = [walk.operand(place, index) for index in range(len(node.input))]
    copies = [1 if operand is None else constants.get(walk.origin(operand), 0) for operand in operands]
    if not all(copies):
        return 0
    return sum(copies) if is_op(node, ("StringConcat",)) else max(copies, default=1)


def _elements(shape: Shape | None) -> int:
    return 0 if shape is None else prod(1 if size is None else size for size in shape)
