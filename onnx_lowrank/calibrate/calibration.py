"""The calibration inputs of a run, with the engine that runs them and the statistics measured on them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from onnx_lowrank.calibrate.allowance import Allowance
from onnx_lowrank.calibrate.data import Samples
from onnx_lowrank.calibrate.measured import Statistics
from onnx_lowrank.calibrate.originals import Originals
from onnx_lowrank.calibrate.shares import Samples as Batches
from onnx_lowrank.calibrate.succession import Succession
from onnx_lowrank.calibrate.trimming import Trimmed
from onnx_lowrank.core.outcome import Calibrated
from onnx_lowrank.engines.running import Engine, slowness
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

    def on(self, engine: Engine) -> Calibration:
        """The same inputs on another engine, without the outputs that are known of this one."""
        return replace(self, engine=engine, originals=Originals(self.memory.outputs))

    @property
    def summary(self) -> Calibrated:
        """The use of the inputs, for the report."""
        samples, mask = self.samples, self.statistics.padding.mask
        is_varied = self.varied is not samples
        source = samples.description + (f", without the positions that {mask!r} hides" if mask else "")
        return Calibrated(
            source=source + (", every third read again with other tokens" if is_varied else ""),
            samples=samples.count,
            held=samples.held,
            unmeasured=tuple(self.statistics.reasons.items()),
            warnings=(*samples.warnings, *slowness(self.engine), *self.succession.warnings),
        )

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
