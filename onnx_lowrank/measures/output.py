"""The effect of one layer's error on the model's outputs, from a curve through a few measured points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_lowrank.measures import Errors, Evidence, Floats, Measure, Needs

_LEAST_SLOPE = 1e-3
"""Slope between points that do not rise: it keeps the order of options and hardly changes the errors."""

_LAST_SLOPES = (0.5, 8.0)
"""Least and largest slope beyond the last point: even a large output error still grows, and points that are
close together determine their slope badly."""

_FLOOR = 1e-12
"""Replaces an output error of 0, which has no logarithm; relative to the layer's largest output error."""


def predicted(errors: Floats, points: Sequence[tuple[float, float]]) -> Floats:
    """Predict the errors at the model's outputs from errors of one layer.

    The curve is linear between the points in the logarithms of both errors: squared errors are proportional
    while they are small, and saturate. The curve rises everywhere, so that it keeps the order of errors: each
    point is raised to the largest one before it. Below the first point, output errors are proportional to
    layer errors. Above the last point, the slope is that between the last two points, at least 0.5 and at
    most 8.

    Args:
        errors: Relative squared errors of the layer's options, 0 or more, any shape.
        points: Pairs of a layer's error, above 0, and of the output error measured for it, 0 or more, in any
            order. Of points with the same layer's error, the one with the largest output error counts.
            Without points, the predicted output errors are the layer's errors.

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
    # Without this, rounding could take a value past the end of its part of the curve.
    return np.asarray(np.exp(np.minimum(value, np.append(y, np.inf)[part])))


def _knots(points: Sequence[tuple[float, float]]) -> tuple[Floats, Floats]:
    """Logarithms of both errors at the points, each strictly ascending."""
    layer, output = np.asarray(points, dtype=np.float64).T
    order = np.lexsort((output, layer))
    x = np.log(layer[order])
    y = np.log(np.maximum(output[order], _FLOOR * (output.max() or 1.0)))
    last = np.append(np.diff(x) > 0, True)
    x, y = x[last], np.maximum.accumulate(y)[last]
    rise = _LEAST_SLOPE * x
    return x, np.maximum.accumulate(y - rise) + rise


def _errors(evidence: Evidence, *, relative: bool) -> Errors:
    """The errors at the model's outputs, which are always relative."""
    return {key: predicted(error, evidence.effects) for key, error in evidence.activation.items()}


MEASURE = Measure(
    summary=(
        "Σ ‖y − ŷ‖² / Σ ‖y − ȳ‖² at the model's outputs y, ȳ their mean, with this layer alone compressed"
    ),
    needs=Needs.MOMENTS | Needs.OUTPUTS,
    errors=_errors,
    legend="the predicted contribution of this layer to the squared output error, before any recovery",
)
