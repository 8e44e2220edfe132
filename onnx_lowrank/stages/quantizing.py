"""Quantization after the decomposition: what follows is fitted to it, then ONNX Runtime's own tool runs.

Rules:

1. With calibration inputs that are held out in part, all layers of the low-rank model are walked in the order
   in which they run, factors too: each is fitted to its outputs in the low-rank model, from its inputs behind
   the rounded layers before it, and then rounded. So a decoder is fitted to the rounded encoder, and a bias
   keeps the mean of the outputs. If the rounded weight itself does better on held-out inputs, it stays.
2. Otherwise the factors of a chain are fitted to each other alone: a decoder to the rounded encoder, or an
   encoder to the rounded decoder, in the Frobenius norm. What loses least after both are rounded is taken.
3. Nothing lies between an encoder and its decoder, so the scale of each rank is free. Where a tensor of
   activations has one scale, the ranks share their ranges with the decoder's columns, by square roots.
   Otherwise the rounding of activations counts in no fit.
4. With calibration inputs, the matrices of a dynamic quantization get inputs with balanced features.
5. The certificates are those of the factors before all of this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.budgets.budget import Budget
from onnx_lowrank.budgets.macs import macs
from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.measured import Statistics
from onnx_lowrank.calibrate.prefix import Prefix
from onnx_lowrank.core.factors import Certificate
from onnx_lowrank.core.outcome import OutputError, Quantized, Trial, Undecomposed, Validation
from onnx_lowrank.engines.engine import one_line
from onnx_lowrank.errors import InputError, LowRankError
from onnx_lowrank.files.load import PROTOBUF_LIMIT, Model, load, stored_bytes
from onnx_lowrank.files.save import save
from onnx_lowrank.files.scratch import scratch
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import read
from onnx_lowrank.layers.found import Found, find_layers
from onnx_lowrank.progress import Progress
from onnx_lowrank.quantize.ends import finish, lifted
from onnx_lowrank.quantize.kind import Feeds, Given, Kind, Quantizer
from onnx_lowrank.quantize.sizes import floats
from onnx_lowrank.rewrite.refit import Refitted, can_refit, operands
from onnx_lowrank.rewrite.replace import Rewritten
from onnx_lowrank.stages.balancing import balanced
from onnx_lowrank.stages.build import Built, assemble
from onnx_lowrank.stages.gather import sums_bytes
from onnx_lowrank.stages.recover import is_walked
from onnx_lowrank.stages.rounding import Rounding, Scales, best, name_of, pairs
from onnx_lowrank.work.executor import Executor, Threads

_log = logging.getLogger(__name__)

_RANGES = 512
"""The most samples that show the ranges of activations."""


@dataclass(frozen=True, slots=True)
class Low:
    """A low-rank model before its quantization.

    Attributes:
        built: The model.
        validation: Its comparison with the input model.
        calibration: The inputs to fit to; None without any.
    """

    built: Built
    validation: Validation
    calibration: Calibration | None


Validate = Callable[[Built, Calibration | None, tuple[Trial, ...]], Validation]
"""Compares a model with the input model."""

Errors = Callable[[Built, Calibration | None], tuple[OutputError, ...]]
"""Gives the errors of a model's outputs."""


def chosen(kind: Kind, found: Found, budget: Budget, *, calibrated: bool) -> Quantizer:
    """The quantizer of a kind for a model; also checks that it has something to do there.

    Args:
        kind: The kind.
        found: The model with its layers.
        budget: The budget of the plan.
        calibrated: Whether there are calibration inputs.

    Raises:
        InputError: It cannot quantize the model.
    """
    if budget.is_measured:
        raise InputError(
            f"--budget {budget.name} times float layers, and --then {kind.name} replaces them: choose "
            "--budget bytes, macs or params, and add --time to see the times."
        )
    layers = [layer for layer in found.layers if not any(use.reads_indices for use in layer.uses)]
    counts = [macs(layer) for layer in layers]
    known = [count for count in counts if count is not None]
    work = known if len(known) == len(layers) else [layer.size for layer in layers]
    matrices = sum(size for layer, size in zip(layers, work, strict=True) if not layer.kernel)
    return kind.on(found.model, Given(found.walk, calibrated, multiplies=2 * matrices > sum(work)))


