"""The measurements of a run over the data: which moments they take, and how many fit into memory at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from onnx_lowrank.calibrate.parts import Part
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.operators.geometry import CHUNK, Geometry, outputs, patches
from onnx_lowrank.probe.instrument import Tap


@dataclass(frozen=True, slots=True)
class Job:
    """One measurement, for all layers that read the same tensors in the same way.

    Attributes:
        sights: For each use, the tap and the geometry that cuts it into vectors.
        of_outputs: Whether it measures outputs, not inputs.
        shape: Number of groups, and length of the vectors.
    """

    sights: tuple[tuple[Tap, Geometry], ...]
    of_outputs: bool
    shape: tuple[int, int]

    def cut(self, form: Geometry, value: NDArray[Any], depth: int = 0) -> Iterator[NDArray[Any]]:
        """The vectors of one tensor, in chunks of shape (vectors, groups, length)."""
        return (outputs if self.of_outputs else patches)(form, value, depth)


def measured_shape(layer: Layer, *, of_outputs: bool) -> tuple[int, int]:
    """Number of groups, and length of the measured vectors."""
    return layer.groups, (layer.f // layer.groups if of_outputs else layer.size // layer.f)


def moments_bytes(shape: tuple[int, int]) -> int:
    """Bytes of one job's unfinished moments: two shares with their waiting rows and sections, and a merge."""
    groups, size = shape
    second = 8 * groups * size**2
    return 2 * (2 * second + min(2 * second, CHUNK)) + second // groups


def takes_outputs(part: Part, memory: int, *, is_looked_up: bool) -> bool | str:
    """Whether to measure the outputs instead of the inputs; or the reason why neither is possible.

    Args:
        part: The part of a layer.
        memory: Bytes for unfinished moments.
        is_looked_up: Whether it is a table whose indices are inputs of the model (`calibrate.lookups`).
    """
    layer = part.binding.layer
    if part.reason:
        return part.reason
    if not is_looked_up and any(use.reads_indices and not use.is_linear for use in layer.uses):
        return "its indices are computed, so nothing shows which rows it looks up: make them inputs"
    is_linear = all(use.is_linear for use in layer.uses)
    reads_indices = any(use.reads_indices for use in layer.uses)
    kinds = (True,) if reads_indices else (False, True) if is_linear else (False,)
    if part.of_outputs is not None:
        kinds = (part.of_outputs,)
    for of_outputs in kinds:
        if moments_bytes(measured_shape(layer, of_outputs=of_outputs)) <= memory:
            return of_outputs
    _, size = measured_shape(layer, of_outputs=True)
    share = f"{memory / 2**30:g} GiB"
    return f"the moments of its {size} features do not fit into the {share} for statistics: raise --memory"


def grouped(jobs: Iterable[Job], memory: int) -> Iterator[list[Job]]:
    """Jobs in their order, in groups that fit into memory together."""
    group: list[Job] = []
    for job in jobs:
        if group and sum(moments_bytes(other.shape) for other in (*group, job)) > memory:
            yield group
            group = []
        group.append(job)
    if group:
        yield group
