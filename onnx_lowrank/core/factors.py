"""The factors of a layer, what they are fitted to, and what is proved of them."""

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
    """What factors are fitted to: the weight itself, or what it makes of calibration inputs."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"


Spectra = Mapping[tuple[Fold, int], NDArray[np.float64]]
"""Singular values of every slice, descending, for each (fold, k): shape (groups, k, full rank)."""


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moments of vectors, for every operator group on its own.

    Attributes:
        count: Number of vectors.
        mean: Their mean, shape (g, n).
        second: Their centred second moments, E[(x − E x)(x − E x)ᵀ], shape (g, n, n).
    """

    count: int
    mean: NDArray[np.float64]
    second: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Targets:
    """What a layer should give, beside the moments of the inputs x that it gets.

    Attributes:
        mean: E[y], shape (g, f / g).
        cross: E[(y − E y)(x − E x)ᵀ], shape (g, f / g, p).
        power: E‖y − E y‖², shape (g,).
    """

    mean: NDArray[np.float64]
    cross: NDArray[np.float64]
    power: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Factors:
    """The two arrays that replace one weight.

    Attributes:
        fold: The fold by which they were made.
        encoder: Shape (groups, k, j, c / (groups · k), *encoder kernel).
        decoder: Shape (groups, f / groups, k, j, *decoder kernel).
    """

    fold: Fold
    encoder: Array
    decoder: Array

    @property
    def size(self) -> int:
        """Number of parameters of both."""
        return int(prod(self.encoder.shape) + prod(self.decoder.shape))


@dataclass(frozen=True, slots=True)
class Certificate:
    """Norms of the residual W − Ŵ relative to W's, for every operator group, rounded outwards.

    W has its BatchNorm folded in and is the map from patch to output (the encode matrix).
    """

    spectral: tuple[float, ...]
    frobenius: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LayerFit:
    """How the factors of one layer came about.

    Attributes:
        fit: What they were fitted to.
        recovered: Whether that was what the compressed layers before it give.
        error: ‖y − ŷ‖² / ‖y‖² of its output y on held-out calibration inputs where there are any, else on
            those that were fitted to; y less its mean where a bias keeps that. A recovered layer's y makes
            up for the layers before it, and ŷ is computed behind them. None where it is unknown.
    """

    fit: Fit
    recovered: bool = False
    error: float | None = None
