"""Measured times of a model and its layers, and predicted times of the layers' options.

Rules:

1. A layer is measured alone, in surroundings like those in the model (`probe.micro`). Its time is relative
   to that of the whole model in the same turns. Layers that are alike are measured once.
2. The time of an option is relative to that of its layer. First, every (fold, k) with MACs that permit a
   gain is measured at one rank. Then those that can be best at some time are measured at more ranks.
3. The saving of a layer inside the model can differ from its isolated saving (fusions, caches). `learn`
   scales predictions to the saving of a measured model. `correct` measures one model for every important
   kind of layer; it trusts a measurement more if the saving is large beside the noise. The prediction for
   options that were measured together in one model is that measurement.
4. The time of a use in a body counts as often as the use ran. A layer without any run is kept.
5. With several sets of shapes, times are the means over the sets by their weights. A layer has uses of its
   own in every set; they are of other kinds if their shapes differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnx_lowrank.allocate.cost import Costs, Line, Linear
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.allocate.times import (
    Curve,
    Times,
    by_promise,
    faster,
    middle_rank,
    sampled,
    worth_measuring,
)
from onnx_lowrank.budgets.budget import Budget, Gauge
from onnx_lowrank.budgets.latency.clock import Pace
from onnx_lowrank.budgets.latency.scene import Scene, weighed
from onnx_lowrank.budgets.latency.stopwatch import Stopwatch
from onnx_lowrank.budgets.latency.whole import (
    Call,
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
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.files.load import Model
from onnx_lowrank.measures import Errors
from onnx_lowrank.probe.micro import Micro
from onnx_lowrank.progress import Step

_log = logging.getLogger(__name__)

_LAYERS = Pace(seconds=4.0, spread=0.02)
_FIRST_LOOK = Pace(seconds=0.0)
_CHAINS = Pace(seconds=2.0, spread=0.02)
_BUDGET = 240.0
"""Approximate seconds to measure the chains of all layers; each chain gets a least number of rounds."""

_LEAST_OPTIONS, _BUILT = 8, 2 * 2**30
"""The options of a layer that are measured at a time: this number, or as many as make 2 GiB of models."""

_EFFICIENCY = 0.5
"""A chain may need only this share of the time of another chain with the same MACs."""

_BUNCHES = 4  # the usual number of bunches in which the options of a layer are measured
_GAINS = (-1.0, 1.5)
"""Credible ratios of a saving inside the model to the predicted one; others are measurement errors."""

_NOISE = 0.01
"""Approximate spread of the ratio of two models' times between measurements."""

_JUDGED = 16
"""The number of kinds of layers that are measured in the model: those with the largest savings."""

_Key = tuple[Fold, int]


