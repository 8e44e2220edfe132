"""The errors of every layer's options under the measure of a recipe; expensive results are computed once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from math import exp
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank import measures
from onnx_lowrank.allocate.cost import Costs, spared
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.joins import Joined, sharings_of
from onnx_lowrank.allocate.options import Candidates, candidates, narrowings, sparse_tables
from onnx_lowrank.allocate.pairs import Group, Sharing, pairs_of
from onnx_lowrank.budgets.budget import Gauge, Meter
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Fold
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.overflow import Overflow
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.measures import Errors, Evidence, Measure, Needs
from onnx_lowrank.progress import Progress
from onnx_lowrank.stages.detail import Considered, considered
from onnx_lowrank.stages.fit import can_narrow, width_item
from onnx_lowrank.stages.known import Key, Known
from onnx_lowrank.stages.unmeasured import without_calibration
from onnx_lowrank.work.executor import Executor
from onnx_lowrank.work.moments import MomentsRef
from onnx_lowrank.work.narrowing import WidthItem, width_errors
from onnx_lowrank.work.scoring import ActivationItem, WeightItem, activation_errors, singular_values
from onnx_lowrank.work.weights import reference

if TYPE_CHECKING:
    from onnx_lowrank.calibrate.calibration import Calibration
    from onnx_lowrank.stages.effects import Effects

_log = logging.getLogger(__name__)

_SPREAD = 2
"""The least ratio of two slice counts with activation errors. Curves take time, and neighbours are alike."""

_LEAST_YIELD = 1e-9  # not 0: a share of the cost is divided by it

_SPECTRA = 2**26
"""The most bytes of spectra in memory. For layers of 2,048 features they take 1 % of the weights."""

_Wanted = Mapping[Fold, Sequence[int]]


class Scores:
    """The errors of all options of a model's layers, on one grid, and their costs.

    Attributes:
        meter: The costs of the options.
        considered: What reports tell of the options, layer by layer, by the name of the recipe; after
            `candidates`.
    """

    def __init__(
        self,
        model: Model,
        walk: Walk,
        bindings: Sequence[Binding],
        grid: Grid[Meter],
        executor: Executor,
        progress: Progress,
        calibration: Calibration | None = None,
        prices: Callable[[str], Costs] | None = None,
    ) -> None:
        """Prepare; results are computed on demand.

        Args:
            model: The model.
            walk: Its walk.
            bindings: Its layers, in graph order.
            grid: The ranks of the options, and their costs.
            executor: Runs the computations.
            progress: Where to show progress.
            calibration: The inputs for the measures that need some.
            prices: Returns the costs of a budget by its name, for recipes that trade these against error.
        """
        self.meter = grid.costs
        self._prices = prices
        self._model = model
        self._walk = walk
        self._bindings = bindings
        self._layers = [binding.layer for binding in bindings]
        self._grid = grid
        self._executor = executor
        self._progress = progress
        self._calibration = calibration
        self._known = [Known() for _ in bindings]
        self._overflow = Overflow(_SPECTRA)
        self._numbers = {layer.id: number for number, layer in enumerate(self._layers)}
        # Relative errors with a shared factor, at the ranks 0, 1, …, by set of layers; None until computed.
        self._shared: Mapping[Joined, Sequence[NDArray[np.float64]]] | None = None
        # Relative errors of tables that keep rows, at the ranks 0, 1, …, by id; None until computed.
        self._kept_rows: Mapping[str, NDArray[np.float64]] | None = None
        self.considered: dict[str, tuple[Considered, ...]] = {}
        self._timed = set[Recipe]()
        self._timed_together = set[str]()
        self._probed = False
        self._scaled: Scores | None = None
        self._importances: Mapping[str, float] | None = None

    def fitted(self, factors: Fit) -> Scores:
        """The scores of options whose factors are fitted so: these, except for scaled factors."""
        if factors is not Fit.SCALED or self._calibration is None:
            return self
        if self._scaled is None:
            scaled = replace(self._calibration, statistics=self._calibration.statistics.scaled())
            self._scaled = made = copy(self)
            made._calibration, made._probed = scaled, False
            made._known, made._shared = [Known() for _ in self._layers], None
            made.considered = {}
        return self._scaled

    def candidates(self, recipe: Recipe) -> tuple[Candidates, ...]:
        """The options that a recipe chooses from, layer by layer in graph order.

        A calibrated measure keeps the layers of which nothing was measured, and any other measure keeps heads
        (`stages.unmeasured`): their errors have no unit in common with those of the others.

        Raises:
            InputError: The model cannot be counted, or it fails on the calibration inputs.
        """
        wanted = [self._grid.wanted_spectra(layer, recipe) for layer in self._layers]
        measure = measures.named(recipe.measure)
        if Needs.WEIGHTS in measure.needs:
            self._add_spectra(wanted)
        if measure.calibrated:
            self._add_activation(wanted)
        if Needs.OUTPUTS in measure.needs:
            self._add_effects(recipe)
        unknown = self._unknown(measure)
        tables: Iterable[Errors] = self._errors(recipe, unknown)
        if self.meter.gauge is not None:
            tables = list(tables)
            self._measure(recipe, self.meter.gauge, tables)
        price, yields = self._price(recipe), self._yields(recipe)
        found, seen = [], []
        for layer, known, table, reason in zip(self._layers, self._known, tables, unknown, strict=True):
            options = candidates(layer, table, recipe, self._grid, price)
            seen.append(considered(options, table, known.evidence(measure.needs).spectra))
            reason = spared(layer, recipe) or reason
            found.append(replace(options, reason=reason, yields=yields.get(layer.id, 1.0)))
        self.considered[recipe.name] = tuple(seen)
        return tuple(found if measure.calibrated else without_calibration(self._layers, found))

    def _errors(self, recipe: Recipe, unknown: Sequence[str]) -> Iterator[Errors]:
        """The errors of all options of every layer; none for a layer that a reason keeps."""
        measure = measures.named(recipe.measure)
        # One by one: the errors of all options of all layers may take much more than those that remain.
        for known, reason in zip(self._known, unknown, strict=True):
            evidence = known.evidence(measure.needs)
            yield {} if reason else measure.errors(evidence, relative=recipe.relative)

    def _unknown(self, measure: Measure) -> list[str]:
        """For every layer, why its errors under a measure are unknown, a phrase; "" if they are known."""
        if not measure.calibrated:
            return [""] * len(self._layers)
        reasons = _calibrated(self._calibration).statistics.reasons
        probed = Needs.OUTPUTS in measure.needs
        found = (
            reasons.get(layer.id) or (known.unknown if probed else "")
            for layer, known in zip(self._layers, self._known, strict=True)
        )
        return [reason and f"its effect is unknown: {reason}" for reason in found]

    def _yields(self, recipe: Recipe) -> Mapping[str, float]:
        """How readily layers give up cost, by id: exp(−s / temperature), s the importance of their blocks."""
        if recipe.temperature is None:
            return {}
        if self._importances is None:
            # Few recipes need it, and it loads what runs without calibration never need.
            from onnx_lowrank.calibrate.similarity import importances

            calibration = _calibrated(self._calibration)
            with self._progress.stage("similarities"):
                self._importances = importances(self._model, self._walk, self._bindings, calibration)
        least = min(self._importances.values(), default=0.0)
        excess = {name: value - least for name, value in self._importances.items()}
        return {name: max(exp(-s / recipe.temperature), _LEAST_YIELD) for name, s in excess.items()}

    def groups(self, recipe: Recipe) -> tuple[Group, ...]:
        """The layers that a recipe may narrow together or give one factor; call `candidates` before.

        Raises:
            InputError: The model cannot be counted, or the moments are not finite.
        """
        return (*self._pairs(recipe), *self._sharings(recipe), *self._tables(recipe))

    def _tables(self, recipe: Recipe) -> Iterator[Sharing]:
        """The tables that can keep rows, each a group of its own."""
        if not (recipe.sparse and self.meter.budget.keeps_rows):
            return
        if self._kept_rows is None:
            from onnx_lowrank.stages import tables  # Runs without calibration keep no rows.

            statistics, block = _calibrated(self._calibration).statistics, self._grid.block
            self._kept_rows = tables.errors(
                self._model, self._walk, self._bindings, statistics, block, self._executor, self._progress
            )
        for number, layer in enumerate(self._layers):
            curve = self._kept_rows.get(layer.id)
            if curve is not None and not self._known[number].unknown:
                table = sparse_tables(layer, self._error(recipe, number, curve), self._grid)
                if table.cost.size > 1:
                    yield Sharing((table,), (number,))

    def _pairs(self, recipe: Recipe) -> tuple[Group, ...]:
        if not (recipe.narrow and self.meter.budget.narrows):
            return ()
        self._add_widths()
        measured = zip(self._layers, self._known, strict=True)
        self._measure_together(narrow=[layer for layer, known in measured if known.widths is not None])
        errors = {
            layer.id: self._error(recipe, number, known.widths, known.narrow_effects)
            for number, (layer, known) in enumerate(zip(self._layers, self._known, strict=True))
            if known.widths is not None and not known.unknown
        }
        return pairs_of(self._layers, errors, self._grid)

    def _sharings(self, recipe: Recipe) -> tuple[Sharing, ...]:
        if not (recipe.share and self.meter.budget.shares):
            return ()
        self._measure_together(shared=[layer for layer in self._layers if layer.siblings])
        if self._shared is None:
            from onnx_lowrank.stages import joins  # Runs without calibration join no layers.

            # Measured costs may fall later, so ranks count that are cheaper by formula.
            known, grid = _calibrated(self._calibration).statistics, self._grid.at(self.meter.counted)
            self._shared = joins.errors(
                self._model,
                self._walk,
                self._bindings,
                grid,
                self.meter.budget.shares,
                known,
                self._executor,
                self._progress,
            )
        errors = {}
        for group, curves in self._shared.items():
            members = [self._numbers[name] for name in group[1]]
            if not any(self._known[number].unknown for number in members):
                pairs = zip(members, curves, strict=True)
                errors[group] = [self._error(recipe, number, curve) for number, curve in pairs]
        return sharings_of(self._layers, errors, self._grid)

    def _error(
        self, recipe: Recipe, number: int, curve: NDArray[np.float64], caused: Effects | None = None
    ) -> NDArray[np.float64]:
        """The errors of a layer in a recipe's measure, given relative errors and the effects of such ones."""
        known, key = self._known[number], (self._layers[number].shared_fold, 1)
        evidence = Evidence({}, {key: curve}, known.power, known.effects if caused is None else caused)
        return measures.named(recipe.measure).errors(evidence, relative=recipe.relative)[key]

    def _add_widths(self) -> None:
        """Compute the errors of all narrow layers that are not known yet."""
        statistics = _calibrated(self._calibration).statistics
        chosen = [
            (known, binding)
            for known, binding in zip(self._known, self._bindings, strict=True)
            if known.widths is None and can_narrow(binding, statistics)
        ]

        def items() -> Iterator[WidthItem]:
            for _, binding in chosen:
                yield width_item(self._model, self._walk, binding, statistics)

        if not chosen:
            return
        begin = monotonic()
        with self._progress.stage("widths", len(chosen)) as step:
            computed = self._executor.map(width_errors, items())
            for (known, binding), errors in zip(chosen, computed, strict=True):
                known.widths = errors.relative
                statistics.ways[binding.layer.id] = errors.way
                step()
        _log.debug("computed the errors of %d narrow layers in %.2f s", len(chosen), monotonic() - begin)

    def _measure(self, recipe: Recipe, gauge: Gauge, tables: Sequence[Errors]) -> None:
        """Measure the costs of the options once for every recipe, as the budget has no formula for them."""
        if recipe not in self._timed:
            with self._progress.stage("time layers", 1) as step:
                gauge.measure(tables, self._grid, step)
            self._timed.add(recipe)

    def _measure_together(self, narrow: Sequence[Layer] = (), shared: Sequence[Layer] = ()) -> None:
        """As `_measure`, once for the layers that are narrowed and once for those that share an encoder."""
        gauge, kind = self.meter.gauge, "narrow" if narrow else "shared"
        if gauge is not None and (narrow or shared) and kind not in self._timed_together:
            with self._progress.stage("time layers together", 1) as step:
                gauge.measure_together(narrow, shared, self._grid, step)
            self._timed_together.add(kind)

    def _price(self, recipe: Recipe) -> Costs | None:
        """The costs that a recipe trades against error; None if these are the budget's own."""
        if recipe.price in (None, self.meter.budget.name):
            return None
        if self._prices is None or recipe.price is None:
            raise RuntimeError("a recipe with a price needs the costs behind it")
        return self._prices(recipe.price)

    def _add_spectra(self, wanted: Sequence[_Wanted]) -> None:
        """Compute the wanted spectra that are not known yet."""
        missing = [
            {fold: tuple(k for k in ks if (fold, k) not in known.spectra) for fold, ks in folds.items()}
            for known, folds in zip(self._known, wanted, strict=True)
        ]
        chosen = [number for number, folds in enumerate(missing) if any(folds.values())]

        def items() -> Iterator[WeightItem]:
            for number in chosen:
                weight = reference(self._model, self._walk, self._bindings[number])
                yield WeightItem(weight, missing[number])

        if not chosen:
            return
        begin = monotonic()
        with self._progress.stage("spectra", len(chosen)) as step:
            computed = self._executor.map(singular_values, items())
            for number, found in zip(chosen, computed, strict=True):
                held = {key: self._overflow.put(values) for key, values in found.items()}
                self._known[number].spectra.update(held)
                step()
        count = sum(len(ks) for folds in missing for ks in folds.values())
        _log.debug("computed %d spectra of %d layers in %.2f s", count, len(chosen), monotonic() - begin)

    def _add_activation(self, wanted: Sequence[_Wanted]) -> None:
        """Compute the wanted activation errors that are not known yet."""
        missing = [
            [(fold, k) for fold, ks in folds.items() for k in _spread(ks) if (fold, k) not in known.computed]
            for known, folds in zip(self._known, wanted, strict=True)
        ]
        if not any(missing):
            return
        statistics = _calibrated(self._calibration).statistics
        self._add_measured(missing, [statistics.reference(layer.id) for layer in self._layers])
        # Also keys without a result, or moments of outputs would be evaluated again at every call.
        for known, keys in zip(self._known, missing, strict=True):
            known.computed.update(keys)

    def _add_measured(self, missing: Sequence[Sequence[Key]], moments: Sequence[MomentsRef | None]) -> None:
        """Compute the errors of the layers that have moments."""
        chosen = [
            (number, found)
            for number, (keys, found) in enumerate(zip(missing, moments, strict=True))
            if keys and found is not None
        ]

        def items() -> Iterator[ActivationItem]:
            for number, measured in chosen:
                binding = self._bindings[number]
                tops = {key: max(self._grid.ranks(binding.layer, *key), default=0) for key in missing[number]}
                centred = bias(self._model, self._walk, binding) is not None
                yield ActivationItem(reference(self._model, self._walk, binding), measured, centred, tops)

        if not chosen:
            return
        begin = monotonic()
        with self._progress.stage("errors", len(chosen)) as step:
            computed = self._executor.map(activation_errors, items())
            for (number, _), found in zip(chosen, computed, strict=True):
                self._known[number].activation.update(found.relative)
                self._known[number].power = found.power
                step()
        count = sum(len(missing[number]) for number, _ in chosen)
        _log.debug("computed %d curves of activation errors in %.2f s", count, monotonic() - begin)

    def _add_effects(self, recipe: Recipe) -> None:
        """Measure how a few options of every layer change the model's outputs, once for all recipes."""
        if self._probed:
            return
        from onnx_lowrank.stages.effects import effects  # Runs without calibration never try options.

        self._probed = True
        counted = self._grid.at(self.meter.counted)
        tables = [
            candidates(layer, known.activation, recipe, counted)
            for layer, known in zip(self._layers, self._known, strict=True)
        ]
        narrow = {}
        if recipe.narrow and self.meter.budget.narrows:
            self._add_widths()
            narrow = {
                layer.id: narrowings(layer, known.widths, counted)
                for layer, known in zip(self._layers, self._known, strict=True)
                if known.widths is not None
            }
        measured, narrowed = effects(
            self._model,
            self._walk,
            self._bindings,
            tables,
            _calibrated(self._calibration),
            self._executor,
            self._progress,
            narrow,
        )
        for layer, known, caused in zip(self._layers, self._known, measured, strict=True):
            known.effects, known.unknown = ((), caused) if isinstance(caused, str) else (caused, "")
            known.narrow_effects = narrowed.get(layer.id, known.effects)


def _spread(slices: Sequence[int]) -> list[int]:
    """The slice counts that are at least twice the one before: those between are hardly ever much better.

    Args:
        slices: Slice counts, ascending.
    """
    kept: list[int] = []
    for k in slices:
        if not kept or k >= _SPREAD * kept[-1]:
            kept.append(k)
    return kept


def _calibrated(calibration: Calibration | None) -> Calibration:
    if calibration is None:
        raise RuntimeError("a measure of activations needs calibration inputs")
    return calibration
