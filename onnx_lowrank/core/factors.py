"""The factors of a layer, the target of their fit, and the proven bounds on their error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.option import Fold

Array = Any
"""An array of any namespace that array-api-compat knows (NumPy, CuPy)."""


class Fit(StrEnum):
    """The target of the fit of factors.

    WEIGHTS is the weight, ACTIVATIONS its outputs on calibration inputs. SCALED is the weight with columns
    scaled by the size of the inputs (`linalg.scaled`).
    """

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"
    SCALED = "scaled"


Spectra = Mapping[tuple[Fold, int], NDArray[np.float64]]
"""Singular values of every slice, descending, for each (fold, k): shape (groups, k, full rank)."""


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moments of vectors, for every operator group on its own.

    Attributes:
        count: Number of vectors.
        mean: Their mean, shape (g, n).
        second: Their centred second moments, E[(x − E x)(x − E x)ᵀ], shape (g, n, n).
        independent: The number of independent vectors that they are worth (`calibrate.independence`); None
            if it is unknown, so that all vectors count as independent.
    """

    count: int
    mean: NDArray[np.float64]
    second: NDArray[np.float64]
    independent: float | None = None


@dataclass(frozen=True, slots=True)
class Targets:
    """Moments of the outputs y that a layer should give, jointly with the inputs x that it gets.

    Attributes:
        mean: E[y], shape (g, f / g).
        cross: E[(y − E y)(x − E x)ᵀ], shape (g, f / g, p).
        power: E‖y − E y‖², shape (g,).
    """

    mean: NDArray[np.float64]
    cross: NDArray[np.float64]
    power: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Rows of a table that stay as they are. The encoder is zero there.

    Attributes:
        indices: Their indices among the input channels, ascending, shape (s,).
        values: Their numbers, as columns of the canonical weight, shape (f, s).
    """

    indices: NDArray[np.intp]
    values: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Factors:
    """The arrays that replace one weight.

    Attributes:
        fold: The fold of the weight from which they were made.
        encoder: Shape (groups, k, j, c / (groups · k), *encoder kernel).
        decoder: Shape (groups, f / groups, k, j, *decoder kernel).
        rows: The rows of a sparse table that stay; None for all other options.
    """

    fold: Fold
    encoder: Array
    decoder: Array
    rows: KeptRows | None = None

    @property
    def size(self) -> int:
        """Number of parameters of all arrays."""
        kept = 0 if self.rows is None else self.rows.values.size
        return int(prod(self.encoder.shape) + prod(self.decoder.shape)) + kept

    def astype(self, dtype: np.dtype[Any]) -> Factors:
        """The same factors in another dtype."""
        rows = self.rows and KeptRows(self.rows.indices, self.rows.values.astype(dtype))
        return Factors(self.fold, self.encoder.astype(dtype), self.decoder.astype(dtype), rows)


@dataclass(frozen=True, slots=True)
class Certificate:
    """Norms of the residual W − Ŵ relative to W's, for every operator group, rounded outwards.

    W is the map from patch to output (the encode matrix), with the BatchNorm folded in.
    """

    spectral: tuple[float, ...]
    frobenius: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LayerFit:
    """How the factors of one layer were made.

    Attributes:
        fit: The target of the fit.
        recovered: Whether they were fitted to correct the errors of the compressed layers before this one.
        error: ‖y − ŷ‖² / ‖y‖² of the layer's output y on the held-out calibration inputs, or on all
            calibration inputs if none is held out. The mean of y is subtracted if a bias preserves it. For a
            recovered layer, y is the output that corrects the earlier errors, and ŷ is computed from the
            outputs of the compressed layers. None if it is unknown.
    """

    fit: Fit
    recovered: bool = False
    error: float | None = None
