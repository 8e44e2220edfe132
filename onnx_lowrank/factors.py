"""The factors of every layer that a plan names: fitted to weights, to activations, or by recovery.

Rules:

1. Factors fitted to activations minimize E‖(W − Ŵ) x‖² over the calibration inputs. Where the layer has
   a bias that can change (`graph.bias`), it takes the change of the mean, and only the deviations count.
2. Recovery walks the layers in the order in which they run. It fits each one to what it gives in the
   original model, y, on what the compressed layers before it make of its inputs, x̂: E‖y − Ŵ x̂‖².
   Where a residual connection is added to y, y takes up what the compressed layers have lost of that.
3. What is fitted to one share of the calibration inputs is judged by the other: refinement goes on
   while the held-out error falls, and a recovered layer whose held-out error is above that of the
   factors by rule 1 gets these.
4. A layer of which calibration tells nothing has its factors fitted to its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.moments import Accumulator, merged, shrinkage, split
from onnx_lowrank.calibrate.patches import Geometry, geometry, outputs, patches
from onnx_lowrank.calibrate.prefix import Prefix, Sight, Step
from onnx_lowrank.calibrate.statistics import LayerMoments
from onnx_lowrank.found import Found, prepared
from onnx_lowrank.graph.bias import Bias, bias
from onnx_lowrank.graph.layers import Binding
from onnx_lowrank.graph.rewrite import Replacement
from onnx_lowrank.graph.walk import Place
from onnx_lowrank.linalg.activations import corrected_mean, fit, output_fit
from onnx_lowrank.linalg.backend import Backend, parallel_map
from onnx_lowrank.linalg.factorize import certify, factorize
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.quadratic import Quadratic, best_ridge, error, of_targets, of_weight
from onnx_lowrank.types import Factors, Fit, Fold, LayerFit, Moments, Option, Plan, Targets

STEPS = 30
"""Iterations by which factors are refined at most."""

_LANES = 4  # sums of so many parts, whatever the number of cores: the same bits everywhere
_LANE_BYTES = 2**28  # what the sums of one lane may take; larger ones are not parted


Fitted = tuple[Replacement, LayerFit]
"""The factors of one layer as the rewriter needs them, and how they came about."""


def fitted(found: Found, plan: Plan, calibration: Calibration | None, backend: Backend) -> Iterator[Fitted]:
    """Make the factors of all layers that a plan rewrites, one by one.

    Args:
        found: The model.
        plan: What to do with its layers.
        calibration: The inputs to fit to, where the plan asks for that.
        backend: Where the linear algebra runs.

    Raises:
        InputError: The model fails on the calibration inputs, or the disk is full.
    """
    options = {choice.layer: choice.option for choice in plan.choices if choice.option is not None}
    chosen = [binding for binding in found.bindings if binding.layer.id in options]
    if plan.factors is Fit.WEIGHTS or calibration is None:
        yield from parallel_map(lambda b: _on_weight(found, b, options[b.layer.id], backend), chosen, backend)
        return
    walked = [b for b in chosen if plan.recover and _can_recover(found, b, calibration)]
    ids = {binding.layer.id for binding in walked}

    def alone(binding: Binding) -> Fitted:
        return _on_activations(found, binding, options[binding.layer.id], calibration, backend)

    yield from parallel_map(alone, [b for b in chosen if b.layer.id not in ids], backend)
    if walked:
        batches = calibration.samples.batches(calibration.statistics.batch)
        with Prefix(found.model, found.walk, walked, batches, calibration.engine) as prefix:
            for step in prefix.steps():
                option = options[step.binding.layer.id]
                yield _Recovery(found, step.binding, option, calibration, backend).run(step)


# --- one layer ------------------------------------------------------------------------------------


def _on_weight(found: Found, binding: Binding, option: Option, backend: Backend) -> Fitted:
    weight, dtype = prepared(found, binding)
    factors = factorize(weight, option, backend, dtype)
    stored = _stored(factors, dtype)
    del factors  # a large layer's are gigabytes
    return Replacement(binding, option, stored, certify(weight, stored)), LayerFit(Fit.WEIGHTS)


def _on_activations(
    found: Found, binding: Binding, option: Option, calibration: Calibration, backend: Backend
) -> Fitted:
    """Rules 1 and 4."""
    moments = calibration.statistics[binding.layer.id]
    weight, dtype = prepared(found, binding)
    own = bias(found.model, found.walk, binding)
    factors = activation_factors(weight, option, moments, backend, centred=own is not None, steps=STEPS)
    if factors is None:
        return _on_weight(found, binding, option, backend)
    stored = _stored(factors, dtype)
    shifted = None if own is None else own.values + lost_mean(weight, stored, moments, own)
    loss = _error(weight, stored, moments, centred=own is not None)
    replacement = Replacement(binding, option, stored, certify(weight, stored), shifted)
    return replacement, LayerFit(Fit.ACTIVATIONS, error=loss)


def activation_factors(
    weight: NDArray[np.generic],
    option: Option,
    moments: LayerMoments,
    backend: Backend,
    *,
    centred: bool,
    steps: int,
) -> Factors | None:
    """Factors of least error on a layer's own inputs (rule 1), or None where its moments do not tell.

    Args:
        weight: Canonical weight, with its BatchNorm folded in.
        option: Its option.
        moments: What was measured of the layer; moments of outputs serve the encode fold of one slice.
        backend: Where to compute.
        centred: Whether a bias takes the change of the mean.
        steps: Iterations of the refinement at most; it needs held-out moments.
    """
    if moments.inputs is not None:
        problem = of_weight(weight, moments.inputs, centred=centred, ridge=shrinkage(moments.inputs))
        held = None
        if moments.held is not None:
            held = of_weight(weight, moments.held, centred=centred, ridge=0.0)
        return fit(problem, weight.shape, option, backend, held, steps if held is not None else 0)
    kernel = weight.shape[3:]
    if moments.outputs is not None and option.fold.on(kernel) is Fold.ENCODE and option.k == 1:
        ridge = shrinkage(moments.outputs)
        return output_fit(moments.outputs, weight, option.j, backend, centred=centred, ridge=ridge)
    return None


def lost_mean(
    weight: NDArray[np.generic], factors: Factors, moments: LayerMoments, own: Bias
) -> NDArray[np.float64]:
    """(W − Ŵ) E[x], by which a bias keeps the mean of a layer's outputs; shape (f,)."""
    if moments.inputs is not None:
        return corrected_mean(weight, factors, moments.inputs)
    if moments.outputs is None:
        return np.zeros_like(own.values)
    # The factors of outputs project W on the decoder's columns, and so they project its outputs.
    mean = moments.outputs.mean - (own.values.reshape(weight.shape[:2]) if own.in_node else 0.0)
    decoder = factors.decoder.astype(np.float64).reshape(*weight.shape[:2], -1)
    kept = np.matvec(decoder, np.matvec(np.linalg.pinv(decoder), mean))
    return np.asarray(mean - kept).reshape(-1)


