"""Work items that sum the moments of a section: of a few consecutive batches of one pass."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_lowrank.calibrate.jobs import Job, moments_bytes
from onnx_lowrank.calibrate.shares import Batch
from onnx_lowrank.calibrate.tasks import Section, Task
from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.engines.padding import Padding
from onnx_lowrank.engines.running import Engine
from onnx_lowrank.files.load import Model
from onnx_lowrank.linalg.backend import Backend

SECTIONS = 16
"""A pass has about so many sections; their number depends on the data alone, as it decides the last bits."""

_TIMES = 4
"""Bytes of the tensors of a run over those of its inputs and of its part of the model, assumed."""


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What a section needs of one batch.

    Attributes:
        batch: The batch.
        inputs: The inputs of the part.
        taken: What the pass takes from the pass before.
    """

    batch: Batch
    inputs: Feed
    taken: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class SectionItem:
    """Asks for the sums of one section.

    Attributes:
        engine: Runs the part.
        part: The part of the model; None if everything is taken from the pass before.
        jobs: The measurements, each with its layers.
        given: What it needs of every batch.
        padding: The padding of the inputs.
        new: The outputs of the part that the next pass takes.
        tapped: Approximate bytes of the tapped tensors of one batch.
    """

    engine: Engine
    part: Model | None
    jobs: tuple[tuple[Job, tuple[str, ...]], ...]
    given: tuple[Given, ...]
    padding: Padding
    new: tuple[str, ...]
    tapped: int

    @property
    def nbytes(self) -> int:
        """Approximate bytes that the computation takes: the part, the moments, and the tensors of a batch."""
        fed = sum(_bytes(given.inputs) + _bytes(given.taken) for given in self.given)
        model = 0 if self.part is None else self.part.proto.ByteSize()
        moments = sum(moments_bytes(job.shape) for job, _ in self.jobs)
        return moments + fed + 2 * model + _TIMES * self.tapped


@dataclass(frozen=True, slots=True, eq=False)
class SectionSums:
    """The sums of one section.

    Attributes:
        sums: Those of every job.
        kept: For every batch, what the next pass takes, by name.
    """

    sums: tuple[Section, ...]
    kept: tuple[Mapping[str, Any], ...]


def section_sums(item: SectionItem, backend: Backend) -> SectionSums:
    """Run the batches of a section, and sum their moments.

    Raises:
        UnsupportedError: The engine does not run the part.
        RejectedError: The part fails on the inputs.
        InputError: The activations hold NaN, Inf or numbers whose squares overflow.
    """
    tasks, kept = [Task(job, layers) for job, layers in item.jobs], []
    with nullcontext(nothing) if item.part is None else item.engine.open(item.part) as run:
        for given in item.given:
            found = run(given.inputs)
            kept.append({name: found[name] for name in item.new})
            for task in tasks:
                task.add({**given.taken, **found}, given.batch, item.padding)
    return SectionSums(tuple(task.section() for task in tasks), tuple(kept))


def nothing(feed: Feed) -> dict[str, Any]:
    """Run no model."""
    return {}


def _bytes(arrays: Mapping[str, Any]) -> int:
    return sum(array.nbytes for array in arrays.values() if isinstance(array, np.ndarray))
