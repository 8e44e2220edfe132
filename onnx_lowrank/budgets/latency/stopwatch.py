"""Times of models and of layers' chains, on one runtime with one setting."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter_ns
from typing import TypeVar

from onnx_lowrank.budgets.latency.cache import Cache
from onnx_lowrank.budgets.latency.clock import Clock, Pace, interleaved
from onnx_lowrank.core.option import Option
from onnx_lowrank.engines.engine import Feed, RejectedError, UnsupportedError
from onnx_lowrank.engines.runtime import Runtime
from onnx_lowrank.files.load import Model, stored_bytes
from onnx_lowrank.hardware import processor
from onnx_lowrank.logs import DETAIL
from onnx_lowrank.probe.micro import Micro

_log = logging.getLogger(__name__)

T = TypeVar("T")

Timed = tuple[Model, Feed]
"""A model and the inputs on which it is timed."""

_TOGETHER = 2**29
"""The most bytes of models that are in memory at the same time, unless one model alone is larger."""

_MOST = 16
"""The most models that run in turns: each one lengthens a round and the pause between two runs of a model."""


class Stopwatch:
    """Times models as they are deployed; known times of chains are not measured again.

    Attributes:
        engine: The runtime that runs the models.
        threads: The number of threads for one operator; 0 leaves it to the runtime.
        warm: Whether every run finds the weights of its model in the processor's caches.
        cache: The known times.
    """

    def __init__(
        self,
        engine: Runtime,
        threads: int = 0,
        *,
        warm: bool = False,
        caching: bool | Path = True,
        clock: Clock = perf_counter_ns,
    ) -> None:
        """Prepare; nothing is measured yet.

        Args:
            engine: The runtime that runs the models.
            threads: The number of threads for one operator; 0 leaves it to the runtime.
            warm: Whether every run finds the weights of its model in the processor's caches.
            caching: The folder from which times are read and to which they are written; True for the user's
                cache folder, False for none.
            clock: Gives the time.
        """
        self.engine = engine
        self.threads = threads
        self.warm = warm
        self._clock = clock
        folder, known = None if caching is True else caching, _environment(engine, threads, warm)
        self.cache = Cache(None) if folder is False else Cache.for_environment(known, folder)

    @property
    def name(self) -> str:
        """The runtime that measures, with its setting, a short phrase."""
        threads = {0: "all threads", 1: "1 thread"}.get(self.threads, f"{self.threads} threads")
        return f"{self.engine.name}, {threads}"

    def times(self, models: Sequence[Timed], pace: Pace) -> list[int]:
        """The times of models that run in turns, in nanoseconds.

        Raises:
            UnsupportedError: The runtime does not accept one of the models.
            RejectedError: One of the models fails on its inputs.
        """
        with ExitStack() as stack:
            runs = [
                stack.enter_context(self.engine.ready(model, feed, self.threads)) for model, feed in models
            ]
            return interleaved(runs, pace, self._clock, warm=self.warm)

    def shares(self, whole: Timed, layers: Sequence[Micro], pace: Pace) -> tuple[int, list[float]]:
        """The time of a model in nanoseconds, and the times of layers as shares of it.

        Raises:
            UnsupportedError: The runtime does not accept the model, or a layer in isolation.
            RejectedError: The model or a layer fails on its inputs.
        """
        totals, shares = [], []
        for bunch in [*_bunches(layers, lambda layer: layer.bytes)] or [[]]:
            total, *parts = self.times([whole, *((layer.dense(), layer.feed()) for layer in bunch)], pace)
            totals.append(total)
            shares += [part / total for part in parts]
        return sorted(totals)[len(totals) // 2], shares

    def accepts(self, layer: Micro) -> bool:
        """Whether the runtime runs a layer on its own."""
        try:
            self.times([(layer.dense(), layer.feed())], Pace(seconds=0.0))
        except (UnsupportedError, RejectedError):
            return False
        return True

    def chains(self, layer: Micro, options: Iterable[Option], pace: Pace) -> dict[Option, float]:
        """The times of a layer's chains over the layer's time; without chains that the runtime refuses."""
        wanted = list(options)
        if not wanted:
            return {}
        made = layer.chains()
        # The times of a brief look have keys of their own, so they never pass for full measurements.
        suffix = "" if pace.seconds else " at a look"
        keys = {option: made.digest(option) + suffix for option in wanted}
        known = {option: self.cache.get(layer.key, key) for option, key in keys.items()}
        missing = [option for option, ratio in known.items() if ratio is None]
        found = len(known) - len(missing)
        _log.debug("layer %.12s: %d chains are known, %d are measured", layer.key, found, len(missing))
        for bunch in _bunches(made.decomposed(missing), lambda chain: stored_bytes(chain[1])):
            for option, ratio in self._measured(layer, bunch, pace):
                known[option] = ratio
                _log.log(DETAIL, "layer %.12s: %s takes %.3f of its time", layer.key, option, ratio)
                self.cache.put(layer.key, keys[option], ratio)
        return {option: ratio for option, ratio in known.items() if ratio is not None}

    def _measured(
        self, layer: Micro, chains: Sequence[tuple[Option, Model]], pace: Pace
    ) -> Iterator[tuple[Option, float]]:
        feed = layer.feed()
        try:
            dense, *others = self.times(
                [(layer.dense(), feed), *((model, feed) for _, model in chains)], pace
            )
        except (UnsupportedError, RejectedError):
            if len(chains) > 1:
                for chain in chains:
                    yield from self._measured(layer, [chain], pace)
            return
        yield from zip((option for option, _ in chains), (other / dense for other in others), strict=True)


def _bunches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Split items, in their order, into bunches that fit into memory together."""
    bunch: list[T] = []
    room = _TOGETHER
    for item in items:
        if bunch and (size(item) > room or len(bunch) == _MOST):
            yield bunch
            bunch, room = [], _TOGETHER
        bunch.append(item)
        room -= size(item)
    if bunch:
        yield bunch


def _environment(engine: Runtime, threads: int, warm: bool) -> dict[str, str]:
    """Everything that times depend on, beside the models."""
    return {
        "runtime": engine.module.__version__,
        "provider": engine.provider,
        "threads": str(threads),
        "caches": "warm" if warm else "cold",
        "machine": platform.machine(),
        "processor": processor(engine.provider),
    }
