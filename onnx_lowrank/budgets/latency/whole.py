"""The input model as a whole, timed in turns with models made from it, on one or several sets of inputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnx_lowrank.budgets.budget import Tools
from onnx_lowrank.budgets.latency.clock import Pace
from onnx_lowrank.budgets.latency.stopwatch import Stopwatch
from onnx_lowrank.core.outcome import CallTime, Timing
from onnx_lowrank.engines.engine import Feed, RejectedError, UnsupportedError
from onnx_lowrank.engines.inputs import describe, specs
from onnx_lowrank.engines.made import make
from onnx_lowrank.engines.running import first_run
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model

_log = logging.getLogger(__name__)

_PACE = Pace(seconds=6.0, spread=0.005)
_SESSIONS = 3
"""The number of sessions in which warm models are timed: times differ from session to session."""

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a model's inputs, by name."""

Pair = tuple[int, int]
"""The times of the input model and of another, in nanoseconds."""


@dataclass(frozen=True, slots=True)
class Call:
    """Inputs on which a model is timed.

    Attributes:
        feed: The inputs.
        weight: The share of calls with inputs of these shapes.
    """

    feed: Feed
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Whole:
    """A model with inputs on which it runs.

    Attributes:
        model: The model.
        calls: The inputs, of one set of shapes or of several; their weights have the sum 1.
        stopwatch: Measures the times.
    """

    model: Model
    calls: tuple[Call, ...]
    stopwatch: Stopwatch

    def pairs(self, other: Model) -> list[list[Pair]]:
        """For every call, time this model and another with the same inputs in turns, session by session.

        Raises:
            UnsupportedError: The runtime does not accept the other model.
            RejectedError: The other model fails on the inputs.
        """
        sessions = _SESSIONS if self.stopwatch.warm else 1
        pace = replace(_PACE, seconds=_PACE.seconds / sessions)
        found: list[list[Pair]] = []
        for call in self.calls:
            both = [(self.model, call.feed), (other, call.feed)]
            times = (self.stopwatch.times(both, pace) for _ in range(sessions))
            found.append([(before, after) for before, after in times])
        _log.debug("times before and after, in ns: %s", found)
        return found

    def timing(self, other: Model) -> Timing:
        """Measure the times of this model and of another, for the report; raises the errors of `pairs`."""
        pairs = self.pairs(other)
        middles = [middle(each) for each in pairs]
        spread = max(spread_of([before for before, _ in each]) for each in pairs)
        before, after = summed(self.calls, middles)
        return Timing(
            self.stopwatch.name,
            described(self.calls),
            before,
            None,
            after,
            spread=spread,
            calls=call_times(self.calls, middles),
        )


def summed(calls: Sequence[Call], pairs: Sequence[Pair]) -> Pair:
    """The weighted sums of the times of all calls."""
    before, after = (
        max(1, round(sum(call.weight * time for call, time in zip(calls, times, strict=True))))
        for times in zip(*pairs, strict=True)
    )
    return before, after


def spread_of(times: Sequence[int]) -> float:
    """The longest over the shortest of several times."""
    return max(times) / min(times)


def described(calls: Sequence[Call]) -> str:
    """The inputs of all calls, with their weights if there are several."""
    if len(calls) == 1:
        return describe(calls[0].feed)
    return " + ".join(f"{call.weight:.3g} × ({describe(call.feed)})" for call in calls)


def call_times(calls: Sequence[Call], pairs: Sequence[tuple[int, int | None]]) -> tuple[CallTime, ...]:
    """The times of every call for the report; none for a single call, whose times stand there already."""
    if len(calls) == 1:
        return ()
    return tuple(
        CallTime(describe(call.feed), call.weight, before, after)
        for call, (before, after) in zip(calls, pairs, strict=True)
    )


def middle(pairs: Sequence[Pair]) -> Pair:
    """The pair whose ratio is the median of all."""
    return sorted(pairs, key=lambda pair: pair[1] / pair[0])[len(pairs) // 2]


def runnable(model: Model, shown: Feed, shapes: Shapes, stopwatch: Stopwatch) -> Feed:
    """Inputs of the requested shapes on which a model runs.

    Args:
        model: The model.
        shown: The user's inputs, which are used if they fit; empty if there are none.
        shapes: The requested shapes of inputs, by name.
        stopwatch: Its engine runs the model.

    Raises:
        UnsupportedError: The runtime does not accept the model.
        RejectedError: The model fails on all inputs.
    """
    fits = shown and all(shapes.get(name, array.shape) == array.shape for name, array in shown.items())
    feeds = [shown] if fits else make(model.proto, specs(model.proto), shapes)
    return first_run(stopwatch.engine, model, feeds)[0]


def start(model: Model, tools: Tools, stopwatch: Stopwatch) -> Whole:
    """Find inputs on which a model can be timed.

    Args:
        model: The model.
        tools: The user's inputs, the sets of shapes, and their weights.
        stopwatch: Measures the times.

    Raises:
        InputError: The model does not run.
    """
    try:
        feeds = [runnable(model, tools.feed, shapes, stopwatch) for shapes in tools.sets]
    except (UnsupportedError, RejectedError) as error:
        raise unmeasurable(stopwatch, error, "leave --time out") from error
    return Whole(model, tuple(map(Call, feeds, tools.weights)), stopwatch)


def unmeasurable(stopwatch: Stopwatch, error: Exception, advice: str) -> InputError:
    """The error for a model that cannot be timed because it does not run."""
    return InputError(
        f"To measure times the model has to run, and {stopwatch.engine.name} cannot run it ({error}): "
        f"{advice}, or choose another --provider."
    )
