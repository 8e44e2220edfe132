"""The records that the package logs through the standard library, and their display by the command.

Every module has a logger with its own name, so all loggers are below `onnx_lowrank`. DEBUG has a record for
each decision, with its reason. DETAIL has a record for each layer or option that was considered. As a library
the package shows no records: it adds a handler that does nothing.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from rich.console import Console
from rich.text import Text

ROOT = logging.getLogger("onnx_lowrank")

DETAIL = 5
"""The level of records that are too numerous for a reader who only wants the decisions."""

_SHOWN = 3
_FILTERS = Lock()


def printable(text: str) -> str:
    """Text in one line, without the control characters that names from a model may contain."""
    return "".join(char if char.isprintable() else " " for char in text)


def first_names(names: Sequence[str]) -> str:
    """The first names, and the number of the others."""
    more = len(names) - _SHOWN
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


class _Lines(logging.Handler):
    """Prints each record as a line on a console, above the progress that the console shows."""

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


class _Written(logging.Handler):
    """Hands the level and the text of each record to a function."""

    def __init__(self, write: Callable[[str, str], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a record on."""
        try:
            self._write(record.levelname.lower(), printable(self.format(record)))
        except Exception:
            self.handleError(record)


@contextmanager
def shown(
    console: Console, verbosity: int, write: Callable[[str, str], None] | None = None
) -> Iterator[None]:
    """Show records on a console during the block.

    Args:
        console: The console.
        write: Takes the level and the text of every record in place of the console.
        verbosity: Below 0 for none, 0 for warnings, 1 for decisions, 2 or more for details, with times and
            the modules' names.
    """
    if verbosity < 0:
        yield
        return
    lines: logging.Handler = _Lines(console) if write is None else _Written(write)
    level = ROOT.level
    if verbosity > 1 and write is None:
        lines.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(name)s: %(message)s", "%H:%M:%S"))
    ROOT.addHandler(lines)
    ROOT.setLevel({0: logging.WARNING, 1: logging.DEBUG}.get(verbosity, DETAIL))
    try:
        yield
    finally:
        ROOT.removeHandler(lines)
        ROOT.setLevel(level)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Ignore the warnings of Python during the block.

    All threads share their filters, and blocks that overlap would restore them in the wrong order. So threads
    wait for each other.
    """
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
