"""What a plan must keep within: a budget, on every route through a model's branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from onnx_lowrank.allocate.cost import use_macs
from onnx_lowrank.allocate.options import Candidates, Ints
from onnx_lowrank.core.layer import Layer, ScopeWork, Use


@dataclass(frozen=True, slots=True)
class Limits:
    """Constraints on a plan; each bounds what its candidates cost.

    Attributes:
        budgets: Largest total cost, shape (constraints,).
        costs: For every layer what its candidates cost, shape (constraints, candidates).
        alike: Every constraint orders each layer's candidates, those included that `candidates` drops,
            as their cost does, or not at all. Only then the solver's proofs hold.
    """

    budgets: Ints
    costs: tuple[Ints, ...]
    alike: bool = True

    @classmethod
    def single(cls, tables: Sequence[Candidates], budget: int) -> Limits:
        """One budget for the candidates' own costs."""
        return cls(np.array([budget], dtype=np.int64), tuple(table.cost[None, :] for table in tables))

    def spare(self, picks: Sequence[int]) -> Ints:
        """What candidates leave of each budget; negative where they exceed it."""
        spent = (costs[:, pick] for costs, pick in zip(self.costs, picks, strict=True))
        left: Ints = self.budgets - sum(spent, np.zeros_like(self.budgets))
        return left

    def excess(self, picks: Sequence[int]) -> int:
        """By how much candidates exceed a budget, the worst of them; at most 0 where they fit."""
        return -int(self.spare(picks).min())


def macs_limits(
    layers: Sequence[Layer],
    tables: Sequence[Candidates],
    scopes: Sequence[ScopeWork],
    routes: Sequence[Mapping[str, int]],
    limit: int,
) -> Limits:
    """Hold a whole model's MACs below a limit, on each of some routes through its branches.

    Args:
        layers: The layers.
        tables: Their candidates, whose costs are MACs.
        scopes: Every scope of the model.
        routes: How often every scope runs, for each route (`allocate.cost.dearest`).
        limit: Largest MACs of the whole model.
    """
    fixed = [
        sum(runs[scope.path] * (scope.macs or 0) for scope in scopes if runs[scope.path]) for runs in routes
    ]
    return Limits(
        limit - np.array(fixed, dtype=np.int64),
        tuple(
            np.stack([_macs(layer, table, runs) for runs in routes])
            for layer, table in zip(layers, tables, strict=True)
        ),
        all(_alike(layer, routes) for layer in layers),
    )


def _macs(layer: Layer, table: Candidates, runs: Mapping[str, int]) -> Ints:
    """MACs of a layer's candidates on a route."""
    counts = {runs[use.scope] for use in layer.uses}
    if len(counts) == 1:
        return table.cost * counts.pop()
    options = [table.option(index) for index in range(table.cost.size)]
    return np.array(
        [
            sum(runs[use.scope] * (use_macs(layer, use, option) or 0) for use in layer.uses)
            for option in options
        ],
        dtype=np.int64,
    )


def _alike(layer: Layer, routes: Sequence[Mapping[str, int]]) -> bool:
    """Whether the routes weigh a layer's two factors alike: run all uses as often, or uses of one kind."""
    same = all(len({runs[use.scope] for use in layer.uses}) == 1 for runs in routes)
    return same or len({_kind(use) for use in layer.uses if _kind(use) != ()}) <= 1


def _kind(use: Use) -> tuple[int, ...] | None:
    """Uses of one kind have MACs in one proportion to each other, whatever the option; () where none runs."""
    if use.evaluations is None:
        return None
    counts = (use.evaluations.dense, *(n for pair in use.evaluations.factors.values() for n in pair))
    unit = gcd(*counts)
    return tuple(count // unit for count in counts) if unit else ()
