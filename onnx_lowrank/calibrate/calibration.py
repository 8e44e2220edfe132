"""The calibration inputs of a run, with the engine that runs them and the statistics measured on them."""

from __future__ import annotations

from dataclasses import dataclass, field

from onnx_lowrank.calibrate.allowance import Allowance
from onnx_lowrank.calibrate.data import Samples
from onnx_lowrank.calibrate.measured import Statistics
from onnx_lowrank.calibrate.originals import Originals
from onnx_lowrank.calibrate.shares import Samples as Batches
from onnx_lowrank.calibrate.succession import Succession
from onnx_lowrank.calibrate.trimming import Trimmed
from onnx_lowrank.engines.running import Engine
from onnx_lowrank.files.keeping import Keeper


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration inputs in use.

    Attributes:
        samples: The inputs.
        varied: The inputs with further texts to fit to (`calibrate.variety`).
        engine: The engine that runs the model on them.
        statistics: The moments of every layer.
        originals: The input model's outputs on the batches of `statistics.batch` samples.
        succession: The likeness of the compared samples to those before them.
        keeper: Keeps values that depend on the model and the inputs; None keeps none.
        memory: The memory to take.
    """

    samples: Samples
    varied: Batches
    engine: Engine
    statistics: Statistics
    originals: Originals = field(default_factory=Originals)
    succession: Succession = field(default_factory=Succession)
    keeper: Keeper | None = None
    memory: Allowance = field(default_factory=Allowance)

    @property
    def trimmed(self) -> Batches:
        """The inputs to fit to without removable padding, for sums over the vectors of layers."""
        return Trimmed(self.varied, self.statistics.padding)

    @property
    def compared(self) -> Batches:
        """The samples for comparisons of outputs."""
        # The mean of every position's output needs outputs of one shape.
        padding = self.statistics.padding
        return self.samples if padding.axes else Trimmed(self.samples, padding)

    @property
    def is_in_order(self) -> bool:
        """Whether `compared` gives the samples in the user's order, not in that of their lengths."""
        padding = self.statistics.padding
        return bool(padding.axes) or not padding.removable
