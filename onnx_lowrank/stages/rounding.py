"""Fits the layers of a low-rank model to their quantization; `stages.quantizing` has the rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.prefix import Sight, Step
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk, label
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.found import Found
from onnx_lowrank.linalg import rounding as linalg
from onnx_lowrank.operators.geometry import outputs
from onnx_lowrank.quantize.kind import Quantizer
from onnx_lowrank.rewrite.replace import Rewritten
from onnx_lowrank.stages.targets import Share
from onnx_lowrank.stages.walked import Recovered, Refit
from onnx_lowrank.work.executor import Threads

_LEAST = 1e-3
"""The least range of a rank, relative to the largest one: those below count as this."""

Scales = NDArray[np.float64]
Round = Callable[[NDArray[Any]], NDArray[Any]]

_FACTORS = 2


def name_of(walk: Walk, binding: Binding) -> str:
    """The name of a layer's first node."""
    use = binding.layer.uses[0]
    return label(walk.node(Place(use.scope, use.node)))


def pairs(found: Found, low: Rewritten) -> Iterator[tuple[Binding, Binding]]:
    """The encoder and the decoder of every chain of which each belongs to no other chain.

    Args:
        found: The layers of the low-rank model.
        low: The low-rank model.
    """
    by_node = {name_of(found.walk, binding): binding for binding in found.bindings}
    chains = [[by_node[n] for n in each[0] if n in by_node] for each in low.chains.values()]
    uses = Counter(link.layer.id for links in chains for link in links)
    for links in chains:
        if len(links) == _FACTORS and all(uses[link.layer.id] == 1 for link in links):
            encoder, decoder = links
            if _is_read_alone(found, encoder, decoder):
                yield encoder, decoder


def _is_read_alone(found: Found, encoder: Binding, decoder: Binding) -> bool:
    """Whether only the decoder reads the encoder's result, which no bias changes, feature by feature."""
    walk = found.walk
    (use, *others), (reader, *_) = encoder.layer.uses, decoder.layer.uses
    result = walk.node(Place(use.scope, use.node)).output[0]
    reading = walk.node(Place(reader.scope, reader.node)).input
    graph = found.model.proto.graph
    readers = sum(list(node.input).count(result) for node in graph.node)
    is_output = any(value.name == result for value in graph.output)
    decoder_inputs = decoder.layer.shape[0] * decoder.layer.shape[2]
    return (
        not (others or use.scope or is_output)
        and readers == 1
        and result in reading
        and encoder.layer.f == decoder_inputs
        and bias(found.model, walk, encoder) is None
    )


def scale_of(size: NDArray[np.float64]) -> Scales:
    """The scales that balance the ranks between both factors: the square roots of their ranges.

    The whole range on one side would make that factor coarse: on ResNet-20 at half its parameters the square
    root lowers the error of 8 bits by 15 %, no root or the whole range by nothing.
    """
    largest = size.max(initial=0)
    relative = np.maximum(size / largest, _LEAST) if largest > 0 else np.ones_like(size)
    return np.asarray(np.sqrt(relative))


def columns(weight: NDArray[Any], scales: Scales) -> NDArray[Any]:
    """A decoder whose inputs are divided by scales, shape (g, f, c, *kernel); the weight times the scales."""
    g, _, c, *kernel = weight.shape
    shape = (g, 1, c, *[1] * len(kernel))
    return np.asarray(weight * scales.reshape(shape), weight.dtype)


def rows(weight: NDArray[Any], scales: Scales) -> NDArray[Any]:
    """An encoder whose outputs are divided by scales, shape (g, f, c, *kernel)."""
    g, f, _, *kernel = weight.shape
    return np.asarray(weight / scales.reshape(g, f, 1, *[1] * len(kernel)), weight.dtype)


class Rounding(Refit):
    """Fits a layer and rounds it.

    Attributes:
        scales: For an encoder, the scales that its decoder has to take up, shape (ranks,).
    """

    _keeps_plain = False

    def __init__(
        self,
        model: Model,
        walk: Walk,
        binding: Binding,
        calibration: Calibration,
        threads: Threads,
        method: Quantizer,
    ) -> None:
        super().__init__(model, walk, binding, calibration, threads)
        self._method = method
        self.scales: Scales | None = None

    def behind(self, scales: Scales) -> None:
        """Take up the scales of the encoder before this layer."""
        self._weight = columns(self._weight, scales)

    def run_before(self, step: Step) -> Recovered | None:
        """Like `run`, for an encoder whose ranks are to have balanced ranges."""
        peak = np.zeros(self._weight.shape[:2])

        def watched(sights: Iterator[Sight]) -> Iterator[Sight]:
            for sight in sights:
                for values in outputs(self._gatherer.geometry, sight.y):
                    np.maximum(peak, np.abs(values).max(axis=0, initial=0), out=peak)
                yield sight

        result = self.run(_Watched(step, watched))
        if result is None:
            return None
        self.scales = scale_of(peak.reshape(-1))
        made = rows(np.asarray(result.made), self.scales)
        step.substitute(made.astype(np.float64))
        return Recovered(made, None, result.fit)

    def _round(self, weight: NDArray[Any]) -> NDArray[Any]:
        return self._method.rounded(weight, self._binding.layer.uses[0].op)

    def _fitted(self, shares: Mapping[bool, Share], ridge: float, steps: int) -> NDArray[Any]:
        return self._round(super()._fitted(shares, ridge, steps))

    def _plain(self) -> NDArray[Any]:
        return self._round(self._weight)


class _Watched(Step):
    """A step whose tensors something else sees, too."""

    def __init__(self, step: Step, watched: Callable[[Iterator[Sight]], Iterator[Sight]]) -> None:
        self.binding, self.rectified, self.changed = step.binding, step.rectified, step.changed
        self.batches = lambda *, original=False: watched(step.batches(original=original))  # type: ignore[method-assign]
        self.again, self.substitute = step.again, step.substitute  # type: ignore[method-assign]


def best(
    factors: tuple[NDArray[Any], NDArray[Any]], rounds: tuple[Round, Round], *, balanced: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The encoder and the decoder that lose least when both are rounded, from the weights alone.

    The candidates are the factors as they are, a decoder fitted to the rounded encoder, and an encoder fitted
    to the rounded decoder. A fit is rounded in turn, so it is not always the best.

    Args:
        factors: The canonical weights of the encoder and the decoder.
        rounds: How each is rounded.
        balanced: Whether the ranks get balanced ranges first, as for white inputs.
    """
    exact = (factors[0].astype(np.float64), factors[1].astype(np.float64))
    if balanced:
        scales = scale_of(np.linalg.norm(exact[0].reshape(*exact[0].shape[:2], -1), axis=2).reshape(-1))
        exact = rows(exact[0], scales), columns(exact[1], scales)
    rounded = rounds[0](exact[0]), rounds[1](exact[1])
    candidates = [
        exact,
        (exact[0], linalg.decoder(exact[0], rounded[0], exact[1])),
        (linalg.encoder(exact[1], rounded[1], exact[0]), exact[1]),
    ]
    made = [(rounds[0](one), rounds[1](other)) for one, other in candidates]
    chosen = min(made, key=lambda pair: linalg.error(exact, pair))
    return chosen[0].astype(factors[0].dtype), chosen[1].astype(factors[1].dtype)
