"""Fits one layer of the walk of `stages.recover`, whose rules are numbered there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.measured import Statistics
from onnx_lowrank.calibrate.prefix import Sight, Step
from onnx_lowrank.core.factors import Factors, Fit, LayerFit, Moments
from onnx_lowrank.core.layer import Layer, sharing
from onnx_lowrank.core.option import Lowering, Option
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import geometry
from onnx_lowrank.linalg import selection, shared, sums
from onnx_lowrank.linalg.activations import fit
from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.quadratic import (
    INPUT_RIDGE,
    Quadratic,
    best_ridge,
    error,
    of_weight,
    shrinkage,
)
from onnx_lowrank.operators.geometry import thinned
from onnx_lowrank.rewrite.refit import fixed_features, operands
from onnx_lowrank.stages.fit import joined_item, shared_item, way_to
from onnx_lowrank.stages.gather import Behind, Gatherer, Product
from onnx_lowrank.stages.targets import Share
from onnx_lowrank.work.executor import Threads
from onnx_lowrank.work.fitting import STEPS, Made, activation_factors, exact, stored_as
from onnx_lowrank.work.joins import fitted_jointly
from onnx_lowrank.work.sharing import stored_encoder
from onnx_lowrank.work.weights import reference

M = TypeVar("M", bound=Made)

_FEW_STEPS = 12  # Refinement steps for targets that have changed a little.
_TOGETHER = 4096  # Inputs up to which ridges are tried at the same time; each takes copies of the moments.
_SEEN = 256  # Approximate number of samples that show the error behind a Relu.


class Joint:
    """The factors that layers share, each made once (rule 3)."""

    def __init__(
        self,
        model: Model,
        walk: Walk,
        bindings: Sequence[Binding],
        options: Mapping[str, Option],
        statistics: Statistics,
        threads: Threads,
    ) -> None:
        self._bindings = {binding.layer.id: binding for binding in bindings}
        self._options, self._statistics = options, statistics
        self._model, self._walk, self._threads = model, walk, threads
        self._made: dict[tuple[str, ...], NDArray[Any]] = {}
        self._sums: dict[str, Factors] = {}

    def encoder(self, layer: Layer, j: int, inputs: Moments) -> NDArray[Any]:
        """The encoder of a layer's group, as stored; from these moments if it is not made yet."""
        key = sharing(layer, self._options)
        if key not in self._made:
            item = shared_item(self._model, self._walk, [self._bindings[name] for name in key], j, None)
            backend = self._threads.backend
            self._made[key] = backend.attempt(lambda place: stored_encoder(item, inputs, place), item.nbytes)
        return self._made[key]

    def summed(self, layer: Layer, j: int) -> Factors:
        """The factors of a layer of a sum, as stored, that do not know the compressed layers before it."""
        if layer.id not in self._sums:
            group = [self._bindings[name] for name in layer.addends]
            item = joined_item(self._model, self._walk, group, Lowering.SUMMED, j, self._statistics)
            made = self._threads.backend.attempt(lambda place: fitted_jointly(item, place), item.nbytes)
            self._sums |= {name: fit.factors for name, fit in zip(layer.addends, made, strict=True)}
        return self._sums[layer.id]


@dataclass(frozen=True, slots=True)
class Recovered:
    """A recovered layer.

    Attributes:
        made: Its factors as stored; the weight as stored, in canonical form, if it has no option.
        bias: Its whole bias, shape (f,), if it can change.
        fit: How it was made, with its error.
    """

    made: Made
    bias: NDArray[np.float64] | None
    fit: LayerFit