@dataclass(slots=True)
class _Kind:
    """Uses that are alike.

    Attributes:
        micro: One of them, as a model.
        time: The time of each, in nanoseconds.
        gain: The saving of an option inside the model over its isolated saving.
        looks: Relative times of options from a brief measurement, which selects options for a longer one.
        known: The relative times of options, measured.
    """

    micro: Micro
    time: int
    gain: float = 1.0
    looks: dict[Option, float] = field(default_factory=dict)
    known: dict[Option, float] = field(default_factory=dict)


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
        self._whole = Whole(self._source.model, tuple(scene.call for scene in scenes), stopwatch)
        cut = [(scene.call.weight, scene.uses(stopwatch.engine)) for scene in scenes]
        self._kinds: dict[str, _Kind] = {}
        self._ranges: list[Pair] = []
        for call, (_, uses) in zip(self._whole.calls, cut, strict=True):
            self._time(call, {part.key: part for each in uses.values() for part, _ in each or ()})
        self.whole, _ = summed(self._whole.calls, self._ranges)
        self._reached: dict[frozenset[tuple[str, Option]], float] = {}
        _log.debug("the model takes %.3f ms, and has %d kinds of layers", self.whole / 1e6, len(self._kinds))
        # A layer is kept if one of its uses cannot be timed in isolation.
        timed = {key: kind.micro for key, kind in self._kinds.items()}
        self._uses = {layer.id: weighed(layer.id, cut, timed) for layer in self._source.layers}

    def _time(self, call: Call, parts: Mapping[str, Micro]) -> None:
        """Time the model on the inputs of one call, and the kinds of layers that are new there."""
        new = {key: part for key, part in parts.items() if key not in self._kinds}
        model = (self._source.model, call.feed)
        try:
            whole, shares = self.stopwatch.shares(model, tuple(new.values()), _LAYERS)
        except (UnsupportedError, RejectedError):
            new = {key: part for key, part in new.items() if self.stopwatch.accepts(part)}
            whole, shares = self.stopwatch.shares(model, tuple(new.values()), _LAYERS)
        self._ranges.append((whole, whole))
        for (key, part), share in zip(new.items(), shares, strict=True):
            self._kinds[key] = _Kind(part, round(whole * share))

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
        """Measure the promising options of all layers that have not been measured yet (rule 2).

        Args:
            errors: For each layer the errors of its options, which select the promising ones.
            grid: The ranks to choose from.
            step: Receives the share that is done.
        """
        wanted: dict[str, list[tuple[Layer, Errors]]] = {}
        for layer, table in zip(self._source.layers, errors, strict=True):
            for key in self._uses[layer.id]:
                wanted.setdefault(key, []).append((layer, table))
        # Progress counts a layer by its time, because a slow layer takes longer to measure.
        total = sum(self._kinds[key].time for key in wanted) or 1
        done = 0
        try:
            for key, layers in wanted.items():
                kind = self._kinds[key]
                seconds = _BUDGET * kind.time / total / _BUNCHES
                self._measure(kind, layers, grid, replace(_CHAINS, seconds=min(seconds, _CHAINS.seconds)))
                done += kind.time
                step(done / total)
        finally:  # keep what was measured, even if the user interrupts the rest
            self.stopwatch.cache.save()

    def _measure(
        self, kind: _Kind, layers: Iterable[tuple[Layer, Errors]], grid: Grid[Costs], pace: Pace
    ) -> None:
        """Measure the promising options of layers that are alike (rule 2)."""
        for layer, errors in layers:
            ranks = {key: js for key in errors if (js := grid.ranks(layer, *key))}
            work = {key: _work(layer, Option(*key, middle_rank(js))) for key, js in ranks.items()}
            most = max(_LEAST_OPTIONS, _BUILT // kind.micro.bytes)
            promising = by_promise(worth_measuring(errors, ranks, work, _EFFICIENCY), errors, ranks, work)
            first = [
                Option(*key, middle_rank(ranks[key]), lowering)
                for key in promising
                for lowering in layer.lowerings(key[1])
            ][:most]
            new = [option for option in first if option not in kind.looks]
            kind.looks |= self.stopwatch.chains(kind.micro, new, _FIRST_LOOK)
            fastest: dict[_Key, Option] = {}
            for option in sorted(kind.looks.keys() & first, key=kind.looks.__getitem__):
                fastest.setdefault((option.fold, option.k), option)
            middle = {key: kind.looks[option] for key, option in fastest.items()}
            best = by_promise(worth_measuring(errors, ranks, middle), errors, ranks, middle)
            more = [replace(fastest[key], j=j) for key in best for j in sampled(ranks[key])]
            self._add(kind, more[:most], pace)

    def _add(self, kind: _Kind, options: Iterable[Option], pace: Pace) -> None:
        missing = [option for option in options if option not in kind.known]
        kind.known |= self.stopwatch.chains(kind.micro, missing, pace)

    def tariff(self, layer: Layer) -> Times:
        """The known times of one layer, summed over its uses, which can be of several kinds."""
        kinds = {key: self._kinds[key] for key in self._uses[layer.id]}
        shares = {key: runs * kinds[key].time for key, runs in self._uses[layer.id].items()}
        keep = max(1, round(sum(shares.values()))) if shares else 0
        curves: dict[_Key, Curve] = {}
        if keep:
            shared = set.intersection(*(set(kind.known) for kind in kinds.values()))
            ratios: dict[tuple[Fold, int, Lowering], dict[int, float]] = {}
            for option in shared:
                ratio = sum(kind.known[option] * shares[key] for key, kind in kinds.items()) / keep
                ratios.setdefault((option.fold, option.k, option.lowering), {})[option.j] = ratio
            for (fold, k, lowering), known in ratios.items():
                curve = Curve(known, lowering)
                curves[fold, k] = faster(curves[fold, k], curve) if (fold, k) in curves else curve
        gain = sum(kind.gain * shares[key] for key, kind in kinds.items()) / keep if keep else 1.0
        return Times(keep, curves, gain)

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
        """Measure the saving of every kind of layer inside the model (rule 3).

        Args:
            options: The options of the layers that are rewritten.
            reached: The measured ratio of the model with all of them.
            ratio: Measures the ratio of the model with a part of them (`ratio`).
            step: Receives the share that is done.
        """
        kinds: dict[str, dict[str, Option]] = {}
        for layer, option in options.items():
            kinds.setdefault("/".join(sorted(self._uses[layer])), {})[layer] = option
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
        return {key for layer in options for key in self._uses[layer]}

    def remember(self, options: Mapping[str, Option], ratio: float) -> None:
        """Keep the measured ratio of a model with these layers rewritten, as its prediction."""
        self._reached[frozenset(options.items())] = ratio

    def learn(
        self, options: Mapping[str, Option], ratio: float, limits: tuple[float, float] = _GAINS
    ) -> None:
        """Scale the predictions of some layers to their joint saving in one model (rule 3).

        Args:
            options: The options of the layers that are rewritten in the measured model.
            ratio: The time of the measured model over the time of this one.
            limits: The smallest and the largest credible ratio of the measured saving to the predicted one.
        """
        alone = self._saving(options)
        share = float(np.clip((1 - ratio) / alone, *limits)) if alone > 0 else 1.0
        for key in self.kinds(options):
            self._kinds[key].gain = float(np.clip(self._kinds[key].gain * share, *_GAINS))

    def layers(self, options: Mapping[str, Option]) -> dict[str, LayerTime]:
        """The times of rewritten layers: before, predicted, and measured at the chosen ranks."""
        found: dict[str, LayerTime] = {}
        # Taken before the measurements below, which would change the predictions of layers that are alike.
        planned = {layer.id: self.tariff(layer) for layer in self._source.layers}
        for layer in self._source.layers:
            option = options.get(layer.id)
            if option is None or not self._uses[layer.id]:
                continue
            times = planned[layer.id]
            kinds = [(self._kinds[key], runs) for key, runs in self._uses[layer.id].items()]
            for kind, _ in kinds:
                self._add(kind, [option], _CHAINS)
            if all(option in kind.known for kind, _ in kinds):
                after = sum(round(runs * kind.time * kind.known[option]) for kind, runs in kinds)
                is_known = (option.fold, option.k) in times.curves
                found[layer.id] = LayerTime(times.keep, times.cost(option) if is_known else None, after)
        return found

    def _known(self, options: Mapping[str, Option]) -> bool:
        """Whether every option, or another rank with the same fold and slices, was measured."""
        times = {layer.id: self.tariff(layer).curves for layer in self._source.layers}
        return all((option.fold, option.k) in times[layer] for layer, option in options.items())

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


def _work(layer: Layer, option: Option) -> float:
    """The MACs of an option over the MACs of its layer."""
    return (macs(layer, option) or 0) / (macs(layer) or 1)
