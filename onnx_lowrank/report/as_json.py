"""The report as JSON.

Schema 1, keys in this order; a number that is unknown, infinite or not a number is null:

- schema: 1. It grows when a key changes its meaning or goes; new keys do not change it.
- version: of this program.
- model: name, sha256 of the input model.
- recipe: name, measure.
- ratio: budget, asked, reached.
- solver: aggregate, power, objective, gap (null under uniform and with a price, which follow a rule);
  null where an edited plan was replayed.
- totals: params, macs, bytes, each with before, after, ratio; time, too, in nanoseconds, else null.
- layers: a list in graph order of id, name (as the table shows it), op, shape (groups, outputs per group,
  inputs per group, kernel ...), dtype, nodes, fold, k, j, lowering, full_rank (null where kept), params, macs
  (each before, after, ratio), error, certificate (spectral, frobenius: a list each, one number per operator
  group; null where kept), reason, fit (factors: what they were fitted to, weights or activations; recovered:
  whether to what the compressed layers before give; error: squared, of the layer's outputs, relative; null
  where kept).
- skipped: a list of scope, name, op, weight, reason.
- removed_inputs: a list of names.
- merges: a list of first, second (nodes that became one), layers (of whose chains they were), elements (of
  both weights and of the product), saved (parameters). Layers are described as before that.
- validation: engine, inputs, worst (over the outputs; null where none could be measured), outputs (a list of
  name, relative, largest, agreement, note, centred, is_exact, cosine and neighbours: of rows of norm 1, which
  have no agreement), never_ran (a list of layer ids, null where unknown), notes, alone (as outputs, one per
  rewritten layer, where the model ran nowhere); null where none was made.
- warnings: a list of sentences.
- target: error, agreement (one can be null): what was asked for instead of a ratio; null where a ratio was.
- calibration: source, samples, held (how many of them were held out), unmeasured (a list of layer, reason);
  null where there were no calibration inputs.
- timing: engine, inputs, before, predicted, after (nanoseconds of one run; predicted is null where a plan
  was replayed, after in a dry run), spread (longest over shortest median of the input model's time), layers
  (a list of layer, before, predicted, after: before and after alone, outside the model, predicted with what
  the layer saves in it, null where a plan was replayed); null where latency is not the budget.
- trials: a list of recipe, ratio, recovered, error, agreement (the worst over the outputs, of neighbours
  where rows have norm 1), chosen, note, outputs (as in validation, on the held-out calibration inputs); empty
  where nothing was compared.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from onnx_lowrank.core.factors import LayerFit
from onnx_lowrank.core.outcome import Calibrated, Timing, Trial, Validation
from onnx_lowrank.report.content import Content, LayerRow, Total

SCHEMA = 1


def dumps(report: Content) -> str:
    """The report as JSON text that ends with a newline; the same report gives the same text."""
    return json.dumps(_finite(as_dict(report)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_dict(report: Content) -> dict[str, Any]:
    """The report as plain dicts and lists, with the keys of the schema."""
    totals = report.totals
    return {
        "schema": SCHEMA,
        "version": report.version,
        "model": {"name": report.model, "sha256": report.sha256},
        "recipe": {
            "name": report.recipe,
            "measure": report.measure,
        },
        "ratio": {"budget": report.budget.value, "asked": report.asked, "reached": report.reached},
        "solver": asdict(report.solver) if report.solver else None,
        "totals": {
            "params": _total(totals.params),
            "macs": _total(totals.macs),
            "bytes": _total(totals.bytes),
            "time": _total(totals.time) if totals.time else None,
        },
        "layers": [_layer(row) for row in report.layers],
        "skipped": [asdict(skipped) for skipped in report.skipped],
        "removed_inputs": list(report.removed_inputs),
        "merges": [asdict(merged) for merged in report.merges],
        "validation": _validation(report.validation) if report.validation else None,
        "warnings": list(report.warnings),
        "target": _target(report),
        "calibration": _calibration(report.calibration) if report.calibration else None,
        "timing": _timing(report.timing) if report.timing else None,
        "trials": [_trial(trial) for trial in report.trials],
    }


def _total(total: Total) -> dict[str, Any]:
    return {"before": total.before, "after": total.after, "ratio": total.ratio}


def _layer(row: LayerRow) -> dict[str, Any]:
    option = row.option
    return {
        "id": row.id,
        "name": row.name,
        "op": row.op,
        "shape": list(row.shape),
        "dtype": row.dtype,
        "nodes": list(row.nodes),
        "fold": option.fold.value if option else None,
        "k": option.k if option else None,
        "j": option.j if option else None,
        "lowering": option.lowering.value if option else None,
        "full_rank": row.full_rank,
        "params": _total(row.params),
        "macs": _total(row.macs),
        "error": row.error,
        "certificate": asdict(row.certificate) if row.certificate else None,
        "reason": row.reason,
        "fit": _fit(row.fit) if row.fit else None,
    }


def _fit(fit: LayerFit) -> dict[str, Any]:
    return {"factors": fit.fit.value, "recovered": fit.recovered, "error": fit.error}


def _validation(validation: Validation) -> dict[str, Any]:
    return {
        "engine": validation.engine,
        "inputs": validation.inputs,
        "worst": validation.worst,
        "outputs": [asdict(output) for output in validation.outputs],
        "never_ran": None if validation.never_ran is None else list(validation.never_ran),
        "notes": list(validation.notes),
        "alone": [asdict(output) for output in validation.alone],
    }


def _target(report: Content) -> dict[str, Any] | None:
    target = {"error": report.target_error, "agreement": report.target_agreement}
    return None if set(target.values()) == {None} else target


def _calibration(calibration: Calibrated) -> dict[str, Any]:
    return {
        "source": calibration.source,
        "samples": calibration.samples,
        "held": calibration.held,
        "unmeasured": [{"layer": layer, "reason": reason} for layer, reason in calibration.unmeasured],
    }


def _timing(timing: Timing) -> dict[str, Any]:
    return {
        "engine": timing.engine,
        "inputs": timing.inputs,
        "before": timing.before,
        "predicted": timing.predicted,
        "after": timing.after,
        "spread": timing.spread,
        "layers": [{"layer": layer, **asdict(time)} for layer, time in timing.layers.items()],
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "recipe": trial.recipe,
        "ratio": trial.ratio,
        "recovered": trial.recovered,
        "error": trial.error,
        "agreement": trial.agreement,
        "chosen": trial.chosen,
        "note": trial.note,
        "outputs": [asdict(output) for output in trial.outputs],
    }


def _finite(value: Any) -> Any:
    """The same, with null for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
