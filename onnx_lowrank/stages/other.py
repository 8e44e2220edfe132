"""The comparison of both models on inputs of another kind: does a fit to one kind hold for another, too?"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lowrank.calibrate import data
from onnx_lowrank.calibrate.data import Samples, Source
from onnx_lowrank.calibrate.sources import registry
from onnx_lowrank.calibrate.sources.source import Need
from onnx_lowrank.core.outcome import Other, OutputError
from onnx_lowrank.engines.batches import batch_size
from onnx_lowrank.engines.engine import RejectedError
from onnx_lowrank.engines.padding import NO_PADDING, Padding
from onnx_lowrank.engines.pasts import unmasked
from onnx_lowrank.engines.running import Engine, calibrating_engine, first_run
from onnx_lowrank.files.load import Model
from onnx_lowrank.stages.check import compared, unfit

PURPOSE = "check"
"""The name of the option that gives the inputs."""

CHECKED = 128
"""The most samples of a text or a folder of images: with these, a share is known to about 4 points."""


@dataclass(frozen=True, slots=True)
class Others:
    """Inputs of another kind, on which the input model runs.

    Attributes:
        samples: The inputs.
        engine: Runs the models on them.
        batch: The number of samples to run at a time.
    """

    samples: Samples
    engine: Engine
    batch: int


def open_others(source: Source, need: Need, model: Model, provider: str, files: ExitStack) -> Others:
    """Open inputs of another kind, and run the input model on one of them: a late error would waste work.

    Args:
        source: As in `calibrate.data.open_needed`.
        need: What the model needs.
        model: The input model.
        provider: ONNX Runtime's execution provider.
        files: Closes the inputs.

    Raises:
        InputError: They do not exist, do not fit the model, or it fails on them.
    """
    is_made = isinstance(source, str | Path) and registry.is_made(Path(source))
    need = replace(need, most=CHECKED if is_made else None, purpose=PURPOSE)
    samples = files.enter_context(data.open_needed(source, need))
    one = next(iter(samples.batches(1))).feed
    engine, outputs = calibrating_engine(model, one, provider, PURPOSE)
    if outputs is None:
        try:
            outputs = first_run(engine, model, (one,))[1]  # It fails again, and tells the reason.
        except RejectedError as error:
            raise unfit(error, unmasked(need.specs, one), PURPOSE) from error
    return Others(samples, engine, batch_size(one, outputs))


def compare_on(
    others: Others,
    original: Model,
    compressed: Model,
    familiar: tuple[OutputError, ...],
    kind: str,
    padding: Padding = NO_PADDING,
) -> Other:
    """Compare the outputs of both models on inputs of another kind.

    Args:
        others: The inputs.
        original: The input model.
        compressed: The compressed model.
        familiar: The errors on inputs of the familiar kind; empty without such inputs.
        kind: See `Other`.
        padding: The padding of the inputs; errors there do not count.

    Raises:
        InputError: The input model fails on a sample.
        ValidationError: Only the compressed model fails, or only it gives NaN or Inf.
    """
    feeds = (batch.feed for batch in others.samples.batches(others.batch))
    outputs = compared(original, compressed, others.engine, feeds, PURPOSE, padding)
    return Other(others.samples.extent, outputs, familiar, kind, others.samples.warnings)
