"""The report as JSON; `documents.report_schema` defines its keys."""

from __future__ import annotations

from dataclasses import asdict

import msgspec

from onnx_lowrank.core.factors import LayerFit
from onnx_lowrank.core.outcome import (
    Calibrated,
    Change,
    Continuation,
    Distilled,
    Fused,
    Merge,
    Other,
    OutputError,
    Quantized,
    Timing,
    Trial,
    Undecomposed,
    Validation,
)
from onnx_lowrank.documents import report_details as details
from onnx_lowrank.documents import report_schema as schema
from onnx_lowrank.documents.json_text import finite, to_text
from onnx_lowrank.report.content import Content, Detail, Graph, LayerRow, Total


def dumps(report: Content) -> str:
    """Write the report as JSON text that ends with a newline; equal reports give equal texts."""
    # Without enc_hook, msgspec rejects NumPy's float64, although it is a subclass of float.
    table = msgspec.to_builtins(as_table(report), enc_hook=float)
    return to_text(finite(table), indent=2) + "\n"


def as_table(report: Content) -> schema.Report:
    """The report as the tables of the schema; numbers may be infinite or NaN."""
    return schema.Report(
        schema=schema.VERSION,
        version=report.version,
        model=schema.Model(name=report.model, sha256=report.sha256),
        recipe=schema.Recipe(name=report.recipe, measure=report.measure),
        ratio=schema.Ratio(budget=report.budget, asked=report.asked, reached=report.reached),
        solver=schema.Solver(**asdict(report.solver)) if report.solver else None,
        totals={
            figure.key: None if figure.total is None else _total(figure.total)
            for figure in report.totals.figures
        },
        layers=tuple(_layer(row) for row in report.layers),
        skipped=tuple(schema.Skipped(**asdict(skipped)) for skipped in report.skipped),
        removed_inputs=report.removed_inputs,
        merges=tuple(_merge(merged) for merged in report.merges),
        validation=_validation(report.validation) if report.validation else None,
        warnings=report.warnings,
        target=_target(report),
        calibration=_calibration(report.calibration) if report.calibration else None,
        timing=_timing(report.timing) if report.timing else None,
        trials=tuple(_trial(trial) for trial in report.trials),
        graph=_graph(report.graph) if report.graph else None,
        counted=report.counted,
        then=report.then,
    )


def _total(total: Total) -> details.Total:
    return details.Total(before=total.before, after=total.after, ratio=total.ratio)


def _merge(merged: Merge) -> schema.Merge:
    certificate = None if merged.certificate is None else schema.Certificate(**asdict(merged.certificate))
    return schema.Merge(**{**asdict(merged), "certificate": certificate})


def _layer(row: LayerRow) -> schema.Layer:
    option = row.option
    return schema.Layer(
        id=row.id,
        name=row.name,
        op=row.op,
        shape=row.shape,
        dtype=row.dtype,
        nodes=row.nodes,
        fold=option.fold if option else None,
        k=option.k if option else None,
        j=option.j if option else None,
        lowering=option.lowering if option else None,
        full_rank=row.full_rank,
        params=_total(row.params),
        macs=_total(row.macs),
        error=row.error,
        certificate=schema.Certificate(**asdict(row.certificate)) if row.certificate else None,
        reason=row.reason,
        fit=_fit(row.fit) if row.fit else None,
        kept_rows=row.kept,
        joined=row.joined,
        cost=_total(row.cost),
        curve=details.Curve(**asdict(row.detail.curve)) if row.detail.curve else None,
        alternatives=_alternatives(row.detail),
    )


def _alternatives(detail: Detail) -> tuple[details.Alternative, ...]:
    return tuple(
        details.Alternative(
            fold=found.option.fold, k=found.option.k, j=found.option.j, cost=found.cost, error=found.error
        )
        for found in detail.alternatives
    )


def _graph(graph: Graph) -> details.Graph:
    return details.Graph(
        operators={name: _total(total) for name, total in graph.operators.items()},
        changes=tuple(_change(change) for change in graph.changes),
    )


def _change(change: Change) -> details.Change:
    gone, new = (tuple(details.Node(**asdict(n)) for n in nodes) for nodes in (change.gone, change.new))
    return details.Change(scope=change.scope, same=dict(change.same), gone=gone, new=new)


