"""The squared Frobenius norm of the residual."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.measures import Floats, Measure, Needs, of_spectra
from onnx_lowrank.measures.schatten import tails


def _formula(values: Floats, whole: Floats) -> tuple[Floats, np.float64]:
    residual = tails(values, 2)
    return residual, residual[0]


MEASURE = Measure(
    summary="Σ_i Σ_{m>j} σ²_{i,m} / ‖W‖²_F",
    needs=Needs.WEIGHTS,
    errors=of_spectra(_formula),
)
