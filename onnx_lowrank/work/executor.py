"""What runs work items: the threads of this process, or processes that they travel to.

An item is a value that says all that is to be computed; the function that computes it is at the top level of
a module. So any executor can run it that takes both to where it computes: add one beside `Threads` and
`Processes`.

Rules:

1. Items are bounded by the bytes that running them takes, not by their number: together those that are
   under way, and those whose results wait for their turn, keep within a budget. One always runs.
2. An item is drawn from the iterable when a worker is about to be free, since it may hold a weight.
3. Results come in the items' order, and have the same bits in every executor: each worker's BLAS has one
   thread.
4. What only this process has (sums under way, an open engine) is worked on by `threads`, the one pool of
   threads of a run. Idle threads help with the parts of an item that is large.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from threading import Thread
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from onnx_lowrank.errors import InputError
from onnx_lowrank.hardware import cores, free_memory
from onnx_lowrank.linalg.backend import Backend, one_blas_thread, resolve

_SHARE = 4
"""Items take at most this part of the memory that is free when the executor starts."""


class Item(Protocol):
    """What an executor needs to know of an item."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that running it takes, about."""


T = TypeVar("T")
R = TypeVar("R")
I = TypeVar("I", bound=Item)  # noqa: E741 - an item

Function = Callable[[I, Backend], R]
"""Computes an item on a device."""

_Flight = tuple[Future[R], int]
"""An item that is under way, or whose result waits for its turn; and its bytes."""

_HELD = ExitStack()
"""What a worker process holds until it ends."""


class Executor(Protocol):
    """Runs work items; a context manager that frees its workers."""

    @property
    def threads(self) -> Threads:
        """The threads of this process."""

    def map(self, function: Function[I, R], items: Iterable[I]) -> Iterator[R]:
        """Compute items in parallel; gives the results in their order.

        Args:
            function: Computes one item; at the top level of a module.
            items: The items, drawn one by one.

        Raises:
            InputError: The workers ended.
            Exception: What the function raises for an item, in the item's turn.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def executor(workers: int, backend: Backend) -> Executor:
    """The executor that `--workers` asks for: so many processes, or threads for 0."""
    return Processes(workers, backend) if workers else Threads(backend)


class Threads:
    """One thread for every core.

    Attributes:
        backend: Where they compute; a GPU one after the other, with the host's part in parallel.
    """

    def __init__(self, backend: Backend, *, number: int | None = None, budget: int | None = None) -> None:
        """Start nothing yet.

        Args:
            backend: Where to compute.
            number: How many threads; by default one for every core.
            budget: Bytes that items may take; by default a quarter of the memory that is free.
        """
        self._number = number or cores()
        self._budget = budget or free_memory() // _SHARE
        self._pool = ThreadPoolExecutor(self._number, "onnx-lowrank")
        # On a GPU the parts of an item are one stack for the device already.
        self.backend = backend if backend.name == "cuda" else replace(backend, shared=self._shared)

    def __enter__(self) -> Self:
        """Use the threads until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the threads and end them."""
        self._pool.shutdown(cancel_futures=True)

    @property
    def threads(self) -> Threads:
        """These."""
        return self

    def map(self, function: Function[I, R], items: Iterable[I]) -> Iterator[R]:
        """As `Executor.map`; the function may be any."""

        def submit(item: I) -> Future[R]:
            return self._pool.submit(function, item, self.backend)

        pending: deque[_Flight[R]] = deque()
        with one_blas_thread():
            try:
                yield from _in_order(submit, items, pending, self._number, self._budget)
            finally:
                _ended([future for future, _ in pending])

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Apply a function to few items, in this thread and in those that are idle.

        It may be called while an item is computed: this thread does what no other comes to do.

        Args:
            function: Any function.
            items: All of them are held at once.
        """
        all_items = tuple(items)
        with one_blas_thread():
            return self._shared(lambda n: function(all_items[n]), len(all_items))

    def _shared(self, function: Callable[[int], R], number: int) -> list[R]:
        results: dict[int, R] = {}
        left = deque(range(number))

        def work() -> None:
            while left:
                try:
                    n = left.popleft()
                except IndexError:  # another thread took the last one
                    return
                results[n] = function(n)

        helpers = [self._pool.submit(work) for _ in range(min(self._number, number) - 1)]
        try:
            work()
        except BaseException:
            left.clear()
            raise
        finally:
            _ended(helpers)
        for helper in helpers:
            if not helper.cancelled():
                helper.result()
        return [results[n] for n in range(number)]


