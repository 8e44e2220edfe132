"""A model with inputs of one set of shapes: how often its layers run, each use as a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from onnx_lowrank.budgets.budget import Tools
from onnx_lowrank.budgets.latency.stopwatch import Stopwatch
from onnx_lowrank.budgets.latency.whole import Call, runnable
from onnx_lowrank.engines.engine import Deployed
from onnx_lowrank.engines.runtime import Executed, Runtime
from onnx_lowrank.graph.walk import Place
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.found import Found, Layered, find_layers
from onnx_lowrank.probe.micro import Micro, micro, resized

Uses = Mapping[str, list[tuple[Micro, int]] | None]
"""For every layer its uses that run, and how often; None if a use cannot be cut out."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A model with inputs of one set of shapes.

    Attributes:
        source: The model, with its layers found for these shapes.
        call: The inputs.
    """

    source: Layered
    call: Call

    def uses(self, engine: Deployed) -> Uses:
        """Cut the layers out of the model."""
        ran = self._ran(engine)
        return {binding.layer.id: self._cut(binding, ran) for binding in self.source.bindings}

    def resized(self, layer: str, f: int, c: int) -> Iterator[tuple[str, Micro]]:
        """The uses of a layer with other numbers of features and channels, each with the key of its kind.

        Args:
            layer: The id of the layer.
            f: Its output features.
            c: Its input channels.
        """
        for binding in self.source.bindings:
            if binding.layer.id == layer:
                for index in range(len(binding.layer.uses)):
                    whole = micro(self.source.walk, binding, index)
                    part = resized(self.source.walk, binding, index, f, c)
                    if whole is not None and part is not None:
                        yield whole.key, part

    def _ran(self, engine: Deployed) -> Executed:
        """How often the nodes in bodies run; empty if no layer is in a body, or if the engine counts none."""
        hidden = any(use.scope for layer in self.source.layers for use in layer.uses)
        if not hidden or not isinstance(engine, Runtime):
            return Executed({})
        return engine.executed(self.source.model, [self.call.feed])

    def _cut(self, binding: Binding, ran: Executed) -> list[tuple[Micro, int]] | None:
        """The uses of a layer that run, as micro models, and how often; None if one cannot be cut."""
        found: list[tuple[Micro, int]] = []
        for index, use in enumerate(binding.layer.uses):
            is_known = use.scope and self.source.walk.node(Place(use.scope, use.node)).name
            runs = ran.count(use.name) if is_known else 1
            if not runs:
                continue
            part = micro(self.source.walk, binding, index)
            if part is None:
                return None
            found.append((part, runs))
        return found


def scenes(
    found: Found, tools: Tools, stopwatch: Stopwatch, check: Callable[[Found], None]
) -> Iterator[Scene]:
    """The model with inputs of every set of shapes on which it runs.

    Args:
        found: The model with its layers for the first set.
        tools: The user's inputs, the sets of shapes, and their weights.
        stopwatch: Its engine runs the model.
        check: Raises an InputError if times cannot be measured for further shapes.

    Raises:
        InputError: A set does not fit the model.
        UnsupportedError: The runtime does not accept the model.
        RejectedError: The model fails on all inputs.
    """
    for number, (shapes, weight) in enumerate(zip(tools.sets, tools.weights, strict=True)):
        here = found
        if number:
            here = find_layers(found.model, shapes, (), ())
            check(here)
        yield Scene(here, Call(runnable(found.model, tools.feed, shapes, stopwatch), weight))


def weighed(layer: str, scenes: Iterable[tuple[float, Uses]], timed: Mapping[str, Micro]) -> dict[str, float]:
    """How often a layer runs each kind of micro model, by its key, weighed over scenes.

    Args:
        layer: The id of the layer.
        scenes: The weight of every scene, and the uses of its layers.
        timed: The micro models that can be timed.

    Returns:
        Empty if one of its uses cannot be timed alone, so that the layer is kept.
    """
    found: dict[str, float] = {}
    for weight, uses in scenes:
        cut = uses.get(layer)
        if cut is None or any(part.key not in timed for part, _ in cut):
            return {}
        for part, runs in cut:
            found[part.key] = found.get(part.key, 0.0) + weight * runs
    return found
