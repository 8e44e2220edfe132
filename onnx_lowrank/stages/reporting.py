"""From the results of the stages to the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path

from onnx_lowrank import quantize
from onnx_lowrank.budgets import registry
from onnx_lowrank.budgets.budget import Run
from onnx_lowrank.budgets.macs import macs
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.core.factors import Certificate, LayerFit
from onnx_lowrank.core.layer import Layer, narrow_layers, shared_full_rank, sharing
from onnx_lowrank.core.option import Lowering, Style
from onnx_lowrank.core.outcome import Calibrated, Other, OutputError, Trial, Validation, largest_error
from onnx_lowrank.core.plan import Choice, Plan
from onnx_lowrank.graph import difference
from onnx_lowrank.layers.lowered import is_left
from onnx_lowrank.report.content import Detail, Figure, Graph, LayerRow, Total, Totals
from onnx_lowrank.report.naming import display_names
from onnx_lowrank.report.report import Report
from onnx_lowrank.report.words import number, percent
from onnx_lowrank.stages.build import Built
from onnx_lowrank.stages.search import ANY, Target

_LARGE_ERROR = 0.5
_LOW_AGREEMENT = 0.9
_LOW_COSINE = 0.9
_SLACK = 0.05
_MUCH_LARGER = 2.0
"""The ratio of errors on two kinds of inputs above which most of the larger one comes from the kind."""
_NOTABLE = 0.1
"""The error from which a quantization that loses more than the decomposition is worth a warning."""
_SIGMAS = 2.0
"""The standard errors of sampling noise that such errors must differ by."""
_ROUNDING = 1e-3
"""The error that the rounding of half-precision floats can cause."""
_FAMILIAR = {
    "held-out": "held-out calibration inputs",
    "calibration": "the calibration inputs",
    "inputs": "the inputs of --inputs",
}


def assemble(
    run: Run,
    built: Built | None = None,
    *,
    validation: Validation | None = None,
    given: bool = False,
    calibration: Calibrated | None = None,
    trials: tuple[Trial, ...] = (),
    target: Target = ANY,
    styles: Set[Style] = frozenset(),
    details: Mapping[str, Detail] | None = None,
) -> Report:
    """Gather the results of a run.

    Args:
        run: The input model, its plan, and the compressed model.
        built: The factors of the compressed model; None in a dry run.
        validation: The comparison of both models; None without one.
        given: Whether the user gave the inputs to compare on, by --inputs or --calibration.
        calibration: The use of the calibration inputs; None without any.
        trials: The plans that were tried on them.
        target: The quality that was asked for instead of a ratio.
        styles: The lowerings that were asked for.
        details: What the plan has chosen from, by layer; None if that is unknown.
    """
    found, plan = run.found, run.plan
    totals = _totals(run)
    reached = totals.amount(registry.named(plan.budget).figure).ratio
    return Report(
        version=version("onnx-lowrank"),
        model=Path(found.model.name).stem,
        sha256=found.model.sha256,
        recipe=plan.recipe,
        measure=plan.measure,
        budget=plan.budget,
        asked=plan.ratio,
        reached=1.0 if reached is None else reached,
        solver=plan.solver,
        layers=_rows(run, built, details or {}),
        skipped=found.left_alone(plan.choices),
        removed_inputs=() if built is None else built.rewritten.removed_inputs,
        totals=totals,
        validation=validation,
        warnings=(
            *_ratio_warnings(run, 1.0 if reached is None else reached, targeted=target != ANY),
            *_budget_warnings(run, totals),
            *_lowering_warnings(run, styles),
            *_output_warnings(validation, given, target, calibrated=calibration is not None),
            *_quantized_warnings(validation, given),
            *_dominated_warnings(plan, validation, totals),
            *_calibration_warnings(plan, calibration, trials),
        ),
        calibration=calibration,
        trials=trials,
        target_error=target.error,
        target_agreement=target.agreement,
        timing=run.timing,
        merges=() if built is None else built.merges,
        graph=None if built is None else _graph(run, built),
        counted=run.counted,
        then=plan.then or "",
    )


def _graph(run: Run, built: Built) -> Graph:
    models = run.found.model, built.rewritten.model
    counts = {name: Total(*pair) for name, pair in difference.operators(*models).items()}
    return Graph(counts, difference.changes(*models))


def _ratio_warnings(run: Run, reached: float, *, targeted: bool) -> Iterator[str]:
    """Warnings about a size that may surprise the user."""
    plan = run.plan
    if all(choice.option is None for choice in plan.choices):
        made = f"the input model after --then {plan.then}" if plan.then else "the input model"
        yield f"No layer is rewritten, the output is {made}."
        if not plan.then:
            return
    if reached > plan.ratio * (1 + registry.named(plan.budget).tolerance):
        yield f"The plan reaches the ratio {reached:.4g}, above the {plan.ratio:g} for which it was made."
    elif reached < plan.ratio - _SLACK and not targeted and not run.merged:
        yield (
            f"The ratio is {reached:.4g} where {plan.ratio:g} was asked for, as the options are coarse: "
            "another recipe may come closer."
        )


def _budget_warnings(run: Run, totals: Totals) -> Iterator[str]:
    """Warnings of every budget, also of those that the ratio does not bound."""
    for budget in registry.every():
        yield from budget.warnings(run, totals.amount(budget.figure))


def _lowering_warnings(run: Run, styles: Set[Style]) -> Iterator[str]:
    """A warning about the rewritten layers that have no other operators than their own."""
    options = run.found.options(run.plan.choices)
    left = [layer.id for layer, option in options if option is not None and is_left(layer, styles)]
    if left:
        yield (
            f"{len(left)} of the rewritten layers ({left[0]!r} first) cannot be written as convolutions, as "
            "their inputs have other axes than rows: their factors keep the layers' operators."
        )


def _calibration_warnings(
    plan: Plan, calibration: Calibrated | None, trials: tuple[Trial, ...]
) -> Iterator[str]:
    """Warnings about questions that the calibration inputs leave open."""
    if calibration is None:
        return
    yield from calibration.warnings
    unmeasured = dict(calibration.unmeasured)
    blind = [choice.layer for choice in plan.choices if choice.option and choice.layer in unmeasured]
    if blind:
        yield (
            f"Calibration tells nothing of {len(blind)} of the rewritten layers ({blind[0]!r} first), so no "
            "figure shows their errors: give inputs that reach them, or --exclude them."
        )
    if any(trial.chosen and trial.error == math.inf for trial in trials):
        yield (
            "No model that was tried can be compared with the original (their outputs differ in shape, or "
            "the original's are all zero), so the first recipe was taken: choose one with --pass."
        )


def _advice(*, targeted: bool, calibrated: bool) -> str:
    """Advice that brings the outputs closer to the original's."""
    if targeted:
        return "set a stricter target or choose another recipe"
    more = "" if calibrated else ", or pass inputs to fit to as --calibration"
    return f"choose a larger ratio or another recipe{more}"


