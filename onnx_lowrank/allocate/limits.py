"""What a plan must keep within: one constraint on its costs, or several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from onnx_lowrank.allocate.cost import Ints
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.core.plan import Choice


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


class Bounds(Protocol):
    """How the limit on a whole model binds the choices for its layers."""

    @property
    def limits(self) -> Limits:
        """The constraints of now."""

    def further(self, choices: Sequence[Choice]) -> Self | None:
        """With one more constraint, which a plan breaks that costs too much; None where there is no more."""


@dataclass(frozen=True, slots=True)
class Single:
    """The bounds of a budget in which the cost of a model is that of its layers and something fixed.

    Attributes:
        limits: One constraint.
    """

    limits: Limits

    def further(self, choices: Sequence[Choice]) -> Self | None:
        """None: there is one constraint."""
        return None
