"""Times of whole models, for every budget: the stopwatch, and the comparison of the finished model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_lowrank.budgets.budget import Meter, Tools
from onnx_lowrank.core.outcome import Timing
from onnx_lowrank.engines.engine import Deployed
from onnx_lowrank.files.load import Model, stored_bytes
from onnx_lowrank.hardware import cache_bytes

if TYPE_CHECKING:
    from onnx_lowrank.budgets.latency.stopwatch import Stopwatch

Comparison = Callable[[Model], Timing]
"""Times the input model and a finished model in turns."""


def stopwatch(model: Model, engine: Deployed, threads: int, *, caching: bool | Path) -> Stopwatch:
    """A stopwatch for a model and its layers.

    Args:
        model: The input model.
        engine: Runs the models.
        threads: The number of threads per operator; 0 leaves it to the runtime.
        caching: The folder of known times; True for the user's cache folder, False for none.
    """
    from onnx_lowrank.budgets.latency.stopwatch import Stopwatch  # Most runs time nothing.

    # Only half of the cache counts: other processes and activations need room in it, too.
    warm = stored_bytes(model) <= cache_bytes() / 2
    return Stopwatch(engine, threads, warm=warm, caching=caching)


def comparison(meter: Meter, model: Model, tools: Tools) -> Comparison | None:
    """Start timing the input model, to compare the finished one.

    Args:
        meter: The budget on the model.
        model: The input model.
        tools: The stopwatch, and the inputs on which it times the model.

    Returns:
        None if nothing is timed, or if the meter itself times finished models.

    Raises:
        InputError: The model does not run.
    """
    if tools.stopwatch is None or meter.gauge is not None:
        return None
    from onnx_lowrank.budgets.latency import whole  # Most runs time nothing.

    with tools.progress.stage("time the model"):
        return whole.start(model, tools, tools.stopwatch).timing
