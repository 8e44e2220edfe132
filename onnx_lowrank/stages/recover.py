"""Closed-form recovery: every layer compensates for the errors of the compressed layers before it.

Rules:

1. The layers are walked in execution order. Each is fitted to its outputs y in the original model, from its
   inputs x̂ in the compressed model: E‖y − Ŵ x̂‖². If a residual connection is added to y, the error that the
   compressed layers made in the residual is added to the target, too.
2. Held-out inputs are the judge. The ridge is the best one for them, refinement continues while their error
   falls, and the layer's factors for its own inputs (`work.fitting`) are taken if they do better.
3. Layers that share an encoder get it from the inputs x̂ of the first of them. Each of their decoders is then
   fitted by the rules above.
4. Before a Relu, only the error behind it counts: the layer is refitted to lower that error.
   This is the nonlinear asymmetric reconstruction of Zhang, Zou, He, Sun, "Accelerating Very Deep
   Convolutional Networks for Classification and Detection", 2016, by majorization.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil, prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.measurement import Statistics
from onnx_lowrank.calibrate.moments import Accumulator, merged, split
from onnx_lowrank.calibrate.prefix import Prefix, Sight, Step
from onnx_lowrank.core.factors import Factors, Fit, LayerFit, Moments
from onnx_lowrank.core.layer import Layer, sharing
from onnx_lowrank.core.option import Lowering, Option
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import geometry
from onnx_lowrank.linalg import selection, shared
from onnx_lowrank.linalg.activations import fit
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.quadratic import (
    INPUT_RIDGE,
    Quadratic,
    best_ridge,
    error,
    of_weight,
    shrinkage,
)
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.geometry import Geometry, outputs, patches
from onnx_lowrank.rewrite.replace import Replacement
from onnx_lowrank.stages.fit import Fitted, shared_item, way_to
from onnx_lowrank.stages.targets import Changes, Share
from onnx_lowrank.work.executor import Executor, Threads
from onnx_lowrank.work.fitting import (
    STEPS,
    CertificateItem,
    activation_factors,
    certificate,
    exact,
    stored_as,
)
from onnx_lowrank.work.sharing import stored_encoder
from onnx_lowrank.work.weights import reference

T = TypeVar("T")

_FEW_STEPS = 12  # Refinement steps for targets that have changed a little.
_SEEN = 256  # Approximate number of samples that show the error behind a Relu.
_LANES = 4  # Not the number of cores, or sums would have other bits on other machines.
_LANE_BYTES = 2**28  # The most that the sums of one lane may take; larger sums have only one lane.


def can_recover(model: Model, walk: Walk, binding: Binding, statistics: Statistics) -> bool:
    """Whether a layer can be recovered: it has one use, in the main graph, and moments of its inputs.

    A layer with a bias that cannot change is not recovered: its weight would be fitted to the bias, too.

    Args:
        model: The model.
        walk: Its walk.
        binding: The layer.
        statistics: The moments of its layers.
    """
    use = binding.layer.uses[0]
    if len(binding.layer.uses) > 1 or use.scope or not use.is_linear:
        return False
    if not statistics.has_inputs(binding.layer.id):
        return False
    node = walk.node(Place(use.scope, use.node))
    operand = registry.family(node).bias
    fixed = operand is not None and len(node.input) > operand and bool(node.input[operand])
    return not fixed or bias(model, walk, binding) is not None


def recover(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    options: Mapping[str, Option],
    calibration: Calibration,
    executor: Executor,
) -> Iterator[Fitted]:
    """Recover layers in the order in which they run; each is certified while the next ones are recovered.

    Args:
        model: The model.
        walk: Its walk.
        bindings: The layers; each can be recovered.
        options: Their options, by id.
        calibration: The inputs to fit to.
        executor: Certifies the layers; the walk itself runs in this process.

    Raises:
        InputError: The model fails on the calibration inputs, or the disk is full.
    """
    samples, statistics = calibration.samples, calibration.statistics
    batches = samples.batches(statistics.batch)
    waiting: deque[tuple[Binding, Recovered]] = deque()
    encoders = Encoders(model, walk, bindings, options, executor.threads)
    with Prefix(model, walk, bindings, batches, calibration.engine) as prefix:

        def items() -> Iterator[CertificateItem]:
            for step in prefix.steps():
                option = options[step.binding.layer.id]
                layer = Recovery(model, walk, step.binding, option, calibration, executor.threads, encoders)
                recovered = layer.run(step)
                waiting.append((step.binding, recovered))
                yield CertificateItem(reference(model, walk, step.binding), recovered.factors)

        for proof in executor.map(certificate, items()):
            binding, made = waiting.popleft()
            option = options[binding.layer.id]
            yield Replacement(binding, option, made.factors, proof, made.bias), made.fit


class Encoders:
    """The encoders that layers share, each made once (rule 3)."""

    def __init__(
        self,
        model: Model,
        walk: Walk,
        bindings: Sequence[Binding],
        options: Mapping[str, Option],
        threads: Threads,
    ) -> None:
        self._bindings = {binding.layer.id: binding for binding in bindings}
        self._options = options
        self._model, self._walk, self._threads = model, walk, threads
        self._made: dict[tuple[str, ...], NDArray[Any]] = {}

    def encoder(self, layer: Layer, j: int, inputs: Moments) -> NDArray[Any]:
        """The encoder of a layer's group, as stored; from these moments if it is not made yet."""
        key = sharing(layer, self._options)
        if key not in self._made:
            item = shared_item(self._model, self._walk, [self._bindings[name] for name in key], j, None)
            self._made[key] = stored_encoder(item, inputs, self._threads.backend)
        return self._made[key]


