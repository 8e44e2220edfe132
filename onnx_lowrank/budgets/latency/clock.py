"""Timing that holds on a machine with other work on it: interleaved, paired, repeated until it is steady."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

Clock = Callable[[], int]
"""Nanoseconds since some moment."""

_WARM_UP = 2
_LEAST, _MOST = 7, 10_000
_SELDOM = 5  # rounds are looked at when they have grown by a fifth, as that disturbs the caches
_NOTCH = 1.57
"""Half width of a 95 % interval for a median over IQR / √n (McGill, Tukey and Larsen 1978)."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to repeat a measurement.

    Attributes:
        seconds: After so long it ends, but not before some rounds.
        spread: It ends when every median is known to this share of itself.
    """

    seconds: float
    spread: float = 0.02


def interleaved(
    runs: Sequence[Callable[[], Any]], pace: Pace, clock: Clock = perf_counter_ns, *, warm: bool = False
) -> list[int]:
    """Times of several things that can be run, in nanoseconds.

    They run in turns, so that what else the machine does meets all of them alike. Each is compared with the
    first in every turn: the result is the median of these ratios times the first's own median.

    Args:
        runs: What to time; the first is the reference.
        pace: When to stop.
        clock: Tells the time.
        warm: Time the second of two runs in each turn, which finds in the caches what the first has left
            there; else what the others have left.
    """
    for _ in range(_WARM_UP):
        for run in runs:
            run()
    begin = clock()
    rounds: list[list[int]] = []
    look = _LEAST
    while len(rounds) < _MOST:
        rounds.append([_timed(run, clock, warm) for run in runs])
        if len(rounds) >= _LEAST and clock() - begin >= pace.seconds * 1e9:
            break
        if len(rounds) == look:
            if _spread(np.array(rounds, float)) <= pace.spread:
                break
            look += 1 + look // _SELDOM
    times = np.array(rounds, float)
    own = np.median(times[:, 0])
    ratios = np.median(times / times[:, :1], axis=0)
    return [max(1, int(own * ratio)) for ratio in ratios]


def _timed(run: Callable[[], Any], clock: Clock, warm: bool) -> int:
    if warm:
        run()
    begin = clock()
    run()
    return max(1, clock() - begin)


def _spread(times: NDArray[np.float64]) -> float:
    """How well the medians of the ratios, and the first's own, are known."""
    ratios = times / times[:, :1]
    ratios[:, 0] = times[:, 0]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75), axis=0)
    return float((_NOTCH * (high - low) / np.sqrt(len(times)) / middle).max())