class Processes:
    """Worker processes, started anew and not forked: they share nothing with this one.

    They end with this process, however that ends.
    """

    def __init__(self, number: int, backend: Backend, *, budget: int | None = None) -> None:
        """Start nothing yet.

        Args:
            number: How many, at least 1.
            backend: Where they compute.
            budget: Bytes that items may take; by default a quarter of the memory that is free.
        """
        self.threads = Threads(backend, budget=budget)
        self._number = number
        self._budget = budget or free_memory() // _SHARE
        self._device = backend.name
        context = get_context("spawn")
        # The workers end when nobody holds the writing end: not even a killed process leaves them behind.
        self._reader, self._lifeline = Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(number, context, _start, (self._reader,))

    def __enter__(self) -> Self:
        """Use the processes until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes: at once after an error, else when they have ended their work."""
        if kind is not None:
            self._lifeline.close()
        self._pool.shutdown(cancel_futures=True)
        self._lifeline.close()
        self._reader.close()
        self.threads.__exit__(kind, error, trace)

    def map(self, function: Function[I, R], items: Iterable[I]) -> Iterator[R]:
        """As `Executor.map`."""

        def submit(item: I) -> Future[R]:
            return self._pool.submit(_run, function, item, self._device)

        pending: deque[_Flight[R]] = deque()
        try:
            yield from _in_order(submit, items, pending, self._number, self._budget)
        except BrokenProcessPool as error:
            raise InputError(
                "A worker process ended by itself: where a script calls compress(workers=...), guard it by "
                '`if __name__ == "__main__":`; where memory ran out, ask for fewer workers.'
            ) from error
        finally:
            for future, _ in pending:
                future.cancel()


def _in_order(
    submit: Callable[[I], Future[R]],
    items: Iterable[I],
    pending: deque[_Flight[R]],
    workers: int,
    budget: int,
) -> Iterator[R]:
    """Submit items as rules 1 and 2 allow, and yield their results in order.

    Args:
        submit: Hands an item to a worker.
        items: The items.
        pending: Holds what was submitted and not yielded.
        workers: Number of workers.
        budget: Bytes that items may take.
    """
    source = iter(items)
    drawn: I | None = None
    is_over = False
    while True:
        if pending and pending[0][0].done():
            yield pending.popleft()[0].result()
            continue
        running = [future for future, _ in pending if not future.done()]
        if drawn is None and not is_over and len(running) <= workers:
            drawn = next(source, None)
            is_over = drawn is None
            continue  # It may have taken long to draw: the first result may be there.
        taken = sum(nbytes for _, nbytes in pending)
        if drawn is not None and (not pending or drawn.nbytes <= budget - taken):
            pending.append((submit(drawn), drawn.nbytes))
            drawn = None
        elif running:
            wait(running, return_when=FIRST_COMPLETED)
        else:
            return


def _ended(futures: Sequence[Future[Any]]) -> None:
    """Cancel what has not begun, and wait for the rest: it may use what the caller closes next."""
    wait([future for future in futures if not future.cancel()])


def _start(reader: Connection) -> None:
    """Prepare a worker process, once."""
    # An interrupt reaches all processes of a terminal; the one that waits for this one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with, args=(reader,), daemon=True).start()
    _HELD.enter_context(one_blas_thread())


def _end_with(reader: Connection) -> None:
    """End this process when the other end of a pipe has gone."""
    try:
        reader.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _run(function: Function[I, R], item: I, device: str) -> R:
    return function(item, _backend(device))


@cache
def _backend(device: str) -> Backend:
    return resolve(device)
