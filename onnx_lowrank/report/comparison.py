"""The differences of two models, as data and in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console

from onnx_lowrank.core.outcome import Differences, Timing, Validation
from onnx_lowrank.report import validation_text, words
from onnx_lowrank.report.content import Total
from onnx_lowrank.report.page import Column, Page

_SHOWN = 12  # operator types


@dataclass(frozen=True, slots=True)
class Comparison:
    """The differences of two models.

    Attributes:
        names: The names of their files.
        params: Their parameters.
        quantized: The bytes of those tensors whose elements have 8 bits or fewer.
        bytes: The bytes of all their tensors.
        operators: The numbers of nodes by operator type; only types whose number differs.
        nodes: Their nodes, which have no names that could be compared, so none is changed.
        tensors: Their initializers.
        validation: The comparison of their outputs.
        timing: Their times; None if they were not measured.
    """

    names: tuple[str, str]
    params: Total
    quantized: Total
    bytes: Total
    operators: Mapping[str, Total]
    nodes: Differences
    tensors: Differences
    validation: Validation
    timing: Timing | None


def show(found: Comparison, console: Console) -> None:
    """Print a comparison."""
    page = Page(console)
    page.line(f"{found.names[0]} and {found.names[1]}", "bold")
    page.blank()
    rows: list[tuple[str, Total, Callable[[int | None], str]]] = [
        ("float parameters", found.params, words.exact),
        ("file bytes", found.bytes, words.exact),
    ]
    if found.quantized != Total(0, 0):
        rows.append(("quantized bytes", found.quantized, words.exact))
    if found.timing is not None:
        rows.append(("time", Total(found.timing.before, found.timing.after), words.time))
    ratios = [total.ratio for _, total, _ in rows]
    page.table(
        [
            Column("total", tuple(name for name, _, _ in rows)),
            Column("first", tuple(write(total.before) for _, total, write in rows), "right"),
            Column("second", tuple(write(total.after) for _, total, write in rows), "right"),
            Column("ratio", tuple("–" if ratio is None else f"{ratio:.3f}" for ratio in ratios), "right"),
        ],
        [""] * len(rows),
    )
    page.blank()
    page.line(_sentence("nodes", found.nodes))
    page.line(_sentence("tensors", found.tensors))
    listed = list(found.operators.items())
    changes = [f"{name} {total.before}→{total.after}" for name, total in listed[:_SHOWN]]
    if changes:
        more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        page.line(f"Operators: {', '.join(changes)}{more}.")
    validation_text.show(found.validation, {}, page, title="Outputs")


def _sentence(what: str, found: Differences) -> str:
    parts = [f"{found.same} the same"]
    parts += [f"{number} {word}" for number, word in _kinds(found) if number]
    return f"{what.capitalize()}: {', '.join(parts)}."


def _kinds(found: Differences) -> tuple[tuple[int, str], ...]:
    return (
        (found.changed, "with other numbers"),
        (found.gone, "only in the first"),
        (found.new, "only in the second"),
    )
