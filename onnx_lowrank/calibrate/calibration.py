"""The calibration inputs of a run, with the engine that runs them and the statistics measured on them."""

from __future__ import annotations

from dataclasses import dataclass, field

from onnx_lowrank.calibrate.data import Samples
from onnx_lowrank.calibrate.measurement import Statistics
from onnx_lowrank.calibrate.originals import Originals
from onnx_lowrank.engines.running import Engine


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration inputs in use.

    Attributes:
        samples: The inputs.
        engine: The engine that runs the model on them.
        statistics: The moments of every layer.
        originals: The input model's outputs on the batches of `statistics.batch` samples.
    """

    samples: Samples
    engine: Engine
    statistics: Statistics
    originals: Originals = field(default_factory=Originals)
