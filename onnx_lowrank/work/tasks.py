"""Calls in the queue of a thread pool that can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Generic, TypeVar

R = TypeVar("R")


class Task(Generic[R]):
    """A call that a thread of a pool makes when one is free, or else the thread that wants its result.

    The queue of a pool keeps a cancelled call until a thread is free, which may take minutes. So the queue
    holds this object alone, which lets go of the arguments of a call that was taken back.
    """

    def __init__(self, pool: ThreadPoolExecutor, function: Callable[..., R], *given: Any) -> None:
        self._call: Callable[[], R] | None = partial(function, *given)
        self._future = pool.submit(self._run)

    def result(self) -> R:
        """The result; this thread computes it if no other one has begun."""
        call = self._taken()
        return self._future.result() if call is None else call()

    def check(self) -> None:
        """Raise the call's error, if it was made and failed."""
        if not self._future.cancelled():
            self._future.result()

    def stop(self) -> list[Future[R]]:
        """Drop the call if it has not begun; returns the future to wait for if it has."""
        return [] if self._taken() is not None or self._future.cancelled() else [self._future]

    def _taken(self) -> Callable[[], R] | None:
        """The call, if nobody makes it: it is the caller's now."""
        if not self._future.cancel():
            return None
        call, self._call = self._call, None
        return call

    def _run(self) -> R:
        if self._call is None:
            raise RuntimeError("a call that was cancelled does not run")
        return self._call()


def stopped(tasks: Iterable[Task[Any]]) -> None:
    """Drop the tasks that have not begun, and wait for the others: the caller may close what they use."""
    wait([future for task in tasks for future in task.stop()])
