"""From a plan to the compressed model, and the errors of its outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from onnx_lowrank.budgets import registry
from onnx_lowrank.core.factors import Certificate, Fit, LayerFit
from onnx_lowrank.core.layer import sharing
from onnx_lowrank.core.outcome import Merge, OutputError
from onnx_lowrank.core.plan import Plan
from onnx_lowrank.documents import plans
from onnx_lowrank.engines.compare import Comparison
from onnx_lowrank.engines.engine import Feed, Run
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.spilling import Spill
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.found import Layered
from onnx_lowrank.progress import Progress
from onnx_lowrank.rewrite.edits import Store
from onnx_lowrank.rewrite.merge import merge
from onnx_lowrank.rewrite.notes import stamp
from onnx_lowrank.rewrite.refit import Refitted
from onnx_lowrank.rewrite.replace import Replacement, Rewritten, rewrite
from onnx_lowrank.stages.fit import Fitted, fit
from onnx_lowrank.work.executor import Executor

if TYPE_CHECKING:
    from onnx_lowrank.calibrate.calibration import Calibration

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Built:
    """A compressed model.

    Attributes:
        plan: The plan that it follows.
        rewritten: The model.
        merges: The adjacent operators that were multiplied.
        certificates: The certificates of the factors, by layer.
        fits: How the factors were made, by layer.
        resources: The model's files on disk. Close them with the model.
        quantized: The model after its quantization; None without one.
    """

    plan: Plan
    rewritten: Rewritten
    merges: tuple[Merge, ...]
    certificates: dict[str, Certificate]
    fits: dict[str, LayerFit]
    resources: ExitStack
    quantized: Model | None = None

    @property
    def model(self) -> Model:
        """The model to write."""
        return self.rewritten.model if self.quantized is None else self.quantized


def build(
    source: Layered, plan: Plan, calibration: Calibration | None, executor: Executor, progress: Progress
) -> Built:
    """Make the factors that a plan names, certify them as stored, and write them into the model.

    Operators are merged where the plan says so, unless the model then costs more than the plan has reckoned.

    Args:
        source: The model with its layers.
        plan: The choices for its layers.
        calibration: The inputs to fit to, if the plan asks for some.
        executor: Runs the computations.
        progress: Where to show progress.

    Raises:
        InputError: The model fails on the calibration inputs, or the disk is full.
    """
    built = _built(source, plan, calibration, executor, progress)
    if not built.merges or registry.named(plan.budget).holds(source, plan, built.rewritten):
        return built
    _log.debug("what was multiplied makes the model dearer: it is made again without")
    built.resources.close()
    return _built(source, plans.sealed(replace(plan, merge=False)), calibration, executor, progress)


def _built(
    source: Layered, plan: Plan, calibration: Calibration | None, executor: Executor, progress: Progress
) -> Built:
    """The model of a plan, with operators merged exactly as the plan says."""
    count = sum(choice.option is not None for choice in plan.choices)
    certificates: dict[str, Certificate] = {}
    fits: dict[str, LayerFit] = {}

    def replacements() -> Iterator[Replacement | Refitted]:
        with progress.stage("recover" if plan.recover else "factorize", count) as step:
            for replacement, fit in _fitted(
                source.model, source.walk, source.bindings, plan, calibration, executor
            ):
                layer = replacement.binding.layer.id
                certificates[layer], fits[layer] = replacement.certificate, fit
                _log.debug(
                    "factors of %r: %s, fitted to %s%s%s; certificate %.4g",
                    layer,
                    replacement.option if isinstance(replacement, Replacement) else "kept",
                    fit.fit,
                    ", recovered" * fit.recovered,
                    "" if fit.error is None else f" with error {fit.error:.4g}",
                    max(replacement.certificate.spectral),
                )
                if isinstance(replacement, Replacement):
                    step()
                yield replacement

    rewritten, merges, resources = assemble(source, replacements(), merging=plan.merge)
    stamp(rewritten, described(plan), merges)
    for merged in merges:
        _log.debug("multiplied %r and %r: %d parameters less", merged.first, merged.second, merged.saved)
    return Built(plan, rewritten, merges, certificates, fits, resources)


def described(plan: Plan) -> dict[str, str]:
    """The run that made a plan, for the metadata of its model."""
    return {"version": version("onnx-lowrank"), "recipe": plan.recipe, "budget": plan.budget}


def assemble(
    source: Layered, replacements: Iterable[Replacement | Refitted], *, merging: bool
) -> tuple[Rewritten, tuple[Merge, ...], ExitStack]:
    """Write replacements into the model, and on request multiply adjacent operators with a smaller product.

    Args:
        source: The model with its layers.
        replacements: The layers to replace.
        merging: Whether adjacent linear operators are multiplied.

    Returns:
        The model, the multiplied operators, and the model's files on disk, to close with the model.

    Raises:
        InputError: The disk is full.
    """
    with ExitStack() as stack:
        store, placed = storage(source.model, stack)
        rewritten = rewrite(source.model, source.walk, replacements, store)
        rewritten = replace(rewritten, model=placed(rewritten.model))
        merges: tuple[Merge, ...] = ()
        if merging:
            rewritten, merges = merge(rewritten, store, source.spared)
        return rewritten, merges, stack.pop_all()


def storage(model: Model, stack: ExitStack) -> tuple[Store, Callable[[Model], Model]]:
    """The place of new tensors of a model: where its own are.

    Args:
        model: The model.
        stack: Deletes the file of the new tensors.

    Returns:
        Makes a tensor; and adds the file of all of them to the model that holds them.

    Raises:
        InputError: The disk is full.
    """
    if not model.files:
        return inline, lambda made: made
    spill = stack.enter_context(Spill())
    # Inline, if the input model's files are all temporary.
    temporary = bool(model.temporary) and model.files.keys() <= model.temporary

    def placed(made: Model) -> Model:
        inlines = made.temporary.union(spill.files if temporary else ())
        return replace(made, files={**made.files, **spill.files}, temporary=inlines)

    return spill.large if temporary else spill.tensor, placed


def _fitted(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    plan: Plan,
    calibration: Calibration | None,
    executor: Executor,
) -> Iterator[Fitted]:
    """Make the factors of the layers that a plan rewrites, one layer after the other.

    Raises:
        InputError: The model fails on the calibration inputs, or the disk is full.
    """
    options = {choice.layer: choice.option for choice in plan.choices if choice.option is not None}
    chosen = [binding for binding in bindings if binding.layer.id in options]
    if plan.factors is Fit.WEIGHTS or calibration is None:
        yield from fit(model, walk, chosen, options, None, executor)
        return
    if plan.factors is Fit.SCALED:
        yield from fit(model, walk, chosen, options, calibration.statistics.scaled(), executor)
        return
    # Runs without calibration never recover.
    from onnx_lowrank.stages.recover import can_recover, recover, refittable

    statistics = calibration.statistics
    walked = [b for b in chosen if plan.recover and can_recover(model, walk, b, statistics)]
    ids = {binding.layer.id for binding in walked}
    # Layers that share a factor are recovered together or not at all.
    split = {b.layer.id for b in walked if not ids.issuperset(sharing(b.layer, options))}
    walked = [b for b in walked if b.layer.id not in split]
    ids -= split
    alone = [binding for binding in chosen if binding.layer.id not in ids]
    yield from fit(model, walk, alone, options, statistics, executor)
    if walked:
        kept = refittable(model, walk, bindings, walked, options, statistics)
        yield from recover(model, walk, [*walked, *kept], options, calibration, executor)


def judge(model: Model, built: Built, calibration: Calibration) -> tuple[OutputError, ...]:
    """Compare both models on the held-out calibration inputs; on all calibration inputs if none is held out.

    Raises:
        ValidationError: The compressed model gives NaN or Inf, and the input model does not.
        InputError: The model fails on the calibration inputs.
    """
    comparison = Comparison(calibration.statistics.padding)
    samples, engine, originals = calibration.samples, calibration.engine, calibration.originals
    with ExitStack() as stack:
        # Not opened before a batch needs it: an earlier comparison may have computed all outputs.
        original = cache(lambda: stack.enter_context(engine.open(model)))
        compressed = stack.enter_context(engine.open(built.rewritten.model))
        for number, batch in enumerate(calibration.compared.batches(calibration.statistics.batch)):
            if batch.held or not samples.held:
                feed = batch.feed
                wanted = originals.outputs(number, partial(_run, original, feed))
                comparison.add(wanted, compressed(feed), feed)
                if calibration.is_in_order:
                    calibration.succession.add(number, wanted, feed)
    return comparison.errors()


def _run(opened: Callable[[], Run], feed: Feed) -> Mapping[str, Any]:
    return opened()(feed)
