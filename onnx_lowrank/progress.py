"""The display of progress while stages work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import inf
from threading import Lock
from time import monotonic
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

_PER_SECOND = 2
_FIRST, _EVERY = 10.0, 30.0  # seconds until a long stage prints its progress, and between later lines


class Step(Protocol):
    """Reports the progress of a stage; threads may call it."""

    def __call__(self, done: float | None = None) -> None:
        """Report that one more step is done, or that the share `done` of the stage is, from 0 to 1."""
        ...


class Progress(Protocol):
    """Shows the current stage and its progress; stages follow each other and do not nest."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Step]:
        """Show a stage for as long as the context is open.

        Args:
            name: The name to show.
            total: Number of its steps; 1 if it reports shares; None if the number is unknown.
        """
        ...


@dataclass(frozen=True, slots=True)
class Silent:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Step]:
        """Show nothing."""
        yield _nothing


@dataclass(frozen=True, slots=True)
class Labelled:
    """Shows stages with a label after their names.

    Attributes:
        progress: The progress that shows them.
        label: The purpose of the stages.
    """

    progress: Progress
    label: str

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Step]:
        """Show a stage with its label."""
        return self.progress.stage(f"{name} ({self.label})", total)


@dataclass(frozen=True, slots=True)
class Terminal:
    """Shows the current stage as a bar with the time left.

    If the console is not a terminal (a pipe, a file), each stage prints a line, and long stages print more.

    Attributes:
        console: The console to show it on; it should write to stderr.
        clock: Seconds since any fixed moment.
    """

    console: Console
    clock: Callable[[], float] = monotonic

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Step]:
        """Show a stage for as long as the context is open."""
        # Drawn seldom, because drawing disturbs the times of models. The speed is averaged over the whole
        # stage, because steps may be further apart than any shorter window.
        bars = Bars(
            *_columns(total),
            console=self.console,
            get_time=self.clock,
            speed_estimate_period=inf,
            refresh_per_second=_PER_SECOND,
            transient=True,
        )
        task = bars.add_task(name, total=total)

        def step(done: float | None = None) -> None:
            if done is None:
                bars.advance(task)
            elif total is not None:
                bars.update(task, completed=done * total)

        if not self.console.is_terminal:
            yield self._logged(bars.tasks[0], step)
            return
        with bars:
            yield step
            if total is None or total == 1:
                bars.update(task, total=1, completed=1)

    def _logged(self, task: Task, step: Step) -> Step:
        """Print the stage's first line, and return a step that prints its progress from time to time."""
        counted = f"{task.description} ({task.total:g})" if _is_counted(task.total) else task.description
        self._print(counted)
        due = self.clock() + _FIRST
        lock = Lock()

        def logged(done: float | None = None) -> None:
            nonlocal due
            with lock:
                step(done)
                now = self.clock()
                if now < due or task.total is None or task.finished:
                    return
                due = now + _EVERY
                self._print(f"{task.description}: {_state(task)}")

        return logged

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)


class _TimeLeft(TimeRemainingColumn):
    """The time left, with a word that distinguishes it from the time elapsed."""

    def render(self, task: Task) -> Text:
        return Text() if task.finished else super().render(task).append(" left")


def _columns(total: int | None) -> list[ProgressColumn]:
    name, bar = TextColumn("{task.description:<12}", markup=False), BarColumn(24)
    if total is None:
        return [name, bar, TimeElapsedColumn()]
    state = MofNCompleteColumn() if _is_counted(total) else TaskProgressColumn()
    return [name, bar, state, TimeElapsedColumn(), _TimeLeft()]


def _state(task: Task) -> str:
    """The progress of a stage with a known total, and the time left."""
    counted = f"{int(task.completed)}/{task.total:g}"
    state = counted if _is_counted(task.total) else f"{task.percentage:.0f} %"
    left = task.time_remaining
    return state if left is None else f"{state}, {timedelta(seconds=int(left))} left"


def _is_counted(total: float | None) -> bool:
    """Whether a stage with this total reports a count instead of a share."""
    return total is not None and total != 1


def _nothing(done: float | None = None) -> None:
    """Show nothing."""
