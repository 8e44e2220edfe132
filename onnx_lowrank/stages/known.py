"""The results that are known for one layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.option import Fold
from onnx_lowrank.files.overflow import Held
from onnx_lowrank.measures import Evidence, Needs

if TYPE_CHECKING:
    from onnx_lowrank.stages.effects import Effects

Key = tuple[Fold, int]
"""A fold with a number of slices."""


@dataclass(slots=True)
class Known:
    """The results known for one layer, from which measures compute errors.

    Attributes:
        spectra: Singular values of its weight, in memory or on disk.
        activation: Relative errors on the calibration inputs.
        power: The power of its outputs on these inputs. Times this, the activation errors are absolute.
        computed: The decompositions with attempted activation errors. Moments of outputs determine only one
            of them, so `activation` may hold fewer.
        effects: The errors at the model's outputs that some activation errors cause; empty until measured.
        unknown: Why these errors could not be measured, a sentence; "" if they were.
        widths: Relative errors of narrow layers, at the widths 0 … full width; None until computed.
        narrow_effects: The errors at the model's outputs that some of these cause; empty until measured.
    """

    spectra: dict[Key, Held] = field(default_factory=dict)
    activation: dict[Key, NDArray[np.float64]] = field(default_factory=dict)
    power: float = 1.0
    computed: set[Key] = field(default_factory=set)
    effects: Effects = ()
    unknown: str = ""
    widths: NDArray[np.float64] | None = None
    narrow_effects: Effects = ()

    def evidence(self, needs: Needs) -> Evidence:
        """The results that a measure needs, and others."""
        spectra = {key: held() for key, held in self.spectra.items()} if Needs.WEIGHTS in needs else {}
        return Evidence(spectra, self.activation, self.power, self.effects)
