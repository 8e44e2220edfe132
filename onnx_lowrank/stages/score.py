"""The errors of every layer's options, by any recipe's measure; what is dear is computed once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank import measures
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.options import Candidates, candidates
from onnx_lowrank.allocate.times import Times
from onnx_lowrank.budgets.latency.measured import Latency
from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.moments import INPUT_RIDGE, shrinkage
from onnx_lowrank.core.option import Fold
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.find import Binding
from onnx_lowrank.layers.found import Found, prepared
from onnx_lowrank.linalg.activations import errors, output_errors
from onnx_lowrank.linalg.backend import Backend, parallel_map
from onnx_lowrank.linalg.quadratic import of_weight
from onnx_lowrank.linalg.spectra import spectra
from onnx_lowrank.measures import Errors, Evidence, Needs
from onnx_lowrank.progress import Progress
from onnx_lowrank.stages.effects import Effects, effects

_log = logging.getLogger(__name__)

_Wanted = Mapping[Fold, Sequence[int]]
_Key = tuple[Fold, int]


@dataclass(slots=True)
class _Known:
    """What has been computed for one layer.

    Attributes:
        spectra: Singular values of its weight.
        activation: Relative errors on the calibration inputs.
        scale: What makes those absolute.
        computed: The decompositions whose activation errors have been computed; moments of outputs tell those
            of one alone.
        effects: What some activation errors cause at the model's outputs; empty until that is measured.
    """

    spectra: dict[_Key, NDArray[np.float64]] = field(default_factory=dict)
    activation: dict[_Key, NDArray[np.float64]] = field(default_factory=dict)
    scale: float = 1.0
    computed: set[_Key] = field(default_factory=set)
    effects: Effects = ()

    def evidence(self) -> Evidence:
        """All of it, for a measure to choose from."""
        return Evidence(self.spectra, self.activation, self.scale, self.effects)


class Scores:
    """The errors of all options of a model's layers, on one grid, and their costs.

    Attributes:
        latency: What measures the options, where latency is the budget.
    """

    def __init__(
        self,
        found: Found,
        grid: Grid,
        backend: Backend,
        progress: Progress,
        calibration: Calibration | None = None,
        latency: Latency | None = None,
    ) -> None:
        """Prepare; nothing is computed before it is asked for.

        Args:
            found: The model.
            grid: The ranks of the options, and what they are counted in.
            backend: Where the linear algebra runs.
            progress: Where to show progress.
            calibration: The inputs behind the measures that need some.
            latency: What measures the options, where latency is the budget.
        """
        self.latency = latency
        self._found = found
        self._grid = grid
        self._backend = backend
        self._progress = progress
        self._calibration = calibration
        self._known = [_Known() for _ in found.bindings]
        self._timed = set[Recipe]()

    def candidates(self, recipe: Recipe) -> tuple[Candidates, ...]:
        """The options that a recipe chooses from, layer by layer in graph order.

        Layers of which calibration tells nothing are scored by their weights: the squared Frobenius norm
        is the activation error for white inputs.

        Raises:
            InputError: MACs are needed and unknown, or the model fails on the calibration inputs.
        """
        wanted = [self._grid.wanted_spectra(layer, recipe) for layer in self._found.layers]
        measure = measures.named(recipe.measure)
        if Needs.WEIGHTS in measure.needs:
            self._add_spectra(wanted)
        if measure.calibrated:
            self._add_activation(wanted)
        if Needs.OUTPUTS in measure.needs:
            self._add_effects(recipe)
        tables = [measure.errors(known.evidence(), relative=recipe.relative) for known in self._known]
        times = self._times(recipe, tables)
        return tuple(
            candidates(layer, table, recipe, self._grid, of)
            for layer, table, of in zip(self._found.layers, tables, times, strict=True)
        )

    def _times(self, recipe: Recipe, tables: Sequence[Errors]) -> Sequence[Times | None]:
        """How long the options take, where that is the budget; they are measured once for every recipe."""
        if self.latency is None:
            return [None] * len(tables)
        if recipe not in self._timed:
            with self._progress.stage("time layers", 1) as step:
                self.latency.measure(tables, self._grid, step)
            self._timed.add(recipe)
        return self.latency.times()

    def _add_spectra(self, wanted: Iterable[_Wanted]) -> None:
        """Compute the spectra that are asked for and not known."""
        missing = [
            {fold: tuple(k for k in ks if (fold, k) not in known.spectra) for fold, ks in of.items()}
            for known, of in zip(self._known, wanted, strict=True)
        ]

        def compute(item: tuple[Binding, _Wanted]) -> Mapping[_Key, NDArray[np.float64]]:
            binding, of = item
            if not any(of.values()):
                return {}
            weight, dtype = prepared(self._found, binding)
            return spectra(weight, of, self._backend, dtype)

        if not any(any(of.values()) for of in missing):
            return
        begin = monotonic()
        with self._progress.stage("spectra", len(missing)) as step:
            items = zip(self._found.bindings, missing, strict=True)
            for known, found in zip(self._known, parallel_map(compute, items, self._backend), strict=True):
                known.spectra.update(found)
                step()
        count = sum(len(ks) for of in missing for ks in of.values())
        _log.debug("computed %d spectra of %d layers in %.2f s", count, len(missing), monotonic() - begin)

    def _add_activation(self, wanted: Sequence[_Wanted]) -> None:
        """Compute the activation errors that are asked for and not known."""
        missing = [
            [(fold, k) for fold, ks in of.items() for k in ks if (fold, k) not in known.computed]
            for known, of in zip(self._known, wanted, strict=True)
        ]

        def compute(item: tuple[Binding, list[_Key]]) -> tuple[Errors, float]:
            binding, keys = item
            return self._activation_errors(binding, keys) if keys else ({}, 1.0)

        if not any(missing):
            return
        begin = monotonic()
        with self._progress.stage("errors", len(missing)) as step:
            items = zip(self._found.bindings, missing, strict=True)
            for known, (found, scale), keys in zip(
                self._known, parallel_map(compute, items, self._backend), missing, strict=True
            ):
                if keys:
                    known.activation.update(found)
                    known.scale = scale
                    known.computed.update(keys)
                step()
        count = sum(map(len, missing))
        _log.debug("computed %d curves of activation errors in %.2f s", count, monotonic() - begin)

    def _activation_errors(self, binding: Binding, keys: Sequence[_Key]) -> tuple[Errors, float]:
        """Relative errors of one layer, and the scale that makes them absolute."""
        layer = binding.layer
        moments = _calibrated(self._calibration).statistics[layer.id]
        weight, dtype = prepared(self._found, binding)
        centred = bias(self._found.model, self._found.walk, binding) is not None
        if moments.inputs is not None:
            ridge = shrinkage(moments.inputs, INPUT_RIDGE)
            problem = of_weight(weight, moments.inputs, centred=centred, ridge=ridge)
            tops = {key: max(self._grid.ranks(layer, *key), default=0) for key in keys}
            table = {
                (fold, k): errors(problem, weight.shape, fold, k, top, self._backend)
                for (fold, k), top in tops.items()
            }
            return table, float(np.sum(problem.power))
        if moments.outputs is not None:
            ridge = shrinkage(moments.outputs)
            only = {(Fold.ENCODE, 1): output_errors(moments.outputs, weight, centred=centred, ridge=ridge)}
            return only, float(np.trace(moments.outputs.second, axis1=1, axis2=2).sum())
        wanted = {fold: tuple(k for by, k in keys if by is fold) for fold, _ in keys}
        found = spectra(weight, wanted, self._backend, dtype)
        white = measures.named("frobenius")
        return white.errors(Evidence(found), relative=True), float(np.sum(np.square(weight)))

    def _add_effects(self, recipe: Recipe) -> None:
        """Measure what a few options of every layer do to the model's outputs, once for all recipes."""
        if all(known.effects for known in self._known):
            return
        counted = replace(self._grid, budget=self._grid.counted)
        tables = [
            candidates(layer, known.activation, recipe, counted)
            for layer, known in zip(self._found.layers, self._known, strict=True)
        ]
        calibration = _calibrated(self._calibration)
        measured = effects(self._found, tables, calibration, self._backend, self._progress)
        for known, own in zip(self._known, measured, strict=True):
            known.effects = own


def _calibrated(calibration: Calibration | None) -> Calibration:
    if calibration is None:
        raise RuntimeError("a measure of activations needs calibration inputs")
    return calibration
