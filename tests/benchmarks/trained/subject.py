"""What a benchmark has to know of a trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]
Feeds = dict[str, Array]
Shapes = Mapping[str, tuple[int, ...]]
Scores = dict[str, float]


@dataclass(frozen=True, slots=True)
class Subject:
    """A trained model with its data and its scores.

    Attributes:
        name: What the tables call it.
        file: Its ONNX file.
        about: What the page says of it.
        beside: Other files that its scores read.
        needs: Names of the modules that its data and scores import.
        calibration: Makes the unlabelled inputs that the command fits to.
        scores: Gives the scores of a compressed model, on data that calibration never sees.
        shapes: Input shapes at which budgets count MACs.
        times: Input shapes to time, by the name of their column.
        asked: Ratios to measure by default, for each budget.
        goals: What the project aims at, for a budget and a ratio, by the name of the score.
    """

    name: str
    file: Path
    about: str
    calibration: Callable[[], Feeds]
    scores: Callable[[Path], Scores]
    shapes: Shapes
    times: Mapping[str, Shapes]
    asked: Mapping[str, Sequence[float]]
    beside: tuple[Path, ...] = ()
    needs: tuple[str, ...] = ()
    goals: Mapping[tuple[str, float], Mapping[str, float]] = field(default_factory=dict)

    def lacks(self) -> str:
        """What is absent that the benchmark needs, in words; empty if nothing is."""
        for path in (self.file, *self.beside):
            if not path.exists():
                return f"{path} is absent: shared/real_models/build.py writes it"
        for module in self.needs:
            if find_spec(module) is None:
                return f'the package of {module} is absent: pip install -e ".[bench]"'
        return ""


def opened(model: Path) -> onnxruntime.InferenceSession:
    """A session on ONNX Runtime's CPU provider whose threads do not spin, as others use the cores, too."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """So many items at even distances, in their order; all of them if there are fewer."""
    number = min(number, len(items))
    return [items[i] for i in np.linspace(0, len(items) - 1, number).round().astype(int)]


def unlike(scores: Scores, kind: str = "other") -> Scores:
    """Scores on data of another kind, named as such."""
    return {f"{name}, {kind}": value for name, value in scores.items()}
