"""The layers of a model before any ratio, as data and in a terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from onnx_lowrank.core.layer import Skipped
from onnx_lowrank.layers.withheld import withheld
from onnx_lowrank.report import words
from onnx_lowrank.report.page import Column, Page
from onnx_lowrank.report.shorten import distinct

SHARES = (0.9, 0.99)
"""The shares of a weight's energy ‖W‖²_F whose ranks are shown."""


@dataclass(frozen=True, slots=True)
class Row:
    """A layer that can be decomposed.

    Attributes:
        id: Its id.
        name: Its name for readers.
        op: Its operator type.
        shape: The shape of the canonical weight: (groups, f / groups, c / groups, *kernel).
        dtype: Name of the stored dtype.
        params: Its parameters, including those of a folded BatchNorm.
        macs: Its multiply-accumulates; None if they are unknown.
        full_rank: The rank at which two factors of one slice are exact.
        pays: The largest rank of one slice with fewer parameters than the layer.
        ranks: The ranks of one slice that hold `SHARES` of the weight's energy.
        is_narrowed: Whether calibration can make it narrower, together with others.
        siblings: The number of layers that can share its encoder, itself included; 0 without others.
    """

    id: str
    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    params: int
    macs: int | None
    full_rank: int
    pays: int
    ranks: tuple[int, ...]
    is_narrowed: bool
    siblings: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model before any ratio.

    Attributes:
        model: The file's name without folder and suffix.
        layers: The layers that can be decomposed, in graph order.
        skipped: The operators that are left alone.
        total: The parameters of the model.
        quantized: The bytes of its tensors whose elements have 8 bits or fewer.
        least: The smallest ratio of them that can be reached; None if that is unknown.
    """

    model: str
    layers: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    total: int
    quantized: int
    least: float | None


def show(seen: Inspection, console: Console) -> None:
    """Print the layers, the largest first, and the reasons for the operators that are left alone."""
    page = Page(console)
    if (held := withheld(seen.skipped, len(seen.layers))) is not None:
        fact, advice = held
        page.line(f"{seen.model}: {fact}: {advice}.", "bold yellow")
    mine = sum(row.params for row in seen.layers)
    page.line(
        f"{seen.model}: {_layers(len(seen.layers))} can be decomposed, with {words.short(mine)} of "
        f"{words.short(seen.total)} float parameters",
        "bold",
    )
    if seen.quantized:
        page.line(f"{words.short(seen.quantized)} bytes of its tensors are quantized.")
    if seen.layers:
        page.blank()
        _table(seen, page)
        page.blank()
    if seen.least is not None and seen.layers:
        page.line(f"The smallest ratio of the parameters that can be reached is {seen.least:.3f}.")
    narrowed = sum(row.is_narrowed for row in seen.layers)
    joined = sum(row.siblings > 0 for row in seen.layers)
    if narrowed:
        page.line(f"With --calibration, {_layers(narrowed)} can get narrower, with no operator more.")
    if joined:
        page.line(f"With --calibration, {_layers(joined)} can share an encoder with others.")
    names = [(item.reason, item.name or item.weight or item.op) for item in seen.skipped]
    page.groups("Skipped", "operator", names)


def _layers(number: int) -> str:
    return f"{number} layer{'s' * (number != 1)}"


def _table(seen: Inspection, page: Page) -> None:
    rows = sorted(seen.layers, key=lambda row: -row.params)
    total = max(1, sum(row.params for row in rows))
    columns = [
        Column("operator", tuple(row.op for row in rows)),
        Column("weight", tuple("×".join(map(str, row.shape[row.shape[0] == 1 :])) for row in rows)),
        Column("params", tuple(words.short(row.params) for row in rows), "right"),
        Column("share", tuple(f"{row.params / total:.1%}" for row in rows), "right"),
        Column("pays", tuple(f"≤{row.pays}" for row in rows), "right"),
    ]
    for number, share in enumerate(SHARES):
        columns.append(Column(f"{share:.0%}", tuple(str(row.ranks[number]) for row in rows), "right"))
    columns.append(Column("full", tuple(str(row.full_rank) for row in rows), "right"))
    names = distinct([row.name for row in rows], max(page.room(columns), 5))
    page.table(
        [Column("layer", names), *columns], ["" if row.pays >= row.ranks[0] else "dim" for row in rows]
    )
    page.line(
        f"pays: ranks with fewer parameters than the layer. {SHARES[0]:.0%}, {SHARES[1]:.0%}: the ranks that "
        "hold this share of ‖W‖². full: the rank that is exact. All are for one slice; several slices often "
        "do better.",
        style="dim",
    )