def _output_warnings(
    validation: Validation | None, given: bool, target: Target, *, calibrated: bool
) -> Iterator[str]:
    """Warnings about outputs that may surprise the user."""
    if validation is None:
        return
    advice = _advice(targeted=target != ANY, calibrated=calibrated)
    # Not above the target: a user who asks for less agreement needs no warning about it.
    least = min(_LOW_AGREEMENT, _LOW_AGREEMENT if target.agreement is None else target.agreement)
    large = _large_error(validation.outputs, given)
    # Not for made inputs: their outputs mostly belong to no class, so their agreement means nothing.
    low = ""
    if given:
        low = _low_agreement(validation.outputs, least) or _low_cosine(validation.outputs)
    if large and not given:
        yield f"{large} on inputs made from the graph, which say little: pass real ones as --inputs."
    elif large or low:
        yield f"{_joined(large, low)}: {advice}."
    if validation.other is not None:
        yield from _other_warnings(validation.other, least, advice, alone=not (given and (large or low)))


def _quantized_warnings(validation: Validation | None, given: bool) -> Iterator[str]:
    """A warning about a quantization that loses more than the decomposition before it."""
    if validation is None or validation.quantized is None or not given:
        return
    done = validation.quantized
    before = max((output.relative for output in done.alone if output.relative is not None), default=0.0)
    after = validation.worst or 0.0
    if after > max(_MUCH_LARGER * before, _NOTABLE):
        others = " or ".join(f"--then {name}" for name in quantize.names() if name != done.kind)
        yield (
            f"The quantization to {done.kind} raises the relative error of an output from "
            f"{number(before)} to {number(after)}: compare with {others}, or with a smaller ratio alone."
        )


