"""The spectral norm of the worst slice's residual."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.measures import Floats, Measure, Needs, of_spectra


def formula(values: Floats, whole: Floats) -> tuple[Floats, np.float64]:
    """The largest singular value beyond every rank, and the largest one of the weight."""
    return values.max(axis=(0, 1)), whole.max()


MEASURE = Measure(
    summary="max_i σ_{i,j+1} / σ_1(W), as the ALDS paper's code scores it",
    needs=Needs.WEIGHTS,
    errors=of_spectra(formula),
)
