"""The times of a layer, kept or decomposed: measured at some ranks, monotone between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from onnx_lowrank.allocate.cost import Ints
from onnx_lowrank.core.option import Fold, Lowering, Option

WORTHWHILE = 0.97
"""An option must take less than this share of the layer's time: a smaller gain may be a loss."""

SANE = (1e-6, 1e6)
"""Credible times of chains over the times of their layers; values outside this range are errors."""

_LONGEST = 2.0**62  # nanoseconds, or 146 years; within the range of int64


@dataclass(frozen=True, slots=True)
class Curve:
    """The measured times of one (fold, k) relative to the time of the layer, by rank.

    Attributes:
        ratios: The time of the chain over the time of the layer, by rank; at least one entry.
        lowering: The operators with which the chain was fastest.
    """

    ratios: Mapping[int, float]
    lowering: Lowering = Lowering.NATIVE

    def at(self, ranks: Sequence[int] | Ints) -> NDArray[np.float64]:
        """The relative times at these ranks.

        Times rise with the rank: measured times that do not are replaced by the closest ones that do. Between
        measured ranks, times are linear. Beyond them no time is known, and that of the layer is used.
        """
        known = np.array(sorted(self.ratios))
        # Not minimum, which would keep NaN.
        ratios = np.fmin([self.ratios[rank] for rank in known], SANE[1])
        rising = scipy.optimize.isotonic_regression(ratios).x
        return np.asarray(np.interp(ranks, known, rising, left=1.0, right=1.0))


@dataclass(frozen=True, slots=True)
class Narrowed:
    """The times of a layer and of its partners at smaller widths.

    Attributes:
        keeps: The times of the partners, and of the layer, at full width.
        curves: Their relative times, by width; the full width is among them.
        gain: As for `Times`.
    """

    keeps: tuple[int, ...]
    curves: tuple[Curve, ...]
    gain: float = 1.0

    def members(self, widths: Ints) -> tuple[Ints, ...]:
        """The times of the partners, and of the layer, at these widths; width 0 is the full one."""
        return tuple(
            np.where(widths > 0, _inside(keep, curve.at(widths), self.gain), keep)
            for keep, curve in zip(self.keeps, self.curves, strict=True)
        )

    def saved(self, widths: Ints) -> Ints:
        """The time that all save together at these widths; 0 if it is too little to be worth it."""
        whole = sum(self.keeps)
        left = np.sum(self.members(widths), axis=0)
        return np.where(left < WORTHWHILE * whole, whole - left, 0)


@dataclass(frozen=True, slots=True)
class Shared:
    """The relative times of a layer that shares an encoder, by rank.

    Attributes:
        layer: The id of the layer.
        first: With the encoder.
        other: Without it.
        gain: As for `Times`.
    """

    layer: str
    first: Curve
    other: Curve
    gain: float = 1.0


@dataclass(frozen=True, slots=True)
class Times:
    """The times of a layer in its model, in nanoseconds.

    Attributes:
        keep: The time of the kept layer, all uses together.
        curves: The relative times of its decompositions.
        gain: The saving of an option inside the model over its isolated saving; 1 if it is unknown.
        narrowed: The times at smaller widths; None if they are unknown.
        shared: The times with a shared encoder; None if they are unknown.
    """

    keep: int
    curves: Mapping[tuple[Fold, int], Curve]
    gain: float = 1.0
    narrowed: Narrowed | None = None
    shared: Shared | None = None

    def costs(self, fold: Fold, k: int, ranks: Ints) -> Ints:
        """The times of a decomposition at these ranks, ascending; the layer's time if none was measured."""
        curve = self.curves.get((fold, k))
        shares = np.ones(len(ranks)) if curve is None else curve.at(ranks)
        return _inside(self.keep, shares, self.gain)

    def cost(self, option: Option | None) -> int:
        """The time of an option; None is the kept layer."""
        if option is None:
            return self.keep
        if option.lowering in (Lowering.NARROW, Lowering.SHARED):
            return int(self.together(option, np.array([option.j]))[0])
        return int(self.costs(option.fold, option.k, np.array([option.j]))[0])

    def is_cheaper(self, costs: Ints, keep: int | None = None) -> NDArray[np.bool_]:
        """Whether each of these times is clearly below the time of the kept layer, or of several."""
        return costs < WORTHWHILE * (self.keep if keep is None else keep)

    def together(self, option: Option, ranks: Ints) -> Ints:
        """The times at these widths less what partners save, or at these ranks of a shared encoder."""
        if option.lowering is Lowering.NARROW:
            return self.keep - (np.zeros_like(ranks) if self.narrowed is None else self.narrowed.saved(ranks))
        if self.shared is None:
            return np.full_like(ranks, self.keep)
        curve = self.shared.first if option.encoder == self.shared.layer else self.shared.other
        return _inside(self.keep, curve.at(ranks), self.shared.gain)

    def members(self, widths: Ints) -> tuple[Ints, ...]:
        """The own times of the partners, and of the layer, at these widths; width 0 is the full one."""
        return () if self.narrowed is None else self.narrowed.members(widths)

    def knows(self, option: Option) -> bool:
        """Whether the option, or another rank of its kind, was measured."""
        match option.lowering:
            case Lowering.NARROW:
                return self.narrowed is not None
            case Lowering.SHARED:
                return self.shared is not None
            case _:
                return (option.fold, option.k) in self.curves

    def lowering(self, fold: Fold, k: int) -> Lowering:
        """The operators with which the chains of a decomposition were fastest."""
        curve = self.curves.get((fold, k))
        return Lowering.NATIVE if curve is None else curve.lowering


