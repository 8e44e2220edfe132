"""The nuclear norm of the slices' residuals."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.measures import Floats, Measure, Needs, of_spectra
from onnx_lowrank.measures.schatten import tails


def _formula(values: Floats, whole: Floats) -> tuple[Floats, np.float64]:
    residual = tails(values, 1)
    return residual, residual[0]


MEASURE = Measure(
    summary="Σ_i Σ_{m>j} σ_{i,m} / Σ_i Σ_m σ_{i,m}",
    needs=Needs.WEIGHTS,
    errors=of_spectra(_formula),
)
