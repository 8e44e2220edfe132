"""The times of nodes, from the profiles that ONNX Runtime writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

KERNEL = "_kernel_time"
"""The end of the names of events that are runs of a node."""

_RUN = "model_run"
_FASTEST = 4
"""The time of a node is the mean over the fastest quarter of its runs: other work on the machine only slows
runs down, and a mean is finer than the microseconds in which the runtime counts."""


@dataclass(frozen=True, slots=True)
class Runs:
    """The times of all runs of a session, in microseconds.

    Attributes:
        ops: The operator types of the nodes, in the order in which they run. A single "" stands for all nodes
            together: if nodes run inside others, or other nodes in every run.
        times: For each run, the times of these nodes.
        beside: For each run, the time outside of all nodes.
    """

    ops: tuple[str, ...]
    times: tuple[tuple[int, ...], ...]
    beside: tuple[int, ...]

    def every(self, first: int, step: int) -> Runs:
        """Some of the runs: a first one, and every so many after it."""
        chosen = slice(first, None, step)
        return Runs(self.ops, self.times[chosen], self.beside[chosen])

    @property
    def nodes(self) -> tuple[tuple[str, float], ...]:
        """The nodes' operator types, and their usual times without other work on the machine, in ns."""
        columns = zip(*self.times, strict=True)
        return tuple((op, _usual(column)) for op, column in zip(self.ops, columns, strict=True))

    @property
    def whole(self) -> float:
        """The usual time of a run without other work on the machine, in nanoseconds."""
        return sum(time for _, time in self.nodes) + _usual(self.beside)


def _usual(times: Sequence[int]) -> float:
    fastest = np.sort(times)[: max(1, len(times) // _FASTEST)]
    return float(fastest.mean()) * 1e3


def runs_of(events: Iterable[Mapping[str, Any]]) -> Runs:
    """The runs of a profile.

    Args:
        events: Its events, in the order in which they were written: a run after its nodes.
    """
    runs: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
    totals: list[int] = []
    nodes: list[tuple[int, int, str]] = []
    for event in events:
        name = str(event.get("name"))
        if event.get("cat") == "Node" and name.endswith(KERNEL):
            nodes.append((int(event["ts"]), int(event["dur"]), str(event["args"].get("op_name"))))
        elif name == _RUN:
            totals.append(int(event["dur"]))
            runs.append(_in_order(nodes))
            nodes = []
    orders = {ops for ops, _ in runs}
    if len(orders) != 1 or () in orders:
        return Runs(("",), tuple((total,) for total in totals), (0,) * len(totals))
    times = tuple(each for _, each in runs)
    beside = (max(0, total - sum(each)) for total, each in zip(totals, times, strict=True))
    return Runs(orders.pop(), times, tuple(beside))


def _in_order(nodes: Sequence[tuple[int, int, str]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The operator types and the times of a run's nodes; none if one runs inside another.

    Args:
        nodes: Start, time and operator type of each.
    """
    ordered = sorted(nodes, key=lambda node: node[0])
    if any(start + time > after for (start, time, _), (after, *_) in pairwise(ordered)):
        return (), ()
    return tuple(op for *_, op in ordered), tuple(time for _, time, _ in ordered)
