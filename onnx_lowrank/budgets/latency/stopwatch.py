"""Times of models and of layers' chains, on one runtime with one setting."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns
from typing import TypeVar

from onnx_lowrank.budgets.latency.cache import Cache
from onnx_lowrank.budgets.latency.clock import LEAST, WARM_UP, Clock, Pace, interleaved
from onnx_lowrank.core.option import Option
from onnx_lowrank.engines.engine import Deployed, Feed, RejectedError, UnsupportedError
from onnx_lowrank.engines.node_times import Runs
from onnx_lowrank.files.load import Model, stored_bytes
from onnx_lowrank.hardware import processor
from onnx_lowrank.logs import DETAIL
from onnx_lowrank.probe.micro import Micro

_log = logging.getLogger(__name__)

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

_Trial = tuple[K, Micro, Model]
"""A model whose time is compared with that of a layer: its name, and the layer that it stands for."""

Timed = tuple[Model, Feed]
"""A model and the inputs on which it is timed."""

_TOGETHER = 2**29
"""The most bytes of models that are in memory at the same time, unless one model alone is larger."""

_ENOUGH = 0.1
"""Seconds in which profiles show the times of a bunch of models: only their fastest runs count, for which few
runs are enough, and every run of a node takes a kilobyte of the profile."""

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
        engine: Deployed,
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

    @property
    def times_nodes(self) -> bool:
        """Whether layers are timed by the profiles of the runtime, without their surroundings."""
        return self.engine.times_nodes

    def profiled(self, models: Sequence[Timed], pace: Pace) -> tuple[list[int], list[Runs]]:
        """The times of models that run in turns, in nanoseconds, and their profiles; raises as `times`.

        A runtime notes a bounded number of events. A profile with too few runs gives way to one run of the
        whole model, which takes the model's time.
        """
        with ExitStack() as stack:
            sessions = [
                stack.enter_context(self.engine.profiled(model, feed, self.threads)) for model, feed in models
            ]
            runs = [session.run for session in sessions]
            brief = replace(pace, seconds=min(pace.seconds, _ENOUGH))
            times = interleaved(runs, brief, self._clock, warm=self.warm)
            step = 2 if self.warm else 1
            profiles = (session.finish().every(WARM_UP + step - 1, step) for session in sessions)
            return times, [
                runs if len(runs.times) >= LEAST else Runs(("",), ((max(1, time // 1000),),), (0,))
                for runs, time in zip(profiles, times, strict=True)
            ]

    def shares(self, whole: Timed, layers: Sequence[Micro], pace: Pace) -> tuple[int, list[float]]:
        """The time of a model in nanoseconds, and the times of layers as shares of it.

        Raises:
            UnsupportedError: The runtime does not accept the model, or a layer in isolation.
            RejectedError: The model or a layer fails on its inputs.
        """
        totals, shares = [], []
        for bunch in [*_bunches(layers, lambda layer: layer.bytes)] or [[]]:
            models = [whole, *((layer.dense(), layer.feed()) for layer in bunch)]
            if self.times_nodes:
                (total, *_), (of_whole, *runs) = self.profiled(models, pace)
                own = (layer.own(run.nodes) for layer, run in zip(bunch, runs, strict=True))
                parts = [time / of_whole.whole for time in own]
            else:
                total, *times = self.times(models, pace)
                parts = [time / total for time in times]
            totals.append(total)
            shares += parts
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

        def models(missing: Iterable[Option]) -> Iterator[_Trial[Option]]:
            return ((option, layer, model) for option, model in made.decomposed(missing))

        return self._known(layer, {option: made.digest(option) for option in wanted}, models, pace)

    def others(self, layer: Micro, others: Mapping[K, Micro], pace: Pace) -> dict[K, float]:
        """The times of other layers over a layer's time; without those that the runtime refuses."""

        def models(missing: Iterable[K]) -> Iterator[_Trial[K]]:
            return ((name, others[name], others[name].dense()) for name in missing)

        return self._known(layer, {name: other.key for name, other in others.items()}, models, pace)

    def _known(
        self,
        layer: Micro,
        keys: Mapping[K, str],
        models: Callable[[Iterable[K]], Iterator[_Trial[K]]],
        pace: Pace,
    ) -> dict[K, float]:
        """The times of some models over a layer's time; those that are unknown are measured."""
        known = {name: self.cache.get(layer.key, key) for name, key in keys.items()}
        missing = [name for name, ratio in known.items() if ratio is None]
        found = len(known) - len(missing)
        _log.debug("layer %.12s: %d chains are known, %d are measured", layer.key, found, len(missing))
        for bunch in _bunches(models(missing), lambda trial: stored_bytes(trial[2])):
            for name, ratio in self._measured(layer, bunch, pace):
                known[name] = ratio
                _log.log(DETAIL, "layer %.12s: %s takes %.3f of its time", layer.key, name, ratio)
                self.cache.put(layer.key, keys[name], ratio)
        return {name: ratio for name, ratio in known.items() if ratio is not None}

    def _measured(self, layer: Micro, trials: Sequence[_Trial[K]], pace: Pace) -> Iterator[tuple[K, float]]:
        parts = [layer, *(part for _, part, _ in trials)]
        feed = layer.feed()
        feeds = [feed if part is layer else part.feed() for part in parts]
        models = [*zip((layer.dense(), *(model for *_, model in trials)), feeds, strict=True)]
        dense: float
        try:
            if self.times_nodes:
                runs = self.profiled(models, pace)[1]
                dense, *others = (part.own(run.nodes) for part, run in zip(parts, runs, strict=True))
            else:
                dense, *others = map(float, self.times(models, pace))
        except (UnsupportedError, RejectedError):
            if len(trials) > 1:
                for trial in trials:
                    yield from self._measured(layer, [trial], pace)
            return
        yield from zip((name for name, *_ in trials), (other / dense for other in others), strict=True)


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


def _environment(engine: Deployed, threads: int, warm: bool) -> dict[str, str]:
    """Everything that times depend on, beside the models."""
    return {
        "runtime": engine.module.__version__,
        "provider": engine.provider,
        "threads": str(threads),
        "caches": "warm" if warm else "cold",
        "layers": "nodes" if engine.times_nodes else "models",
        "machine": platform.machine(),
        "processor": processor(engine.provider),
    }
