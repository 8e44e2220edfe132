"""A bound on the spectral norm of the whole residual: Theorem 1 of Liebenwein et al., NeurIPS 2021."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.measures import Floats, Measure, Needs, of_spectra, spectral


def _formula(values: Floats, whole: Floats) -> tuple[Floats, np.float64]:
    residual, norm = spectral.formula(values, whole)
    return residual * np.sqrt(values.shape[1]), norm


MEASURE = Measure(
    summary="√k · max_i σ_{i,j+1} / σ_1(W), the bound of the ALDS paper's Theorem 1",
    needs=Needs.WEIGHTS,
    errors=of_spectra(_formula),
)
