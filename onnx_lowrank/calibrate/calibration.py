"""What there is to calibrate with: inputs, what runs them, and what was measured on them."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lowrank.calibrate.data import Samples
from onnx_lowrank.calibrate.statistics import Statistics
from onnx_lowrank.engines.running import Engine


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration inputs at work.

    Attributes:
        samples: The inputs.
        engine: What runs the model on them.
        statistics: The moments of every layer.
    """

    samples: Samples
    engine: Engine
    statistics: Statistics
