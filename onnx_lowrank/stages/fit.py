"""The factors of one layer: fitted to its weight, or to its activations.

Rules:

1. Factors fitted to activations minimize E‖(W − Ŵ) x‖² over the calibration inputs. Where the layer has
   a bias that can change (`layers.bias`), it takes the change of the mean, and only the deviations count.
2. What is fitted to one share of the calibration inputs is judged by the other: refinement goes on
   while the held-out error falls.
3. A layer of which calibration tells nothing has its factors fitted to its weight.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.moments import INPUT_RIDGE, shrinkage
from onnx_lowrank.calibrate.statistics import LayerMoments
from onnx_lowrank.core.factors import Factors, Fit, LayerFit
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.layers.bias import Bias, bias
from onnx_lowrank.layers.find import Binding
from onnx_lowrank.layers.found import Found, prepared
from onnx_lowrank.linalg.activations import corrected_mean, fit, output_error, output_fit
from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.linalg.factorize import certify, factorize
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.quadratic import error, of_weight
from onnx_lowrank.rewrite.replace import Replacement

STEPS = 30
"""Iterations by which factors are refined at most."""


Fitted = tuple[Replacement, LayerFit]
"""The factors of one layer as the rewriter needs them, and how they came about."""


def on_weight(found: Found, binding: Binding, option: Option, backend: Backend) -> Fitted:
    """Factors of one layer fitted to its weight."""
    weight, dtype = prepared(found, binding)
    factors = factorize(weight, option, backend, dtype)
    stored = stored_as(factors, dtype)
    del factors  # a large layer's are gigabytes
    return Replacement(binding, option, stored, certify(weight, stored)), LayerFit(Fit.WEIGHTS)


def on_activations(
    found: Found, binding: Binding, option: Option, calibration: Calibration, backend: Backend
) -> Fitted:
    """Factors of one layer fitted to its own inputs (rules 1 and 3).

    Args:
        found: The model.
        binding: The layer.
        option: Its option.
        calibration: The inputs to fit to.
        backend: Where to compute.
    """
    moments = calibration.statistics[binding.layer.id]
    weight, dtype = prepared(found, binding)
    own = bias(found.model, found.walk, binding)
    factors = activation_factors(weight, option, moments, backend, centred=own is not None, steps=STEPS)
    if factors is None:
        return on_weight(found, binding, option, backend)
    stored = stored_as(factors, dtype)
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
        problem = of_weight(
            weight, moments.inputs, centred=centred, ridge=shrinkage(moments.inputs, INPUT_RIDGE)
        )
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
    """The relative activation error of factors as stored; None where nothing was measured."""
    if (inputs := moments.held or moments.inputs) is not None:
        return error(of_weight(weight, inputs, centred=centred, ridge=0.0), compose(exact(stored)))
    outputs = moments.held_outputs or moments.outputs
    return None if outputs is None else output_error(outputs, stored, centred=centred)


def stored_as(factors: Factors, dtype: np.dtype[np.generic]) -> Factors:
    """Factors in the dtype in which they are stored."""
    return Factors(factors.fold, factors.encoder.astype(dtype), factors.decoder.astype(dtype))


def exact(factors: Factors) -> Factors:
    """Factors in float64, to compute with."""
    return stored_as(factors, np.dtype(np.float64))
