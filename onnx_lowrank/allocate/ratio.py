"""One rule for the costs of all layers, which minimizes no error: each keeps a share of its own cost.

At φ, a layer with the yield w may keep at most the share 1 − φ·w of its cost. It takes its candidate of least
error within that, or its cheapest one if all cost more. The smallest φ that fits the limits is taken. With
equal yields, all layers keep one ratio. Yields w = exp(−s / ε), with the importance s of a layer's block
(`calibrate.similarity`), give the shares φ·w in proportion to softmax(−s / ε), which maximize the sum of
s·(1 − share) plus ε times the entropy of the shares (Lin et al., MoDeGPT, 2024).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from onnx_lowrank.allocate.limits import Limits
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.measures import Floats


def by_ratio(tables: Sequence[Candidates], limits: Limits) -> list[int]:
    """The candidates at the smallest φ whose costs fit; those of the largest φ if none does.

    Args:
        tables: The candidates of every layer, in graph order; none beats another in cost and error.
        limits: The constraints on the plan.
    """
    steps = [_steps(table) for table in tables]
    shares = np.unique(np.concatenate([np.zeros(1), *steps]))

    def picks(share: float) -> list[int]:
        return [_at(own, share) for own in steps]

    # Costs fall as φ grows, and only where some layer takes its next candidate.
    first = bisect_left(shares[:-1], 1, key=lambda share: int(limits.excess(picks(share)) <= 0))
    return picks(float(shares[first]))


def _steps(table: Candidates) -> Floats:
    """For each candidate, the largest φ that allows it; 0 for keep."""
    return np.asarray((table.cost[0] - table.cost) / (max(int(table.cost[0]), 1) * table.yields), np.float64)


def _at(steps: Floats, share: float) -> int:
    """The dearest candidate that φ allows; the cheapest one if it allows none."""
    wanted = min(share, steps.max())
    return int(np.argmin(np.where(steps >= wanted, steps, np.inf)))