class Walked(ABC, Generic[M]):
    """Fits one layer of the walk by the rules 1, 2 and 4."""

    _keeps_plain = False
    """Whether the plain result is the layer's own map, which stays without a better one."""

    def __init__(
        self,
        model: Model,
        walk: Walk,
        binding: Binding,
        calibration: Calibration,
        threads: Threads,
        *,
        is_weighed: bool = False,
    ) -> None:
        self._binding = binding
        self._threads = threads
        weight = reference(model, walk, binding)
        self._weight, self._dtype = weight.read(), weight.dtype
        self._bias = bias(model, walk, binding)
        self._samples = calibration.samples.count
        form = geometry(walk, binding, 0)
        if binding.layer.id not in calibration.statistics.padding.layers:
            form = thinned(form, prod(self._weight.shape[2:]), self._samples)
        inside = None if binding.layer.uses[0].is_linear else self._inside()
        self._gatherer = Gatherer(binding.layer.id, form, self._weight.shape, threads, is_weighed, inside)

    def run(self, step: Step) -> Recovered | None:
        """Fit the layer to the inputs and targets of its step, and let the walk continue with the result.

        Returns:
            The result; None if the layer keeps its map.
        """
        shares = self._gatherer.shares(step.batches(original=self._gatherer.product is not None))
        judge = shares[True].problem(self._weight, 0.0, centred=self._centred)
        ridge = self._ridge(shares)
        self._prepare(shares)
        fitted, plain = self._threads.each(
            lambda make: make(), (lambda: self._fitted(shares, ridge, STEPS), self._plain)
        )
        results = []
        for made in (fitted, plain):
            product = self._product(made)
            results.append((made, product, error(judge, product)))
        errors = [loss for _, _, loss in results]
        is_better = errors[0] < errors[1] if self._keeps_plain else errors[0] <= errors[1]
        taken, product, loss = results[0 if is_better else 1]
        best = first = _Map(taken, product, self._shifted(taken, product, shares[False]))
        if step.rectified and first.bias is not None:
            best = self._rectified(step, shares, first, ridge)
        recovered = is_better or best is not first
        if self._keeps_plain and not (recovered and self._can_store(best)):
            return None
        step.substitute(best.weight, None if best.bias is None else best.bias - self._added_behind())
        loss = loss if best is first else error(judge, best.weight)
        return Recovered(best.made, best.bias, LayerFit(Fit.ACTIVATIONS, recovered, loss))

    @abstractmethod
    def _ridge(self, shares: Mapping[bool, Share]) -> float:
        """The ridge of the fit."""

    def _prepare(self, shares: Mapping[bool, Share]) -> None:
        """Make what all fits of the layer need."""

    @abstractmethod
    def _fitted(self, shares: Mapping[bool, Share], ridge: float, steps: int) -> M:
        """The result that is fitted to the targets of one share and judged on the other, as stored."""

    @abstractmethod
    def _plain(self) -> M:
        """The result that does not know the compressed layers before it, as stored."""

    @abstractmethod
    def _product(self, made: M) -> NDArray[np.float64]:
        """The canonical weight of a result."""

    @abstractmethod
    def _shifted(self, made: M, product: NDArray[np.float64], share: Share) -> NDArray[np.float64] | None:
        """The bias that goes with a result and its canonical weight, shape (f,)."""

    def _can_store(self, best: _Map[M]) -> bool:
        """Whether the model can store a result."""
        return True

    @property
    def _centred(self) -> bool:
        return self._bias is not None

    def _rectified(self, step: Step, shares: Mapping[bool, Share], linear: _Map[M], ridge: float) -> _Map[M]:
        """Refit a layer before a Relu to lower its error behind the Relu (rule 4).

        By majorization this lowers the error behind the Relu on the inputs of the fit; held-out inputs show
        whether it does so on others.
        """
        every = ceil(self._samples / _SEEN)
        before = self._behind_relu(step.again(every), shares, linear)
        made = self._fitted(before.shares, ridge, _FEW_STEPS)
        product = self._product(made)
        refitted = _Map(made, product, self._shifted(made, product, before.shares[False]))
        after = self._behind_relu(step.again(every), shares, refitted)
        # Not <=: with equal losses the simpler fit stays.
        return refitted if after.loss < before.loss else linear

    def _behind_relu(self, sights: Iterator[Sight], shares: Mapping[bool, Share], map_: _Map[M]) -> Behind:
        total = 0.0 if map_.bias is None else map_.bias
        return self._gatherer.behind_relu(sights, shares, map_.weight, self._added_behind(), total)

    def _mean_shift(self, weight: NDArray[np.float64], share: Share) -> NDArray[np.float64]:
        """The bias that gives the outputs of a weight the mean of their target, shape (f,)."""
        mean = share.targets.mean.reshape(-1)
        return np.asarray(mean - self._mean(weight, share) + self._added_behind())

    def _mean(self, weight: NDArray[np.float64], share: Share) -> NDArray[np.float64]:
        """The mean of the outputs of a weight, shape (f,)."""
        matrices = weight.reshape(*self._weight.shape[:2], -1)
        return np.asarray(np.matvec(matrices, share.inputs.mean)).reshape(-1)

    def _inside(self) -> Product:
        """The product inside a node that does more than multiply, with the bias that the node adds."""
        g, f = self._weight.shape[:2]
        added = self._bias.values if self._bias is not None and self._bias.in_node else np.zeros(g * f)
        weight = self._weight.reshape(g, f, -1).astype(np.float32)
        return Product(weight, added.reshape(g, f).astype(np.float32))

    def _added_behind(self) -> NDArray[np.float64] | float:
        """The bias that a node behind the layer adds; y does not include it."""
        return 0.0 if self._bias is None or self._bias.in_node else self._bias.values


