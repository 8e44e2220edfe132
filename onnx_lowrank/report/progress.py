"""What the user sees while stages work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

Step = Callable[[], None]
"""Reports that one unit of a stage is done; threads may call it."""


class Progress(Protocol):
    """Shows which stage works and how far it is."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Step]:
        """Show a stage for as long as the context is open.

        Args:
            name: What it does.
            total: How many steps it has; None where that is unknown.
        """
        ...


@dataclass(frozen=True, slots=True)
class Silent:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Step]:
        """Show nothing."""
        yield lambda: None


@dataclass(frozen=True, slots=True)
class Terminal:
    """A bar for each stage; a line for each where nobody watches (a pipe, a file).

    Attributes:
        console: Where to; it should stand on stderr.
    """

    console: Console

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Step]:
        """Show a stage for as long as the context is open."""
        if not self.console.is_terminal:
            self.console.print(name if total is None else f"{name} ({total})", markup=False, highlight=False)
            yield lambda: None
            return
        columns: list[ProgressColumn] = [TextColumn("{task.description:<12}", markup=False), BarColumn(24)]
        if total is not None:
            columns.append(MofNCompleteColumn())
        with Bars(*columns, TimeElapsedColumn(), console=self.console) as bars:
            task = bars.add_task(name, total=total)
            yield lambda: bars.advance(task)
            if total is None:
                bars.update(task, total=1, completed=1)
