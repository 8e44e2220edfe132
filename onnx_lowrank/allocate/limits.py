"""The limits of a plan: one constraint on its costs, or several at once."""

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
    """Constraints on a plan; each bounds the total cost of its candidates.

    Attributes:
        budgets: Largest total cost, shape (constraints,).
        costs: For every layer, the costs of its candidates, shape (constraints, candidates).
        alike: Whether every constraint orders each layer's options, with those that `candidates` drops, as
            their cost does, or gives all of them one cost. The solver's proofs hold only then.
    """

    budgets: Ints
    costs: tuple[Ints, ...]
    alike: bool = True

    @classmethod
    def single(cls, tables: Sequence[Candidates], budget: int) -> Limits:
        """One budget for the candidates' own costs."""
        return cls(np.array([budget], dtype=np.int64), tuple(table.cost[None, :] for table in tables))

    def spare(self, picks: Sequence[int]) -> Ints:
        """The part of each budget that candidates leave; negative if they exceed it."""
        spent = (costs[:, pick] for costs, pick in zip(self.costs, picks, strict=True))
        left: Ints = self.budgets - sum(spent, np.zeros_like(self.budgets))
        return left

    def excess(self, picks: Sequence[int]) -> int:
        """The largest excess of candidates over a budget; at most 0 if they fit."""
        return -int(self.spare(picks).min())


class Bounds(Protocol):
    """The constraints that the limit on a whole model sets for its layers; more can be added."""

    @property
    def limits(self) -> Limits:
        """The current constraints."""

    def further(self, choices: Sequence[Choice]) -> Self | None:
        """Add the constraint that a too expensive plan breaks; None if there is none to add."""


@dataclass(frozen=True, slots=True)
class Single:
    """The bounds of a budget in which a model costs the sum of its layers and a fixed amount.

    Attributes:
        limits: One constraint.
    """

    limits: Limits

    def further(self, choices: Sequence[Choice]) -> Self | None:
        """None: there is one constraint."""
        return None
