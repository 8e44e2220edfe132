"""Moments of what every layer of a model reads: streamed, centred, in one or a few passes over the data.

For every layer the moments of its input patches are taken, of the samples to fit to and of the held-out
ones apart. Where these do not fit into memory, and of tables, whose inputs are indices, the moments of
the results stand in. Finished moments lie on disk, so that memory holds those under way only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from onnx_lowrank.calibrate.moments import Accumulator
from onnx_lowrank.calibrate.shares import Batch
from onnx_lowrank.core.factors import Moments
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.engines.engine import RejectedError, Run, UnsupportedError
from onnx_lowrank.engines.running import Engine
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.find import Binding, geometry
from onnx_lowrank.operators.geometry import CHUNK, Geometry, outputs, patches
from onnx_lowrank.probe.instrument import Instrumented, Tap, instrument
from onnx_lowrank.work.executor import Threads
from onnx_lowrank.work.moments import LayerMoments, MomentsRef

MEMORY = 2**30
"""Bytes that the moments under way take at most, all layers together."""

_UNMEASURED = 32
"""Samples to run at a time where nothing is measured."""

_TAPPED = 2**28
"""Bytes that the tapped tensors of one batch take, about."""

_GROWTH, _SHARE = 32, 4  # a first convolution makes 64 channels of 3; all of a batch may take 4 times _TAPPED


class Samples(Protocol):
    """Calibration inputs that can be gone through again and again."""

    @property
    def count(self) -> int:
        """Number of samples."""

    def batches(self, size: int) -> Iterable[Batch]:
        """The samples, in batches of at most `size` where the model lets them be cut."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What to measure once, for all layers that read the same in the same way.

    Attributes:
        sights: For each use, the tap and how to cut it.
        of_outputs: Whether results are measured rather than inputs.
        shape: Groups and length of the vectors.
    """

    sights: tuple[tuple[Tap, Geometry], ...]
    of_outputs: bool
    shape: tuple[int, int]


class Statistics(Mapping[str, LayerMoments]):
    """The moments of all layers by id, on disk; each is read when it is asked for.

    Use it as a context manager: it keeps a temporary folder.

    Attributes:
        reasons: Why the layers without moments have none.
        batch: How many samples were run at a time.
    """

    def __init__(self, layers: Iterable[str]) -> None:
        """Start without moments of these layers."""
        self.reasons: dict[str, str] = {}
        self.batch = _UNMEASURED
        self._layers = tuple(layers)
        self._references: dict[str, MomentsRef] = {}
        self._folder = TemporaryDirectory(prefix="onnx-lowrank-")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete what lies on disk."""
        self._folder.cleanup()

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: str) -> LayerMoments:
        """The moments of one layer, read from disk."""
        if layer in self.reasons:
            return LayerMoments(reason=self.reasons[layer])
        return self._references[layer].read()

    def reference(self, layer: str) -> MomentsRef | None:
        """Where the moments of one layer are; None where there are none."""
        return self._references.get(layer)

    def has_inputs(self, layer: str) -> bool:
        """Whether there are moments of a layer's inputs, of both shares."""
        known = self._references.get(layer)
        return known is not None and not known.of_outputs and known.has_held

    def store(self, layers: Iterable[str], fit: Moments, held: Moments | None, *, of_outputs: bool) -> None:
        """Put moments on disk that several layers may share.

        Raises:
            InputError: The disk is full.
        """
        number = len(set(self._references.values()))
        kept = MomentsRef(Path(self._folder.name), number, of_outputs)
        try:
            kept.write(fit, held)
        except OSError as error:
            raise InputError(
                f"The activation statistics cannot be written to {self._folder.name} "
                f"({error.strerror or error}): make room there, or set TMPDIR to another folder."
            ) from error
        self._references.update(dict.fromkeys(layers, kept))