def _error(
    weight: NDArray[np.generic], stored: Factors, moments: LayerMoments, *, centred: bool
) -> float | None:
    """The relative activation error of factors as stored; None where only outputs were measured."""
    judge = moments.held or moments.inputs
    if judge is None:
        return None
    return error(of_weight(weight, judge, centred=centred, ridge=0.0), compose(_exact(stored)))


def _stored(factors: Factors, dtype: np.dtype[np.generic]) -> Factors:
    return Factors(factors.fold, factors.encoder.astype(dtype), factors.decoder.astype(dtype))


def _exact(factors: Factors) -> Factors:
    return _stored(factors, np.dtype(np.float64))


# --- recovery -------------------------------------------------------------------------------------


def _can_recover(found: Found, binding: Binding, calibration: Calibration) -> bool:
    """Whether rule 2 applies: one use in the main graph, moments of its inputs of both shares.

    A bias that cannot change would be fitted by the weight.
    """
    use = binding.layer.uses[0]
    if len(binding.layer.uses) > 1 or use.scope:
        return False
    if not calibration.statistics.has_inputs(binding.layer.id):
        return False
    node = found.walk.node(Place(use.scope, use.node))
    fixed = len(node.input) > 2 and bool(node.input[2])
    return not fixed or bias(found.model, found.walk, binding) is not None


@dataclass(frozen=True, slots=True)
class _Share:
    """Moments of one share of the calibration inputs: of x̂, and of y with them."""

    inputs: Moments
    targets: Targets

    def problem(self, weight: NDArray[np.generic], ridge: float, *, centred: bool) -> Quadratic:
        return of_targets(weight, self.inputs, self.targets, centred=centred, ridge=ridge)


