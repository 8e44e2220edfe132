"""Measures the layers of a model and their options in isolation.

Rules:

1. A layer is measured alone, in surroundings like those in the model (`probe.micro`), which do not count
   (`stopwatch`). Its time is relative to that of the whole model in the same turns. Layers that are alike are
   measured once.
2. The time of an option is relative to that of its layer. First, every (fold, k) with MACs that permit a
   gain is measured at one rank. Then those that can be best at some time are measured at a few more ranks;
   between them the time is linear in the rank.
3. Layers that change together are measured one by one: a layer and its partners at some widths, and a layer
   that shares an encoder with the encoder and without it. The operators between narrower layers count as they
   are, so such a prediction is too high rather than too low.
4. The time of a use in a body counts as often as the use ran. A layer without any run is kept.
5. With several sets of shapes, times are the means over the sets by their weights. A layer has uses of its
   own in every set; they are of other kinds if their shapes differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from onnx_lowrank.allocate.cost import Costs, Linear
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.options import shared_ranks
from onnx_lowrank.allocate.times import by_promise, middle_rank, sampled, worth_measuring
from onnx_lowrank.budgets.latency.clock import Pace
from onnx_lowrank.budgets.latency.kinds import Kind, widths_of
from onnx_lowrank.budgets.latency.scene import Scene, weighed
from onnx_lowrank.budgets.latency.stopwatch import Stopwatch
from onnx_lowrank.budgets.latency.whole import Call
from onnx_lowrank.budgets.macs import known_macs, macs
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.measures import Errors
from onnx_lowrank.probe.micro import Micro
from onnx_lowrank.progress import Step

_LAYERS = Pace(seconds=1.0, spread=0.02)
_CHAINS = Pace(seconds=0.5, spread=0.02)
_BUDGET = 12.0
"""Approximate seconds to measure the chains of all layers; each chain gets a least number of rounds."""

_LEAST_OPTIONS, _BUILT = 8, 2 * 2**30
"""The options of a layer that are measured at a time: this number, or as many as make 2 GiB of models."""

_EFFICIENCY = 0.5
"""A chain may need only this share of the time of another chain with the same MACs."""

_BUNCHES = 4  # the usual number of bunches in which the options of a layer are measured
_Key = tuple[Fold, int]


class Isolated:
    """The times of a model's layers and of their options, each in isolation.

    Attributes:
        kinds: The measured times of uses that are alike, by the key of their micro model.
        uses: For every layer, how often its uses of each kind run in a call; none if one cannot be timed.
        widths: For layers that were measured with their partners, the widths.
        wholes: The time of the model for every call, in nanoseconds.
    """

    def __init__(self, scenes: Sequence[Scene], stopwatch: Stopwatch) -> None:
        """Measure the model and its layers.

        Args:
            scenes: The model with inputs of every set of shapes, the one that MACs are counted for first.
            stopwatch: Measures the times.

        Raises:
            UnsupportedError: The runtime does not accept the model.
            RejectedError: The model fails on the inputs.
        """
        self.kinds: dict[str, Kind] = {}
        self.widths: dict[str, tuple[int, ...]] = {}
        self.wholes: list[int] = []
        self._scenes = scenes
        self._source = scenes[0].source
        self._layers = {layer.id: layer for layer in self._source.layers}
        self._stopwatch = stopwatch
        cut = [(scene.call.weight, scene.uses(stopwatch.engine)) for scene in scenes]
        for scene, (_, uses) in zip(scenes, cut, strict=True):
            self._time(scene.call, {part.key: part for each in uses.values() for part, _ in each or ()})
        # A layer is kept if one of its uses cannot be timed in isolation.
        timed = {key: kind.micro for key, kind in self.kinds.items()}
        self.uses = {layer.id: weighed(layer.id, cut, timed) for layer in self._source.layers}

    def _time(self, call: Call, parts: Mapping[str, Micro]) -> None:
        """Time the model on the inputs of one call, and the kinds of layers that are new there."""
        new = {key: part for key, part in parts.items() if key not in self.kinds}
        model = (self._source.model, call.feed)
        try:
            whole, shares = self._stopwatch.shares(model, tuple(new.values()), _LAYERS)
        except (UnsupportedError, RejectedError):
            new = {key: part for key, part in new.items() if self._stopwatch.accepts(part)}
            whole, shares = self._stopwatch.shares(model, tuple(new.values()), _LAYERS)
        self.wholes.append(whole)
        for (key, part), share in zip(new.items(), shares, strict=True):
            self.kinds[key] = Kind(part, round(whole * share))

    def parts(self, layer: Layer) -> list[tuple[float, Kind]]:
        """The kinds of a layer's uses, each with the time that its uses take."""
        return [(runs * self.kinds[key].time, self.kinds[key]) for key, runs in self.uses[layer.id].items()]

    def measure(self, errors: Sequence[Errors], grid: Grid[Costs], step: Step) -> None:
        """Measure the promising options of all layers that have not been measured yet (rule 2).

        Args:
            errors: For each layer the errors of its options, which select the promising ones.
            grid: The ranks to choose from.
            step: Receives the share that is done.
        """
        wanted: dict[str, list[tuple[Layer, Errors]]] = {}
        for layer, table in zip(self._source.layers, errors, strict=True):
            for key in self.uses[layer.id]:
                wanted.setdefault(key, []).append((layer, table))
        # Progress counts a layer by its time, because a slow layer takes longer to measure.
        total = sum(self.kinds[key].time for key in wanted) or 1
        done = 0
        try:
            for key, layers in wanted.items():
                kind = self.kinds[key]
                seconds = _BUDGET * kind.time / total / _BUNCHES
                self._measure(kind, layers, grid, replace(_CHAINS, seconds=min(seconds, _CHAINS.seconds)))
                done += kind.time
                step(done / total)
        finally:  # keep what was measured, even if the user interrupts the rest
            self._stopwatch.cache.save()

    def _measure(
        self, kind: Kind, layers: Iterable[tuple[Layer, Errors]], grid: Grid[Costs], pace: Pace
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
            self._add(kind, first, pace)
            fastest: dict[_Key, Option] = {}
            for option in sorted(kind.known.keys() & first, key=kind.known.__getitem__):
                fastest.setdefault((option.fold, option.k), option)
            middle = {key: kind.known[option] for key, option in fastest.items()}
            best = by_promise(worth_measuring(errors, ranks, middle), errors, ranks, middle)
            more = [replace(fastest[key], j=j) for key in best for j in sampled(ranks[key])]
            self._add(kind, more[:most], pace)

    def measure_together(
        self, narrow: Sequence[Layer], shared: Sequence[Layer], grid: Grid[Costs], step: Step
    ) -> None:
        """Measure what layers take that change together with others and have not been measured yet (rule 3).

        Args:
            narrow: The layers that may be narrowed with their partners.
            shared: The layers that may share an encoder.
            grid: The ranks to choose from.
            step: Receives the share that is done.
        """
        families = dict.fromkeys(layer.siblings for layer in shared)
        tops = {names: self._top([self._layers[name] for name in names], grid.block) for names in families}
        count = len(narrow) + len(shared)
        try:
            for done, layer in enumerate((*narrow, *shared), 1):
                if done <= len(narrow):
                    self._measure_widths(layer, widths_of(layer, grid.block), _CHAINS)
                elif ranks := range(grid.block, tops[layer.siblings] + 1, grid.block):
                    self._measure_ranks(layer, sampled(ranks), _CHAINS)
                step(done / count)
        finally:
            self._stopwatch.cache.save()

    def _top(self, siblings: Sequence[Layer], block: int) -> int:
        """The largest rank at which an encoder of these layers saves MACs; 0 if there is none."""
        ranks = shared_ranks(siblings, Lowering.SHARED, Grid(Linear(known_macs), block))
        return int(ranks[-1]) if ranks.size else 0

    def _measure_ranks(self, layer: Layer, ranks: Iterable[int], pace: Pace) -> None:
        """Measure a layer's chains at some ranks, and their decoders alone, for a shared encoder."""
        options = [Option(layer.shared_fold, 1, j) for j in ranks]
        for key in self.uses[layer.id]:
            kind = self.kinds[key]
            self._add(kind, options, pace)
            missing = [option for option in options if option not in kind.decoders]
            if missing:
                made = kind.micro.chains()
                cut = {option: made.decoder(option) for option in missing}
                found = {option: part for option, part in cut.items() if part is not None}
                kind.decoders |= self._stopwatch.others(kind.micro, found, pace)

    def _measure_widths(self, layer: Layer, widths: Iterable[int], pace: Pace) -> None:
        """Measure a layer and its partners at some widths."""
        wanted: dict[str, dict[tuple[int, int], Micro]] = {}
        chosen = sorted({*self.widths.get(layer.id, ()), *widths})
        members = [member.id for member in (*layer.partners, layer)]
        for width in chosen:
            for name, less in zip(members, layer.at_width(width), strict=True):
                for scene in self._scenes:
                    for key, part in scene.resized(name, less.f, less.c):
                        if key in self.kinds and (less.f, less.c) not in self.kinds[key].sizes:
                            wanted.setdefault(key, {})[less.f, less.c] = part
        for key, parts in wanted.items():
            kind = self.kinds[key]
            kind.sizes |= self._stopwatch.others(kind.micro, parts, pace)
        self.widths[layer.id] = tuple(chosen)

    def _add(self, kind: Kind, options: Iterable[Option], pace: Pace) -> None:
        missing = [option for option in options if option not in kind.known]
        kind.known |= self._stopwatch.chains(kind.micro, missing, pace)

    def measure_exactly(self, options: Mapping[str, Option]) -> None:
        """Measure the chosen options of all layers."""
        chains: dict[str, list[Option]] = {}
        for layer in self._source.layers:
            option = options.get(layer.id)
            if option is None or not self.uses[layer.id]:
                continue
            if option.lowering is Lowering.NARROW:
                self._measure_widths(layer, [option.j], _CHAINS)
            elif option.lowering is Lowering.SHARED:
                self._measure_ranks(layer, [option.j], _CHAINS)
            else:
                for key in self.uses[layer.id]:
                    chains.setdefault(key, []).append(option)
        for key, chosen in chains.items():
            self._add(self.kinds[key], dict.fromkeys(chosen), _CHAINS)


def _work(layer: Layer, option: Option) -> float:
    """The MACs of an option over the MACs of its layer."""
    return (macs(layer, option) or 0) / (macs(layer) or 1)