class Refit(Walked[NDArray[Any]]):
    """Fits a layer that the plan keeps (rule 5)."""

    _keeps_plain = True

    def __init__(
        self, model: Model, walk: Walk, binding: Binding, calibration: Calibration, threads: Threads
    ) -> None:
        super().__init__(model, walk, binding, calibration, threads)
        self._model, self._walk = model, walk
        self._fixed = fixed_features(binding)

    def _ridge(self, shares: Mapping[bool, Share]) -> float:
        return _best_ridge(self._weight, shares, self._threads, centred=self._centred)

    def _fitted(self, shares: Mapping[bool, Share], ridge: float, steps: int) -> NDArray[Any]:
        problem = shares[False].problem(self._weight, ridge, centred=self._centred)
        made = problem.optimum.reshape(self._weight.shape)
        fixed = self._fixed.reshape(*made.shape[:2], *[1] * len(made.shape[2:]))
        with np.errstate(over="ignore"):  # the judge refuses infinite numbers
            return np.where(fixed, self._weight, made).astype(self._dtype)

    def _plain(self) -> NDArray[Any]:
        return self._weight

    def _product(self, made: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(made, np.float64)

    def _shifted(
        self, made: NDArray[Any], product: NDArray[np.float64], share: Share
    ) -> NDArray[np.float64] | None:
        if self._bias is None:
            return None
        if made is self._weight:
            return self._bias.values
        return np.where(self._fixed, self._bias.values, self._mean_shift(product, share))

    def _can_store(self, best: _Map[NDArray[Any]]) -> bool:
        return operands(self._model, self._walk, self._binding, best.made, best.bias) is not None


class Recovery(Walked[Factors]):
    """Fits the factors of one layer."""

    def __init__(
        self,
        model: Model,
        walk: Walk,
        binding: Binding,
        option: Option,
        calibration: Calibration,
        threads: Threads,
        joint: Joint,
    ) -> None:
        # Other options take the ridge of least held-out error.
        is_weighed = option.lowering in (Lowering.NARROW, Lowering.SHARED)
        super().__init__(model, walk, binding, calibration, threads, is_weighed=is_weighed)
        self._joint = joint
        self._encoder: NDArray[Any] | None = None
        self._summed: Factors | None = None
        self._option = option
        self._moments = calibration.statistics[binding.layer.id]
        # As the plan was made, although other inputs are fitted to now: a replay makes the same model.
        is_narrow = option.lowering is Lowering.NARROW
        self._way = way_to(model, walk, binding, calibration.statistics) if is_narrow else None

    def _prepare(self, shares: Mapping[bool, Share]) -> None:
        if self._option.lowering is Lowering.SHARED:
            self._encoder = self._joint.encoder(self._binding.layer, self._option.j, shares[False].inputs)
        if self._option.lowering is Lowering.SUMMED:
            self._summed = self._joint.summed(self._binding.layer, self._option.j)

    def _ridge(self, shares: Mapping[bool, Share]) -> float:
        """The ridge of least error on the held-out share; for a narrow layer, that of its own inputs."""
        if self._option.lowering is Lowering.NARROW:
            # The whole weight says nothing about it: without a channel to drop, the largest ridge is best.
            return shrinkage(shares[False].inputs, selection.RIDGE)
        return _best_ridge(self._weight, shares, self._threads, centred=self._centred)

    def _fitted(self, shares: Mapping[bool, Share], ridge: float, steps: int) -> Factors:
        problem = shares[False].problem(self._weight, ridge, centred=self._centred)
        if self._encoder is not None:
            return self._decoded(problem, self._encoder)
        if self._summed is not None:
            decoder = self._summed.decoder
            return self._stored(
                problem, lambda place: sums.encoded(problem, self._weight.shape, decoder, place)
            )
        judge = shares[True].problem(self._weight, 0.0, centred=self._centred)
        return self._stored(
            problem,
            lambda place: fit(problem, self._weight.shape, self._option, place, judge, steps, self._way),
        )

    def _decoded(self, problem: Quadratic, encoder: NDArray[Any]) -> Factors:
        """The factors with a shared encoder."""
        return self._stored(problem, lambda place: shared.fit(problem, self._weight.shape, encoder, place))

    def _stored(self, problem: Quadratic, make: Callable[[Backend], Factors]) -> Factors:
        """Factors as stored, made where the threads compute."""
        nbytes = 5 * problem.second.nbytes + 10 * problem.cross.nbytes
        return stored_as(self._threads.backend.attempt(make, nbytes), self._dtype)

    def _plain(self) -> Factors:
        if self._summed is not None:
            return self._summed
        inputs = self._moments.inputs
        if self._encoder is not None and inputs is not None:
            ridge = shrinkage(inputs, INPUT_RIDGE)
            problem = of_weight(self._weight, inputs, centred=self._centred, ridge=ridge)
            return self._decoded(problem, self._encoder)
        factors = self._threads.backend.attempt(
            lambda place: activation_factors(
                self._weight,
                self._option,
                self._moments,
                place,
                centred=self._centred,
                steps=STEPS,
                way=self._way,
            ),
            5 * inputs.second.nbytes if inputs is not None else 0,
        )
        if factors is None:
            raise RuntimeError(f"the inputs of {self._binding.layer.id} were measured")
        return stored_as(factors, self._dtype)

    def _product(self, made: Factors) -> NDArray[np.float64]:
        return np.asarray(compose(exact(made)))

    def _shifted(
        self, made: Factors, product: NDArray[np.float64], share: Share
    ) -> NDArray[np.float64] | None:
        """The bias that gives the layer's outputs the mean of their target."""
        if self._bias is None:
            return None
        if self._way is None:
            return self._mean_shift(product, share)
        wanted = share.targets.mean.reshape(-1) + self._added_behind()
        return np.asarray(self._way.given(wanted, self._option.j) - self._mean(product, share))


def _best_ridge(
    weight: NDArray[Any], shares: Mapping[bool, Share], threads: Threads, *, centred: bool
) -> float:
    """The ridge of least error on the held-out share."""
    fitted, held = shares[False], shares[True]
    moments = fitted.inputs, fitted.targets, held.inputs, held.targets
    is_small = fitted.inputs.second.shape[-1] <= _TOGETHER
    return best_ridge(weight, *moments, centred=centred, each=threads.each if is_small else map)


@dataclass(frozen=True, slots=True)
class _Map(Generic[M]):
    """The map of a layer: as stored, its canonical weight, and its whole bias (f,) if it can change."""

    made: M
    weight: NDArray[np.float64]
    bias: NDArray[np.float64] | None
