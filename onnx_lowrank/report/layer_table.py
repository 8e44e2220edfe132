"""The table of layers, in the layout that fits the console."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from decimal import ROUND_CEILING, Context

from onnx_lowrank.core.factors import LayerFit
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.core.outcome import LayerTime
from onnx_lowrank.measures import named
from onnx_lowrank.report import words
from onnx_lowrank.report.content import Content, LayerRow, Total
from onnx_lowrank.report.page import Column, Page
from onnx_lowrank.report.shorten import distinct

_NAME_ROOM = 16
_GROUPS = 3
_COMPACT = frozenset(("operator", "weight"))
_HELD, _MEASURED = "held-out", "measured"
_TIME, _PREDICTED = "time alone", "predicted"
_FITTED = frozenset(("fit", _HELD, _MEASURED))
# How each layout writes numbers, and the columns that it omits; the most informative layout comes first.
_LAYOUTS: tuple[tuple[Callable[[int | None], str], frozenset[str]], ...] = (
    (words.exact, frozenset()),
    (words.short, frozenset()),
    (words.short, frozenset(("operator",))),
    (words.short, _COMPACT),
    (words.short, _COMPACT | {_PREDICTED}),
    (words.short, _COMPACT | {_PREDICTED, "bound"}),
    (words.short, _COMPACT | {_PREDICTED, "bound", "fit"}),
    (words.short, _COMPACT | {_PREDICTED, "bound", "fit", "fold", "k"}),
    (words.short, _COMPACT | {_PREDICTED, "bound", "fold", "k"} | _FITTED),
    (words.short, _COMPACT | {_PREDICTED, _TIME, "bound", "fold", "k"} | _FITTED),
)


def show(report: Content, rows: Sequence[LayerRow], page: Page) -> None:
    """Print a table of layers and its legend, in the most informative layout with enough room for the names.

    Args:
        report: The report.
        rows: The layers to show.
        page: Where to print.
    """
    names = [row.name for row in rows]
    enough = min(_NAME_ROOM, max(map(len, names)))
    for number, omitted in _LAYOUTS:
        columns = [column for column in _columns(report, rows, number) if column.header not in omitted]
        room = page.room(columns)
        if room >= enough:
            break
    layer = Column("layer", distinct(names, max(room, 5)))
    page.table([layer, *columns], ["" if row.option else "dim" for row in rows])
    for line in _legend(report, rows, {column.header for column in columns}):
        page.line(line, style="dim")


def _legend(report: Content, rows: Sequence[LayerRow], shown: Container[str]) -> Iterator[str]:
    """Explanations of the columns whose headers do not explain them."""
    yield f"error: {report.measure}, {named(report.measure).legend}."
    for way, factor in ((Lowering.SHARED, "encoder"), (Lowering.SUMMED, "decoder")):
        yield from _joined(report, way, factor)
    if "bound" in shown:
        yield "bound: certified ‖W − Ŵ‖/‖W‖, spectral norm, of the factors as stored."
    if _TIME in shown:
        yield "time alone: times of the layer and of its chain outside the model, measured like the model."
    if "fit" in shown and any(fit is not None and fit.recovered for fit in _fits(report, rows)):
        yield "fit: recovered layers make up for the errors of the layers before them."
    for header, samples in ((_HELD, "held-out"), (_MEASURED, "the")):
        if header in shown:
            yield (
                f"{header}: ‖y − ŷ‖²/‖y‖² of the layer's output y on {samples} calibration inputs; about the "
                "mean if the layer's bias keeps the mean."
            )


def _joined(report: Content, way: Lowering, factor: str) -> Iterator[str]:
    """The layers that share a factor: the first groups of them."""
    names = {row.id: row.name for row in report.layers}
    rows = [row for row in report.layers if row.option is not None and row.option.lowering is way]
    groups = [", ".join(names[name] for name in group) for group in dict.fromkeys(row.joined for row in rows)]
    if any(groups):
        more = f"; and {len(groups) - _GROUPS} more" if len(groups) > _GROUPS else ""
        yield f"{way}: one {factor} for all of {'; '.join(groups[:_GROUPS])}{more}."


def _columns(report: Content, rows: Sequence[LayerRow], number: Callable[[int | None], str]) -> list[Column]:
    folds, ks, ranks = zip(*(_option(row) for row in rows), strict=True)
    columns = [
        Column("operator", tuple(row.op for row in rows)),
        Column("weight", tuple(_shape(row) for row in rows)),
        Column("fold", folds),
        Column("k", ks, "right"),
        Column("rank", ranks, "right"),
        Column("parameters", tuple(_change(row.params, number) for row in rows), "right"),
        Column("error", tuple(words.error(row.error) for row in rows), "right"),
        Column("bound", tuple(_bound(row) for row in rows), "right"),
    ]
    if report.timing is not None and report.timing.layers:
        times = [report.timing.layers.get(row.id) for row in rows]
        columns.append(Column(_TIME, tuple(map(_faster, times)), "right"))
        columns.append(Column(_PREDICTED, tuple(map(_expected, times)), "right"))
    fits = _fits(report, rows)
    if any(fits):
        columns.append(Column("fit", tuple(map(_fit, fits))))
    if any(fit and fit.error is not None for fit in fits):
        errors = tuple(words.percent(fit.error if fit else None) for fit in fits)
        columns.append(Column(_lost(report), errors, "right"))
    return columns


def _fits(report: Content, rows: Sequence[LayerRow]) -> tuple[LayerFit | None, ...]:
    """How the factors of the layers were made; None without calibration, where all are made in one way."""
    return tuple(None if report.calibration is None else row.fit for row in rows)


def _lost(report: Content) -> str:
    """Header of the column of errors that were measured on calibration inputs."""
    return _HELD if report.calibration is not None and report.calibration.held else _MEASURED


def _shape(row: LayerRow) -> str:
    groups, *dims = row.shape
    return (f"{groups}·" if groups > 1 else "") + "×".join(map(str, dims))


def _option(row: LayerRow) -> tuple[str, str, str]:
    if row.option is None:
        return "keep", "–", "–"
    if row.option.lowering is Lowering.NARROW:
        return row.option.lowering.value, "–", f"{row.option.j} of {row.full_rank}"
    if row.option.lowering in (Lowering.SHARED, Lowering.SUMMED):
        return row.option.lowering.value, "1", f"{row.option.j} of {row.full_rank}"
    rank = f"{row.option.j} of {row.full_rank}"
    if row.kept:
        rank += f", {row.kept} rows stay"
    return row.option.fold.value, str(row.option.k), rank


def _change(total: Total, number: Callable[[int | None], str]) -> str:
    before, after = number(total.before), number(total.after)
    return before if total.before == total.after else f"{before}→{after}"


def _bound(row: LayerRow) -> str:
    """The certified spectral norm of the residual, the largest one of all groups; never rounded down."""
    if row.certificate is None:
        return "–"
    worst = max(row.certificate.spectral, default=0.0)
    digits = 3 if worst >= 1e-3 else 2
    return words.number(float(Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(worst))))


def _faster(time: LayerTime | None) -> str:
    return "–" if time is None else f"{words.time(time.before)}→{words.time(time.after)}"


def _expected(time: LayerTime | None) -> str:
    return "–" if time is None or time.predicted is None else words.time(time.predicted)


def _fit(fit: LayerFit | None) -> str:
    return "–" if fit is None else "recovered" if fit.recovered else fit.fit.value
