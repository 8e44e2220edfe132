"""What the package logs, through the standard library, and how the command shows it.

Every module has a logger of its own name, so all of them are below `onnx_lowrank`. At DEBUG there is a record
for each decision, with its reason; at DETAIL one for each layer or option that was considered. As a library
the package shows none of them: it adds a handler that does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

ROOT = logging.getLogger("onnx_lowrank")

DETAIL = 5
"""The level of records that are too many to read where one only wants to know what was decided."""

_SHOWN = 3


def printable(text: str) -> str:
    """Text without control characters, which names from a model may hold, in one line."""
    return "".join(char if char.isprintable() else " " for char in text)


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


class _Lines(logging.Handler):
    """Prints records on a console, a line each, above whatever progress it shows."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            line = Text(printable(self.format(record)), style="dim")
            self._console.print(line, soft_wrap=True)
        except Exception:
            self.handleError(record)


@contextmanager
def shown(console: Console, verbosity: int) -> Iterator[None]:
    """Show records on a console during the block.

    Args:
        console: Where to.
        verbosity: 0 for none, 1 for decisions, 2 or more for details, with times and the modules' names.
    """
    if verbosity <= 0:
        yield
        return
    lines, level = _Lines(console), ROOT.level
    if verbosity > 1:
        lines.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(name)s: %(message)s", "%H:%M:%S"))
    ROOT.addHandler(lines)
    ROOT.setLevel(logging.DEBUG if verbosity == 1 else DETAIL)
    try:
        yield
    finally:
        ROOT.removeHandler(lines)
        ROOT.setLevel(level)
