"""Models with layers at given widths, and what they lose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto

from attending import inputs
from calibrating import made, measured, plan_of, run, seen
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.layers.found import Found
from onnx_lowrank.stages.build import Built


def narrow(width: int) -> Option:
    return Option(Fold.ENCODE, 1, width, Lowering.NARROW)


def built(
    proto: ModelProto, widths: Mapping[str, int], *, recover: bool = False, data: Any = None
) -> tuple[Found, Built]:
    """The model with layers at given widths."""
    found = seen(proto)
    options = [narrow(widths[layer.id]) if layer.id in widths else None for layer in found.layers]
    with measured(found, data or inputs()) as calibration:
        return found, made(found, plan_of(found, options, recover=recover), calibration)


def error(proto: ModelProto, other: ModelProto, **data: np.ndarray) -> float:
    """Relative error of the output, on other inputs of another length."""
    feed = data or inputs(7, 9, seed=2)
    wanted, given = run(proto, **feed), run(other, **feed)
    return float(np.linalg.norm(wanted - given) / np.linalg.norm(wanted))
