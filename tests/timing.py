"""A stopwatch that measures nothing: times that follow from the model alone, the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from onnx import ModelProto, NodeProto

from onnx_lowrank.budgets.latency.clock import Pace
from onnx_lowrank.budgets.latency.stopwatch import Stopwatch, Timed
from onnx_lowrank.engines.runtime import Runtime
from onnx_lowrank.graph.walk import Walk

PER_NODE = 10
"""Nanoseconds of every node that computes, beside one for every element of its weights."""

Cost = Callable[[ModelProto], int]


def by_weights(proto: ModelProto) -> int:
    """The time of a model, in nanoseconds: of its nodes in all scopes, and of the weights they read."""
    walk = Walk(proto)
    return max(1, sum(_node(walk, walk.node(place)) for place in walk.places()))


def _node(walk: Walk, node: NodeProto) -> int:
    if node.op_type == "Constant":
        return sum(prod(attribute.t.dims) for attribute in node.attribute if attribute.HasField("t"))
    sizes = {name: prod(tensor.dims) for (_, name), tensor in walk.initializers.items()}
    return PER_NODE + sum(sizes.get(name, 0) for name in node.input)


class Recorded(Stopwatch):
    """Takes its times from a rule; nothing runs, and nothing is cached on disk."""

    def __init__(
        self,
        engine: Runtime,
        threads: int = 0,
        *,
        warm: bool = False,
        caching: bool = True,
        cost: Cost = by_weights,
    ) -> None:
        super().__init__(engine, threads, caching=False)
        self.cost = cost
        self.timed = 0

    @property
    def times_nodes(self) -> bool:
        """No profile is made: the rule gives the times of layers, too."""
        return False

    def times(self, models: Sequence[Timed], pace: Pace) -> list[int]:
        """The rule's times."""
        self.timed += len(models)
        return [self.cost(model.proto) for model, _ in models]
