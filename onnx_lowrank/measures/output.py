"""What a layer's own error does to the model's outputs, read off a curve through a few measured points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_lowrank.measures import Errors, Evidence, Floats, Measure, Needs

_LEAST_SLOPE = 1e-3
"""Between points that do not rise: keeps the order of options, and hardly changes the numbers."""

_LAST_SLOPES = (0.5, 8.0)
"""Beyond the last point: outputs that have lost nearly all still lose more, and points that lie close
together do not tell how much."""

_FLOOR = 1e-12
"""What stands for an output error of 0, relative to the layer's largest."""


def predicted(errors: Floats, points: Sequence[tuple[float, float]]) -> Floats:
    """Predict the errors at the model's outputs from a layer's own.

    The curve is linear between the points in logarithms of both errors: squared errors are proportional
    as long as they are small, and saturate. It rises everywhere, so that larger errors stay larger: its
    points are raised to the largest before them. Below the first point it is proportional, above the last
    it goes on as between the last two, with a slope from 0.5 to 8.

    Args:
        errors: Relative squared errors of the layer's options, 0 or more, any shape.
        points: Pairs of such an error, which is positive, and of the output error measured for it, 0 or
            more, in any order. Among points with the same error the largest output error counts. Without
            any, the outputs are taken to have the layer's own errors.

    Returns:
        The output errors, in the shape of `errors`; 0 for 0.
    """
    if not points:
        return errors.copy()
    x, y = _knots(points)
    slopes = np.concatenate(([1.0], np.diff(y) / np.diff(x), [1.0]))
    if len(x) > 1:
        slopes[-1] = np.clip(slopes[-2], *_LAST_SLOPES)
    with np.errstate(divide="ignore"):
        at = np.log(errors)
    part = np.searchsorted(x, at, side="right")
    anchor = np.maximum(part - 1, 0)
    value = y[anchor] + slopes[part] * (at - x[anchor])
    # Rounding takes no value of a part past the end of it.
    return np.asarray(np.exp(np.minimum(value, np.append(y, np.inf)[part])))


def _knots(points: Sequence[tuple[float, float]]) -> tuple[Floats, Floats]:
    """Logarithms of both errors at the points, each strictly ascending."""
    own, caused = np.asarray(points, dtype=np.float64).T
    order = np.lexsort((caused, own))
    x = np.log(own[order])
    y = np.log(np.maximum(caused[order], _FLOOR * (caused.max() or 1.0)))
    last = np.append(np.diff(x) > 0, True)
    x, y = x[last], np.maximum.accumulate(y)[last]
    rise = _LEAST_SLOPE * x
    return x, np.maximum.accumulate(y - rise) + rise


def _errors(evidence: Evidence, *, relative: bool) -> Errors:
    """The errors at the model's outputs, which are relative in any case."""
    return {key: predicted(error, evidence.effects) for key, error in evidence.activation.items()}


MEASURE = Measure(
    summary=(
        "Σ ‖y − ŷ‖² / Σ ‖y − ȳ‖² at the model's outputs y, ȳ their mean, with this layer alone compressed"
    ),
    needs=Needs.MOMENTS | Needs.OUTPUTS,
    errors=_errors,
    legend="what the layer alone is predicted to add to the square of the output error, before any recovery",
)
