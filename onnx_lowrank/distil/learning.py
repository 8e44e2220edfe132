"""The training of the tensors of a low-rank model: rounds of steps of Adam, judged on held-out inputs.

Rules:

1. After each round, the held-out loss is measured, and the tensors with the smallest one so far are kept. The
   rounds and the seed alone make the result, so a plan that notes them is replayed to the same bits.
2. The rate of a tensor is relative to the root mean square of its numbers: the scales of the factors of a
   layer, whose product counts, are set by chance.
3. The first rate comes from a range test: the largest one that does not raise the loss much in some steps.
4. Where the training diverges, it goes on from the best tensors.

Adam is from Kingma, Ba, "Adam: A Method for Stochastic Optimization", 2015; the test from Smith, "Cyclical
Learning Rates for Training Neural Networks", 2017.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from time import monotonic
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from onnx_lowrank.core.plan import Round
from onnx_lowrank.distil.forms.form import as_tensor
from onnx_lowrank.distil.schedule import Schedule, bounded, plateaus

_log = logging.getLogger(__name__)

RATES = (0.02, 0.01, 0.005, 0.002, 0.001, 0.0005)
"""The rates that the range test tries, from the largest on."""

SEED = 0
"""The seed of all draws."""

_TESTED, _SEEN = 16, 8  # steps of a range test, and the last of them, which show the loss
_TESTING = 0.1  # the share of the time that a range test may take
_LIKELY = 0.002  # a rate that is seldom too large
_RISE = 2.0  # of the loss, up to which a rate is good: it falls again with the rate
_LOST = 4.0  # times the first loss: the training has diverged
_BETAS = (0.9, 0.99)
_SMALL = 0.1  # of the usual scale of tensors, the least

Tensors = Mapping[str, Tensor]

Losses = Callable[[int], Iterator[Callable[[Tensors], Tensor]]]
"""Gives the loss on one batch after the other without an end, for a seed."""

Report = Callable[[float, float, float], None]
"""Is told the share of the training that is done, the held-out loss, and the smallest one so far."""


@dataclass(frozen=True, slots=True)
class Learned:
    """The result of a training.

    Attributes:
        values: The tensors with the smallest held-out loss, by name.
        rounds: The rounds up to these tensors.
        before: The held-out loss before the training.
        after: The smallest held-out loss.
        steps: The number of steps in all.
        is_ended: Whether an interrupt ended the training.
    """

    values: Mapping[str, NDArray[Any]]
    rounds: tuple[Round, ...]
    before: float
    after: float
    steps: int
    is_ended: bool = False


class Learner:
    """Trains tensors."""

    def __init__(
        self,
        values: Mapping[str, NDArray[Any]],
        losses: Losses,
        judge: Callable[[Tensors], tuple[float, bool]],
        device: torch.device,
    ) -> None:
        """Prepare.

        Args:
            values: The tensors at the start, by name.
            losses: Gives the losses to train with.
            judge: Gives the held-out loss, and whether tensors with it may be the result.
            device: The device that computes.
        """
        self._starts = {name: as_tensor(value, device) for name, value in values.items()}
        self._losses = losses
        self._judge = judge
        self._restart(self._starts)

    def schedule(self, seconds: float | None) -> Schedule:
        """The rounds of a training, after a range test.

        Args:
            seconds: The bound on the time, from now on; None for none.
        """
        began = monotonic()
        first, tested = self._first_rate(None if seconds is None else began + _TESTING * seconds)
        took = monotonic() - began
        self._restart(self._starts)
        _log.debug("range test: rate %g; a step takes %.3g s", first, took / tested)
        if seconds is None:
            return plateaus(first)
        return bounded(first, seconds, took / tested, lambda: monotonic() - began)

    def learn(self, schedule: Schedule, report: Report) -> Learned:
        """Train in the rounds of a schedule; an interrupt ends the training.

        Args:
            schedule: The rounds.
            report: Is told how the training goes.
        """
        before, _ = self._held()
        best = last = before
        kept, known, rounds, is_ended = self._copied(), 0, list[Round](), False
        batches = self._losses(SEED)
        try:
            share, one = next(schedule)
            while True:
                if one.is_again or not isfinite(last) or last > _LOST * before:
                    self._restart(kept)
                self._run(one, batches)
                rounds.append(one)
                last, is_fit = self._held()
                if last < best and is_fit:
                    best, kept, known = last, self._copied(), len(rounds)
                report(share, last, best)
                share, one = schedule.send(last)
        except StopIteration:
            pass
        except KeyboardInterrupt:
            is_ended = True
        values = {name: value.cpu().numpy() for name, value in kept.items()}
        steps = sum(one.steps for one in rounds)
        return Learned(values, tuple(rounds[:known]), before, best, steps, is_ended)

    def _held(self) -> tuple[float, bool]:
        with torch.no_grad():
            return self._judge(self._tensors)

    def _copied(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._tensors.items()}

    def _restart(self, starts: Tensors) -> None:
        """Go on from given tensors, without the memory of earlier steps."""
        self._tensors = {name: Parameter(value.clone()) for name, value in starts.items()}
        sizes = [value.square().mean().sqrt().item() for value in self._starts.values()]
        # Zeros, such as a new bias, have no scale of their own.
        self._sizes = [max(size, _SMALL * float(np.median(sizes))) for size in sizes]
        groups = [{"params": [tensor]} for tensor in self._tensors.values()]
        self._adam = torch.optim.Adam(groups, betas=_BETAS)

    def _run(self, one: Round, batches: Iterator[Callable[[Tensors], Tensor]]) -> list[float]:
        """Make the steps of a round; returns their losses."""
        found = []
        for group, size in zip(self._adam.param_groups, self._sizes, strict=True):
            group["lr"] = one.rate * size
        for loss in islice(batches, one.steps):
            value = loss(self._tensors)
            self._adam.zero_grad()
            value.backward()
            self._adam.step()
            found.append(value.item())
        return found

    def _first_rate(self, until: float | None = None) -> tuple[float, int]:
        """The first rate of a training (rule 3), and the number of steps that the test took.

        Args:
            until: When the test has to end, with a rate that is likely to be good; None for no bound.
        """
        start = np.mean(self._run(Round(_SEEN, 0.0), self._losses(SEED)))
        taken = _SEEN
        for rate in RATES:
            self._restart(self._starts)
            found = self._run(Round(_TESTED, rate), self._losses(SEED))
            taken += _TESTED
            end = float(np.mean(found[-_SEEN:]))
            if isfinite(end) and end <= _RISE * start:
                return rate, taken
            if until is not None and monotonic() > until:
                return min(rate, _LIKELY), taken
        return RATES[-1], taken