def follow(
    low: Low,
    method: Quantizer,
    executor: Executor,
    progress: Progress,
    shapes: Mapping[str, tuple[int, ...]],
    validate: Validate,
    beside: Undecomposed | None = None,
) -> tuple[Built, Validation]:
    """Fit a low-rank model to its quantization, quantize it, and compare the result with the input model.

    Args:
        low: The low-rank model; the result takes over its files.
        method: The quantizer for the model.
        executor: Runs the computations.
        progress: Where to show progress.
        shapes: The shapes of inputs for which the layers were found, by name.
        validate: Compares a model with the input model.
        beside: The quantization alone, for the report.

    Returns:
        The quantized model, and the comparison, with what was done.

    Raises:
        InputError: ONNX Runtime's tool cannot quantize the model, or the disk is full.
        ValidationError: As for `stages.check.validate`.
    """
    built, rewritten = low.built, low.built.rewritten
    with ExitStack() as stack:
        model, refitted = _quantized(low, method, executor.threads, progress, shapes, stack)
        _log.debug("%s: %d weights fitted to it; %s", method.kind, refitted, method.method)
        # Other nodes than those of the chains run now, so the names of the chains tell nothing.
        bare = replace(built, rewritten=replace(rewritten, model=model, chains={}))
        with progress.stage("validate"):
            validation = validate(bare, low.calibration, ())
        done = Quantized(
            kind=method.kind,
            method=method.method,
            reason=method.reason,
            refitted=refitted,
            floats=(floats(rewritten.model.proto), floats(model.proto)),
            size=(stored_bytes(rewritten.model), stored_bytes(model)),
            alone=low.validation.outputs,
            undecomposed=beside,
        )
        stack.enter_context(built.resources.pop_all())
        result = replace(built, quantized=model, resources=stack.pop_all())
    before = low.validation
    known = replace(validation, never_ran=before.never_ran, distilled=before.distilled)
    return result, replace(known, quantized=done)


def undecomposed(
    original: Found, low: Low, method: Quantizer, progress: Progress, errors: Errors
) -> Undecomposed | None:
    """The input model after the same quantization, without any fit to it, measured like the compressed model.

    It is what a user would have without a decomposition. It fails alone: the run goes on without it.

    Args:
        original: The input model with its layers.
        low: The low-rank model.
        method: The quantizer.
        progress: Where to show progress.
        errors: Gives the errors of a model's outputs.

    Returns:
        The figures; None if no layer is rewritten.
    """
    built, name, size = low.built, method.kind, None
    if all(choice.option is None for choice in built.plan.choices):
        return None
    if stored_bytes(original.model) > PROTOBUF_LIMIT >= stored_bytes(built.rewritten.model):
        return Undecomposed(note=f"{name} alone was not tried: the input model has more than 2 GiB.")
    try:
        with progress.stage(f"{name} alone"), ExitStack() as stack:
            model = original.model
            if method.balances and low.calibration is not None:
                model, files = _balanced(
                    original, replace(built.rewritten, chains={}), method, low.calibration
                )
                stack.enter_context(files)
            model = _written(model, method, low.calibration, stack)
            size = stored_bytes(model)
            bare = replace(built, rewritten=replace(built.rewritten, model=model, chains={}))
            return Undecomposed(size, errors(bare, low.calibration))
    except _ToolError as error:
        return Undecomposed(note=f"ONNX Runtime cannot quantize the input model to {name} ({error}).")
    except LowRankError as error:
        _log.debug("%s alone: %s", name, error)
        return Undecomposed(size, note=f"The outputs of {name} alone cannot be compared.")


def _quantized(
    low: Low,
    method: Quantizer,
    threads: Threads,
    progress: Progress,
    shapes: Mapping[str, tuple[int, ...]],
    stack: ExitStack,
) -> tuple[Model, int]:
    """The quantized model, whose files the stack deletes, and the number of weights fitted to it."""
    rewritten, calibration = low.built.rewritten, low.calibration
    found = find_layers(rewritten.model, shapes, (), ())
    if method.balances and calibration is not None:
        model, files = _balanced(found, rewritten, method, calibration)
        stack.enter_context(files)
        rewritten = replace(rewritten, model=model)
        found = find_layers(model, shapes, (), ())
    if calibration is not None and calibration.samples.held:
        fits = _walked(found, rewritten, method, calibration, threads)
    else:
        fits = _alone(found, rewritten, method)
    count = 0

    def counted() -> Iterator[Refitted]:
        nonlocal count
        with progress.stage("fit to the quantization", len(_rounded(found, method))) as step:
            for refit in fits:
                step()
                count += 1
                yield refit

    fitted, _, files = assemble(found, counted(), merging=False)
    with files, progress.stage("quantize"):
        try:
            return _written(fitted.model, method, calibration, stack), count
        except _ToolError as error:
            raise InputError(
                f"ONNX Runtime's {method.method.split(',')[0]} cannot quantize the low-rank model of "
                f"{found.model.name} ({error}): leave out --then {method.kind}, or choose another kind."
            ) from error


def _balanced(
    found: Found, low: Rewritten, method: Quantizer, calibration: Calibration
) -> tuple[Model, ExitStack]:
    """The model with balanced inputs of matrices (rule 4)."""
    decoders = {decoder.layer.id for _, decoder in pairs(found, low)}
    chosen = [binding for binding in _rounded(found, method) if binding.layer.id not in decoders]
    return balanced(found, chosen, calibration, _feeds(calibration))


class _ToolError(Exception):
    """ONNX Runtime's tool fails; the message is its own, in one line."""