@dataclass(frozen=True, slots=True)
class Recovered:
    """A recovered layer: its factors as stored, its whole bias (f,) if it can change, and its error."""

    factors: Factors
    bias: NDArray[np.float64] | None
    fit: LayerFit


class Recovery:
    """Recovers one layer."""

    def __init__(
        self,
        model: Model,
        walk: Walk,
        binding: Binding,
        option: Option,
        calibration: Calibration,
        threads: Threads,
        encoders: Encoders,
    ) -> None:
        self._encoders = encoders
        self._encoder: NDArray[Any] | None = None
        self._binding = binding
        self._option = option
        self._threads = threads
        weight = reference(model, walk, binding)
        self._weight, self._dtype = weight.read(), weight.dtype
        self._bias = bias(model, walk, binding)
        self._geometry = geometry(walk, binding, 0)
        self._moments = calibration.statistics[binding.layer.id]
        self._samples = calibration.samples.count
        # As the plan was made, although other inputs are fitted to now: a replay makes the same model.
        is_narrow = option.lowering is Lowering.NARROW
        self._way = way_to(model, walk, binding, calibration.statistics) if is_narrow else None

    def run(self, step: Step) -> Recovered:
        """Fit the layer to the inputs and targets of its step, and let the walk continue with the result."""
        shares = self._shares(step.batches())
        judge = shares[True].problem(self._weight, 0.0, centred=self._centred)
        ridge = self._ridge(shares)
        if self._option.lowering is Lowering.SHARED:
            self._encoder = self._encoders.encoder(self._binding.layer, self._option.j, shares[False].inputs)
        candidates = self._threads.each(
            lambda make: make(), (lambda: self._fitted(shares, ridge, STEPS), self._plain)
        )
        weighed = [(error(judge, compose(exact(factors))), factors) for factors in candidates]
        _, stored = min(weighed, key=lambda pair: pair[0])
        best = first = _Map(stored, self._shifted(stored, shares[False]))
        if step.rectified and first.bias is not None:
            best = self._rectified(step, shares, first, ridge)
        recovered = stored is candidates[0] or best is not first
        stored, shifted = best.factors, best.bias
        weight = compose(exact(stored))
        loss = error(judge, weight)
        step.substitute(weight, None if shifted is None else shifted - self._added_behind())
        return Recovered(stored, shifted, LayerFit(Fit.ACTIVATIONS, recovered, loss))

    @property
    def _centred(self) -> bool:
        return self._bias is not None

    def _ridge(self, shares: Mapping[bool, Share]) -> float:
        """The ridge of least error on the held-out share; for a narrow layer, that of its own inputs."""
        if self._option.lowering is Lowering.NARROW:
            # The whole weight says nothing about it: without a channel to drop, the largest ridge is best.
            return shrinkage(shares[False].inputs, selection.RIDGE)
        fitted, held = shares[False], shares[True]
        return best_ridge(
            self._weight, fitted.inputs, fitted.targets, held.inputs, held.targets, centred=self._centred
        )

    def _fitted(self, shares: Mapping[bool, Share], ridge: float, steps: int) -> Factors:
        """Factors fitted to the targets of one share and judged on the other."""
        problem = shares[False].problem(self._weight, ridge, centred=self._centred)
        if self._encoder is not None:
            return self._decoded(problem, self._encoder)
        judge = shares[True].problem(self._weight, 0.0, centred=self._centred)
        factors = fit(
            problem, self._weight.shape, self._option, self._threads.backend, judge, steps, self._way
        )
        return stored_as(factors, self._dtype)

    def _rectified(self, step: Step, shares: Mapping[bool, Share], linear: _Map, ridge: float) -> _Map:
        """Refit a layer before a Relu to lower its error behind the Relu (rule 4).

        If both models are below zero there, the error is zero, and the target is the layer's output. If only
        the original is, the target is zero. By majorization this lowers the error behind the Relu on the
        inputs of the fit; held-out inputs show whether it does so on others.
        """
        every = ceil(self._samples / _SEEN)
        before = self._behind_relu(step.again(every), shares, linear)
        factors = self._fitted(before.shares, ridge, _FEW_STEPS)
        refitted = _Map(factors, self._shifted(factors, before.shares[False]))
        after = self._behind_relu(step.again(every), shares, refitted)
        # Not <=: with equal losses the simpler fit stays.
        return refitted if after.loss < before.loss else linear

    def _decoded(self, problem: Quadratic, encoder: NDArray[Any]) -> Factors:
        """The factors with a shared encoder."""
        factors = shared.fit(problem, self._weight.shape, encoder, self._threads.backend)
        return stored_as(factors, self._dtype)

    def _plain(self) -> Factors:
        inputs = self._moments.inputs
        if self._encoder is not None and inputs is not None:
            ridge = shrinkage(inputs, INPUT_RIDGE)
            problem = of_weight(self._weight, inputs, centred=self._centred, ridge=ridge)
            return self._decoded(problem, self._encoder)
        factors = activation_factors(
            self._weight,
            self._option,
            self._moments,
            self._threads.backend,
            centred=self._centred,
            steps=STEPS,
            way=self._way,
        )
        if factors is None:
            raise RuntimeError(f"the inputs of {self._binding.layer.id} were measured")
        return stored_as(factors, self._dtype)

    def _shifted(self, factors: Factors, share: Share) -> NDArray[np.float64] | None:
        """The bias that gives the layer's outputs the mean of their target."""
        if self._bias is None:
            return None
        matrices = compose(exact(factors)).reshape(*self._weight.shape[:2], -1)
        given = np.matvec(matrices, share.inputs.mean).reshape(-1)
        mean = share.targets.mean.reshape(-1)
        if self._way is None:
            return np.asarray(mean - given + self._added_behind())
        return np.asarray(self._way.given(mean + self._added_behind(), self._option.j) - given)

    def _added_behind(self) -> NDArray[np.float64] | float:
        """The bias that a node behind the layer adds; y does not include it."""
        return 0.0 if self._bias is None or self._bias.in_node else self._bias.values

    def _shares(self, sights: Iterator[Sight]) -> dict[bool, Share]:
        """The moments of both shares, by whether they are held out."""
        g, f, *rest = self._weight.shape
        p = prod(rest)
        lanes = _LANES if 8 * g * (p + f) ** 2 <= _LANE_BYTES else 1
        sums: list[dict[bool, Accumulator]] = [{} for _ in range(lanes)]

        def add(lane: dict[bool, Accumulator], sight: Sight) -> None:
            if sight.held not in lane:
                lane[sight.held] = Accumulator(f"layer {self._binding.layer.id!r}", g, p + f)
            for x, y, beside in _rows(self._geometry, sight):
                target = y if beside is None else y + (beside[0] - beside[1])
                lane[sight.held].add(np.concatenate([x, target], axis=2))
            # A sight does not tell samples apart, so its whole batch counts as one block.
            lane[sight.held].close_block()

        _in_lanes(sights, sums, add, self._threads)
        return {held: _share(sums, held, p) for held in (False, True)}

    def _behind_relu(self, sights: Iterator[Sight], shares: Mapping[bool, Share], layer: _Map) -> _Behind:
        """The held-out error of a layer behind the Relu, and targets that lower it."""
        sums = [{held: Changes(share) for held, share in shares.items()} for _ in range(_LANES)]
        weight = compose(exact(layer.factors)).reshape(*self._weight.shape[:2], -1).astype(np.float32)
        added, total = (self._grouped(bias) for bias in (self._added_behind(), layer.bias))

        def add(lane: dict[bool, Changes], sight: Sight) -> None:
            for x, y, beside in _rows(self._geometry, sight):
                given = np.swapaxes(np.swapaxes(x, 0, 1) @ np.swapaxes(weight, 1, 2), 0, 1) + total
                wanted, got, linear = y + added, given, y
                if beside is not None:
                    linear = y + (beside[0] - beside[1])
                    wanted, got = wanted + beside[0], given + beside[1]
                lost = wanted - got
                # Not `lost` below zero in the original: there every output up to 0 is as good as another.
                excess = np.where(wanted > 0, lost, np.minimum(-got, 0))
                lane[sight.held].add(x, linear, excess - lost, np.maximum(wanted, 0) - np.maximum(got, 0))

        _in_lanes(sights, sums, add, self._threads)
        whole = {held: Changes.merged([lane[held] for lane in sums]) for held in shares}
        return _Behind(whole[True].lost, {held: changes.share() for held, changes in whole.items()})

    def _grouped(self, values: NDArray[np.float64] | float | None) -> NDArray[np.float32]:
        """Values of the output features in the shape of a row, (g, f / g)."""
        filled = np.broadcast_to(np.asarray(0.0 if values is None else values), self._binding.layer.f)
        return filled.reshape(self._weight.shape[:2]).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Map:
    """The map of a recovered layer: its factors as stored, and its whole bias (f,) if it can change."""

    factors: Factors
    bias: NDArray[np.float64] | None


