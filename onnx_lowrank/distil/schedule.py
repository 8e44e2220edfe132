"""The rounds of a training: their steps and their rates.

Rules:

1. With a bound on the time, the rate falls with the share of it that has passed, as half a cosine.
2. Without one, the rate falls where the best held-out loss has stopped falling, and the training goes on
   from the best tensors. It ends after some such falls.
3. The first rounds raise the rate to its first value.

The cosine is from Loshchilov, Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from math import cos, pi

from onnx_lowrank.core.plan import Round
from onnx_lowrank.documents.plans import LONGEST, STEPS

_RISING = 3  # rounds in which the rate rises
_USUAL, _LEAST = 50, 4  # steps of a round
_BOUNDED = 40  # rounds in a bounded time
_PATIENCE = 3  # rounds without progress before the rate falls
_PROGRESS = 0.002  # of the loss, the least that counts
_FALL, _FALLS = 0.3, 4

Schedule = Generator[tuple[float, Round], float, None]
"""Gives the share of the training that is behind each round, and the round; is sent the held-out loss."""


def bounded(first: float, seconds: float, step: float, passed: Callable[[], float]) -> Schedule:
    """The rounds of a training that ends in time (rule 1).

    Args:
        first: The first rate.
        seconds: The bound on the time.
        step: The seconds that one step takes.
        passed: The seconds since the beginning.
    """
    steps = min(STEPS, max(_LEAST, int(seconds / _BOUNDED / max(step, 1e-6))))
    number = 0
    while ((share := min(1.0, passed() / seconds)) < 1 or not number) and number < LONGEST:
        rising = min(1.0, (number + 1) / (_RISING + 1))
        yield share, Round(steps, first * rising * (1 + cos(pi * share)) / 2)
        number += 1


def plateaus(first: float) -> Schedule:
    """The rounds of a training that ends where the held-out loss stops falling (rule 2).

    Args:
        first: The first rate.
    """
    best, idle, falls, rate, is_again = float("inf"), 0, 0, first, False
    for number in range(LONGEST):
        rising = min(1.0, (number + 1) / (_RISING + 1))
        loss = yield falls / _FALLS, Round(_USUAL, rate * rising, is_again)
        is_again = False
        idle = 0 if loss < best * (1 - _PROGRESS) else idle + 1
        best = min(best, loss)
        if idle >= _PATIENCE:
            falls, rate, idle, is_again = falls + 1, rate * _FALL, 0, True
            if falls == _FALLS:
                return


def replayed(rounds: Sequence[Round]) -> Schedule:
    """Known rounds."""
    for number, one in enumerate(rounds):
        yield number / len(rounds), one
