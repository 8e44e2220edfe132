"""Moments of the tensors around one layer of a walk, over both shares of the calibration inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.moments import Accumulator, merged_pairs
from onnx_lowrank.calibrate.prefix import Sight
from onnx_lowrank.core.factors import Moments, Targets
from onnx_lowrank.operators.geometry import Geometry, outputs, patches
from onnx_lowrank.stages.targets import Changes, Share
from onnx_lowrank.work.executor import Threads

_LANES = 4  # Not the number of cores, or sums would have other bits on other machines.
_LANE_BYTES = 2**28  # The most that the sums of one lane may take; larger sums have only one lane.


def sums_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of the moments of a layer's inputs and targets, for its canonical shape (g, f, c, *kernel)."""
    g, f, *rest = shape
    p = prod(rest)
    return 8 * g * p * (p + f)


@dataclass(frozen=True, slots=True)
class Behind:
    """A layer's squared error behind a Relu on held-out inputs, and targets that lower it."""

    loss: float
    shares: dict[bool, Share]


@dataclass(frozen=True, slots=True)
class Product:
    """The target inside a node that does more than multiply, from the node's input in the original model.

    Attributes:
        weight: The canonical weight as matrices, shape (g, f, p).
        bias: The bias that the node adds to the product, shape (g, f).
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def rows(self, form: Geometry, sight: Sight) -> Iterator[NDArray[Any]]:
        """The products of the rows of x, in chunks of shape (rows, g, f)."""
        if sight.x is None:
            raise RuntimeError("a target inside a node needs its input in the original model")
        for x in patches(form, sight.x):
            yield np.swapaxes(np.swapaxes(x, 0, 1) @ np.swapaxes(self.weight, 1, 2), 0, 1) + self.bias


@dataclass(frozen=True, slots=True)
class Gatherer:
    """Sums the tensors around one layer.

    Attributes:
        layer: The layer's id.
        geometry: The geometry of its operator.
        shape: Its canonical shape, (g, f, c, *kernel).
        threads: Where to compute.
        is_weighed: Whether the fit asks how many independent vectors its inputs are worth.
        product: The target, if the node's result is not the target.
    """

    layer: str
    geometry: Geometry
    shape: tuple[int, ...]
    threads: Threads
    is_weighed: bool
    product: Product | None = None

    def shares(self, sights: Iterator[Sight]) -> dict[bool, Share]:
        """The moments of both shares, by whether they are held out.

        Raises:
            InputError: The activations are not finite.
        """
        g, f, *rest = self.shape
        p = prod(rest)
        lanes = _LANES if sums_bytes(self.shape) <= _LANE_BYTES else 1
        sums: list[dict[bool, Accumulator]] = [{} for _ in range(lanes)]

        def add(lane: dict[bool, Accumulator], sight: Sight) -> None:
            if sight.held not in lane:
                is_weighed = self.is_weighed and not sight.held
                lane[sight.held] = Accumulator(f"layer {self.layer!r}", g, p, f, is_weighed=is_weighed)
            for x, y, beside, samples in _rows(self.geometry, sight, self.product):
                target = y if beside is None else y + (beside[0] - beside[1])
                lane[sight.held].add(np.concatenate([x, target], axis=2), samples)
            lane[sight.held].close_block()

        # Batch n always goes to lane n modulo the number of lanes, or the bits would depend on the threads.
        self.threads.in_turn(add, sums, sights)
        ends = [(held, lane) for held in (False, True) for lane in sums if held in lane]
        # Accumulators multiply their last vectors here, which is most of the work with few samples.
        pairs = self.threads.each(lambda end: end[1][end[0]].pair(), ends)
        parts: dict[bool, list[tuple[Moments, Targets]]] = {False: [], True: []}
        for (held, _), pair in zip(ends, pairs, strict=True):
            if pair is not None:
                parts[held].append(pair)
        return {held: Share(*merged_pairs(own)) for held, own in parts.items()}

    def behind_relu(
        self,
        sights: Iterator[Sight],
        shares: Mapping[bool, Share],
        weight: NDArray[np.float64],
        added: NDArray[np.float64] | float,
        bias: NDArray[np.float64] | float,
    ) -> Behind:
        """The held-out error of a map of the layer behind the Relu, and targets that lower it.

        If both models are below zero there, the error is zero, and the target is the layer's output. If only
        the original is, the target is zero.

        Args:
            sights: The tensors around the layer.
            shares: The moments that `shares` gave.
            weight: The canonical weight of the map, shape (g, f, c, *kernel).
            added: The bias that a node behind the layer adds in the original, shape (g · f,).
            bias: The whole bias of the map, shape (g · f,).
        """
        sums = [{held: Changes(share) for held, share in shares.items()} for _ in range(_LANES)]
        matrices = weight.reshape(*self.shape[:2], -1).astype(np.float32)
        before, total = (self._grouped(values) for values in (added, bias))

        def add(lane: dict[bool, Changes], sight: Sight) -> None:
            for x, y, beside, _ in _rows(self.geometry, sight):
                given = np.swapaxes(np.swapaxes(x, 0, 1) @ np.swapaxes(matrices, 1, 2), 0, 1) + total
                wanted, got, linear = y + before, given, y
                if beside is not None:
                    linear = y + (beside[0] - beside[1])
                    wanted, got = wanted + beside[0], given + beside[1]
                lost = wanted - got
                # Not `lost` below zero in the original: there every output up to 0 is as good as another.
                excess = np.where(wanted > 0, lost, np.minimum(-got, 0))
                lane[sight.held].add(x, linear, excess - lost, np.maximum(wanted, 0) - np.maximum(got, 0))

        # Batch n always goes to lane n modulo the number of lanes, or the bits would depend on the threads.
        self.threads.in_turn(add, sums, sights)
        whole = {held: Changes.merged([lane[held] for lane in sums]) for held in shares}
        return Behind(whole[True].lost, {held: changes.share() for held, changes in whole.items()})

    def _grouped(self, values: NDArray[np.float64] | float) -> NDArray[np.float32]:
        """Values of the output features in the shape of a row, (g, f)."""
        g, f = self.shape[:2]
        return np.broadcast_to(np.asarray(values), g * f).reshape(g, f).astype(np.float32)


class _Rows(NamedTuple):
    """A chunk of rows.

    Attributes:
        x: Inputs x̂, shape (rows, g, p).
        y: Outputs of the original model, shape (rows, g, f).
        beside: The residuals added to y in both models, of y's shape; None if there are none.
        samples: The number of each row's sample, ascending, shape (rows,); None if it is unknown.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    beside: tuple[NDArray[Any], NDArray[Any]] | None
    samples: NDArray[np.intp] | None


