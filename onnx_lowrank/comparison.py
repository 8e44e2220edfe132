"""A comparison of two models: what differs in their graphs, sizes, fused operators, outputs and times."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Unpack

from onnx_lowrank import means
from onnx_lowrank import request as arguments
from onnx_lowrank.budgets import timing
from onnx_lowrank.budgets.budget import Tools
from onnx_lowrank.core.outcome import Timing, Validation
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.errors import InputError, ValidationError
from onnx_lowrank.files.load import Model, load, stored_bytes
from onnx_lowrank.graph import difference
from onnx_lowrank.graph.parameters import parameters, quantized_bytes
from onnx_lowrank.linalg.backend import one_blas_thread
from onnx_lowrank.material import Material, read
from onnx_lowrank.options import Options, completed
from onnx_lowrank.progress import Progress, Silent
from onnx_lowrank.report.comparison import Comparison
from onnx_lowrank.report.content import Total
from onnx_lowrank.request import Setting
from onnx_lowrank.stages.check import validate


def compare(
    one: str | os.PathLike[str], other: str | os.PathLike[str], **options: Unpack[Options]
) -> Comparison:
    """Compare a model with another that takes the same inputs, such as a compressed one.

    Args:
        one: The path of the first model.
        other: The path of the second model.
        options: The options of `compress` for inputs, their shapes, times and the machine.

    Returns:
        The differences.

    Raises:
        InputError: A model, or an option, is wrong, or one of the models does not run on the inputs.
    """
    given = completed(options)
    asked = arguments.request(1.0, given)
    setting = arguments.setting(asked, given)
    progress = given["progress"] or Silent()
    with one_blas_thread(), ExitStack() as stack:
        with progress.stage("read the models"):
            material = read(one, setting, stack, stack.enter_context(ExitStack()))
            means.check_engine(material.found.model, setting)
            first, second = material.found.model, load(other, stack.enter_context(ExitStack()))
            _check_names(first, second)
        with progress.stage("compare the graphs"):
            nodes, tensors = difference.nodes(first, second), difference.tensors(first, second)
        with progress.stage("compare the outputs"):
            validation = _validated(material, second, setting)
        return Comparison(
            names=(Path(first.name).name, Path(second.name).name),
            params=Total(parameters(first), parameters(second)),
            quantized=Total(quantized_bytes(first), quantized_bytes(second)),
            bytes=Total(stored_bytes(first), stored_bytes(second)),
            operators={n: Total(*counts) for n, counts in difference.operators(first, second).items()},
            nodes=nodes,
            tensors=tensors,
            validation=validation,
            timing=_timing(material, second, setting, progress),
        )


def _check_names(first: Model, second: Model) -> None:
    """Check that both models have inputs and outputs of the same names.

    Raises:
        InputError: They do not.
    """
    for kind, names in (("inputs", _inputs), ("outputs", _outputs)):
        own = [names(model) for model in (first, second)]
        if own[0] != own[1]:
            lists = " and ".join(", ".join(sorted(each)) or "none" for each in own)
            raise InputError(
                f"{first.name} and {second.name} have other {kind} ({lists}): "
                f"name two models with the same {kind}."
            )


def _inputs(model: Model) -> set[str]:
    weights = {tensor.name for tensor in model.proto.graph.initializer}
    return {value.name for value in model.proto.graph.input} - weights


def _outputs(model: Model) -> set[str]:
    return {value.name for value in model.proto.graph.output}


def _validated(material: Material, second: Model, setting: Setting) -> Validation:
    """The differences of the outputs.

    Raises:
        InputError: The second model does not run as the first one does.
    """
    first = material.found.model
    try:
        return validate(
            first,
            second,
            {},
            alone=lambda layer: None,
            inputs=material.given,
            input_shapes=setting.sets[0],
            provider=setting.provider,
            engine=setting.engine,
        )
    except ValidationError as error:
        fault = str(error).partition(": ")[0].replace("the compressed model", "it")
        raise InputError(
            f"{second.name} does not run as {first.name} does ({fault}): "
            "name two models that take the same inputs, or other --inputs."
        ) from error


def _timing(material: Material, second: Model, setting: Setting, progress: Progress) -> Timing | None:
    """The times of both models; None if they were not asked for."""
    if not setting.time:
        return None
    from onnx_lowrank.budgets.latency import whole  # Most comparisons time nothing.

    first = material.found.model
    watch = timing.stopwatch(first, setting.tool, setting.threads, caching=setting.cache)
    tools = Tools(watch, material.shown, material.shapes, progress, setting.sets[1:], setting.weights)
    with progress.stage("time"):
        try:
            return whole.start(first, tools, watch).timing(second)
        except (UnsupportedError, RejectedError) as error:
            raise InputError(f"{second.name} cannot be timed ({error}): leave out --time.") from error
