"""The moments of all layers that were measured, on disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from types import TracebackType
from typing import Self

from onnx_lowrank.calibrate.lookups import Counts
from onnx_lowrank.calibrate.parts import Part, summed
from onnx_lowrank.core.factors import Fit, Moments
from onnx_lowrank.engines.padding import NO_PADDING
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.scratch import scratch
from onnx_lowrank.linalg.narrowing import Way
from onnx_lowrank.linalg.quadratic import INPUT_RIDGE
from onnx_lowrank.work.moments import LayerMoments, MomentsRef

UNMEASURED = 32
"""Samples to run at a time if nothing is measured."""


class Statistics(Mapping[str, LayerMoments]):
    """The moments of all layers by id, on disk; each access reads them.

    Use it as a context manager: it keeps a temporary folder.

    Attributes:
        reasons: For each layer without moments, the reason.
        batch: The number of samples that were run at a time.
        ways: For layers that can be narrowed, the way to do it, once known.
        padding: The padding of the inputs, which counts in no moments.
    """

    def __init__(self, layers: Iterable[str]) -> None:
        """Start without moments of these layers."""
        self.reasons: dict[str, str] = {}
        self.batch = UNMEASURED
        self.ways: dict[str, Way] = {}
        self.padding = NO_PADDING
        self._layers = tuple(layers)
        self._references: dict[str, MomentsRef] = {}
        self._number = 0
        self._resources = ExitStack()
        self._folder = self._resources.enter_context(scratch())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete the moments on disk."""
        self._resources.close()

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
        """The place of the moments of one layer on disk; None if it has none."""
        return self._references.get(layer)

    def shared_inputs(self, layers: Sequence[str]) -> MomentsRef | None:
        """The moments of the inputs of layers that read the same tensor; None if one has others or none."""
        found = {self.reference(layer) for layer in layers}
        only = found.pop()
        return None if found or only is None or not only.of_inputs else only

    def summed_outputs(self, layers: Sequence[str]) -> MomentsRef | None:
        """The moments of the sum of the results of layers, in graph order; None if they are unknown."""
        return self.reference(summed(layers))

    def scaled(self) -> Statistics:
        """The same for scaled factors, which need moments of inputs; the files stay with this object."""
        made, found = copy(self), self._references
        kept = made._references = {n: replace(r, fit=Fit.SCALED) for n, r in found.items() if r.of_inputs}
        made.reasons = self.reasons | {n: "its inputs were not measured" for n in found if n not in kept}
        return made

    def join(self, parts: Sequence[Part]) -> None:
        """Give every layer the moments of its parts, and tables their least ridge."""
        for part in parts:
            known, reason = self._references.pop(part.id, None), self.reasons.pop(part.id, "")
            own = self._references.pop(part.layer, None) if part.id != part.layer else None
            if known is None or part.layer in self.reasons:
                self.reasons.setdefault(part.layer, reason)
                continue
            if any(use.reads_indices for use in part.binding.layer.uses):
                known = replace(known, least=INPUT_RIDGE)
            self._references[part.layer] = known if own is None else replace(own, transposed=known)

    def has_inputs(self, layer: str) -> bool:
        """Whether a layer has moments of its inputs, for both shares."""
        known = self._references.get(layer)
        return known is not None and not known.of_outputs and known.has_held

    def store(self, layers: Iterable[str], fit: Moments, held: Moments | None, *, of_outputs: bool) -> None:
        """Write moments, which several layers may share, to disk.

        Raises:
            InputError: The disk is full.
        """
        kept = MomentsRef(self._folder, self._number, of_outputs)
        self._number += 1
        with self._writing():
            kept.write(fit, held)
        self._references.update(dict.fromkeys(layers, kept))

    def restore(self, layers: Sequence[str], moments: LayerMoments) -> None:
        """Write moments of an earlier run, which several layers may share, to disk.

        Raises:
            InputError: The disk is full.
        """
        of_outputs = moments.inputs is None
        fit, held = moments.inputs or moments.outputs, moments.held or moments.held_outputs
        if fit is None:
            raise RuntimeError(f"the moments of {layers[0]!r} are empty")
        self.store(layers, fit, held, of_outputs=of_outputs)
        given = {False: moments.counts, True: moments.held_counts}
        counts = {is_held: numbers for is_held, numbers in given.items() if numbers is not None}
        for layer in layers if counts else ():
            self.count(layer, counts)

    def count(self, layer: str, counts: Counts) -> None:
        """Write how often the rows of a table with moments were read to disk.

        Raises:
            InputError: The disk is full.
        """
        with self._writing():
            self._references[layer].count(counts)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"The activation statistics cannot be written to {self._folder} "
                f"({error.strerror or error}): make room there, or set TMPDIR to another folder."
            ) from error
