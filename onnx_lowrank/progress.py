"""The display of progress while stages work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from math import inf
from threading import Lock
from time import monotonic
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
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

    def __call__(self, done: float | None = None, note: str = "") -> None:
        """Report that one more step is done, or that the share `done` of the stage is, from 0 to 1.

        Args:
            done: The share; None for one more step.
            note: A phrase about the state of the work.
        """
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
class Above:
    """Work of many parts, each with stages of its own.

    Attributes:
        name: The name to show.
        done: The number of parts that are done.
        total: The number of all parts.
        begun: When the first part began.
    """

    name: str
    done: int
    total: int
    begun: float


def over(progress: Progress, name: str, done: int, total: int, begun: float) -> Progress:
    """The progress with a bar of the parts above the bars of their stages, where it shows bars."""
    if not isinstance(progress, Terminal):
        return progress
    return replace(progress, above=Above(name, done, total, begun))


@dataclass(frozen=True, slots=True)
class Terminal:
    """Shows the current stage as a bar with the time left.

    If the console is not a terminal (a pipe, a file), each stage prints a line, and long stages print more.

    Attributes:
        console: The console to show it on; it should write to stderr.
        clock: Seconds since any fixed moment.
        above: The work that the stages are a part of, shown as a bar of its own.
    """

    console: Console
    clock: Callable[[], float] = monotonic
    above: Above | None = None

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Step]:
        """Show a stage for as long as the context is open."""
        # Drawn seldom, because drawing disturbs the times of models. The speed is averaged over the whole
        # stage, because steps may be further apart than any shorter window.
        bars = Bars(
            *_columns(),
            console=self.console,
            get_time=self.clock,
            speed_estimate_period=inf,
            refresh_per_second=_PER_SECOND,
            transient=True,
        )
        if self.above is not None:
            whole = bars.add_task(self.above.name, total=self.above.total, completed=self.above.done)
            bars.tasks[whole].start_time = self.above.begun
        task = bars.add_task(name, total=total)

        def step(done: float | None = None, note: str = "") -> None:
            if note:
                bars.update(task, description=f"{name}: {note}")
            if done is None:
                bars.advance(task)
            elif total is not None:
                bars.update(task, completed=done * total)

        if not self.console.is_terminal:
            yield self._logged(bars.tasks[-1], step)
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

        def logged(done: float | None = None, note: str = "") -> None:
            nonlocal due
            with lock:
                step(done, note)
                now = self.clock()
                if now < due or task.total is None or task.finished:
                    return
                due = now + _EVERY
                self._print(f"{task.description}: {_state(task)}")

        return logged

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)


@dataclass(frozen=True, slots=True)
class Lines:
    """Writes one JSON object a line, for programs that run the command.

    A stage gives `{"event": "stage", "name": ..., "total": ...}`, with null for an unknown number of steps.
    From time to time it gives `{"event": "step", "name": ..., "share": ...}`, with a note where there is one,
    and 1 as the share when it ends. Records and the error that ends the program are lines, too.

    Attributes:
        file: Where to write.
        clock: Seconds since any fixed moment.
    """

    file: TextIO
    clock: Callable[[], float] = monotonic

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Step]:
        """Write the begin, the progress and the end of a stage."""
        self._write({"event": "stage", "name": name, "total": total})
        share, due, lock = 0.0, self.clock() + 1 / _PER_SECOND, Lock()

        def step(done: float | None = None, note: str = "") -> None:
            nonlocal share, due
            with lock:
                share = done if done is not None else share + 1 / (total or 1)
                now = self.clock()
                if total and now >= due:
                    due = now + 1 / _PER_SECOND
                    known = {"event": "step", "name": name, "share": round(min(share, 1.0), 4)}
                    self._write({**known, "note": note} if note else known)

        yield step
        self._write({"event": "step", "name": name, "share": 1.0})

    def log(self, level: str, message: str) -> None:
        """Write a record of the program, such as a warning."""
        self._write({"event": "log", "level": level, "message": message})

    def failed(self, message: str, code: int) -> None:
        """Write the error that ends the program, with its exit code."""
        self._write({"event": "error", "message": message, "code": code})

    def _write(self, event: Mapping[str, object]) -> None:
        self.file.write(json.dumps(event, ensure_ascii=False) + "\n")
        self.file.flush()


class _State(ProgressColumn):
    """The steps that are done, or their share, or nothing if their number is unknown."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text()
        if _is_counted(task.total):
            return Text(f"{int(task.completed)}/{task.total:g}", style="progress.download")
        return Text(f"{task.percentage:>3.0f}%", style="progress.percentage")


class _TimeLeft(TimeRemainingColumn):
    """The time left, with a word that distinguishes it from the time elapsed."""

    def render(self, task: Task) -> Text:
        if task.finished or task.total is None:
            return Text()
        if task.time_remaining is None and task.completed and task.elapsed:  # Parts that were done before.
            seconds = task.elapsed / task.completed * (task.total - task.completed)
            return Text(f"{timedelta(seconds=int(seconds))} left", style="progress.remaining")
        return super().render(task).append(" left")


def _columns() -> list[ProgressColumn]:
    name, bar = TextColumn("{task.description:<12}", markup=False), BarColumn(24)
    return [name, bar, _State(), TimeElapsedColumn(), _TimeLeft()]


def _state(task: Task) -> str:
    """The progress of a stage with a known total, and the time left."""
    counted = f"{int(task.completed)}/{task.total:g}"
    state = counted if _is_counted(task.total) else f"{task.percentage:.0f} %"
    left = task.time_remaining
    return state if left is None else f"{state}, {timedelta(seconds=int(left))} left"


def _is_counted(total: float | None) -> bool:
    """Whether a stage with this total reports a count instead of a share."""
    return total is not None and total != 1


def _nothing(done: float | None = None, note: str = "") -> None:
    """Show nothing."""
