"""The report in a terminal: one table, the totals, and what else there is to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from os.path import commonprefix
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnx_lowrank.report.model import LayerRow, Report, Total
from onnx_lowrank.types import Aggregate, Measure, Solver, Validation

_ASCII = str.maketrans(
    {"×": "x", "·": "*", "→": ">", "–": "-", "≤": "<", "…": "~", "‖": "|", "−": "-", "Ŵ": "W'"}
)
_NAMES_SHOWN = 3


def show(report: Report, console: Console) -> None:
    """Print a report, for whatever width the console has."""
    page = _Page(console)
    page.line(_headline(report), style="bold")
    if report.layers:
        console.print()
        console.print(_layers(report, page))
        page.line(_legend(report), style="dim")
    console.print()
    console.print(_totals(report, page))
    if report.totals.macs.before is None:
        page.line(
            "MACs need the shapes that the model leaves open: --input-shape NAME=1,3,224,224.", style="dim"
        )
    page.line(_ratios(report))
    console.print()
    kept = [(row.reason or "kept by the plan", row.id) for row in report.layers if row.option is None]
    page.groups("Kept", "layer", kept)
    page.groups(
        "Skipped", "operator", [(item.reason, item.name or item.weight or item.op) for item in report.skipped]
    )
    if report.removed_inputs:
        names = _some(report.removed_inputs)
        page.line(f"Graph inputs removed, which only named weights that are rewritten: {names}")
    if report.validation is not None:
        _validation(report.validation, page)
    for warning in report.warnings:
        page.line(f"Warning: {warning}", style="yellow")


class _Page:
    """A console on which names from a model cannot do harm and every character can be printed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._unicode = console.encoding.lower().startswith("utf")

    def text(self, text: str, style: str = "") -> Text:
        """Text as it is, without markup; control characters, which names may hold, are shown as '?'."""
        text = "".join(char if char.isprintable() else "?" for char in text)
        if not self._unicode:
            text = text.translate(_ASCII).encode("ascii", "replace").decode()
        return Text(text, style=style)

    def line(self, text: str, style: str = "", indent: int = 0) -> None:
        """Print text, wrapped and without the blanks with which rich would fill up the lines."""
        for part in self.text(text).wrap(self.console, self.console.width - indent):
            part.rstrip()
            self.console.print(Text(" " * indent + part.plain, style=style))

    def grid(self, columns: list[_Column], styles: list[str]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, header_style="bold")
        for column in columns:
            table.add_column(self.text(column.header), justify=column.justify, no_wrap=True, overflow="crop")
        for *cells, style in zip(*(column.cells for column in columns), styles, strict=True):
            table.add_row(*(self.text(cell) for cell in cells), style=style)
        return table

    def groups(self, title: str, unit: str, items: list[tuple[str, str]]) -> None:
        """Print names by the reason that they share, most frequent reasons first."""
        if not items:
            return
        reasons: dict[str, list[str]] = {}
        for reason, name in items:
            reasons.setdefault(reason, []).append(name)
        self.line(f"{title}: {len(items)} {unit}{'s' * (len(items) != 1)}")
        for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
            self.line(f"{len(names)} × {reason} ({_some(names)})", style="dim", indent=2)


def _headline(report: Report) -> str:
    rewritten = sum(row.option is not None for row in report.layers)
    return f"{report.model}: {rewritten} of {len(report.layers)} layers rewritten with recipe {report.recipe}"


@dataclass(frozen=True, slots=True)
class _Column:
    header: str
    cells: tuple[str, ...]
    justify: Literal["left", "right"] = "left"

    @property
    def width(self) -> int:
        return max(len(text) for text in (self.header, *self.cells))


def _layers(report: Report, page: _Page) -> Table:
    """The table of layers in the most telling layout that leaves enough room for their ids."""
    ids = [row.id for row in report.layers]
    enough = min(_ID_ROOM, max(map(len, ids)))
    for number, left_out in _LAYOUTS:
        columns = [column for column in _columns(report.layers, number) if column.header not in left_out]
        room = page.console.width - sum(column.width + _GAP for column in columns)
        if room >= enough:
            break
    layer = _Column("layer", _distinct(ids, max(room, 5)))
    return page.grid([layer, *columns], ["" if row.option else "dim" for row in report.layers])


def _columns(rows: tuple[LayerRow, ...], number: Callable[[int | None], str]) -> list[_Column]:
    folds, ks, ranks = zip(*(_option(row) for row in rows), strict=True)
    return [
        _Column("operator", tuple(row.op for row in rows)),
        _Column("weight", tuple(_shape(row) for row in rows)),
        _Column("fold", folds),
        _Column("k", ks, "right"),
        _Column("rank", ranks, "right"),
        _Column("parameters", tuple(_change(row.params, number) for row in rows), "right"),
        _Column("error", tuple(_error(row.error) for row in rows), "right"),
        _Column("bound", tuple(_bound(row) for row in rows), "right"),
    ]


def _totals(report: Report, page: _Page) -> Table:
    totals = (report.totals.params, report.totals.macs, report.totals.bytes)
    ratios = tuple("–" if total.ratio is None else f"{total.ratio:.3f}" for total in totals)
    columns = [
        _Column("total", ("parameters", "MACs", "file bytes")),
        _Column("before", tuple(_exact(total.before) for total in totals), "right"),
        _Column("after", tuple(_exact(total.after) for total in totals), "right"),
        _Column("ratio", ratios, "right"),
    ]
    return page.grid(columns, ["", "", ""])


