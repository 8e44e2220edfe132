"""The inner values at which a low-rank model is compared with the original: the ends of its blocks.

A block ends where a single value carries all that the trained tensors before it have computed. Each residual
block of a network ends so, and each layer of a plain one. Where trained operators follow each other, the
value before the next one counts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass

from onnx import GraphProto, NodeProto

from onnx_lowrank.graph.scopes import reads

MOST = 12
"""The most features of a model: one more of them teaches little, and costs a pass over its values."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the main graph, with the names that it and its bodies read."""

    proto: NodeProto
    reads: frozenset[str]


def nodes(graph: GraphProto) -> list[Node]:
    """The nodes of a graph with all that they read."""
    return [Node(node, frozenset(reads(node))) for node in graph.node]


def features(found: Sequence[str], known: Collection[str]) -> tuple[str, ...]:
    """The names of the features, at most `MOST`, evenly spaced, in order.

    Args:
        found: The ends of the blocks of the low-rank model.
        known: The names of the values of the original, which alone can be compared.
    """
    shared = [name for name in found if name in known]
    step = max(1, -(-len(shared) // MOST))
    return tuple(shared[::-1][::step][::-1])


def ends(graph: GraphProto, trained: Set[str]) -> list[str]:
    """The values at the ends of the blocks of a graph, in order.

    Args:
        graph: The graph.
        trained: The names of its trained tensors.
    """
    listed = nodes(graph)
    last = {name: index for index, node in enumerate(listed) for name in node.reads}
    derived, live, found = set(trained), set[str](), list[str]()
    behind = False  # whether a trained tensor was read since the last end
    for index, node in enumerate(listed):
        is_trained, before = not trained.isdisjoint(node.reads), live
        if not derived.isdisjoint(node.reads):
            derived.update(node.proto.output)
            live = live | {name for name in node.proto.output if name}
        live = {name for name in live if last.get(name, -1) > index}
        if behind and len(before) == 1 and (is_trained or len(live) > 1):
            found += before
            behind = False
        behind |= is_trained
    return found