def _fit(fit: LayerFit) -> schema.Fit:
    return schema.Fit(factors=fit.fit, recovered=fit.recovered, error=fit.error)


def _outputs(outputs: tuple[OutputError, ...]) -> tuple[schema.Output, ...]:
    return tuple(schema.Output(**asdict(output)) for output in outputs)


def _validation(validation: Validation) -> schema.Validation:
    return schema.Validation(
        engine=validation.engine,
        inputs=validation.inputs,
        worst=validation.worst,
        outputs=_outputs(validation.outputs),
        never_ran=validation.never_ran,
        notes=validation.notes,
        alone=_outputs(validation.alone),
        other=_other(validation.other) if validation.other else None,
        continuation=_continuation(validation.continuation) if validation.continuation else None,
        fused=_fused(validation.fused) if validation.fused else None,
        quantized=_quantized(validation.quantized) if validation.quantized else None,
        distilled=_distilled(validation.distilled) if validation.distilled else None,
    )


def _distilled(found: Distilled) -> schema.Distilled:
    return schema.Distilled(
        tensors=found.tensors,
        elements=found.elements,
        steps=found.steps,
        loss=found.loss[0],
        loss_after=found.loss[1],
        losses={name: tuple(kinds) for name, kinds in found.losses.items()},
        features=found.features,
        changes=found.changes,
        unreached=found.unreached,
        stops=found.stops,
        is_kept=found.is_kept,
        is_ended=found.is_ended,
        alone=_outputs(found.alone),
    )


def _quantized(found: Quantized) -> schema.Quantized:
    return schema.Quantized(
        kind=found.kind,
        method=found.method,
        reason=found.reason,
        refitted=found.refitted,
        floats=found.floats[0],
        floats_after=found.floats[1],
        bytes=found.size[0],
        bytes_after=found.size[1],
        alone=_outputs(found.alone),
        undecomposed=_undecomposed(found.undecomposed) if found.undecomposed else None,
    )


def _undecomposed(found: Undecomposed) -> schema.Undecomposed:
    return schema.Undecomposed(bytes=found.size, outputs=_outputs(found.outputs), note=found.note)


def _continuation(found: Continuation) -> schema.Continuation:
    return schema.Continuation(prompts=found.prompts, tokens=found.tokens, agreement=found.agreement)


def _fused(fused: Fused) -> dict[str, details.Total] | None:
    if fused.note:
        return None
    return {name: _total(Total(count, fused.after.get(name, 0))) for name, count in fused.before.items()}


def _other(other: Other) -> schema.Other:
    return schema.Other(
        source=other.source,
        outputs=_outputs(other.outputs),
        familiar=_outputs(other.familiar),
        kind=other.kind,
    )


def _target(report: Content) -> schema.Target | None:
    if report.target_error is None and report.target_agreement is None:
        return None
    return schema.Target(error=report.target_error, agreement=report.target_agreement)


def _calibration(calibration: Calibrated) -> schema.Calibration:
    return schema.Calibration(
        source=calibration.source,
        samples=calibration.samples,
        held=calibration.held,
        unmeasured=tuple(
            schema.Unmeasured(layer=layer, reason=reason) for layer, reason in calibration.unmeasured
        ),
    )


def _timing(timing: Timing) -> schema.Timing:
    return schema.Timing(
        engine=timing.engine,
        inputs=timing.inputs,
        before=timing.before,
        predicted=timing.predicted,
        after=timing.after,
        spread=timing.spread,
        layers=tuple(schema.LayerTime(layer=layer, **asdict(time)) for layer, time in timing.layers.items()),
        calls=tuple(schema.CallTime(**asdict(call)) for call in timing.calls),
    )


def _trial(trial: Trial) -> schema.Trial:
    return schema.Trial(
        recipe=trial.recipe,
        ratio=trial.ratio,
        recovered=trial.recovered,
        error=trial.error,
        agreement=trial.agreement,
        chosen=trial.chosen,
        note=trial.note,
        outputs=_outputs(trial.outputs),
        caches=tuple(sorted(trial.caches)),
    )
