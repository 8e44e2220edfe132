"""Routes through a model: which graphs and functions run on the most expensive route, and how often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import chain

from onnx_lowrank.core.layer import ScopeWork


def dearest(
    scopes: Sequence[ScopeWork], counts: Mapping[str, Sequence[int | None]]
) -> tuple[int | None, Mapping[str, int]]:
    """The largest count over all routes through the branches, and the route that has it.

    An If counts as its branch with the larger count. The body of a Loop or Scan counts once. A
    function counts once per call, and not at all without calls.

    Args:
        scopes: Every scope of the model, the main graph first, each after its parent.
        counts: The parts of the count of every scope; None for an unknown part.

    Returns:
        The count, and how often every scope runs on this route. If a part of the count is unknown: None, and
        an empty mapping.
    """
    steps = _steps(scopes)
    try:
        callees = {path: chain(*bodies) for path, bodies in steps.items()}
        order = list(TopologicalSorter(callees).static_order())
    except CycleError:  # a function that calls itself never ends
        return None, {}
    totals: dict[str, int | None] = {}
    for path in order:
        parts = [*counts[path], *(_dearer(totals, step) for step in steps[path])]
        totals[path] = None if None in parts else sum(filter(None, parts))
    start = scopes[0].path
    if totals[start] is None:
        return None, {}
    runs = dict.fromkeys(totals, 0) | {start: 1}
    for path in reversed(order):
        for step in steps[path] if runs[path] else ():
            runs[max(step, key=lambda body: totals[body] or 0)] += runs[path]
    return totals[start], runs


def running(scopes: Sequence[ScopeWork]) -> set[str]:
    """The paths of the scopes that run on some route: all except functions that no such scope calls."""
    steps = _steps(scopes)
    found: set[str] = set()
    pending = [scopes[0].path]
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            pending.extend(chain(*steps[path]))
    return found


def _steps(scopes: Sequence[ScopeWork]) -> dict[str, list[list[str]]]:
    """The steps in which every scope runs other scopes; a step lists scopes, of which exactly one runs."""
    steps: dict[str, list[list[str]]] = {scope.path: [[path] for path in scope.calls] for scope in scopes}
    branches: dict[tuple[str, int], list[str]] = {}
    for scope in scopes:
        if scope.parent is not None and scope.branch_of is None:
            steps[scope.parent].append([scope.path])
        elif scope.parent is not None and scope.branch_of is not None:
            key = scope.parent, scope.branch_of
            if key not in branches:
                steps[scope.parent].append(branches.setdefault(key, []))
            branches[key].append(scope.path)
    return steps


def _dearer(totals: Mapping[str, int | None], bodies: Sequence[str]) -> int | None:
    counts = [totals[path] for path in bodies]
    known = [count for count in counts if count is not None]
    return max(known) if len(known) == len(counts) else None