def _inside(keep: int, shares: NDArray[np.float64], gain: float) -> Ints:
    """The times inside a model, given relative times in isolation, and the gain of the model."""
    saved = 1 - shares
    # The gain may be negative: without this test, an option that is slower in isolation would save time.
    left = np.rint(keep * (1 - np.where(saved > 0, gain * saved, saved)))
    # An option may save more in the model than in isolation, but no time is negative. A number that is
    # too large would become a negative integer and make the slowest option the cheapest.
    costs: Ints = np.clip(left, 0, _LONGEST).astype(np.int64)
    return costs


def faster(one: Curve, other: Curve) -> Curve:
    """The faster of two curves, judged at the ranks measured for both; the first one if there are none."""
    both = sorted(one.ratios.keys() & other.ratios.keys())
    is_other = sum(other.ratios[rank] for rank in both) < sum(one.ratios[rank] for rank in both)
    return other if is_other else one


def worth_measuring(
    errors: Mapping[tuple[Fold, int], NDArray[np.float64]],
    ranks: Mapping[tuple[Fold, int], Sequence[int]],
    middle: Mapping[tuple[Fold, int], float],
    slack: float = 0.85,
) -> list[tuple[Fold, int]]:
    """The decompositions that may have the least error at some time, judged by one measurement each.

    A fifth of the time is assumed to be constant, and the rest to be proportional to the rank.

    Args:
        errors: For each (fold, k), the errors at the ranks 0, 1, ….
        ranks: The ranks to choose from, ascending.
        middle: The relative time at the middle one of these ranks (`middle_rank`).
        slack: A decomposition is kept if this share of its time would make it best at some rank.
    """
    points = []
    for key, js in ranks.items():
        if key not in middle or key not in errors:
            continue
        times = middle[key] * (0.2 + 0.8 * np.array(js) / middle_rank(js))
        points += [(float(time), float(errors[key][rank]), key) for time, rank in zip(times, js, strict=True)]
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
    """Sort decompositions by their error at half the layer's time, the least first.

    Args:
        keys: The decompositions.
        errors: As for `worth_measuring`.
        ranks: As for `worth_measuring`.
        middle: The relative time, or work, at the middle rank; it is assumed to be proportional to the rank.
    """

    def error(key: tuple[Fold, int]) -> float:
        half = middle_rank(ranks[key]) * 0.5 / middle[key]
        within = [rank for rank in ranks[key] if rank <= half]
        return float(errors[key][within[-1]]) if within else np.inf

    return sorted(keys, key=error)


def _least(best: NDArray[np.float64], times: NDArray[np.float64], time: float) -> float:
    """The least error of all points with less than this time."""
    index = int(np.searchsorted(times, time, side="left"))
    return float(best[index - 1]) if index else np.inf


def middle_rank(ranks: Sequence[int]) -> int:
    """The rank at which a decomposition is tried first."""
    return ranks[len(ranks) // 2]


def sampled(ranks: Sequence[int]) -> list[int]:
    """The ranks to measure: the first, the middle one and the last; times are nearly affine in the rank."""
    return sorted({ranks[0], middle_rank(ranks), ranks[-1]})
