"""The products of attention, the operators that may lie between them and layers, and what others mean."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from onnx import NodeProto

from onnx_lowrank.core.layer import Between
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk, is_op
from onnx_lowrank.graph.weights import constant
from onnx_lowrank.operators import registry

SAME = frozenset({"Identity", "Cast", "Dropout"})
ANEW = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
CUTS = frozenset({"Split", "Slice", "Gather"})
LONGEST = 64
"""So many operators at most lie between a MatMul and a layer."""

UNKNOWN = "the sizes between are unknown: pass --input-shape"
READ = "other operators read the tensors between, or the model returns them"
CUT = (
    "one matrix computes several of queries, keys and values, and its result is cut apart in a way that "
    "cannot follow the size of the heads: cut it with one Split"
)
BOUND = (
    "one matrix computes several of queries, keys and values, a Reshape states one size of heads for all, "
    "and not all can be narrowed: cut it with one Split"
)
COMPUTED = "the size of its heads is computed while the model runs: export it as a constant"
JOINED = "a Concat lies between: a past, or a rotation of positions"
OTHER = "operators lie between that treat the numbers of a head differently: a rotation, or a norm"
NO_LAYER = "no layer that can be narrowed computes or reads it"
BIAS = "other operators read its bias, or it is computed"
MIXED = "its heads are not laid out one after the other"
PAST = "it reads or gives a past, or reads positions whose sizes are those of its heads"
UNEQUAL = "its queries, keys and values cannot be cut into equal heads"


_MASKS = frozenset({"Cast", "Dropout", "Identity", "Where", "Mul", "Div", "Add"})
"""Operators between scores and their Softmax, and between the Softmax and the values."""

_NEAR = 12
"""So many operators at most lie between a MatMul and its Softmax."""


def products(walk: Walk) -> Iterator[tuple[Place, Between]]:
    """The MatMuls of attention in the main graph, of two computed tensors each."""
    for place in walk.places():
        if place.scope or not is_op(walk.node(place), ("MatMul",)):
            continue
        # A weight in a Constant node, or behind views, has a producer, too.
        if not all(_is_computed(walk, walk.operand(place, n)) for n in (0, 1)):
            continue
        if _softmax_before(walk, place):
            yield place, Between.VALUES
        elif softmax_behind(walk, place) is not None:
            yield place, Between.SCORES


def _is_computed(walk: Walk, tensor: Any) -> bool:
    return tensor is not None and walk.producer(tensor) is not None and not walk.is_fixed(tensor)


def _softmax_before(walk: Walk, place: Place) -> bool:
    """Whether the left operand of a MatMul comes from a Softmax."""
    waiting, seen = [walk.operand(place, 0)], 0
    while waiting and seen < _NEAR:
        tensor, seen = waiting.pop(), seen + 1
        producer = None if tensor is None else walk.producer(tensor)
        if producer is None:
            continue
        node = walk.node(producer)
        if is_op(node, ("Softmax",)):
            return True
        if is_op(node, _MASKS):
            waiting += [walk.operand(producer, index) for index in range(len(node.input))]
    return False


def softmax_behind(walk: Walk, place: Place) -> list[Place] | None:
    """The operators from a MatMul to the Softmax of its result, which the list includes; None without one."""
    chain: list[Place] = []
    tensor = walk.result(place)
    while tensor is not None and len(chain) < _NEAR:
        readers = [reader for reader, _ in walk.consumers(tensor)]
        chosen = [r for r in readers if is_op(walk.node(r), _MASKS | {"Softmax"})]
        if len(chosen) != 1:
            return None
        chain += chosen
        if is_op(walk.node(chosen[0]), ("Softmax",)):
            return chain
        tensor = walk.result(chosen[0])
    return None


def blocked(model: Model, walk: Walk, plain: Container[Place], product: Place) -> str:
    """Why the heads of a MatMul's right operand stay, by the operators before it; "" if types do not tell."""
    tensor = walk.operand(product, 1)
    for _ in range(LONGEST):
        place = None if tensor is None else walk.producer(tensor)
        if place is None or place in plain:
            return ""
        node = walk.node(place)
        if is_op(node, ("Mul", "Div", "Add")):
            computed = [n for n in (0, 1) if constant(walk, model, walk.operand(place, n)) is None]
            if len(computed) != 1:
                return ""
            tensor = walk.operand(place, computed[0])
        elif is_op(node, SAME | ANEW | CUTS | {"Transpose", "Expand"}):
            tensor = walk.operand(place, 0)
        else:
            return reason_of(node)
    return ""


def reason_of(node: NodeProto) -> str:
    """Why an operator between keeps the heads."""
    if is_op(node, ("Concat",)):
        return JOINED
    if is_op(node, CUTS):
        return CUT
    return OTHER if registry.known(node) is None else NO_LAYER