@dataclass(frozen=True, slots=True)
class _Behind:
    """A layer's squared error behind a Relu on held-out inputs, and targets that lower it."""

    loss: float
    shares: dict[bool, Share]


def _rows(
    form: Geometry, sight: Sight
) -> Iterator[tuple[NDArray[Any], NDArray[Any], tuple[NDArray[Any], NDArray[Any]] | None]]:
    """Chunks of x̂ (rows, g, p), of y (rows, g, f / g), and of the residuals added to y in both models."""
    y = np.concatenate(list(outputs(form, sight.y)))
    beside = None
    if sight.beside is not None:
        beside = tuple(np.concatenate(list(outputs(form, value))) for value in sight.beside)
    start = 0
    for x in patches(form, sight.x_hat):
        part = slice(start, start + len(x))
        yield x, y[part], None if beside is None else (beside[0][part], beside[1][part])
        start += len(x)


def _share(sums: Sequence[Mapping[bool, Accumulator]], held: bool, p: int) -> Share:
    parts = [lane[held].moments() for lane in sums if held in lane]
    return Share(*split(merged([part for part in parts if part is not None]), p))


def _in_lanes(
    sights: Iterator[Sight], lanes: Sequence[T], add: Callable[[T, Sight], None], threads: Threads
) -> None:
    """Add every batch to one of the lanes, in turn; the lanes work in parallel."""
    # Batch n always goes to lane n modulo the number of lanes, or the bits would depend on the threads.
    while group := list(islice(sights, len(lanes))):
        threads.each(lambda item: add(*item), zip(lanes, group, strict=False))