def _dominated_warnings(plan: Plan, validation: Validation | None, totals: Totals) -> Iterator[str]:
    """Warnings where the decomposition alone, or the quantization alone, is better than both together.

    It is if it errs no more and has no more bytes, or none above the bytes that were asked for.
    """
    done = None if validation is None else validation.quantized
    error = None if validation is None else largest_error(validation.outputs)
    if done is None or done.undecomposed is None or error is None:
        return
    other, size = done.undecomposed, done.size[1]
    before = totals.amount("bytes").before
    most = max(size, plan.ratio * before) if plan.budget == "bytes" and before is not None else size
    both = f"the result {size:,} with {number(error)}"
    alone = largest_error(other.outputs)
    if alone is not None and alone <= error and other.size is not None and other.size <= most:
        yield (
            f"{done.kind} alone is better than with low-rank factors: {other.size:,} bytes with an output "
            f"error of {number(alone)}, {both}: take --budget params --ratio 1 --then {done.kind}."
        )
    low = largest_error(done.alone)
    if low is not None and low <= error and done.size[0] <= most:
        yield (
            f"The low-rank model is better before {done.kind}: {done.size[0]:,} bytes with an output error "
            f"of {number(low)}, {both}: leave out --then {done.kind}."
        )


def _other_warnings(other: Other, least: float, advice: str, *, alone: bool) -> Iterator[str]:
    """Warnings about inputs of another kind: about their errors, if those on familiar ones gave no warning.

    Args:
        other: The comparison.
        least: The least agreement without a warning.
        advice: Advice that brings the outputs closer to the original's.
        alone: Whether errors on familiar inputs gave no warning.
    """
    yield from (f"{other.source}: {warning}" for warning in other.warnings)
    worse = [pair for here, there in other.pairs if (pair := _worse(here, there)) is not None]
    if worse:
        name, error, familiar = max(worse, key=lambda pair: pair[1] / max(pair[2], _ROUNDING))
        yield (
            f"The relative error of {name!r} is {number(error)} on the check data, much more than the "
            f"{number(familiar)} on {_FAMILIAR[other.kind]}: fit to inputs of both kinds (--calibration), or "
            "choose a larger ratio."
        )
        return
    large = _large_error(other.outputs, given=True)
    low = _low_agreement(other.outputs, least) or _low_cosine(other.outputs)
    if alone and (large or low):
        yield f"On the check data: {_joined(large, low)}: {advice}."


def _worse(here: OutputError, there: OutputError | None) -> tuple[str, float, float] | None:
    """An output's name and both errors, if that on inputs of another kind is much larger; else None.

    It is if it exceeds `_MUCH_LARGER` times the other: then most of it comes from the kind of the inputs, and
    not from the decomposition as such. The difference must also exceed `_SIGMAS` standard errors of sampling
    noise, so that chance alone seldom causes a warning, and the error the rounding of half-precision floats.
    """
    if there is None or here.is_exact or here.relative is None or there.relative is None:
        return None
    noise = math.hypot(here.noise or 0.0, there.noise or 0.0)
    least = max(_MUCH_LARGER * there.relative, there.relative + _SIGMAS * noise, _ROUNDING)
    return (here.name, here.relative, there.relative) if here.relative > least else None


def _joined(large: str, low: str) -> str:
    """Two complaints as one; one of them may be empty."""
    return f"{large}, and only {low}" if large and low else large or f"Only {low}"


def _large_error(outputs: tuple[OutputError, ...], given: bool) -> str:
    """The error of the worst output; empty if it is small."""
    worst = max((output.relative for output in outputs if output.relative is not None), default=0.0)
    centred = largest_error(outputs) or 0.0
    if worst > _LARGE_ERROR:
        return f"The largest relative error of an output is {worst:.3g}"
    # Not for made inputs: their outputs hardly vary.
    if given and centred > _LARGE_ERROR:
        return f"The largest error of an output is {centred:.3g} of what varies in it"
    return ""