class _Recovery:
    """Recovers one layer (rules 2 and 3)."""

    def __init__(
        self, found: Found, binding: Binding, option: Option, calibration: Calibration, backend: Backend
    ) -> None:
        self._binding = binding
        self._option = option
        self._backend = backend
        self._weight, self._dtype = prepared(found, binding)
        self._bias = bias(found.model, found.walk, binding)
        self._geometry = geometry(found.model, found.walk, binding, 0)
        self._moments = calibration.statistics[binding.layer.id]

    def run(self, step: Step) -> Fitted:
        """Fit the layer to what the walk shows, and let the walk go on with it."""
        shares = self._shares(step.batches())
        fit_share, held_share = shares[False], shares[True]
        judge = held_share.problem(self._weight, 0.0, centred=self._centred)
        fits = (lambda: self._fitted(fit_share, held_share, judge), self._plain)
        candidates = parallel_map(lambda make: make(), fits, self._backend)
        weighed = [(error(judge, compose(_exact(factors))), factors) for factors in candidates]
        recovered = weighed[0][0] <= weighed[1][0]
        loss, stored = weighed[0 if recovered else 1]
        weight = compose(_exact(stored))
        shifted = self._shifted(weight, fit_share)
        step.substitute(weight, None if shifted is None else shifted - self._added_behind())
        certificate = certify(self._weight, stored)
        replacement = Replacement(self._binding, self._option, stored, certificate, shifted)
        return replacement, LayerFit(Fit.ACTIVATIONS, recovered, loss)

    @property
    def _centred(self) -> bool:
        return self._bias is not None

    def _fitted(self, fit_share: _Share, held_share: _Share, judge: Quadratic) -> Factors:
        ridge = best_ridge(
            self._weight,
            fit_share.inputs,
            fit_share.targets,
            held_share.inputs,
            held_share.targets,
            centred=self._centred,
        )
        problem = fit_share.problem(self._weight, ridge, centred=self._centred)
        factors = fit(problem, self._weight.shape, self._option, self._backend, judge, STEPS)
        return _stored(factors, self._dtype)

    def _plain(self) -> Factors:
        factors = activation_factors(
            self._weight, self._option, self._moments, self._backend, centred=self._centred, steps=STEPS
        )
        if factors is None:
            raise RuntimeError(f"the inputs of {self._binding.layer.id} were measured")
        return _stored(factors, self._dtype)

    def _shifted(self, weight: NDArray[np.float64], share: _Share) -> NDArray[np.float64] | None:
        """The bias by which the mean of what the layer gives is that of y."""
        if self._bias is None:
            return None
        matrices = weight.reshape(*weight.shape[:2], -1)
        given = np.matvec(matrices, share.inputs.mean).reshape(-1)
        return np.asarray(share.targets.mean.reshape(-1) - given + self._added_behind())

    def _added_behind(self) -> NDArray[np.float64] | float:
        """What a node behind the layer adds, which y does not show."""
        return 0.0 if self._bias is None or self._bias.in_node else self._bias.values

    def _shares(self, sights: Iterator[Sight]) -> dict[bool, _Share]:
        """The moments of both shares, summed in lanes that run in parallel."""
        g, f, *rest = self._weight.shape
        p = int(np.prod(rest))
        lanes = _LANES if 8 * g * (p + f) ** 2 <= _LANE_BYTES else 1
        sums: list[dict[bool, Accumulator]] = [{} for _ in range(lanes)]

        def add(item: tuple[int, Sight]) -> None:
            lane, sight = item
            if sight.held not in sums[lane]:
                sums[lane][sight.held] = Accumulator(f"layer {self._binding.layer.id!r}", g, p + f)
            _add(sums[lane][sight.held], self._geometry, sight)

        while group := list(islice(sights, lanes)):
            for _ in parallel_map(add, enumerate(group), self._backend):
                pass
        return {held: self._share(sums, held, p) for held in (False, True)}

    @staticmethod
    def _share(sums: Sequence[Mapping[bool, Accumulator]], held: bool, p: int) -> _Share:
        parts = [lane[held].moments() for lane in sums if held in lane]
        return _Share(*split(merged([part for part in parts if part is not None]), p))


def _add(accumulator: Accumulator, form: Geometry, sight: Sight) -> None:
    """Add the vectors (x̂, y) of one batch."""
    target = sight.y if sight.lack is None else sight.y + sight.lack
    wanted = np.concatenate(list(outputs(form, target)))
    start = 0
    for rows in patches(form, sight.x_hat):
        accumulator.add(np.concatenate([rows, wanted[start : start + len(rows)]], axis=2))
        start += len(rows)
