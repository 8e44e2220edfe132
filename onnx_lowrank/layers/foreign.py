"""Operators of other domains that hold weights: nothing is known of them, so they are listed as skipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from onnx import NodeProto

from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.graph.weights import FLOATS, resolve
from onnx_lowrank.operators import registry

_MANY = 256
"""So many floats are a weight, even in a vector; fewer are the scales of a norm or parameters."""


def foreign(walk: Walk, place: Place) -> str | None:
    """The reason to skip an operator of another domain; None if it has no large constant of floats.

    A constant is large if it is a matrix, or if it has 256 elements or more.
    """
    node = walk.node(place)
    if registry.is_standard(node) or walk.calls_function(node):
        return None
    operands = (resolve(walk, walk.operand(place, index)) for index in range(len(node.input)))
    constants = (stored.source.tensor.dims for stored in operands if not isinstance(stored, str))
    if any(map(_is_large, constants)) or any(map(_is_large, _attributes(node))):
        return f"the operator {node.domain}.{node.op_type} is not known here: its weight stays as it is"
    return None


def _attributes(node: NodeProto) -> Iterator[Sequence[int]]:
    """The shapes of the floats that a node has in its attributes, such as ai.onnx.ml's coefficients."""
    for attribute in node.attribute:
        yield (len(attribute.floats),)
        if attribute.t.data_type in FLOATS:
            yield attribute.t.dims


def _is_large(shape: Sequence[int]) -> bool:
    return sum(size > 1 for size in shape) > 1 or prod(shape) >= _MANY