def measure(
    model: Model,
    walk: Walk,
    bindings: Iterable[Binding],
    samples: Samples,
    engine: Engine,
    threads: Threads,
    *,
    memory: int = MEMORY,
    step: Callable[[float], None] | None = None,
) -> Statistics:
    """Take the moments of what every layer reads, or else of what it gives.

    The same activations give the same bits, whatever the number of threads: every sum is one task's.

    Args:
        model: The model.
        walk: Its walk.
        bindings: Its layers.
        samples: The calibration inputs.
        engine: What runs the model.
        threads: What adds the moments up.
        memory: Bytes for the moments under way; layers that do not fit together take several passes.
        step: Told the share of the work that is done, after every batch.

    Raises:
        InputError: The model fails on the inputs, the activations hold NaN or Inf, or the disk is full.
    """
    bindings = tuple(bindings)
    statistics = Statistics(binding.layer.id for binding in bindings)
    try:
        _Measurement(model, walk, samples, engine, threads, statistics, step).run(bindings, memory)
    except BaseException:
        statistics.close()
        raise
    return statistics


class _Measurement:
    """One run over all layers, in groups whose moments fit into memory together."""

    def __init__(
        self,
        model: Model,
        walk: Walk,
        samples: Samples,
        engine: Engine,
        threads: Threads,
        statistics: Statistics,
        step: Callable[[float], None] | None,
    ) -> None:
        self._model = model
        self._walk = walk
        self._samples = samples
        self._engine = engine
        self._threads = threads
        self._statistics = statistics
        self._step = step or _silent
        self._of_outputs: dict[str, bool] = {}
        self._sizes: list[int] = []

    def run(self, bindings: Sequence[Binding], memory: int) -> None:
        """Measure all layers, those that read the same tensors once."""
        for binding in bindings:
            choice = _of_outputs(binding.layer, memory)
            if isinstance(choice, str):
                self._statistics.reasons[binding.layer.id] = choice
            else:
                self._of_outputs[binding.layer.id] = choice
        chosen = {b.layer.id: b for b in bindings if b.layer.id in self._of_outputs}
        instrumented = self._instrumented(chosen.values())
        self._statistics.reasons.update(instrumented.reasons)
        jobs = self._jobs(instrumented, chosen)
        groups = list(_grouped(jobs, memory))
        for number, group in enumerate(groups):
            self._measure([chosen[layer] for job in group for layer in jobs[job]], number, len(groups))

    def _instrumented(self, bindings: Iterable[Binding]) -> Instrumented:
        bindings = tuple(bindings)
        return instrument(
            self._model,
            self._walk,
            [b for b in bindings if not self._of_outputs[b.layer.id]],
            [b for b in bindings if self._of_outputs[b.layer.id]],
        )

    def _jobs(self, instrumented: Instrumented, bindings: Mapping[str, Binding]) -> dict[_Job, list[str]]:
        """What there is to measure, each with the layers that it serves."""
        jobs: dict[_Job, list[str]] = {}
        for layer, taps in (*instrumented.inputs.items(), *instrumented.outputs.items()):
            binding, of_outputs = bindings[layer], self._of_outputs[layer]
            sights = tuple((tap, geometry(self._walk, binding, index)) for index, tap in enumerate(taps))
            job = _Job(sights, of_outputs, _shape(binding.layer, of_outputs=of_outputs))
            jobs.setdefault(job, []).append(layer)
        return jobs

    def _measure(self, bindings: Sequence[Binding], number: int, passes: int) -> None:
        """Measure layers in one pass; if their taps do not run, those that stand in no body.

        A Loop cannot stack what differs in shape from iteration to iteration.
        """
        try:
            self._pass(bindings, number, passes)
        except (UnsupportedError, RejectedError) as error:
            self._check_data()
            outside = [b for b in bindings if not any(use.scope for use in b.layer.uses)]
            inside = [b for b in bindings if b not in outside]
            reason = f"{self._engine.name} does not run the model with its activations as outputs ({error})"
            failed = inside if inside and outside else bindings
            self._statistics.reasons.update({b.layer.id: reason for b in failed})
            if inside and outside:
                self._measure(outside, number, passes)

    def _check_data(self) -> None:
        """Find out whether the model itself fails on the calibration inputs.

        Raises:
            InputError: It does.
        """
        try:
            with self._engine.open(self._model) as run:
                for batch in self._samples.batches(1):
                    run(batch.feed)
        except UnsupportedError:
            return
        except RejectedError as error:
            raise InputError(
                f"The model fails on the calibration inputs ({error}): give inputs that it takes."
            ) from error

    def _pass(self, bindings: Sequence[Binding], number: int, passes: int) -> None:
        """Run all batches, and put the moments on disk."""
        instrumented = self._instrumented(bindings)
        jobs = self._jobs(instrumented, {binding.layer.id: binding for binding in bindings})
        tasks = [_Task(job, layers) for job, layers in jobs.items()]
        with self._engine.open(instrumented.model) as run:
            size = self._batch_size(run)
            self._sizes.append(size)
            self._statistics.batch = min(self._sizes)
            expected = ceil(self._samples.count / size)
            for done, batch in enumerate(self._samples.batches(size), 1):
                _add(tasks, run(batch.feed), batch.held, self._threads)
                self._step((number + done / (max(done, expected) + 1)) / passes)
        for task in tasks:
            task.finish(self._statistics)
        self._step((number + 1) / passes)

    def _batch_size(self, run: Run) -> int:
        """Samples whose tapped tensors take about `_TAPPED` bytes, judged by the first one.

        Few taps say little of what else the model computes: its largest tensors are taken for at most
        `_GROWTH` times its inputs.
        """
        first = next(iter(self._samples.batches(1)))
        taken = sum(value.nbytes for value in run(first.feed).values() if isinstance(value, np.ndarray))
        given = sum(value.nbytes for value in first.feed.values())
        return max(1, _TAPPED // max(1, taken, given * _GROWTH // _SHARE))


class _Task:
    """A job under way."""

    def __init__(self, job: _Job, layers: Sequence[str]) -> None:
        self._job = job
        self._layers = layers
        self._shares: dict[bool, Accumulator] = {}

    def add(self, found: Mapping[str, Any], held: bool) -> None:
        """Add what the taps show in one batch."""
        if held not in self._shares:
            self._shares[held] = Accumulator(f"layer {self._layers[0]!r}", *self._job.shape)
        cut = outputs if self._job.of_outputs else patches
        for tap, form in self._job.sights:
            for rows in cut(form, found[tap.name], tap.depth):
                self._shares[held].add(rows)

    def finish(self, statistics: Statistics) -> None:
        """Put the moments on disk and forget them."""
        fit, held = (self._shares.pop(h).moments() if h in self._shares else None for h in (False, True))
        if fit is None:
            reason = "it does not run on the calibration inputs: give some that reach it"
            statistics.reasons.update(dict.fromkeys(self._layers, reason))
        else:
            statistics.store(self._layers, fit, held, of_outputs=self._job.of_outputs)


def _add(tasks: Sequence[_Task], found: Mapping[str, Any], held: bool, threads: Threads) -> None:
    """Add a batch to all tasks, in parallel; its tensors are free when this returns."""
    threads.each(lambda task: task.add(found, held), tasks)


def _silent(share: float) -> None:
    """Tell nobody."""


def _shape(layer: Layer, *, of_outputs: bool) -> tuple[int, int]:
    """Groups, and length of the vectors of which the moments are taken."""
    return layer.groups, (layer.f // layer.groups if of_outputs else layer.size // layer.f)


def _bytes(shape: tuple[int, int]) -> int:
    """What the moments of one job take while they are under way: two shares, what waits, and a merge."""
    groups, size = shape
    own = 8 * groups * size**2
    return 2 * (own + min(2 * own, CHUNK)) + 2 * own // groups


def _of_outputs(layer: Layer, memory: int) -> bool | str:
    """Whether the outputs are to be measured rather than the inputs, or why neither can be."""
    if any(use.transposed for use in layer.uses):
        return "it is applied as it is and transposed, which read different spaces: give each its own weight"
    is_linear = all(use.is_linear for use in layer.uses)
    reads_indices = any(use.reads_indices for use in layer.uses)
    kinds = (True,) if reads_indices else (False, True) if is_linear else (False,)
    for of_outputs in kinds:
        if _bytes(_shape(layer, of_outputs=of_outputs)) <= memory:
            return of_outputs
    _, size = _shape(layer, of_outputs=True)
    return (
        f"the moments of its {size} features do not fit into {memory / 2**30:g} GiB: its weight alone decides"
    )


def _grouped(jobs: Iterable[_Job], memory: int) -> Iterator[list[_Job]]:
    """Jobs in their order, as many together as fit into memory."""
    group: list[_Job] = []
    for job in jobs:
        if group and sum(_bytes(other.shape) for other in (*group, job)) > memory:
            yield group
            group = []
        group.append(job)
    if group:
        yield group
