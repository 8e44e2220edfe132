"""The data of a page: one or many reports of one model, as plain values for JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from onnx_lowrank import measures
from onnx_lowrank.core.plan import Solver
from onnx_lowrank.documents import report_schema as schema
from onnx_lowrank.documents.json_text import finite
from onnx_lowrank.documents.sweeps import Point, Sweep
from onnx_lowrank.report import proof
from onnx_lowrank.report.terminal import WORTHLESS

_ROOM = 3_000_000
"""Characters of the details of all points; later points have none, so that a page stays small."""

_Table = dict[str, Any]


def of_run(report: schema.Report, command: str) -> _Table:
    """The data of a single run.

    Args:
        report: Its report.
        command: The command that made it; "" if that is unknown.
    """
    pool = _Pool()
    validation = report.validation
    error, agreement = _judged(report)
    shares = {key: None if total is None else total.ratio for key, total in report.totals.items()}
    point = {
        "name": "",
        "budget": report.ratio.budget,
        "asked": report.ratio.asked,
        "recipe": report.recipe.name,
        "reached": report.ratio.reached,
        "error": error,
        "agreement": agreement,
        "shares": shares,
        "inputs": "" if validation is None else validation.inputs,
        "detail": pool.detail(report),
    }
    return {"kind": "run", "command": command, **_shared(report), **pool.table, "points": [finite(point)]}


def _judged(report: schema.Report) -> tuple[float | None, float | None]:
    """The largest output error and the smallest agreement of the model that a run has made."""
    validation, chosen = report.validation, next((t for t in report.trials if t.chosen), None)
    # A trial judges the model before its quantization.
    if chosen is not None and (validation is None or validation.quantized is None):
        return chosen.error, chosen.agreement
    caches = () if chosen is None else chosen.caches
    outputs = [] if validation is None else [o for o in validation.outputs if o.name not in caches]
    errors = (o.relative if o.centred is None else o.centred for o in outputs if not o.is_exact)
    shares = (o.neighbours if o.agreement is None else o.agreement for o in outputs)
    return max(_known(errors), default=None), min(_known(shares), default=None)


def of_sweep(sweep: Sweep, reports: Mapping[str, schema.Report], command: str) -> _Table:
    """The data of all points of a sweep.

    Args:
        sweep: The sweep.
        reports: The reports of its points by name; at least one.
        command: The command that made it; "" if that is unknown.
    """
    pool, best = _Pool(), sweep.front()
    points: dict[str, _Table] = {}
    # The best points get their details first.
    for point in sorted(sweep.points, key=lambda point: point.name not in best):
        detail = None
        if point.name in reports and pool.size < _ROOM:
            detail = pool.detail(reports[point.name])
        points[point.name] = finite({**_point(point), "detail": detail})
    return {
        "kind": "sweep",
        "command": command,
        "evaluator": sweep.evaluator,
        "score": sweep.score,
        **_shared(next(iter(reports.values()))),
        **pool.table,
        "points": [points[point.name] for point in sweep.points],
    }


def _point(point: Point) -> _Table:
    return {
        "name": point.name,
        "budget": point.budget,
        "asked": point.asked,
        "recipe": point.recipe or point.wanted,
        "reached": point.reached,
        "error": point.error,
        "agreement": point.agreement,
        "score": point.score,
        "shares": {key: getattr(point, key) for key in ("params", "macs", "bytes", "time")},
        "inputs": point.inputs,
        "note": point.note,
        "files": {"model": point.model, "plan": point.plan, "report": point.report},
        "command": point.command,
    }


def _shared(report: schema.Report) -> _Table:
    """What the reports of one model share."""
    layers = [
        {
            "id": layer.id,
            "name": layer.name,
            "op": layer.op,
            "shape": layer.shape,
            "dtype": layer.dtype,
            "nodes": layer.nodes,
            "params": layer.params.before,
            "macs": layer.macs.before,
        }
        for layer in report.layers
    ]
    return {
        "model": report.model.name,
        "sha256": report.model.sha256,
        "version": report.version,
        "worthless": WORTHLESS,
        "layers": layers,
    }


class _Pool:
    """Takes the details of reports; what several of them have is kept once.

    Attributes:
        size: Characters of all that it has taken.
    """

    def __init__(self) -> None:
        self._kept: dict[str, int] = {}
        self.size = 0

    @property
    def table(self) -> _Table:
        """What was kept."""
        return {"pool": [json.loads(text) for text in self._kept]}

    def detail(self, report: schema.Report) -> _Table:
        """All of a report that is its own."""
        table: _Table = msgspec.to_builtins(report, enc_hook=float)
        own = ("warnings", "totals", "skipped", "removed_inputs", "merges", "validation", "calibration")
        times = {time.layer: time for time in report.timing.layers} if report.timing is not None else {}
        detail = {key: table[key] for key in (*own, "timing", "trials", "graph", "target", "then")}
        detail["rows"] = [self._row(layer, times.get(layer.id)) for layer in report.layers]
        detail["measure"] = f"{report.recipe.measure}, {measures.named(report.recipe.measure).legend}"
        detail["objective"] = _objective(report)
        worst = None if report.validation is None else report.validation.worst
        detail["worthless"] = worst is not None and worst > WORTHLESS
        made: _Table = finite(detail)
        self.size += len(json.dumps(made))
        return made

    def _row(self, layer: schema.Layer, time: schema.LayerTime | None) -> _Table:
        row: _Table = {"params": layer.params.after, "macs": layer.macs.after}
        if layer.fold is not None:
            row["option"] = [layer.fold, layer.k, layer.j, layer.lowering]
        if layer.certificate is not None:
            row["bound"] = max(_known(layer.certificate.spectral), default=None)
            row["frobenius"] = max(_known(layer.certificate.frobenius), default=None)
        if layer.fit is not None:
            row["fit"] = "recovered" if layer.fit.recovered else layer.fit.factors
            row["held"] = layer.fit.error
        if layer.cost is not None:
            row["cost"] = [layer.cost.before, layer.cost.after]
        if layer.curve is not None:
            row["curve"] = self._number(layer.curve)
        if layer.alternatives:
            row["alternatives"] = self._number(layer.alternatives)
        if time is not None:
            row["time"] = [time.before, time.predicted, time.after]
        others = {
            "full": layer.full_rank,
            "error": layer.error,
            "reason": layer.reason,
            "kept_rows": layer.kept_rows,
            "joined": layer.joined,
        }
        return row | {key: value for key, value in others.items() if value}

    def _number(self, found: object) -> int:
        """The number of a layer's curve, or of its alternatives, in the pool."""
        text = json.dumps(finite(msgspec.to_builtins(found, enc_hook=float)))
        if text not in self._kept:
            self._kept[text] = len(self._kept)
            self.size += len(text)
        return self._kept[text]


def _known(values: Iterable[float | None]) -> Iterator[float]:
    return (value for value in values if value is not None)


def _objective(report: schema.Report) -> str:
    solver = report.solver
    if solver is None or solver.objective is None or all(layer.fold is None for layer in report.layers):
        return ""
    quality = Solver(solver.aggregate, solver.power, solver.objective, solver.gap)
    return proof.sentence(quality, report.recipe.measure)
