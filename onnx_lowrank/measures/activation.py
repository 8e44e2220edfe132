"""The squared error of a layer's outputs on calibration inputs.

`linalg/activations.py` computes the relative errors. They are part of the evidence because every measure that
needs moments or outputs starts from them.
"""

from __future__ import annotations

from onnx_lowrank.measures import Errors, Evidence, Measure, Needs


def _errors(evidence: Evidence, *, relative: bool) -> Errors:
    scale = 1.0 if relative else evidence.power
    return {key: scale * error for key, error in evidence.activation.items()}


MEASURE = Measure(
    summary=("(E‖(W − Ŵ) x‖² + λ ‖W − Ŵ‖²_F) / (E‖W x‖² + λ ‖W‖²_F), x the patches that the layer reads"),
    needs=Needs.MOMENTS,
    errors=_errors,
    legend=(
        "‖y − ŷ‖²/‖y‖² of the layer's output y, predicted from calibration inputs, with a ridge for "
        "directions that they do not show"
    ),
)