def _legend(report: Report) -> str:
    return (
        f"error: {report.measure}, as the recipe scores it. "
        "bound: certified ‖W − Ŵ‖/‖W‖, spectral norm, of the factors as stored."
    )


def _ratios(report: Report) -> str:
    line = f"Ratio of {report.budget}: {report.reached:.4f}, asked for {report.asked:g}."
    if report.solver is None or all(row.option is None for row in report.layers):
        return line
    gap = report.solver.gap
    if gap is None:
        uniform = report.solver.aggregate is Aggregate.UNIFORM
        proof = "one relative rank for all layers" if uniform else "the smallest lambda that fits"
    else:
        proof = "proven optimal" if gap <= 0 else f"within {gap:.2g} of the optimum"
    return f"{line} Objective ({_objective(report.solver, report.measure)}): {proof}."


def _objective(solver: Solver, measure: Measure) -> str:
    """What was minimized, and its value."""
    value = _number(solver.objective)
    if solver.aggregate is not Aggregate.SUM:
        return f"largest {measure} error {value}"
    power = "" if solver.power == 1 else f" to the power {solver.power:g}"
    return f"sum of {measure} errors{power} {value}"


def _validation(validation: Validation, page: _Page) -> None:
    page.line(f"Validation on {validation.engine}")
    page.line(f"inputs {validation.inputs}", style="dim", indent=2)
    for output in (*validation.outputs, *validation.alone):
        parts = []
        if output.relative is not None:
            parts.append(f"relative error {_number(output.relative)}")
        if output.largest is not None:
            parts.append(f"largest difference {_number(output.largest)}")
        if output.agreement is not None:
            parts.append(f"agreement {output.agreement:.1%}")
        if output.note:
            parts.append(output.note)
        page.line(f"{output.name}: {', '.join(parts)}", indent=2)
    if validation.never_ran:
        page.line(f"never ran: {_some(validation.never_ran)}", style="yellow", indent=2)
    elif validation.never_ran is None:
        page.line("which layers in branches ran is unknown", style="dim", indent=2)
    for note in validation.notes:
        page.line(note, style="yellow", indent=2)


def _shape(row: LayerRow) -> str:
    groups, *dims = row.shape
    return (f"{groups}·" if groups > 1 else "") + "×".join(map(str, dims))


def _option(row: LayerRow) -> tuple[str, str, str]:
    if row.option is None:
        return "keep", "–", "–"
    return row.option.fold.value, str(row.option.k), f"{row.option.j} of {row.full_rank}"


def _change(total: Total, number: Callable[[int | None], str]) -> str:
    before, after = number(total.before), number(total.after)
    return before if total.before == total.after else f"{before}→{after}"


def _bound(row: LayerRow) -> str:
    """The certified spectral norm of the residual, the worst of the groups; never rounded down."""
    if row.certificate is None:
        return "–"
    worst = max(row.certificate.spectral, default=0.0)
    digits = 3 if worst >= 1e-3 else 2
    return _number(float(Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(worst))))


def _error(value: float | None) -> str:
    return "–" if value is None else _number(value)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}" if 1e-3 <= abs(value) < 1e3 else f"{value:.1e}"


def _exact(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _short(value: int | None) -> str:
    """Three digits: 36.9k, 2.36M."""
    if value is None:
        return "?"
    size, unit = float(value), ""
    for larger in ("k", "M", "G", "T"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{value}" if not unit else f"{size:.3g}{unit}"


def _distinct(names: list[str], room: int) -> tuple[str, ...]:
    """Names that are too long lose the folders and the ending that all of them share, then their middle."""
    if len(set(names)) > 1 and max(map(len, names)) > room:
        shared = _shared(names)
        head = 1 + max(shared.rfind(separator) for separator in "/.:")
        tail = min(len(_shared([name[::-1] for name in names])), min(map(len, names)) - len(shared))
        names = [("…" if head else "") + name[head : len(name) - tail] for name in names]
    return tuple(_middle(name, room) for name in names)


def _shared(names: list[str]) -> str:
    """What all names begin with."""
    return commonprefix(names)  # noqa: RUF071 - characters are meant: names are no paths


def _middle(name: str, room: int) -> str:
    """A name cut in its middle, as both of its ends tell layers apart."""
    if len(name) <= room:
        return name
    tail = room // 2
    return f"{name[: room - 1 - tail]}…{name[-tail:]}"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _NAMES_SHOWN
    shown = ", ".join(_middle(name, 40) for name in listed[:_NAMES_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown


_GAP = 1
_ID_ROOM = 16
_COMPACT = frozenset(("operator", "weight"))
# How numbers are written and which columns are left out, the most telling layout first.
_LAYOUTS: tuple[tuple[Callable[[int | None], str], frozenset[str]], ...] = (
    (_exact, frozenset()),
    (_short, frozenset()),
    (_short, frozenset(("operator",))),
    (_short, _COMPACT),
    (_short, _COMPACT | {"bound"}),
    (_short, _COMPACT | {"bound", "fold", "k"}),
)
