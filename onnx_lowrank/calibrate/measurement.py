"""Moments of every layer's inputs: streamed, centred, in one or a few passes over the data.

Each layer gets the moments of its input patches, separately for the samples to fit to and for the held-out
ones. If the moments do not fit into memory, or if the layer is a table with indices as inputs, it gets the
moments of its outputs instead. A table has far more rows than features, so these are small; they are the
moments of one-hot inputs, which are diagonal and hold the frequencies of the rows, seen through the table. If
the indices are inputs of the model, its rows are looked up here, without a run (`calibrate.lookups`).
A weight that some uses apply transposed (a tied embedding) is measured twice, where both kinds of uses have
the same features (`linalg.tied`). Where results of layers are added up, the sum is measured, too
(`linalg.sums`). Finished moments are on disk, so memory holds only unfinished ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import count, islice
from math import ceil
from typing import Any

import numpy as np

from onnx_lowrank.calibrate.allowance import Allowance
from onnx_lowrank.calibrate.ignored import find_padding
from onnx_lowrank.calibrate.jobs import Job, grouped, measured_shape, moments_bytes, takes_outputs
from onnx_lowrank.calibrate.lookups import Lookup, lookup
from onnx_lowrank.calibrate.measured import UNMEASURED, Statistics
from onnx_lowrank.calibrate.parts import is_sum, split, sums
from onnx_lowrank.calibrate.passes import Passes
from onnx_lowrank.calibrate.relay import Relay
from onnx_lowrank.calibrate.sections import SECTIONS, Given, SectionItem, nothing, section_sums
from onnx_lowrank.calibrate.shares import Batch, Samples
from onnx_lowrank.calibrate.tasks import Lookups, Section, Task
from onnx_lowrank.calibrate.trimming import Trimmed
from onnx_lowrank.engines.engine import Feed, RejectedError, Run, UnsupportedError
from onnx_lowrank.engines.inputs import specs
from onnx_lowrank.engines.padding import Padding
from onnx_lowrank.engines.pasts import unmasked
from onnx_lowrank.engines.running import Engine
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.keeping import Keeper
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import geometry
from onnx_lowrank.operators.geometry import thinned
from onnx_lowrank.probe.instrument import Instrumented, Tap, instrument
from onnx_lowrank.probe.suffix import Cuts
from onnx_lowrank.work.executor import Executor, Threads

_log = logging.getLogger(__name__)

MEMORY = Allowance().moments
"""The usual bytes of unfinished moments, over all layers."""

_TAPPED = 2**28
"""The approximate bytes of the tapped tensors of one batch."""

_GROWTH, _SHARE = 32, 4  # a first convolution makes 64 channels of 3; a batch may take 4 times _TAPPED


def measure(
    model: Model,
    walk: Walk,
    bindings: Iterable[Binding],
    samples: Samples,
    engine: Engine,
    executor: Executor,
    *,
    memory: int = MEMORY,
    activations: int | None = None,
    keeper: Keeper | None = None,
    step: Callable[[float], None] | None = None,
    with_sums: bool = True,
    looked_up: Samples | None = None,
) -> Statistics:
    """Measure the moments of every layer's inputs, or those of its outputs.

    The same activations give the same bits wherever they are summed: a sum is that of sections (`tasks`).

    Args:
        model: The model.
        walk: Its walk.
        bindings: Its layers.
        samples: The calibration inputs.
        engine: Runs the model.
        executor: Its workers run the sections if they are on other machines and see the model's data files.
            Otherwise, this process runs the model, and its threads sum the moments.
        memory: Bytes for unfinished moments; layers that do not fit together take several passes.
        activations: Bytes for tensors between passes; None for the usual ones.
        keeper: Keeps the moments of finished passes, for the same model and samples; None to keep none.
        step: Receives the share of the work that is done, after every batch.
        with_sums: Whether to measure the sums of layers' results, too.
        looked_up: The inputs that tell how often the rows of tables are read; by default the same.

    Raises:
        InputError: The model fails on the inputs, the activations hold NaN or Inf, or the disk is full.
    """
    bindings = tuple(bindings)
    statistics = Statistics(binding.layer.id for binding in bindings)
    try:
        _Measurement(
            model,
            walk,
            samples,
            looked_up or samples,
            engine,
            executor,
            statistics,
            keeper,
            step,
            activations,
        ).run(bindings, sums(bindings) if with_sums else (), memory)
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
        looked_up: Samples,
        engine: Engine,
        executor: Executor,
        statistics: Statistics,
        keeper: Keeper | None,
        step: Callable[[float], None] | None,
        between: int | None,
    ) -> None:
        self._between = between
        self._model = model
        self._walk = walk
        self._samples = samples
        self._looked_up = looked_up
        self._engine = engine
        self._executor = executor
        self._threads = executor.threads
        self._is_spread = executor.reaches(model.files.values())
        self._statistics = statistics
        self._keeper = keeper
        self._step = step or _silent
        self._has_failed = False
        self._of_outputs: dict[str, bool] = {}
        self._sizes: list[int] = []
        self._groups: Sequence[Sequence[Binding]] = ()
        self._relay: Relay | None = None
        self._relayed = 0  # the number of passes that have run their parts
        self._tables: dict[str, Lookup] = {}

    def run(self, bindings: Sequence[Binding], added: Iterable[Binding], memory: int) -> None:
        """Measure all layers, and the sums; layers that read the same tensors are measured once."""
        parts = [part for binding in bindings for part in split(binding)]
        whole = {binding.layer.id: binding for binding in bindings}
        tables = {part.id: lookup(self._model, self._walk, whole[part.layer], part) for part in parts}
        for part in parts:
            choice = takes_outputs(part, memory, is_looked_up=tables[part.id] is not None)
            if isinstance(choice, str):
                self._statistics.reasons[part.id] = choice
            else:
                self._of_outputs[part.id] = choice
        known = {part.id: part.binding for part in parts if part.id in self._of_outputs}
        self._tables = {name: table for name in known if (table := tables[name]) is not None}
        chosen = {name: binding for name, binding in known.items() if tables[name] is None}
        for binding in added:
            if moments_bytes(measured_shape(binding.layer, of_outputs=True)) <= memory:
                chosen[binding.layer.id], self._of_outputs[binding.layer.id] = binding, True
        instrumented = self._instrumented(chosen.values())
        self._statistics.reasons.update(instrumented.reasons)
        jobs = self._jobs(instrumented, chosen)
        self._statistics.padding = find_padding(
            instrumented.model, jobs, self._tables, self._samples, self._engine
        )
        position = Cuts(self._model, self._walk).position
        order = sorted(jobs, key=lambda job: min(position(chosen[layer]) for layer in jobs[job]))
        self._groups = [
            [chosen[layer] for job in group for layer in jobs[job]] for group in grouped(order, memory)
        ]
        self._measure_all([(job, jobs[job]) for job in order], memory)
        counted = {name for name, binding in whole.items() if binding.layer.kept_per_rank}
        self._look_up(known, counted, memory)
        self._statistics.join(parts)
        for name in filter(is_sum, chosen):
            self._statistics.reasons.pop(name, None)

    def _measure_all(self, jobs: Sequence[tuple[Job, Sequence[str]]], memory: int) -> None:
        """Measure one group of layers after the other, except those that are known from an earlier run.

        Args:
            jobs: The measurements of all groups, with their layers.
            memory: Bytes for unfinished moments.
        """
        names = [[binding.layer.id for binding in group] for group in self._groups]
        passes = Passes(self._keeper, self._statistics, "activations", (names, jobs), memory)
        with ExitStack() as stack:
            if len(names) > 1:
                self._relay = stack.enter_context(Relay(self._model, self._walk, self._groups, self._between))
            for number, group in enumerate(self._groups):
                known, before = passes.known(number, names[number]), len(self._sizes)
                if known is None:
                    self._measure(group, number, len(names))
                    sizes = tuple(self._sizes[before:])
                    # A failure, as for lack of memory, may be gone in the next run.
                    if not self._has_failed:
                        passes.keep(number, names[number], sizes, is_relayed=self._relay is not None)
                else:
                    self._sizes += known.sizes
                    self._statistics.batch = min(self._sizes, default=UNMEASURED)
                    self._relay = self._relay if known.is_relayed else None
                    self._step((number + 1) / len(names))

    @property
    def _trimmed(self) -> Trimmed:
        return Trimmed(self._samples, self._statistics.padding)

    def _look_up(self, bindings: Mapping[str, Binding], counted: set[str], memory: int) -> None:
        """Measure the rows of tables that the inputs look up, and count those of some; nothing runs."""
        jobs: dict[Job, str] = {}
        for name, table in self._tables.items():
            binding = bindings[name]
            sights = tuple(
                (Tap(f"{name}:{index}"), geometry(self._walk, binding, index))
                for index in range(len(table.names))
            )
            jobs[Job(sights, True, measured_shape(binding.layer, of_outputs=True))] = name
        groups = list(grouped(jobs, memory))
        described = [[(job, jobs[job]) for job in group] for group in groups]
        known = described, self._statistics.batch, counted
        passes = Passes(self._keeper, self._statistics, "tables", known, memory)
        for number, group in enumerate(groups):
            names = [jobs[job] for job in group]
            if passes.known(number, names) is not None:
                continue
            tasks = [Lookups(job, jobs[job], self._tables[jobs[job]]) for job in group]
            for batch in Trimmed(self._looked_up, self._statistics.padding).batches(self._statistics.batch):
                look_up = partial(Lookups.look_up, batch=batch, padding=self._statistics.padding)
                self._threads.each(look_up, tasks)
            for task in tasks:
                self._finish(task)
                for name in counted.intersection(task.layers) - self._statistics.reasons.keys():
                    self._statistics.count(name, task.counts)
            passes.keep(number, names)

    def _instrumented(self, bindings: Iterable[Binding]) -> Instrumented:
        bindings = tuple(bindings)
        outputs = [b for b in bindings if self._of_outputs[b.layer.id]]
        return instrument(
            self._model,
            self._walk,
            [b for b in bindings if not self._of_outputs[b.layer.id]],
            [b for b in outputs if not is_sum(b.layer.id)],
            [b for b in outputs if is_sum(b.layer.id)],
        )

    def _jobs(
        self, instrumented: Instrumented, bindings: Mapping[str, Binding], *, is_thin: bool = False
    ) -> dict[Job, list[str]]:
        """The measurements, each with its layers; thin ones leave positions of pictures out."""
        jobs: dict[Job, list[str]] = {}
        for layer, taps in (*instrumented.inputs.items(), *instrumented.outputs.items()):
            binding, of_outputs = bindings[layer], self._of_outputs[layer]
            shape = measured_shape(binding.layer, of_outputs=of_outputs)
            forms = (geometry(self._walk, binding, index) for index in range(len(taps)))
            if is_thin and layer not in self._statistics.padding.layers:
                forms = (thinned(form, shape[1], self._samples.count) for form in forms)
            job = Job(tuple(zip(taps, forms, strict=True)), of_outputs, shape)
            jobs.setdefault(job, []).append(layer)
        return jobs

    def _measure(self, bindings: Sequence[Binding], number: int, passes: int) -> None:
        """Measure layers in one pass; if their taps do not run, only layers outside bodies.

        A Loop cannot stack tensors whose shapes differ between iterations.
        """
        try:
            self._pass(bindings, number, passes)
        except (UnsupportedError, RejectedError) as error:
            if self._relay is not None:
                _log.debug("parts of the model do not run (%s): every pass runs the whole model", error)
                self._relay = None
                self._measure(bindings, number, passes)
                return
            self._check_data()
            self._has_failed = True
            outside = [b for b in bindings if not any(use.scope for use in b.layer.uses)]
            inside = [b for b in bindings if b not in outside]
            reason = f"{self._engine.name} does not run the model with its activations as outputs ({error})"
            failed = inside if inside and outside else bindings
            self._statistics.reasons.update({b.layer.id: reason for b in failed})
            if inside and outside:
                self._measure(outside, number, passes)

    def _check_data(self) -> None:
        """Check that the model itself, without taps, runs on the calibration inputs.

        Raises:
            InputError: It fails on them.
        """
        feed: Feed = {}
        try:
            with self._engine.open(self._model) as run:
                for batch in self._looked_up.batches(1):
                    feed = batch.feed
                    run(feed)
        except UnsupportedError:
            return
        except RejectedError as error:
            if (reason := unmasked(specs(self._model.proto), feed)) is not None:
                raise InputError(
                    f"The calibration inputs do not fit each other ({reason}): correct them."
                ) from error
            raise InputError(
                f"The model fails on the calibration inputs ({error}): give inputs that it takes."
            ) from error

    def _pass(self, bindings: Sequence[Binding], number: int, passes: int) -> None:
        """Run all batches, and write the moments to disk."""
        while self._relay is not None and self._relayed < number:
            # The moments of an earlier pass are known, but this one starts from tensors that it leaves.
            self._run(self._groups[self._relayed], self._relayed, None)

        def done(share: float) -> None:
            self._step((number + share) / passes)

        for task in self._run(bindings, number, done):
            self._finish(task)
        done(1.0)

    def _run(
        self, bindings: Sequence[Binding], number: int, step: Callable[[float], None] | None
    ) -> Sequence[Task]:
        """Run all batches of one pass; without `step` nothing is measured."""
        instrumented = self._instrumented(bindings)
        known = {binding.layer.id: binding for binding in bindings}
        jobs = self._jobs(instrumented, known, is_thin=True)
        tasks = [Task(job, layers) for job, layers in jobs.items()] if step else []
        relay, model = self._relay, instrumented.model
        part = (
            model if relay is None else relay.part(number, model, [t.name for j in jobs for t, _ in j.sights])
        )
        with nullcontext(nothing) if part is None else self._engine.open(part) as run:
            # Parts of a model exchange batches, so the first pass decides for all.
            size = self._sizes[0] if relay is not None and number else self._batch_size(run, relay)
            self._sizes.append(size)
            self._statistics.batch = min(self._sizes)
            expected = ceil(self._samples.count / self._trimmed.part(size))
            length = ceil(expected / SECTIONS)
            batches = enumerate(self._trimmed.batches(size), 1)
            added = (
                self._spread(part, tasks, batches, length)
                if self._is_spread
                else self._here(run, tasks, batches, length)
            )
            for done in added:
                if step:
                    step(done / (max(done, expected) + 1))
        self._relayed = number + 1
        return tasks

    def _here(
        self, run: Run, tasks: Sequence[Task], batches: Iterator[tuple[int, Batch]], length: int
    ) -> Iterator[int]:
        """Run numbered batches in this process, `length` in a section, and yield the numbers."""
        relay = self._relay
        for number, batch in batches:
            found = run(batch.feed) if relay is None else relay.run(run, number, batch.feed)
            _add(tasks, found, batch, self._statistics.padding, self._threads)
            if number % length == 0:
                self._threads.each(_close_section, tasks)
            yield number

    def _spread(
        self, part: Model | None, tasks: Sequence[Task], batches: Iterator[tuple[int, Batch]], length: int
    ) -> Iterator[int]:
        """Run numbered batches in the workers, `length` in a section, and yield the numbers."""
        relay, jobs = self._relay, tuple((task.job, tuple(task.layers)) for task in tasks)
        new = () if relay is None else relay.new

        def given(number: int, batch: Batch) -> Given:
            if relay is None:
                return Given(batch, batch.feed, {})
            taken = relay.taken(number)
            return Given(batch, relay.given(taken, batch.feed), taken)

        def items() -> Iterator[SectionItem]:
            while section := tuple(given(*numbered) for numbered in islice(batches, length)):
                padding = self._statistics.padding
                yield SectionItem(self._engine, part, jobs, section, padding, new, _TAPPED)

        numbers = count(1)
        for found in self._executor.map(section_sums, items()):
            self._threads.each(_join, zip(tasks, found.sums, strict=True))
            for kept in found.kept:
                number = next(numbers)
                if relay is not None:
                    relay.keep(number, kept)
                yield number

    def _finish(self, task: Task) -> None:
        """Write the moments of a task to disk and free their memory."""
        fit, held = task.moments()
        if fit is None:
            reason = "it does not run on the calibration inputs: give inputs that reach it"
            self._statistics.reasons.update(dict.fromkeys(task.layers, reason))
        else:
            self._statistics.store(task.layers, fit, held, of_outputs=task.job.of_outputs)

    def _batch_size(self, run: Run, relay: Relay | None) -> int:
        """The number of samples whose tapped tensors take about `_TAPPED` bytes, judged by the first sample.

        The model computes other tensors, too, and a few taps say little about their sizes: they are assumed
        to take at most `_GROWTH` times the bytes of the inputs.
        """
        first = next(iter(self._samples.batches(1)))
        found = run(first.feed if relay is None else relay.fed(first.feed))
        taken = sum(value.nbytes for value in found.values() if isinstance(value, np.ndarray))
        # The rows of tables are not tapped, but the model computes them all the same.
        taken += sum(rows.nbytes for table in self._tables.values() for rows in table.rows(first.feed))
        given = sum(value.nbytes for value in first.feed.values())
        return max(1, _TAPPED // max(1, taken, given * _GROWTH // _SHARE))


def _add(
    tasks: Sequence[Task], found: Mapping[str, Any], batch: Batch, padding: Padding, threads: Threads
) -> None:
    """Add a batch to all tasks, in parallel; no task holds its tensors when this returns."""
    threads.each(lambda task: task.add(found, batch, padding), tasks)


def _join(pair: tuple[Task, Section]) -> None:
    task, section = pair
    task.join(section)


def _close_section(task: Task) -> None:
    task.join(task.section())


def _silent(share: float) -> None:
    """Ignore the progress."""