def _written(model: Model, method: Quantizer, calibration: Calibration | None, stack: ExitStack) -> Model:
    """The quantized model; the stack deletes its files.

    Raises:
        _ToolError: ONNX Runtime's tool fails.
        InputError: The disk is full.
    """
    # Saving locks the folder of the target, and the scratch folder is locked already.
    folder = stack.enter_context(scratch()) / "models"
    folder.mkdir()
    source, target = folder / "low-rank.onnx", folder / f"{method.kind}.onnx"
    save(replace(model, proto=lifted(model.proto)), source)
    is_large = bool(load(source).files)
    feeds: Feeds = () if calibration is None else _feeds(calibration)
    try:
        method.write(source, target, feeds, is_large=is_large)
    except InputError:
        raise
    except Exception as error:
        raise _ToolError(one_line(error)) from error
    made = load(target)
    finish(made.proto, model.proto, method.kind, method.method)
    return replace(made, name=model.name, sha256=model.sha256, path=None)


def _feeds(calibration: Calibration) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Calibration inputs that show the ranges of activations, evenly spaced."""
    samples = calibration.samples
    every = ceil((samples.count - samples.held) / _RANGES)
    batches = (b.feed for b in samples.batches(calibration.statistics.batch) if not b.held)
    return islice(batches, 0, None, every)


def _walked(
    found: Found, low: Rewritten, method: Quantizer, calibration: Calibration, threads: Threads
) -> Iterator[Refitted]:
    """The layers, each fitted to the rounded layers before it (rule 1)."""
    model, walk = found.model, found.walk
    # Indices have no moments.
    tables = {b.layer.id for b in found.bindings if any(use.reads_indices for use in b.layer.uses)}
    chosen = [b for b in _rounded(found, method) if is_walked(model, walk, b) and b.layer.id not in tables]
    chosen = [b for b in chosen if sums_bytes(b.layer.shape) <= calibration.memory.moments]
    own = calibration.statistics
    places = frozenset(b.layer.id for b in chosen if _origin(walk, b, low) in own.padding.layers)
    ids = {b.layer.id for b in chosen}
    linked = pairs(found, low) if method.rounds_activations else ()
    decoders = {e.layer.id: d.layer.id for e, d in linked if {e.layer.id, d.layer.id} <= ids}
    with Statistics(()) as statistics:
        statistics.batch, statistics.padding = own.batch, replace(own.padding, layers=places)
        known = replace(calibration, statistics=statistics)
        batches = known.trimmed.batches(own.batch)
        memory = calibration.memory.activations
        with Prefix(
            model, walk, chosen, batches, calibration.engine, statistics.padding, threads, memory
        ) as prefix:
            scales: dict[str, Scales] = {}  # by the id of the decoder
            for step in prefix.steps():
                layer, name = (
                    Rounding(model, walk, step.binding, known, threads, method),
                    step.binding.layer.id,
                )
                if name in scales:
                    layer.behind(scales[name])
                result = layer.run_before(step) if name in decoders else layer.run(step)
                if layer.scales is not None:
                    scales[decoders[name]] = layer.scales
                if result is None:
                    continue
                weight, is_scaled = np.asarray(result.made), name in decoders or name in scales
                if is_scaled or operands(model, walk, step.binding, weight, result.bias) is not None:
                    yield Refitted(step.binding, weight, _NO_PROOF, result.bias, is_narrowed=False)


def _alone(found: Found, low: Rewritten, method: Quantizer) -> Iterator[Refitted]:
    """The factors of every chain, fitted to each other's rounding alone (rule 2)."""
    model, walk = found.model, found.walk
    refittable = {binding.layer.id for binding in _rounded(found, method)}
    for links in pairs(found, low):
        if not refittable.issuperset(link.layer.id for link in links):
            continue
        encoder, decoder = (read(model, walk, link) for link in links)
        rounds = [partial(method.rounded, operator=link.layer.uses[0].op) for link in links]
        made = best((encoder, decoder), (rounds[0], rounds[1]), balanced=method.rounds_activations)
        for link, weight in zip(links, made, strict=True):
            if operands(model, walk, link, weight, None) is not None:
                yield Refitted(link, weight, _NO_PROOF, None, is_narrowed=False)


def _rounded(found: Found, method: Quantizer) -> list[Binding]:
    """The layers that the quantization rounds, and that can get new numbers before."""
    return [
        binding
        for binding in found.bindings
        if binding.layer.uses[0].op in method.operators
        and len(binding.layer.uses) == 1
        and can_refit(found.model, found.walk, binding)
    ]


def _origin(walk: Walk, binding: Binding, low: Rewritten) -> str:
    """The id of the layer of the input model from which a layer of the low-rank model comes."""
    name = name_of(walk, binding)
    made = (layer for layer, chains in low.chains.items() if any(name in chain for chain in chains))
    return next(made, binding.layer.id)


_NO_PROOF = Certificate((), ())
"""Rounded weights are not certified (rule 5)."""
