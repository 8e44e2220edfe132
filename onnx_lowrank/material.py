"""The material of a run: the model with its layers, and the data that the user gives, read and checked."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from onnx_lowrank.calibrate.sources.source import Need
from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.engines.id_limits import id_limits
from onnx_lowrank.engines.inputs import Spec, is_open, shape_text, specs
from onnx_lowrank.engines.made import one_sample
from onnx_lowrank.engines.pasts import uneven
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model, ModelProto, load
from onnx_lowrank.layers.found import Found, find_layers
from onnx_lowrank.logs import DETAIL, first_names
from onnx_lowrank.progress import Progress
from onnx_lowrank.request import Setting

if TYPE_CHECKING:
    from onnx_lowrank.calibrate.data import Samples
    from onnx_lowrank.stages.other import Others

_FEW = 3

_MADE = (
    "The inputs were made from the statistics of BatchNormalizations, and errors on them say little of real "
    "ones: judge the model with --check on some real inputs, or give those to --calibration."
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Material:
    """A model and the data that came with it, read and checked.

    Attributes:
        found: The model with its layers.
        samples: The calibration data.
        others: Inputs of another kind to compare the models on, too; None without them.
        given: The user's inputs to compare the models on; None without them.
        shown: One feed of the user: `given`, or else a calibration sample; empty without both.
        shapes: The shapes of inputs for which the layers were found, by name.
        counted: The part of `shapes` that neither the model nor the user states, a phrase; "" without any.
    """

    found: Found
    samples: Samples | None
    others: Others | None
    given: Feed | None
    shown: Feed
    shapes: Mapping[str, tuple[int, ...]]
    counted: str


def synthesized(source: str | os.PathLike[str] | ModelProto, setting: Setting, progress: Progress) -> Setting:
    """The setting with inputs made from the statistics of a model.

    Args:
        source: The model.
        setting: The setting of the run.
        progress: Where to show progress.

    Raises:
        InputError: No inputs can be made.
    """
    from onnx_lowrank.distil.synthetic import synthesized as made  # It loads PyTorch.

    with progress.stage("make inputs", 1) as step:
        return replace(setting, calibration=made(load(source), setting.sets[0], step))


def read(
    source: str | os.PathLike[str] | ModelProto, setting: Setting, stack: ExitStack, loaded: ExitStack
) -> Material:
    """Read a model and the user's data, and find the model's layers.

    Args:
        source: The model.
        setting: Names the data.
        stack: Closes the files of the data.
        loaded: Deletes the temporary file of the model.

    Raises:
        InputError: The model or the data is wrong.
    """
    model = load(source, loaded)
    wanted = specs(model.proto)
    given, samples, others = _data(model, wanted, setting, stack)
    # Shapes that the user did not state follow from the user's inputs.
    shown = given or (next(held_out(samples, 1)) if samples is not None else {})
    if (reason := uneven(wanted, shown)) is not None:
        raise InputError(f"The inputs do not fit each other ({reason}): give all of them the same length.")
    shapes = dict(setting.sets[0])
    if any(array.size for array in shown.values()):
        # Arrays without elements count, too: at its first call, the past of a decoder has none.
        told = {n: array.shape for n, array in shown.items() if 0 not in array.shape[:1]}
        owner = "one sample" if given is None else "the inputs"
    else:
        told, owner = one_sample(model.proto, wanted, shapes), "one sample"
    unstated = {spec.name for spec in wanted if is_open(spec)} & told.keys() - shapes.keys()
    counted = [f"{spec.name} {shape_text(told[spec.name])}" for spec in wanted if spec.name in unstated]
    shapes = told | shapes
    found = find_layers(model, shapes, setting.include, setting.exclude)
    _log_found(found)
    return Material(
        found, samples, others, given, shown, shapes, f"{owner} ({_first(counted)})" if counted else ""
    )


def _first(texts: Sequence[str]) -> str:
    more = len(texts) - _FEW
    return ", ".join(texts[:_FEW]) + (f" and {more} more" if more > 0 else "")


def _data(
    model: Model, wanted: tuple[Spec, ...], setting: Setting, stack: ExitStack
) -> tuple[Feed | None, Samples | None, Others | None]:
    """The user's data, checked against the model; None for those not given."""
    if setting.inputs is None and setting.calibration is None and setting.check is None:
        return None, None, None
    from onnx_lowrank.calibrate import data  # The readers are only for runs that read data.
    from onnx_lowrank.stages.other import open_others

    limits = {} if setting.options.tokenizer is None else id_limits(model.proto)
    need = Need(wanted, limits, setting.sets[0], setting.samples, setting.options)
    given = None if setting.inputs is None else data.read_feed(setting.inputs, need)
    samples = others = None
    if setting.calibration is not None:
        samples = stack.enter_context(data.open_needed(setting.calibration, need))
        if setting.synthetic:
            samples.extent = f"made inputs: {samples.count} samples"
            samples.warnings = (*samples.warnings, _MADE)
    if setting.check is not None:
        others = open_others(setting.check, need, model, setting.provider, stack)
    return given, samples, others


def _log_found(found: Found) -> None:
    name, layers = found.model.name, len(found.layers)
    _log.debug("%r: %d layers, %d operators skipped", name, layers, len(found.skipped))
    reasons: dict[str, list[str]] = {}
    for item in found.skipped:
        reasons.setdefault(item.reason, []).append(item.name or item.weight or item.op)
    for reason, names in reasons.items():
        _log.debug("skipped %d: %s (%s)", len(names), reason, first_names(names))
    for layer in found.layers:
        folds = "/".join(layer.folds)
        _log.log(DETAIL, "layer %r: %s of %s, folds %s", layer.id, layer.op, layer.shape, folds)


def held_out(samples: Samples, number: int) -> Iterator[Feed]:
    """The first calibration inputs, one by one; only held-out ones if there are any."""
    return islice((batch.feed for batch in samples.batches(1) if batch.held or not samples.held), number)
