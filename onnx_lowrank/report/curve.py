"""The points of a sweep in a terminal: one row each, the best ones marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from onnx_lowrank.documents.sweeps import Point, Sweep
from onnx_lowrank.report import words
from onnx_lowrank.report.page import Column, Page
from onnx_lowrank.report.shorten import distinct

_BEST = "●"
_BAR, _LEAST_BAR = 12, 4  # characters of the longest bar
_LEAST_NAME = 8

_SHARES: tuple[tuple[str, Callable[[Point], float | None]], ...] = (
    ("params", lambda point: point.params),
    ("MACs", lambda point: point.macs),
    ("bytes", lambda point: point.bytes),
    ("time", lambda point: point.time),
)


def show(sweep: Sweep, console: Console, folder: object) -> None:
    """Print the points, the least error for every cost marked.

    Args:
        sweep: The sweep.
        console: Where to print.
        folder: The folder of its files.
    """
    page = Page(console)
    made = [point for point in sweep.points if point.is_made]
    best = sweep.front()
    if made:
        columns = _columns(sweep, made, best, page)
        page.table(columns, ["" if p.name in best else "dim" for p in made])
        page.line(f"{_BEST} no point costs less and errs less. Error: {_source(made)}.", style="dim")
    times = [point.time for point in made if point.time is not None]
    if times and min(times) >= 1:
        page.line("No point is faster than the input model: --budget latency plans by times.", "yellow")
    if sweep.evaluator is not None:
        page.line(f"Score of the input model by {sweep.evaluator}: {words.error(sweep.score)}.")
    for point in sweep.points:
        if not point.is_made:
            page.line(f"{point.name} has no model: {point.note}", style="yellow")
    models = (
        "1 model, with its plan and report, is"
        if len(made) == 1
        else (f"{len(made)} models, with their plans and reports, are")
    )
    page.line(f"{models} in {folder}.")


def _columns(sweep: Sweep, made: Sequence[Point], best: frozenset[str], page: Page) -> list[Column]:
    marks = tuple(_BEST if point.name in best else "" for point in made)
    before = [Column("", marks)]
    for title, share in _SHARES:
        values = [share(point) for point in made]
        if any(value is not None for value in values):
            before.append(_figures(title, values, "{:.3f}"))
    errors = [point.error for point in made]
    before.append(Column("error", tuple(map(words.error, errors)), "right"))
    after = []
    if any(point.agreement is not None for point in made):
        after.append(_figures("agree", [point.agreement for point in made], "{:.1%}"))
    if sweep.evaluator is not None:
        after.append(Column("score", tuple(words.error(point.score) for point in made), "right"))
    names = distinct([point.name for point in made], max(page.room([*before, *after]) - 1, _LEAST_NAME))
    before.insert(1, Column("point", names))
    room = min(page.room([*before, *after]) - 1, _BAR)
    bars = [Column("", _bars(errors, room))] if room >= _LEAST_BAR else []
    return [*before, *bars, *after]


def _figures(title: str, values: Sequence[float | None], form: str) -> Column:
    return Column(title, tuple("–" if v is None else form.format(v) for v in values), "right")


def _bars(errors: Sequence[float | None], room: int) -> tuple[str, ...]:
    """Bars whose lengths are the errors, of which 1 is noise: a longer bar says no more."""
    longest = min(max((e for e in errors if e is not None), default=0.0), 1.0)
    shares = [0.0 if e is None or not longest else min(e / longest, 1.0) for e in errors]
    return tuple("█" * round(room * share) for share in shares)


def _source(made: Sequence[Point]) -> str:
    sources = list(dict.fromkeys(point.inputs for point in made if point.inputs))
    return "largest of the outputs, " + (sources[0] if len(sources) == 1 else "each on its own inputs")
