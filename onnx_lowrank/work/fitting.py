"""Work items that make the factors of one layer, fitted to its weight or to its activations.

Rules:

1. Factors fitted to activations minimize E‖(W − Ŵ) x‖² over the calibration inputs. Where the layer has
   a bias that can change (`layers.bias`), it takes the change of the mean, and only the deviations count.
2. What is fitted to one share of the calibration inputs is judged by the other: refinement goes on
   while the held-out error falls.
3. A layer of which calibration tells nothing has its factors fitted to its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Certificate, Factors, Fit, LayerFit
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.linalg.activations import corrected_mean, fit, output_error, output_fit
from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.linalg.factorize import certify, factorize
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.quadratic import INPUT_RIDGE, error, of_weight, shrinkage
from onnx_lowrank.work.moments import LayerMoments, MomentsRef
from onnx_lowrank.work.weights import WeightRef

STEPS = 30
"""Iterations by which factors are refined at most."""


@dataclass(frozen=True, slots=True, eq=False)
class FactorsItem:
    """Asks for the factors of one layer.

    Attributes:
        weight: Its weight.
        option: Its option.
        moments: What was measured of it; None where the factors are to be fitted to its weight.
        centred: Whether a bias takes the change of the mean.
        added: What its own node adds to its output features, shape (f,), where moments of outputs include
            that; None where they do not.
    """

    weight: WeightRef
    option: Option
    moments: MomentsRef | None = None
    centred: bool = False
    added: NDArray[np.float64] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, about: to fit, or to certify, whichever is more."""
        taken = self.weight.nbytes
        if self.moments is None:
            taken += 24 * self.weight.size + self._grams()
        elif self.moments.of_outputs:
            taken += 24 * self.weight.size + 4 * self.moments.nbytes
        else:
            g, f, *rest = self.weight.shape
            p = prod(rest)
            _, decoder = self.option.fold.kernels(self.weight.shape[3:])
            n = self.option.k * prod(decoder) * self.option.j
            taken += self.moments.nbytes + 8 * g * (5 * p**2 + 10 * f * p + 4 * n * p + 4 * n**2)
        return max(taken, _certifying(self.weight))

    def _grams(self) -> int:
        """The Gram matrices of the slices, their eigenvectors, and what LAPACK takes to find them."""
        g, f, c, *kernel = self.weight.shape
        encoder, decoder = self.option.fold.kernels(tuple(kernel))
        side = min(f * prod(decoder), c // self.option.k * prod(encoder))
        return 8 * side**2 * (2 * g * self.option.k + 3)


@dataclass(frozen=True, slots=True, eq=False)
class FittedLayer:
    """The factors of one layer.

    Attributes:
        factors: As they are stored, in the weight's dtype.
        certificate: What is proved of them.
        fit: How they came about.
        lost: (W − Ŵ) E[x], by which a bias keeps the mean of the outputs, shape (f,); None where none does.
    """

    factors: Factors
    certificate: Certificate
    fit: LayerFit
    lost: NDArray[np.float64] | None = None


def fitted(item: FactorsItem, backend: Backend) -> FittedLayer:
    """The factors of a layer, certified (rules 1 to 3).

    Raises:
        InputError: The moments are not finite, or a data file has changed.
        PlanError: The option does not fit the weight.
    """
    weight, dtype = item.weight.read(), item.weight.dtype
    moments = LayerMoments() if item.moments is None else item.moments.read()
    factors = activation_factors(weight, item.option, moments, backend, centred=item.centred, steps=STEPS)
    if factors is None:
        stored = stored_as(factorize(weight, item.option, backend, dtype), dtype)
        return FittedLayer(stored, certify(weight, stored), LayerFit(Fit.WEIGHTS))
    stored = stored_as(factors, dtype)
    del factors  # a large layer's are gigabytes
    lost = lost_mean(weight, stored, moments, item.added) if item.centred else None
    loss = _error(weight, stored, moments, centred=item.centred)
    return FittedLayer(stored, certify(weight, stored), LayerFit(Fit.ACTIVATIONS, error=loss), lost)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """What a layer computes under an option, without rounding.

    Attributes:
        weight: The product of its factors, in its canonical shape.
        lost: As in `FittedLayer`.
    """

    weight: NDArray[np.float64]
    lost: NDArray[np.float64] | None


def dense(item: FactorsItem, backend: Backend) -> Dense:
    """The product of a layer's factors that `work.scoring` tells the errors of: without refinement.

    Raises:
        InputError: As `fitted`.
        PlanError: As `fitted`.
    """
    weight = item.weight.read()
    moments = LayerMoments() if item.moments is None else item.moments.read()
    factors = activation_factors(
        weight, item.option, moments, backend, centred=item.centred, steps=0
    ) or factorize(weight, item.option, backend, item.weight.dtype)
    return Dense(compose(factors), lost_mean(weight, factors, moments, item.added) if item.centred else None)


@dataclass(frozen=True, slots=True, eq=False)
class CertificateItem:
    """Asks what is proved of the factors of one layer.

    Attributes:
        weight: Its weight.
        factors: Its factors as they are stored.
    """

    weight: WeightRef
    factors: Factors

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, about, the factors included."""
        return self.factors.size * (8 + self.weight.dtype.itemsize) + _certifying(self.weight)


def certificate(item: CertificateItem, backend: Backend) -> Certificate:
    """The certificate of factors; the host computes it whatever the device."""
    return certify(item.weight.read(), item.factors)


def activation_factors(
    weight: NDArray[Any],
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
    weight: NDArray[Any], factors: Factors, moments: LayerMoments, added: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """(W − Ŵ) E[x], by which a bias keeps the mean of a layer's outputs; shape (f,)."""
    if moments.inputs is not None:
        return corrected_mean(weight, factors, moments.inputs)
    if moments.outputs is None:
        return np.zeros(prod(weight.shape[:2]))
    # The factors of outputs project W on the decoder's columns, and so they project its outputs.
    mean = moments.outputs.mean - (0.0 if added is None else added.reshape(weight.shape[:2]))
    decoder = factors.decoder.astype(np.float64).reshape(*weight.shape[:2], -1)
    kept = np.matvec(decoder, np.matvec(np.linalg.pinv(decoder), mean))
    return np.asarray(mean - kept).reshape(-1)


def _error(weight: NDArray[Any], stored: Factors, moments: LayerMoments, *, centred: bool) -> float | None:
    """The relative activation error of factors as stored; None where nothing was measured."""
    if (inputs := moments.held or moments.inputs) is not None:
        return error(of_weight(weight, inputs, centred=centred, ridge=0.0), compose(exact(stored)))
    outputs = moments.held_outputs or moments.outputs
    return None if outputs is None else output_error(outputs, stored, centred=centred)


def stored_as(factors: Factors, dtype: np.dtype[Any]) -> Factors:
    """Factors in the dtype in which they are stored."""
    return Factors(factors.fold, factors.encoder.astype(dtype), factors.decoder.astype(dtype))


def exact(factors: Factors) -> Factors:
    """Factors in float64, to compute with."""
    return stored_as(factors, np.dtype(np.float64))


def _certifying(weight: WeightRef) -> int:
    """Bytes that a certificate takes: the weight, Ŵ and their difference in float64, and Gram matrices."""
    _, f, *rest = weight.shape
    return weight.nbytes + 32 * weight.size + 40 * min(f, prod(rest)) ** 2
