"""The products of attention: of queries and keys before a Softmax, and with the values behind it."""

from __future__ import annotations

from collections.abc import Iterator

from onnx_lowrank.core.layer import Between
from onnx_lowrank.graph.walk import Place, Walk, is_op

_MASKS = frozenset({"Cast", "Dropout", "Identity", "Where", "Mul", "Div", "Add"})
"""Operators between scores and their Softmax, and between the Softmax and the values."""

_NEAR = 12
"""So many operators at most lie between a MatMul and its Softmax."""


def products(walk: Walk) -> Iterator[tuple[Place, Between]]:
    """The MatMuls of attention in the main graph, of two computed tensors each."""
    for place in walk.places():
        if place.scope or not is_op(walk.node(place), ("MatMul",)):
            continue
        if any(
            walk.operand(place, n) is None or walk.producer(walk.operand(place, n)) is None for n in (0, 1)
        ):
            continue
        if _softmax_before(walk, place):
            yield place, Between.VALUES
        elif softmax_behind(walk, place) is not None:
            yield place, Between.SCORES


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
