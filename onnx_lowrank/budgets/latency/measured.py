"""Measured times of a model and its layers, and predicted times of the layers' options.

Rules:

1. Layers and options are measured in isolation (`isolated`).
2. The saving of a layer inside the model can differ from its isolated saving (fusions, caches). `learn`
   scales predictions to the saving of a measured model. `correct` measures one model for every important
   kind of layer; it trusts a measurement more if the saving is large beside the noise. The prediction for
   options that were measured together in one model is that measurement.
3. The saving of layers that change together is learned for all of them at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_lowrank.allocate.cost import Costs, Line, Linear
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.allocate.times import (
    Narrowed,
    Times,
)
from onnx_lowrank.budgets.budget import Budget, Gauge
from onnx_lowrank.budgets.latency.isolated import Isolated
from onnx_lowrank.budgets.latency.kinds import chains, narrowed, shared
from onnx_lowrank.budgets.latency.scene import Scene
from onnx_lowrank.budgets.latency.stopwatch import Stopwatch
from onnx_lowrank.budgets.latency.whole import (
    Pair,
    Whole,
    call_times,
    described,
    middle,
    spread_of,
    summed,
)
from onnx_lowrank.budgets.macs import known_macs, macs
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.core.outcome import LayerTime, Timing
from onnx_lowrank.core.plan import Choice
from onnx_lowrank.files.load import Model
from onnx_lowrank.measures import Errors
from onnx_lowrank.progress import Step

_log = logging.getLogger(__name__)

_GAINS = (-1.0, 1.5)
"""Credible ratios of a saving inside the model to the predicted one; others are measurement errors."""

_NOISE = 0.01
"""Approximate spread of the ratio of two models' times between measurements."""

_JUDGED = 16
"""The number of kinds of layers that are measured in the model: those with the largest savings."""

_TOGETHER = (Lowering.NARROW, Lowering.SHARED)


