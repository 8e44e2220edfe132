"""How long a layer takes, kept or decomposed: measured at some ranks, monotone between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from onnx_lowrank.allocate.cost import Ints
from onnx_lowrank.core.option import Fold, Lowering, Option

WORTHWHILE = 0.97
"""An option has to take less than this share of the layer's time: what gains less may as well lose."""

SANE = (1e-6, 1e6)
"""Times of chains over those of their layers that can be measurements; whatever lies outside is none."""

_LONGEST = 2.0**62  # nanoseconds: 146 years, and as an integer twice that still fits into int64


@dataclass(frozen=True, slots=True)
class Curve:
    """The measured times of one (fold, k) relative to the layer's, by rank.

    Attributes:
        ratios: Time of the chain over that of the layer, by rank; at least one.
        lowering: The operators by which it was fastest.
    """

    ratios: Mapping[int, float]
    lowering: Lowering = Lowering.NATIVE

    def at(self, ranks: Sequence[int] | Ints) -> NDArray[np.float64]:
        """The relative times at some ranks.

        They rise with the rank: where the measured ones do not, the closest that do take their place. Between
        them they are linear. Beyond them no time is known, and the layer's own stands for it.
        """
        known = np.array(sorted(self.ratios))
        # Not minimum, which hands NaN on.
        ratios = np.fmin([self.ratios[rank] for rank in known], SANE[1])
        rising = scipy.optimize.isotonic_regression(ratios).x
        return np.asarray(np.interp(ranks, known, rising, left=1.0, right=1.0))


@dataclass(frozen=True, slots=True)
class Times:
    """How long a layer takes in its model, in nanoseconds.

    Attributes:
        keep: As it is, all uses together.
        curves: Its decompositions.
        gain: The saving of an option inside the model over its isolated saving; 1 if it is unknown.
    """

    keep: int
    curves: Mapping[tuple[Fold, int], Curve]
    gain: float = 1.0

    def costs(self, fold: Fold, k: int, ranks: Ints) -> Ints:
        """The times of a decomposition at some ranks, ascending; the layer's own where none was measured."""
        curve = self.curves.get((fold, k))
        shares = np.ones(len(ranks)) if curve is None else curve.at(ranks)
        saved = 1 - shares
        # What loses even alone saves nothing where its layer's options lose in the model.
        left = np.rint(self.keep * (1 - np.where(saved > 0, self.gain * saved, saved)))
        # It may save more in the model than alone, but nothing takes less than no time. A number too large
        # for an integer would become a negative one, and so the slowest option the cheapest.
        costs: Ints = np.clip(left, 0, _LONGEST).astype(np.int64)
        return costs

    def cost(self, option: Option | None) -> int:
        """The time of an option, or of the layer as it is."""
        if option is None:
            return self.keep
        return int(self.costs(option.fold, option.k, np.array([option.j]))[0])

    def is_cheaper(self, costs: Ints) -> NDArray[np.bool_]:
        """Which of some times are clearly below the layer's own."""
        return costs < WORTHWHILE * self.keep

    def lowering(self, fold: Fold, k: int) -> Lowering:
        """The operators by which the chains of a decomposition were fastest."""
        curve = self.curves.get((fold, k))
        return Lowering.NATIVE if curve is None else curve.lowering


def faster(one: Curve, other: Curve) -> Curve:
    """The faster of two ways to write chains, at the ranks measured for both; the first without any."""
    both = sorted(one.ratios.keys() & other.ratios.keys())
    is_other = sum(other.ratios[rank] for rank in both) < sum(one.ratios[rank] for rank in both)
    return other if is_other else one


def worth_measuring(
    errors: Mapping[tuple[Fold, int], NDArray[np.float64]],
    ranks: Mapping[tuple[Fold, int], Sequence[int]],
    middle: Mapping[tuple[Fold, int], float],
    slack: float = 0.85,
) -> list[tuple[Fold, int]]:
    """The decompositions that may be best at some time, judged by one measurement each.

    The time is taken to grow with the rank in proportion, but for a fifth of it that does not.

    Args:
        errors: For (fold, k): the errors at the ranks 0, 1, ….
        ranks: The ranks to choose from, ascending.
        middle: The relative time at the middle one of them (`middle_rank`).
        slack: A decomposition is kept if it were best at some rank with this share of its time.
    """
    points = []
    for key, own in ranks.items():
        if key not in middle or key not in errors:
            continue
        times = middle[key] * (0.2 + 0.8 * np.array(own) / middle_rank(own))
        points += [
            (float(time), float(errors[key][rank]), key) for time, rank in zip(times, own, strict=True)
        ]
    points.sort(key=lambda point: point[:2])
    best = np.minimum.accumulate([error for _, error, _ in points]) if points else np.empty(0)
    times = np.array([time for time, *_ in points])
    kept = {
        key: None
        for time, error, key in points
        if slack * time < 1 and error < _least(best, times, slack * time)
    }
    return list(kept)


def by_promise(
    keys: Iterable[tuple[Fold, int]],
    errors: Mapping[tuple[Fold, int], NDArray[np.float64]],
    ranks: Mapping[tuple[Fold, int], Sequence[int]],
    middle: Mapping[tuple[Fold, int], float],
) -> list[tuple[Fold, int]]:
    """Sort decompositions by the error that they have at half the layer's time, the least first.

    Args:
        keys: The decompositions.
        errors: As for `worth_measuring`.
        ranks: As for `worth_measuring`.
        middle: The relative time, or work, at the middle rank, to which others are taken to be proportional.
    """

    def error(key: tuple[Fold, int]) -> float:
        half = middle_rank(ranks[key]) * 0.5 / middle[key]
        within = [rank for rank in ranks[key] if rank <= half]
        return float(errors[key][within[-1]]) if within else np.inf

    return sorted(keys, key=error)


def _least(best: NDArray[np.float64], times: NDArray[np.float64], time: float) -> float:
    """The least error of what takes less than a time."""
    index = int(np.searchsorted(times, time, side="left"))
    return float(best[index - 1]) if index else np.inf


def middle_rank(ranks: Sequence[int]) -> int:
    """The rank at which a decomposition is tried first."""
    return ranks[len(ranks) // 2]


def sampled(ranks: Sequence[int], most: int = 5) -> list[int]:
    """The ranks at which to measure: the first and the last, and some between, denser at the low end."""
    if len(ranks) <= most:
        return list(ranks)
    indices = np.unique(np.rint(np.geomspace(1, len(ranks), most)).astype(int) - 1)
    return [ranks[index] for index in indices]