def _rows(form: Geometry, sight: Sight, product: Product | None = None) -> Iterator[_Rows]:
    """The rows around a layer in chunks, without those that do not count."""
    y = _joined(outputs(form, sight.y) if product is None else product.rows(form, sight))
    beside = [] if sight.beside is None else [_joined(outputs(form, value)) for value in sight.beside]
    shown = sight.shown if sight.shown is not None and len(sight.shown) == len(y) else None
    samples = None
    if sight.samples > 1 and not any(len(v) % sight.samples for v in (sight.x_hat, y) if v.ndim):
        samples = np.repeat(np.arange(sight.samples), len(y) // sight.samples)
    start = 0
    for x in patches(form, sight.x_hat):
        part = slice(start, start + len(x))
        start += len(x)
        rows = [x, y[part], *(value[part] for value in beside)]
        own = None if samples is None else samples[part]
        if shown is not None:
            kept = np.flatnonzero(shown[part])
            # Not the mask itself, with which NumPy copies element by element.
            rows, own = [each.take(kept, axis=0) for each in rows], None if own is None else own[kept]
        x, of_layer, *both = rows
        yield _Rows(x, of_layer, (both[0], both[1]) if both else None, own)


def _joined(chunks: Iterator[NDArray[Any]]) -> NDArray[Any]:
    first, *others = chunks
    return np.concatenate([first, *others]) if others else first
