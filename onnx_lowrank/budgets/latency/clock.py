"""Timing that is valid on a busy machine: interleaved, paired, and repeated until the medians are steady."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

Clock = Callable[[], int]
"""Nanoseconds since a fixed moment."""

WARM_UP = 2
"""The runs of each function before those that are timed."""

LEAST = 7
"""The least number of rounds."""

_MOST = 10_000
_SELDOM = 5  # the spread is computed once the rounds have grown by a fifth, as it disturbs the caches
_NOTCH = 1.57
"""Half width of a 95 % interval for a median over IQR / √n (McGill, Tukey and Larsen 1978)."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The duration of a measurement.

    Attributes:
        seconds: It ends after this time, but not before a least number of rounds.
        spread: It ends when the relative uncertainty of every median is at most this.
    """

    seconds: float
    spread: float = 0.02


def interleaved(
    runs: Sequence[Callable[[], Any]], pace: Pace, clock: Clock = perf_counter_ns, *, warm: bool = False
) -> list[int]:
    """The times of several functions, in nanoseconds.

    They run in turns, so other work on the machine affects all of them alike. Every turn compares each
    function with the first one: the result is the median of these ratios, times the first one's median.

    Args:
        runs: The functions; the first is the reference.
        pace: When to stop.
        clock: Gives the time.
        warm: Whether to run each function twice in a turn and to time the second run. That run finds its own
            data in the caches; a single run finds the data of the other functions.
    """
    for _ in range(WARM_UP):
        for run in runs:
            run()
    begin = clock()
    rounds: list[list[int]] = []
    look = LEAST
    while len(rounds) < _MOST:
        rounds.append([_timed(run, clock, warm) for run in runs])
        if len(rounds) >= LEAST and clock() - begin >= pace.seconds * 1e9:
            break
        if len(rounds) == look:
            if _spread(np.array(rounds, float)) <= pace.spread:
                break
            look += 1 + look // _SELDOM
    times = np.array(rounds, float)
    reference = np.median(times[:, 0])
    ratios = np.median(times / times[:, :1], axis=0)
    return [max(1, int(reference * ratio)) for ratio in ratios]


def _timed(run: Callable[[], Any], clock: Clock, warm: bool) -> int:
    if warm:
        run()
    begin = clock()
    run()
    return max(1, clock() - begin)


def _spread(times: NDArray[np.float64]) -> float:
    """The relative uncertainty of the medians: those of the ratios, and that of the reference itself."""
    ratios = times / times[:, :1]
    ratios[:, 0] = times[:, 0]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75), axis=0)
    return float((_NOTCH * (high - low) / np.sqrt(len(times)) / middle).max())
