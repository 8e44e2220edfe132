"""Work items that make the factors of one layer, fitted to its weight or to its activations.

Rules:

1. Factors fitted to activations minimize E‖(W − Ŵ) x‖² over the calibration inputs. If the layer has a bias
   that can change (`layers.bias`), the bias absorbs the change of the mean, and only the deviations count.
   Scaled factors minimize the error of the scaled weight (`linalg.scaled`), and the bias is corrected, too.
2. Factors are fitted to one share of the calibration inputs and judged on the other: refinement continues
   while the held-out error falls.
3. A layer without calibration moments gets factors fitted to its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Certificate, Factors, Fit, LayerFit
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.errors import PlanError
from onnx_lowrank.linalg import gram, selection, sparse, tied
from onnx_lowrank.linalg.activations import corrected_mean, fit, output_error, output_fit, products
from onnx_lowrank.linalg.backend import Backend, in_turn
from onnx_lowrank.linalg.certificate import certify, certify_weight, taken
from onnx_lowrank.linalg.factorize import factorize
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.narrowing import Way
from onnx_lowrank.linalg.quadratic import INPUT_RIDGE, error, of_weight, shrinkage
from onnx_lowrank.work.moments import LayerMoments, MomentsRef, input_problem, tied_problem
from onnx_lowrank.work.narrowing import WidthItem, way_of
from onnx_lowrank.work.sparse import sparse_factors
from onnx_lowrank.work.weights import WeightRef

STEPS = 30
"""Largest number of iterations that refine factors."""

Made = Factors | NDArray[Any]
"""The new numbers of a layer: its factors, or its whole weight in canonical form."""


@dataclass(frozen=True, slots=True, eq=False)
class FactorsItem:
    """Asks for the factors of one layer.

    Attributes:
        weight: Its weight.
        option: Its option.
        moments: Its moments; None to fit the factors to its weight.
        centred: Whether a bias absorbs the change of the mean.
        added: The bias that its node adds to its outputs, shape (f,), if the moments of outputs include it;
            None otherwise.
        way: The way to make it narrower, or the question for it; narrow options need it.
        per_rank: The rows of a table that stay for each unit of rank; sparse options need it.
    """

    weight: WeightRef
    option: Option
    moments: MomentsRef | None = None
    centred: bool = False
    added: NDArray[np.float64] | None = None
    way: Way | WidthItem | None = None
    per_rank: int = 0

    @property
    def nbytes(self) -> int:
        """Approximate bytes that the fit or the certificate takes, whichever is more."""
        needed = self.weight.nbytes
        if self.moments is None:
            needed += self.weight.nbytes + 8 * min(self.weight.size, gram.BLOCK)
            needed += 24 * self._factors() + self._grams()
        elif self.moments.of_outputs or self.moments.transposed is not None:
            needed += 24 * self.weight.size + 4 * self.moments.nbytes
        else:
            g, f, *rest = self.weight.shape
            p = prod(rest)
            _, decoder = self.option.fold.kernels(self.weight.shape[3:])
            n = self.option.k * prod(decoder) * self.option.j
            needed += self.moments.nbytes + 8 * g * (5 * p**2 + 10 * f * p + 4 * n * p + 4 * n**2)
        return max(needed, _certifying(self.weight))

    def _factors(self) -> int:
        """Number of elements of the factors."""
        g, f, c, *kernel = self.weight.shape
        encoder, decoder = self.option.fold.kernels(tuple(kernel))
        return g * self.option.j * (c * prod(encoder) + self.option.k * f * prod(decoder))

    def _grams(self) -> int:
        """Bytes of the Gram matrices of the slices, of their eigenvectors, and of LAPACK's workspace."""
        g, f, c, *kernel = self.weight.shape
        encoder, decoder = self.option.fold.kernels(tuple(kernel))
        side = min(f * prod(decoder), c // self.option.k * prod(encoder))
        return 8 * side**2 * (2 * g * self.option.k + 3)


@dataclass(frozen=True, slots=True, eq=False)
class FittedLayer:
    """The factors of one layer.

    Attributes:
        factors: The factors as stored, in the weight's dtype.
        certificate: Their certificate.
        fit: How they were made.
        lost: (W − Ŵ) E[x], which a bias adds to keep the outputs' mean, shape (f,); None without a bias.
    """

    factors: Factors
    certificate: Certificate
    fit: LayerFit
    lost: NDArray[np.float64] | None = None


def fitted(item: FactorsItem, backend: Backend) -> FittedLayer:
    """Make and certify the factors of a layer (rules 1 to 3).

    Raises:
        InputError: The moments are not finite, or a data file has changed.
        PlanError: The option does not fit the weight.
    """
    weight, dtype = item.weight.read(), item.weight.dtype
    moments = LayerMoments() if item.moments is None else item.moments.read()
    if item.option.lowering is Lowering.SPARSE:
        return _sparse(item, weight, moments)
    way = _way(item.way)
    factors = activation_factors(
        weight, item.option, moments, backend, centred=item.centred, steps=STEPS, way=way
    )
    if factors is None:
        stored = stored_as(factorize(weight, item.option, backend, dtype), dtype)
        return FittedLayer(stored, certify(weight, stored, backend.shared or in_turn), LayerFit(Fit.WEIGHTS))
    stored = stored_as(factors, dtype)
    del factors  # For a large layer these are gigabytes that the certificate needs.
    lost = _lost(item, weight, item.option, stored, moments, way) if item.centred else None
    loss = held_error(weight, stored, moments, centred=item.centred)
    proof = certify(weight, stored, backend.shared or in_turn)
    return FittedLayer(stored, proof, LayerFit(moments.fit, error=loss), lost)


def _sparse(item: FactorsItem, weight: NDArray[Any], moments: LayerMoments) -> FittedLayer:
    """A low-rank table with kept rows."""
    factors = sparse_factors(weight, moments, item.option.j, item.per_rank)
    stored = stored_as(factors, item.weight.dtype)
    counts = moments.counts if moments.held_counts is None else moments.held_counts
    loss = None if counts is None else sparse.error(weight, compose(exact(stored)), counts)
    return FittedLayer(stored, certify(weight, stored), LayerFit(Fit.ACTIVATIONS, error=loss))


@dataclass(frozen=True, slots=True, eq=False)
class DenseItem:
    """Asks for the maps that one layer computes under several options.

    Attributes:
        weight: Its weight.
        options: The options.
        moments: Its moments.
        centred: As in `FactorsItem`.
        added: As in `FactorsItem`.
        way: As in `FactorsItem`.
    """

    weight: WeightRef
    options: tuple[Option, ...]
    moments: MomentsRef | None
    centred: bool = False
    added: NDArray[np.float64] | None = None
    way: Way | WidthItem | None = None

    @property
    def nbytes(self) -> int:
        """Approximate bytes that the fit of one option takes, and all results."""
        items = (FactorsItem(self.weight, option, self.moments) for option in self.options)
        results = len(self.options) * self.weight.size * self.weight.dtype.itemsize
        return max((item.nbytes for item in items), default=0) + results


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """The map that a layer computes under an option, without refinement.

    Attributes:
        weight: The product of its factors, in the weight's dtype and canonical shape.
        lost: As in `FittedLayer`.
    """

    weight: NDArray[Any]
    lost: NDArray[np.float64] | None


def dense(item: DenseItem, backend: Backend) -> list[Dense]:
    """Make the products of a layer's factors without refinement; `work.scoring` predicts their errors.

    Narrow options come after the others.

    Raises:
        InputError: As for `fitted`.
        PlanError: As for `fitted`.
    """
    weight = item.weight.read()
    moments = LayerMoments() if item.moments is None else item.moments.read()
    if moments.inputs is None:
        return [_dense_alone(item, weight, option, moments, backend) for option in item.options]
    chains = [option for option in item.options if option.lowering is not Lowering.NARROW]
    narrow = [option for option in item.options if option.lowering is Lowering.NARROW]
    found = _products(item, weight, chains, moments, backend) if chains else []
    return [*found, *(_narrowed(item, weight, narrow, moments) if narrow else ())]


def _products(
    item: DenseItem,
    weight: NDArray[Any],
    options: Sequence[Option],
    moments: LayerMoments,
    backend: Backend,
) -> list[Dense]:
    """The products under options of chains, all from one decomposition."""
    if moments.inputs is None:
        raise RuntimeError("the products are fitted to moments of inputs")
    dtype = item.weight.dtype
    mean, problem = moments.inputs.mean, input_problem(weight, moments, centred=item.centred)
    found = []
    for product in products(problem, weight.shape, options, backend):
        change = (weight - product).reshape(*weight.shape[:2], -1)
        lost = np.matvec(change, mean).reshape(-1) if item.centred else None
        with np.errstate(over="ignore"):  # a value beyond the range of the dtype becomes infinite
            found.append(Dense(product.astype(dtype), lost))
    return found


def _narrowed(
    item: DenseItem, weight: NDArray[Any], options: Sequence[Option], moments: LayerMoments
) -> list[Dense]:
    """The products under narrow options, all from one problem."""
    way = _way(item.way)
    if way is None:
        raise RuntimeError("a narrow option needs the way to make its layer narrower")
    problem = input_problem(weight, moments, centred=item.centred, least=selection.RIDGE)
    made = ((option, way.fit(problem, weight.shape, option.j)) for option in options)
    return [_composed(item, weight, option, factors, moments, way) for option, factors in made]


def _dense_alone(
    item: DenseItem, weight: NDArray[Any], option: Option, moments: LayerMoments, backend: Backend
) -> Dense:
    """The product under one option, from moments of outputs or from the weight alone."""
    factors = activation_factors(weight, option, moments, backend, centred=item.centred, steps=0)
    factors = factors or factorize(weight, option, backend, item.weight.dtype)
    return _composed(item, weight, option, factors, moments, None)


def _composed(
    item: DenseItem,
    weight: NDArray[Any],
    option: Option,
    factors: Factors,
    moments: LayerMoments,
    way: Way | None,
) -> Dense:
    """The product of factors, and the change of the bias that goes with them."""
    lost = _lost(item, weight, option, factors, moments, way) if item.centred else None
    with np.errstate(over="ignore"):  # a value beyond the range of the dtype becomes infinite
        return Dense(compose(factors).astype(item.weight.dtype), lost)


@dataclass(frozen=True, slots=True, eq=False)
class CertificateItem:
    """Asks for the certificate of one layer.

    Attributes:
        weight: Its weight.
        made: Its factors as they are stored, or a new weight in canonical form as it is stored.
    """

    weight: WeightRef
    made: Made

    @property
    def nbytes(self) -> int:
        """Approximate bytes that it takes, factors included."""
        return self.made.size * (8 + self.weight.dtype.itemsize) + _certifying(self.weight)


def certificate(item: CertificateItem, backend: Backend) -> Certificate:
    """Certify factors or a weight; the host computes this for every device."""
    weight = item.weight.read()
    shared = backend.shared or in_turn
    if isinstance(item.made, Factors):
        return certify(weight, item.made, shared)
    return certify_weight(weight, item.made, shared)


def activation_factors(
    weight: NDArray[Any],
    option: Option,
    moments: LayerMoments,
    backend: Backend,
    *,
    centred: bool,
    steps: int,
    way: Way | None = None,
) -> Factors | None:
    """Factors of least error on a layer's inputs (rule 1); None if its moments do not determine them.

    Args:
        weight: Canonical weight, with its BatchNorm folded in.
        option: Its option.
        moments: The layer's moments; moments of outputs serve only the encode fold of one slice.
        backend: Where to compute.
        centred: Whether a bias absorbs the change of the mean.
        steps: Largest number of refinement iterations; refinement needs held-out moments.
        way: For a narrow option, the way to make the layer narrower.
    """
    if moments.transposed is not None:
        return tied.fit(tied_problem(weight, moments, ridged=True), option.j)
    is_narrow = option.lowering is Lowering.NARROW
    if moments.inputs is not None:
        least = selection.RIDGE if is_narrow else INPUT_RIDGE
        problem = input_problem(weight, moments, centred=centred, least=least)
        held = None
        # Held-out activations do not judge scaled factors, whose error is another one.
        if steps and not is_narrow and moments.held is not None and moments.fit is Fit.ACTIVATIONS:
            held = of_weight(weight, moments.held, centred=centred, ridge=0.0)
        return fit(problem, weight.shape, option, backend, held, steps if held is not None else 0, way)
    if is_narrow:
        raise PlanError("A plan that narrows layers needs moments of their inputs: pass --calibration.")
    kernel = weight.shape[3:]
    if moments.outputs is not None and option.fold.on(kernel) is Fold.ENCODE and option.k == 1:
        ridge = shrinkage(moments.outputs, moments.least)
        return output_fit(moments.outputs, weight, option.j, backend, centred=centred, ridge=ridge)
    return None


def _way(known: Way | WidthItem | None) -> Way | None:
    return way_of(known) if isinstance(known, WidthItem) else known


def _lost(
    item: FactorsItem | DenseItem,
    weight: NDArray[Any],
    option: Option,
    factors: Factors,
    moments: LayerMoments,
    way: Way | None,
) -> NDArray[np.float64]:
    """The change of the bias that goes with the factors of an option, shape (f,)."""
    is_narrow = option.lowering is Lowering.NARROW
    shift = way.shift(option.j) if is_narrow and way is not None else None
    return lost_mean(weight, factors, moments, item.added) if shift is None else shift


def lost_mean(
    weight: NDArray[Any], factors: Factors, moments: LayerMoments, added: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """(W − Ŵ) E[x], which a bias adds to keep the mean of a layer's outputs; shape (f,)."""
    if moments.inputs is not None:
        return corrected_mean(weight, factors, moments.inputs)
    if moments.outputs is None:
        return np.zeros(prod(weight.shape[:2]))
    # Factors fitted to outputs project W, and therefore its outputs, onto the decoder's columns.
    mean = moments.outputs.mean - (0.0 if added is None else added.reshape(weight.shape[:2]))
    decoder = factors.decoder.astype(np.float64).reshape(*weight.shape[:2], -1)
    kept = np.matvec(decoder, np.matvec(np.linalg.pinv(decoder), mean))
    return np.asarray(mean - kept).reshape(-1)


def held_error(
    weight: NDArray[Any], stored: Factors, moments: LayerMoments, *, centred: bool
) -> float | None:
    """The relative activation error of factors as stored; None without moments.

    A tied layer has the sum of the errors of both uses.
    """
    if moments.transposed is not None:
        return tied.error(tied_problem(weight, moments, ridged=False), compose(exact(stored)))
    if (inputs := moments.held or moments.inputs) is not None:
        return error(of_weight(weight, inputs, centred=centred, ridge=0.0), compose(exact(stored)))
    outputs = moments.held_outputs or moments.outputs
    return None if outputs is None else output_error(outputs, stored, centred=centred)


def stored_as(factors: Factors, dtype: np.dtype[Any]) -> Factors:
    """Convert factors to the dtype in which they are stored."""
    return factors.astype(dtype)


def exact(factors: Factors) -> Factors:
    """Convert factors to float64 for computing."""
    return stored_as(factors, np.dtype(np.float64))


def _certifying(weight: WeightRef) -> int:
    """Bytes that a certificate takes, the weight included."""
    return weight.nbytes + taken(weight.shape)
