"""Work items that compute the errors of all decompositions of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Spectra
from onnx_lowrank.core.option import Fold
from onnx_lowrank.linalg import gram, tied
from onnx_lowrank.linalg.activations import errors, output_errors
from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.linalg.quadratic import Quadratic, shrinkage
from onnx_lowrank.linalg.spectra import spectra
from onnx_lowrank.work.moments import MomentsRef, input_problem, tied_problem
from onnx_lowrank.work.weights import WeightRef


@dataclass(frozen=True, slots=True, eq=False)
class WeightItem:
    """Asks for the singular values of a weight's slices.

    Attributes:
        weight: The weight.
        wanted: The numbers of slices k for every fold.
    """

    weight: WeightRef
    wanted: Mapping[Fold, tuple[int, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes of the computation: the weight and a copy, a block, and the Gram matrices of one fold."""
        block = 8 * min(self.weight.size, gram.BLOCK)
        return 2 * self.weight.nbytes + block + max(map(self._grams, self.wanted), default=0)

    def _grams(self, fold: Fold) -> int:
        """Bytes of the Gram matrices of all k, which stay, and of the solver's copy of the largest ones."""
        g, f, c, *kernel = self.weight.shape
        encoder, decoder = fold.kernels(tuple(kernel))
        rows, cols = f * prod(decoder), c * prod(encoder)
        sizes = [8 * g * k * min(rows, cols // k) ** 2 for k in self.wanted[fold]]
        return sum(sizes) + max(sizes, default=0)


def singular_values(item: WeightItem, backend: Backend) -> Spectra:
    """Compute the singular values for every wanted (fold, k); see `linalg.spectra.spectra`."""
    return spectra(item.weight.read(), item.wanted, backend, item.weight.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class ActivationItem:
    """Asks for the errors of a layer's decompositions on its activations.

    Attributes:
        weight: Its weight.
        moments: The moments of its inputs or of its outputs.
        centred: Whether a bias absorbs the change of the mean.
        tops: The largest wanted rank of each (fold, k).
    """

    weight: WeightRef
    moments: MomentsRef
    centred: bool
    tops: Mapping[tuple[Fold, int], int]

    @property
    def nbytes(self) -> int:
        """Approximate bytes that the computation takes: copies of the moments, of the weight and of P C."""
        if self.moments.of_outputs or self.moments.transposed is not None:
            return self.weight.nbytes + 16 * self.weight.size + 4 * self.moments.nbytes
        g, f, *rest = self.weight.shape
        p = prod(rest)
        n = max(map(self._rows, self.tops), default=0)
        taken = 4 * p**2 + 5 * f * p + 3 * n * p + 3 * n**2
        return self.weight.nbytes + self.moments.nbytes + 8 * g * taken

    def _rows(self, key: tuple[Fold, int]) -> int:
        """Rows of P C in `linalg.projection`."""
        fold, k = key
        _, decoder = fold.kernels(self.weight.shape[3:])
        return k * prod(decoder) * self.tops[key]


@dataclass(frozen=True, slots=True, eq=False)
class ActivationErrors:
    """Errors of a layer's decompositions on its activations.

    Attributes:
        relative: The errors at the ranks 0, 1, … for each (fold, k), relative to the power of the outputs.
            Moments of outputs, and those of a tied layer, determine only the errors of (encode, 1).
        power: The power of the outputs. A relative error times this power is the absolute error.
    """

    relative: Mapping[tuple[Fold, int], NDArray[np.float64]]
    power: float


def activation_errors(item: ActivationItem, backend: Backend) -> ActivationErrors:
    """Compute the errors of the factors that `work.fitting.dense` makes; `fitted` refines its factors.

    Raises:
        InputError: The moments are not finite.
    """
    weight, moments = item.weight.read(), item.moments.read()
    if moments.transposed is not None:
        both = tied_problem(weight, moments, ridged=True)
        return ActivationErrors({(Fold.ENCODE, 1): tied.errors(both)}, both.power)
    if moments.inputs is not None:
        problem = input_problem(weight, moments, centred=item.centred)
        return ActivationErrors(_curves(problem, item, backend), float(np.sum(problem.power)))
    if moments.outputs is None:
        raise RuntimeError(f"the moments {item.moments.number} were not written")
    ridge = shrinkage(moments.outputs, moments.least)
    encode_errors = output_errors(moments.outputs, weight, centred=item.centred, ridge=ridge)
    power = float(np.trace(moments.outputs.second, axis1=1, axis2=2).sum())
    return ActivationErrors({(Fold.ENCODE, 1): encode_errors}, power)


def _curves(
    problem: Quadratic, item: ActivationItem, backend: Backend
) -> dict[tuple[Fold, int], NDArray[np.float64]]:
    """The errors of every fold for ascending slice counts, up to the first that pays nowhere.

    Factors with k slices of rank j are also factors with fewer slices of a higher rank, which are a little
    larger. So if k slices would make a layer smaller at no more error, some of the counts below k would too.
    """
    table: dict[tuple[Fold, int], NDArray[np.float64]] = {}
    for fold in dict.fromkeys(fold for fold, _ in item.tops):
        fewer: list[tuple[int, NDArray[np.float64]]] = []
        for k in sorted(k for other, k in item.tops if other is fold):
            curve = errors(problem, item.weight.shape, fold, k, item.tops[fold, k], backend)
            table[fold, k] = curve
            size = _size(item.weight.shape, fold, k)
            if fewer and not _pays(curve, size, fewer):
                break
            fewer.append((size, curve))
    return table


def _size(shape: tuple[int, ...], fold: Fold, k: int) -> int:
    """Parameters of the factors per unit of rank."""
    _, f, c, *kernel = shape
    encoder, decoder = fold.kernels(tuple(kernel))
    return c * prod(encoder) + k * f * prod(decoder)


def _pays(curve: NDArray[np.float64], size: int, fewer: Sequence[tuple[int, NDArray[np.float64]]]) -> bool:
    """Whether a curve has an error below those of all others at the same number of parameters.

    Args:
        curve: The errors at the ranks 0, 1, …
        size: The number of parameters per unit of rank.
        fewer: Sizes and curves of the others. Between their ranks, the errors are interpolated: otherwise a
            curve would pay for its finer steps alone.
    """
    parameters = np.arange(len(curve)) * size
    others = [np.interp(parameters / other, np.arange(len(errors)), errors) for other, errors in fewer]
    return bool(np.any(curve < np.min(others, axis=0)))