def _low_agreement(outputs: tuple[OutputError, ...], least: float) -> str:
    """The agreement of the output that agrees least; empty if it is high enough."""
    known = [(output.kept, output) for output in outputs if output.kept is not None]
    agreement, worst = min(known, key=itemgetter(0), default=(least, None))
    if worst is None or agreement >= least:
        return ""
    if worst.is_exact:
        return f"{percent(agreement)} of the elements of {worst.name!r} are equal"
    if worst.agreement is None:
        return f"{percent(agreement)} of the rows of {worst.name!r} keep their nearest neighbour"
    return f"{percent(agreement)} of the rows of {worst.name!r} have the same largest element"


def _low_cosine(outputs: tuple[OutputError, ...]) -> str:
    """The cosine similarity of the worst embedding; empty if it is high enough."""
    known = [(output.cosine, output.name) for output in outputs if output.cosine is not None]
    cosine, name = min(known, default=(1.0, ""))
    return (
        f"a cosine similarity of {cosine:.3f} is left to the rows of {name!r}" if cosine < _LOW_COSINE else ""
    )


def _rows(run: Run, built: Built | None, details: Mapping[str, Detail]) -> tuple[LayerRow, ...]:
    """One row for every layer, in graph order."""
    bindings = run.found.bindings
    names = display_names(
        (binding.layer.id, binding.stored.source.name, binding.layer.uses[0].name) for binding in bindings
    )
    certificates = {} if built is None else built.certificates
    fits = {} if built is None else built.fits
    narrow, full = narrow_layers(run.found.options(run.plan.choices)), _full_ranks(run)
    options = {choice.layer: choice.option for choice in run.plan.choices}
    return tuple(
        _row(
            binding.layer,
            name,
            choice,
            certificates.get(choice.layer),
            fits.get(choice.layer),
            narrow.get(choice.layer),
            full.get(choice.layer),
            sharing(binding.layer, options),
            None if run.meter is None else run.meter.tariff(binding.layer).keep,
            details.get(choice.layer, Detail()),
        )
        for binding, name, choice in zip(bindings, names, run.plan.choices, strict=True)
    )


def _full_ranks(run: Run) -> dict[str, int]:
    """The rank at which a layer of the plan is exact, by id; for a narrow one its full width."""
    layers = {layer.id: layer for layer in run.found.layers}
    options = {choice.layer: choice.option for choice in run.plan.choices}
    full = {}
    for layer, option in run.found.options(run.plan.choices):
        if option is None:
            continue
        match option.lowering:
            case Lowering.NARROW:
                full[layer.id] = layer.width
            case Lowering.SHARED | Lowering.SUMMED:
                group = [layers[name] for name in sharing(layer, options)]
                full[layer.id] = shared_full_rank(group, option.lowering)
            case _:
                full[layer.id] = layer.full_rank(option.fold, option.k)
    return full


def _row(
    layer: Layer,
    name: str,
    choice: Choice,
    certificate: Certificate | None,
    fit: LayerFit | None,
    narrow: Layer | None,
    full: int | None,
    joined: tuple[str, ...],
    keep: int | None,
    detail: Detail,
) -> LayerRow:
    option = choice.option
    after = (layer, option) if narrow is None else (narrow, None)
    return LayerRow(
        id=layer.id,
        name=name,
        op=layer.op,
        shape=layer.shape,
        dtype=layer.dtype,
        nodes=tuple(use.name for use in layer.uses),
        option=option,
        full_rank=full,
        params=Total(parameters(layer), parameters(*after)),
        macs=Total(macs(layer), macs(*after)),
        error=None if option is None or math.isnan(choice.error) else choice.error,
        certificate=certificate,
        reason=choice.reason,
        fit=fit,
        kept=option.j * layer.kept_per_rank
        if option is not None and option.lowering is Lowering.SPARSE
        else 0,
        joined=joined,
        cost=Total(keep, choice.cost),
        detail=detail,
    )


def _totals(run: Run) -> Totals:
    """The figures of every budget: first those with a formula, then the measured ones."""
    ordered = sorted(registry.every(), key=lambda budget: budget.is_measured)
    return Totals(
        tuple(
            Figure(budget.figure, budget.total(run), budget.title, budget.show, budget.unknown(run.found))
            for budget in ordered
        )
    )
