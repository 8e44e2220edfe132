"""The calibration inputs of a run, with the engine that runs them and the statistics measured on them."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lowrank.calibrate.data import Samples
from onnx_lowrank.calibrate.statistics import Statistics
from onnx_lowrank.engines.running import Engine


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration inputs in use.

    Attributes:
        samples: The inputs.
        engine: The engine that runs the model on them.
        statistics: The moments of every layer.
    """

    samples: Samples
    engine: Engine
    statistics: Statistics