class Latency(Gauge):
    """The times of one model.

    Attributes:
        whole: The time of the model, in nanoseconds.
    """

    def __init__(self, budget: Budget, scenes: Sequence[Scene], stopwatch: Stopwatch) -> None:
        """Measure the model and its layers.

        Args:
            budget: The budget of latency.
            scenes: The model with inputs of every set of shapes, the one that MACs are counted for first.
            stopwatch: Measures the times.

        Raises:
            UnsupportedError: The runtime does not accept the model.
            RejectedError: The model fails on the inputs.
        """
        self.budget = budget
        self.stopwatch = stopwatch
        self._source = scenes[0].source
        self._layers = {layer.id: layer for layer in self._source.layers}
        self._whole = Whole(self._source.model, tuple(scene.call for scene in scenes), stopwatch)
        self._isolated = Isolated(scenes, stopwatch)
        self._ranges = [(whole, whole) for whole in self._isolated.wholes]
        self.whole, _ = summed(self._whole.calls, self._ranges)
        # The savings inside the model over those in isolation, by manner (`_manner`).
        self._gains: dict[str, float] = {}
        self._reached: dict[frozenset[tuple[str, Option]], float] = {}
        number = len(self._isolated.kinds)
        _log.debug("the model takes %.3f ms, and has %d kinds of layers", self.whole / 1e6, number)

    @property
    def total(self) -> int:
        """The time of the model, in nanoseconds."""
        return self.whole

    @property
    def place(self) -> str:
        """The runtime and its setting."""
        return self.stopwatch.name

    @property
    def counted(self) -> Costs:
        """The MACs: an option that does not lower them is not measured."""
        return Linear(known_macs)

    def line(self, layer: Layer, fold: Fold, k: int) -> Line | None:
        """The MACs of a decomposition; None if they are unknown."""
        return None if macs(layer) is None else Linear(known_macs).line(layer, fold, k)

    def of_model(self, choices: Sequence[Choice]) -> int:
        """The time of the model under a plan, from the costs that the plan states."""
        kept = {layer.id: self.tariff(layer).keep for layer in self._source.layers}
        return self.whole - sum(kept[choice.layer] - choice.cost for choice in choices)

    def alone(self, table: Candidates) -> str:
        """The reason why a layer has no option."""
        if table.cost[0] == 0:
            return "it did not run when the model was timed, or cannot be timed on its own"
        return "no option of the recipe, at ranks in multiples of --align, is clearly faster"

    def ratio(self, model: Model) -> float:
        """The time of another model with the same inputs over the time of this one, measured in turns.

        Raises:
            UnsupportedError: The runtime does not accept the other model.
            RejectedError: The other model fails on the inputs.
        """
        before, after = self.pair(model)
        return after / before

    def pair(self, model: Model) -> Pair:
        """The times of this model and of another with the same inputs, measured in turns, in nanoseconds."""
        return summed(self._whole.calls, self._pairs(model))

    def _pairs(self, model: Model) -> list[Pair]:
        """For every call the times of this model and of another, measured in turns, in nanoseconds."""
        pairs = self._whole.pairs(model)
        for index, each in enumerate(pairs):
            times = [*self._ranges[index], *(before for before, _ in each)]
            self._ranges[index] = min(times), max(times)
        return [middle(each) for each in pairs]

    @property
    def _spread(self) -> float:
        """The longest over the shortest time of the model on the same inputs."""
        return max(map(spread_of, self._ranges))

    def measure(self, errors: Sequence[Errors], grid: Grid[Costs], step: Step) -> None:
        """Measure the promising options of all layers that have not been measured yet."""
        self._isolated.measure(errors, grid, step)

    def measure_together(
        self, narrow: Sequence[Layer], shared: Sequence[Layer], grid: Grid[Costs], step: Step
    ) -> None:
        """Measure layers that change together with others and have not been measured yet."""
        self._isolated.measure_together(narrow, shared, grid, step)

    def tariff(self, layer: Layer) -> Times:
        """The known times of one layer, summed over its uses, which can be of several kinds."""
        parts = self._isolated.parts(layer)
        if not parts:
            return Times(0, {})
        whole = sum(share for share, _ in parts)
        keep = max(1, round(whole))
        shares = zip(self._isolated.uses[layer.id], parts, strict=True)
        gain = sum(self._gain(key) * share for key, (share, _) in shares)
        found = shared(layer, parts, self._gain(self._manner(layer, Lowering.SHARED)))
        return Times(keep, chains(parts), gain / whole, self._narrowed(layer), found)

    def _narrowed(self, layer: Layer) -> Narrowed | None:
        """The times of a layer and its partners at smaller widths; None if they are unknown."""
        widths = self._isolated.widths.get(layer.id, ())
        if not widths:
            return None
        members = [self._isolated.parts(member) for member in (*layer.partners, layer)]
        return narrowed(layer, members, widths, self._gain(self._manner(layer, Lowering.NARROW)))

    def _gain(self, manner: str) -> float:
        """The saving inside the model over that in isolation (rule 2); 1 if it is unknown."""
        return self._gains.get(manner, 1.0)

    def _manner(self, layer: Layer, lowering: Lowering) -> str:
        """The name of layers that are rewritten alike; those that change together have one name (rule 3)."""
        match lowering:
            case Lowering.NARROW:
                bound = layer.narrowing.bound if layer.narrowing is not None else ""
                owners = [layer, *([self._layers[bound]] if bound else [])]
                names = {member.id for owner in owners for member in (*owner.partners, owner)}
            case Lowering.SHARED:
                names = set(layer.siblings)
            case _:
                names = {layer.id}
        keys = "/".join(sorted(key for name in names for key in self._isolated.uses[name]))
        return keys if names == {layer.id} else f"{lowering} {keys}"

    def predicted(self, options: Mapping[str, Option]) -> int:
        """The predicted time of the model with these layers rewritten, in nanoseconds."""
        saved = 0
        for layer in self._source.layers:
            if layer.id in options:
                times = self.tariff(layer)
                saved += times.keep - times.cost(options[layer.id])
        return max(1, self.whole - saved)

    def correct(
        self,
        options: Mapping[str, Option],
        reached: float,
        ratio: Callable[[Mapping[str, Option]], float],
        step: Step,
    ) -> None:
        """Measure the saving of every kind of layer inside the model (rule 2).

        Args:
            options: The options of the layers that are rewritten.
            reached: The measured ratio of the model with all of them.
            ratio: Measures the ratio of the model with a part of them (`ratio`).
            step: Receives the share that is done.
        """
        kinds: dict[str, dict[str, Option]] = {}
        for layer, option in options.items():
            kinds.setdefault(self._manner(self._layers[layer], option.lowering), {})[layer] = option
        ordered = sorted(kinds.values(), key=self._saving, reverse=True)
        savings = [self._saving(alike) for alike in ordered]
        whole = self._saving(options)
        # Without a predicted saving the quotient says nothing; the isolated times are the best guess.
        joint = (1 - reached) / whole if whole > 0 else 1.0
        for index, (alike, alone) in enumerate(zip(ordered, savings, strict=True)):
            saved = joint * alone
            if alone > _NOISE and index < _JUDGED:
                # The weight of a measurement against its prior, both with errors of their own: alone² is the
                # variance of the prior and _NOISE² that of the measurement.
                belief = alone**2 / (alone**2 + _NOISE**2)
                saved += belief * (1 - ratio(alike) - saved)
            self.learn(alike, 1 - saved)
            step((index + 1) / len(ordered))

    def _saving(self, options: Mapping[str, Option]) -> float:
        """The predicted saving of these options, as a share of the model's time."""
        return 1 - self.predicted(options) / self.whole

    def kinds(self, options: Mapping[str, Option]) -> set[str]:
        """The kinds of these layers; layers of one kind are alike."""
        found: set[str] = set()
        for layer, option in options.items():
            if option.lowering in _TOGETHER:
                found.add(self._manner(self._layers[layer], option.lowering))
            else:
                found.update(self._isolated.uses[layer])
        return found

    def remember(self, options: Mapping[str, Option], ratio: float) -> None:
        """Keep the measured ratio of a model with these layers rewritten, as its prediction."""
        self._reached[frozenset(options.items())] = ratio

    def learn(
        self, options: Mapping[str, Option], ratio: float, limits: tuple[float, float] = _GAINS
    ) -> None:
        """Scale the predictions of some layers to their joint saving in one model (rule 2).

        Args:
            options: The options of the layers that are rewritten in the measured model.
            ratio: The time of the measured model over the time of this one.
            limits: The smallest and the largest credible ratio of the measured saving to the predicted one.
        """
        alone = self._saving(options)
        share = float(np.clip((1 - ratio) / alone, *limits)) if alone > 0 else 1.0
        for key in self.kinds(options):
            self._gains[key] = float(np.clip(self._gain(key) * share, *_GAINS))

    def layers(self, options: Mapping[str, Option]) -> dict[str, LayerTime]:
        """The times of rewritten layers: before, predicted, and measured at the chosen ranks."""
        found: dict[str, LayerTime] = {}
        # Taken before the measurements below, which would change the predictions of layers that are alike.
        planned = {layer.id: self.tariff(layer) for layer in self._source.layers}
        self._isolated.measure_exactly(options)
        for layer in self._source.layers:
            option = options.get(layer.id)
            alone = None if option is None else self._alone(layer, option)
            if option is None or alone is None:
                continue
            times, (before, after) = planned[layer.id], alone
            # A narrow layer counts with its partners, whose savings are in its cost.
            predicted = before - (times.keep - times.cost(option)) if times.knows(option) else None
            found[layer.id] = LayerTime(before, predicted, after)
        return found

    def _alone(self, layer: Layer, option: Option) -> tuple[int, int] | None:
        """The isolated times of a layer and of its chain, or of all layers that are narrowed with it."""
        parts = self._isolated.parts(layer)
        keep = self.tariff(layer).keep
        if option.lowering is Lowering.NARROW:
            found = self._narrowed(layer)
            if found is None or option.j not in found.curves[0].ratios:
                return None
            pairs = zip(found.keeps, found.curves, strict=True)
            return sum(found.keeps), sum(round(time * curve.ratios[option.j]) for time, curve in pairs)
        known = [kind.known for _, kind in parts]
        if option.lowering is Lowering.SHARED:
            if not layer.holds_factor(option):
                known = [kind.decoders for _, kind in parts]
            option = Option(option.fold, option.k, option.j)
        if not parts or not all(option in each for each in known):
            return None
        return keep, sum(round(share * each[option]) for (share, _), each in zip(parts, known, strict=True))

    def _known(self, options: Mapping[str, Option]) -> bool:
        """Whether every option, or another rank of its kind, was measured."""
        return all(self.tariff(self._layers[name]).knows(option) for name, option in options.items())

    def timing(self, options: Mapping[str, Option], model: Model | None) -> Timing:
        """The times of a compressed model, predicted, and measured if the model is given.

        Args:
            options: The options of its layers.
            model: The model; None if it was not made.

        Raises:
            UnsupportedError: The runtime does not accept the model.
            RejectedError: The model fails on the inputs.
        """
        if model is None and not self._known(options):  # of a replayed plan
            self.layers(options)
        reached = self._reached.get(frozenset(options.items()))
        if reached is not None:
            self.learn(options, reached)
        predicted = self.predicted(options)
        calls, pairs = self._whole.calls, [(whole, None) for whole, _ in self._ranges]
        timing = Timing(self.stopwatch.name, described(calls), self.whole, predicted)
        if model is None:
            return replace(timing, calls=call_times(calls, pairs))
        measured = self._pairs(model)
        before, after = summed(calls, measured)
        layers = self.layers(options)
        # Both models were measured again, and the machine may have become slower: predict by the ratio.
        known = layers.keys() == options.keys() and all(
            time.predicted is not None for time in layers.values()
        )
        expected = round(predicted / self.whole * before) if known else None
        self.keep()
        return replace(
            timing,
            before=before,
            predicted=expected,
            after=after,
            layers=layers,
            spread=self._spread,
            calls=call_times(calls, measured),
        )

    def keep(self) -> None:
        """Keep the measurements for later runs, unless other work disturbed them."""
        is_steady = Timing("", "", self.whole, None, spread=self._spread).is_steady
        (self.stopwatch.cache.save if is_steady else self.stopwatch.cache.discard)()
