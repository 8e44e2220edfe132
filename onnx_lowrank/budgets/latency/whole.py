"""The input model as a whole, timed in turns with models made from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnx_lowrank.budgets.latency.clock import Pace
from onnx_lowrank.budgets.latency.stopwatch import Stopwatch
from onnx_lowrank.core.outcome import Timing
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
class Whole:
    """A model with inputs on which it runs.

    Attributes:
        model: The model.
        feed: The inputs.
        stopwatch: Measures the times.
    """

    model: Model
    feed: Feed
    stopwatch: Stopwatch

    def pairs(self, other: Model) -> list[Pair]:
        """Time this model and another with the same inputs in turns, session by session.

        Raises:
            UnsupportedError: The runtime does not accept the other model.
            RejectedError: The other model fails on the inputs.
        """
        both = [(self.model, self.feed), (other, self.feed)]
        sessions = _SESSIONS if self.stopwatch.warm else 1
        pace = replace(_PACE, seconds=_PACE.seconds / sessions)
        found = (self.stopwatch.times(both, pace) for _ in range(sessions))
        pairs = [(before, after) for before, after in found]
        _log.debug("times before and after, in ns: %s", pairs)
        return pairs

    def timing(self, other: Model) -> Timing:
        """Measure the times of this model and of another, for the report; raises the errors of `pairs`."""
        pairs = self.pairs(other)
        (before, after), times = middle(pairs), [before for before, _ in pairs]
        spread = max(times) / min(times)
        return Timing(self.stopwatch.name, describe(self.feed), before, None, after, spread=spread)


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


def start(model: Model, shown: Feed, shapes: Shapes, stopwatch: Stopwatch) -> Whole:
    """Find inputs on which a model can be timed; arguments as for `runnable`.

    Raises:
        InputError: The model does not run.
    """
    try:
        return Whole(model, runnable(model, shown, shapes, stopwatch), stopwatch)
    except (UnsupportedError, RejectedError) as error:
        raise unmeasurable(stopwatch, error, "leave --time out") from error


def unmeasurable(stopwatch: Stopwatch, error: Exception, advice: str) -> InputError:
    """The error for a model that cannot be timed because it does not run."""
    return InputError(
        f"To measure times the model has to run, and {stopwatch.engine.name} cannot run it ({error}): "
        f"{advice}, or choose another --provider."
    )
