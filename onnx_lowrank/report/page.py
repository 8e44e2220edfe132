"""The console that the report is printed on, and the columns of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnx_lowrank.report import words

_GAP = 1  # spaces between columns
_ASCII = str.maketrans(
    {
        "×": "x",
        "·": "*",
        "→": ">",
        "–": "-",
        "≤": "<",
        "…": "~",
        "‖": "|",
        "−": "-",
        "Ŵ": "W'",
        "ŷ": "y'",
        "ȳ": "mean",
        "²": "^2",
    }
)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its header, its cells, and their alignment."""

    header: str
    cells: tuple[str, ...]
    justify: Literal["left", "right"] = "left"

    @property
    def width(self) -> int:
        """Characters of its widest cell."""
        return max(len(text) for text in (self.header, *self.cells))


class Page:
    """A console wrapper that makes names from a model harmless and every character printable."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._unicode = console.encoding.lower().startswith("utf")

    def text(self, text: str, style: str = "") -> Text:
        """Text without interpretation of markup; control characters, which names may contain, become '?'."""
        text = "".join(char if char.isprintable() else "?" for char in text)
        if not self._unicode:
            text = text.translate(_ASCII).encode("ascii", "replace").decode()
        return Text(text, style=style)

    def line(self, text: str, style: str = "", indent: int = 0) -> None:
        """Print text, wrapped and without the spaces with which rich would pad the lines."""
        for part in self.text(text).wrap(self._console, self._console.width - indent):
            part.rstrip()
            self._console.print(Text(" " * indent + part.plain, style=style))

    def blank(self) -> None:
        """Print an empty line."""
        self._console.print()

    def room(self, columns: Sequence[Column]) -> int:
        """Characters that are left for one more column."""
        return self._console.width - sum(column.width + _GAP for column in columns)

    def table(self, columns: Sequence[Column], styles: Sequence[str]) -> None:
        """Print a table with a style for each of its rows."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, header_style="bold")
        for column in columns:
            table.add_column(self.text(column.header), justify=column.justify, no_wrap=True, overflow="crop")
        for *cells, style in zip(*(column.cells for column in columns), styles, strict=True):
            table.add_row(*(self.text(cell) for cell in cells), style=style)
        self._console.print(table)

    def groups(self, title: str, unit: str, items: list[tuple[str, str]], hint: str = "") -> None:
        """Print names grouped by reason, the most frequent reason first; a hint follows their number."""
        if not items:
            return
        reasons: dict[str, list[str]] = {}
        for reason, name in items:
            reasons.setdefault(reason, []).append(name)
        self.line(f"{title}: {len(items)} {unit}{'s' * (len(items) != 1)}{hint}")
        for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
            self.line(f"{len(names)} × {reason} ({words.first_names(names)})", style="dim", indent=2)
