"""The errors on inputs of another kind (`--check`), side by side with those on the familiar ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx_lowrank.core.outcome import Other, OutputError
from onnx_lowrank.report import words
from onnx_lowrank.report.page import Column, Page
from onnx_lowrank.report.shorten import distinct

_MOST = 4
"""The most outputs that are shown: a decoder has two for every layer beside its logits."""

_Pair = tuple[OutputError, OutputError | None]
_Figure = tuple[str, str, Callable[[float], str]]


def _share(value: float) -> str:
    return f"{value:.1%}"


_FIGURES: tuple[_Figure, ...] = (
    ("relative error", "relative", words.number),
    ("about the mean", "centred", words.number),
    ("agreement", "agreement", _share),
    ("cosine", "cosine", lambda value: f"{value:.3f}"),
    ("neighbour kept", "neighbours", _share),
)
"""The titles of the figures, their names in `OutputError`, and the ways to write them."""


def show(other: Other, page: Page) -> None:
    """Print the errors of the outputs that are judged by more than a norm, and of those that err most."""
    page.line(f"Check on {other.source}")
    shown = _shown(other.pairs)
    rows = [(pair, *figure) for pair in shown for figure in _figures(pair)]
    columns = [Column("figure", tuple(title for _, title, _, _ in rows))]
    if other.familiar:
        familiar = tuple(_text(there, key, write) for (_, there), _, key, write in rows)
        columns.append(Column(other.kind, familiar, "right"))
    columns.append(
        Column("check", tuple(_text(here, key, write) for (here, _), _, key, write in rows), "right")
    )
    names = distinct([here.name for here, _ in shown], max(page.room(columns), 5))
    cells: list[str] = []
    for name, pair in zip(names, shown, strict=True):
        cells += [name, *[""] * (len(_figures(pair)) - 1)]
    page.table([Column("output", tuple(cells)), *columns], [""] * len(rows))
    for here, _ in shown:
        if here.note:
            page.line(f"{here.name}: {here.note}", style="dim", indent=2)
    if len(shown) < len(other.pairs):
        page.line(f"{len(other.pairs) - len(shown)} more outputs are in --report.", style="dim")


def worst(outputs: Sequence[OutputError]) -> list[OutputError]:
    """The outputs to show, in the order of the model: first those judged by more than a norm."""
    order = sorted(outputs, key=lambda output: (not _is_judged(output), -(output.relative or 0.0)))
    return [output for output in outputs if output in order[:_MOST]]


def _shown(pairs: tuple[_Pair, ...]) -> list[_Pair]:
    """The pairs to show, in the order of the model."""
    chosen = worst([here for here, _ in pairs])
    return [pair for pair in pairs if pair[0] in chosen]


def _is_judged(output: OutputError) -> bool:
    return output.agreement is not None or output.cosine is not None


def _figures(pair: _Pair) -> list[_Figure]:
    """The figures that an output has, at least its relative error."""
    known = [
        figure for figure in _FIGURES if any(getattr(each, figure[1], None) is not None for each in pair)
    ]
    return known or [_FIGURES[0]]


def _text(output: OutputError | None, key: str, write: Callable[[float], str]) -> str:
    value: float | None = getattr(output, key, None)
    return "–" if value is None else write(value)
