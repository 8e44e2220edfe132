"""Executors of work items: the threads of this process, or worker processes.

An item is a value that describes one computation completely. The function that computes it is at the top
level of a module. An executor therefore only has to bring both to the place where it computes. Add new
executors beside `Threads` and `Processes`; `work.cluster` has one for other machines.

Rules:

1. The executor bounds the bytes that items take, not their number. Running items and items with a waiting
   result share one budget. One item always runs, even when it exceeds the budget.
2. The executor draws an item when a worker is about to be free, because an item may hold a weight.
3. Results come in the order of the items and have the same bits in every executor: the BLAS of each worker
   has one thread. An item that a GPU cannot compute is computed by the CPU, with a warning.
4. State that only this process has (running sums, an open engine) is processed by `threads`, the only thread
   pool of a run. Idle threads help with the parts of a large item.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import cache
from itertools import islice
from multiprocessing import Pipe, get_context
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from onnx_lowrank.errors import InputError
from onnx_lowrank.hardware import cores, free_memory
from onnx_lowrank.linalg.backend import Backend, one_blas_thread, resolve
from onnx_lowrank.work.starting import start, starting
from onnx_lowrank.work.tasks import Task, stopped

_log = logging.getLogger(__name__)

_SHARE = 4
"""Items take at most 1 / _SHARE of the memory that is free when the executor starts."""

_LEAST, _TIMES = 2**28, 8
"""They take at most _LEAST bytes and _TIMES those of the largest weight, although more may be free."""


class Item(Protocol):
    """The part of an item that an executor uses."""

    @property
    def nbytes(self) -> int:
        """Approximate bytes of memory that the computation takes."""


T = TypeVar("T")
R = TypeVar("R")
L = TypeVar("L")
R_co = TypeVar("R_co", covariant=True)
I = TypeVar("I", bound=Item)  # noqa: E741 - an item

Function = Callable[[I, Backend], R]
"""Computes an item on a device."""


class Promise(Protocol[R_co]):
    """The result of an item that a worker computes."""

    def done(self) -> bool:
        """Whether the result is there, or never will be."""

    def result(self) -> R_co:
        """The result.

        Raises:
            Exception: The function failed for the item.
        """


P = TypeVar("P", bound=Promise[Any])

_Flights = deque[tuple[P, int]]
"""The items that run or have a waiting result, each with its bytes."""


class Executor(Protocol):
    """Runs work items. It is a context manager that frees its workers."""

    @property
    def threads(self) -> Threads:
        """The threads of this process."""

    @property
    def processors(self) -> tuple[str, ...]:
        """The workers' kinds of processors, if one of them differs from that of this machine; else empty."""

    def reaches(self, files: Iterable[Path]) -> bool:
        """Whether the workers are on other machines, and see the data files of a model that is to run."""

    def map(self, function: Function[I, R], items: Iterable[I]) -> Iterator[R]:
        """Compute items in parallel and yield the results in the order of the items.

        Args:
            function: Computes one item. It is defined at the top level of a module.
            items: The items, drawn one by one.

        Raises:
            InputError: The workers ended.
            Exception: The function failed for an item. The error comes when the item's result is due.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def executor(workers: int, backend: Backend, largest: int | None) -> Executor:
    """The executor that `--workers` asks for: this number of processes, or threads if it is 0.

    Args:
        workers: The number of processes.
        backend: Where to compute.
        largest: Bytes of the largest weight, as in `in_flight`.
    """
    budget = in_flight(largest)
    number, kind = (workers, "processes") if workers else (cores(), "threads")
    _log.debug("computes layers in %d %s, with at most %.2f GiB in flight", number, kind, budget / 2**30)
    return Processes(workers, backend, budget=budget) if workers else Threads(backend, budget=budget)


def in_flight(largest: int | None) -> int:
    """The bytes that items may take on this machine.

    Args:
        largest: Bytes of the largest weight: items take a bounded multiple of it, for a model of any size.
            None for a share of the free memory.
    """
    share = free_memory() // _SHARE
    return share if largest is None else min(share, _LEAST + _TIMES * largest)


class Threads:
    """One thread for every core.

    Attributes:
        backend: Where they compute. Every thread has a stream of a GPU; items run there at the same time, as
            far as its memory goes.
    """

    processors = ()

    def __init__(self, backend: Backend, *, number: int | None = None, budget: int | None = None) -> None:
        """Prepare the pool; no thread starts yet.

        Args:
            backend: Where to compute.
            number: Number of threads; by default one for every core.
            budget: Bytes that items may take; by default a quarter of the free memory.
        """
        self._number = number or cores()
        self._budget = budget or free_memory() // _SHARE
        self._pool = ThreadPoolExecutor(self._number, "onnx-lowrank")
        self.backend = replace(backend, shared=self._shared)

    def __enter__(self) -> Self:
        """Use the threads until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the running threads, and end them."""
        self._pool.shutdown(cancel_futures=True)

    @property
    def threads(self) -> Threads:
        """This executor itself."""
        return self

    def reaches(self, files: Iterable[Path]) -> bool:
        """No: they are in this process."""
        return False

    def map(self, function: Function[I, R], items: Iterable[I]) -> Iterator[R]:
        """Like `Executor.map`, but the function need not be at the top level of a module."""

        def submit(item: I) -> Future[R]:
            return self._pool.submit(compute, function, item, self.backend)

        pending: _Flights[Future[R]] = deque()
        with one_blas_thread():
            try:
                yield from in_order(submit, items, pending, self._number, self._budget, _first_of)
            finally:
                _ended([future for future, _ in pending])

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Apply a function to a few items, in this thread and in the idle threads.

        A running item may call it: no deadlock, as this thread computes every item that no idle thread takes.

        Args:
            function: Any function.
            items: The items; all are in memory at once.
        """
        all_items = tuple(items)
        with one_blas_thread():
            return self._shared(lambda n: function(all_items[n]), len(all_items))

    def together(self, function: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
        """Apply a function to many items, and yield the results in their order.

        The idle threads work ahead while this thread uses a result; without any, this thread computes.

        Args:
            function: Any function.
            items: The items.
            most: How many are computed, or wait for their turn, at the same time.
        """
        source = iter(items)
        ahead: deque[Task[R]] = deque()
        with one_blas_thread():
            try:
                while True:
                    while len(ahead) < most and (drawn := list(islice(source, 1))):
                        ahead.append(Task(self._pool, function, *drawn))
                    if not ahead:
                        return
                    result = ahead[0].result()
                    ahead.popleft()  # Not before: an interrupt must find the task that runs.
                    yield result
            finally:
                stopped(ahead)

    def in_turn(self, function: Callable[[L, T], None], lanes: Sequence[L], items: Iterable[T]) -> None:
        """Give item n to lane n modulo their number; a lane takes its items one after the other, in order.

        The lanes work in the idle threads while this thread draws items; without any, this thread works.

        Args:
            function: Takes a lane and an item.
            lanes: The lanes.
            items: The items; each lane has at most one at a time.
        """
        busy: dict[int, Task[None]] = {}

        def finish(n: int) -> None:
            if n in busy:
                busy[n].result()
                del busy[n]

        with one_blas_thread():
            try:
                for number, item in enumerate(items):
                    n = number % len(lanes)
                    finish(n)
                    busy[n] = Task(self._pool, function, lanes[n], item)
                for n in tuple(busy):
                    finish(n)
            finally:
                stopped(busy.values())

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

        helpers = [Task(self._pool, work) for _ in range(min(self._number, number) - 1)]
        try:
            work()
        except BaseException:
            left.clear()
            raise
        finally:
            stopped(helpers)
        for helper in helpers:
            helper.check()
        return [results[n] for n in range(number)]


class Processes:
    """Worker processes. They are spawned, not forked, so they share no state with this process.

    They end when this process ends, even if it is killed.
    """

    processors = ()

    def __init__(self, number: int, backend: Backend, *, budget: int | None = None) -> None:
        """Prepare the pool; no process starts yet.

        Args:
            number: Number of processes, at least 1.
            backend: Where they compute.
            budget: Bytes that items may take, half in the processes and half in the threads of this process;
                by default a quarter of the free memory.
        """
        self._number = number
        self._budget = max(1, (budget or free_memory() // _SHARE) // 2)
        self.threads = Threads(backend, budget=self._budget)
        self._device = backend.name
        context = get_context("spawn")
        # Workers end when the writing end closes, so even a killed process leaves none behind.
        self._reader, self._lifeline = Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(number, context, start, (self._reader,))

    def __enter__(self) -> Self:
        """Use the processes until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes: immediately after an error, otherwise when their work is done."""
        if kind is not None:
            self._lifeline.close()
        self._pool.shutdown(cancel_futures=True)
        self._lifeline.close()
        self._reader.close()
        self.threads.__exit__(kind, error, trace)

    def reaches(self, files: Iterable[Path]) -> bool:
        """No: they are on this machine, whose cores run the model."""
        return False

    def map(self, function: Function[I, R], items: Iterable[I]) -> Iterator[R]:
        """Like `Executor.map`."""

        def submit(item: I) -> Future[R]:
            with starting():
                return self._pool.submit(_run, function, item, self._device, self._number)

        pending: _Flights[Future[R]] = deque()
        try:
            yield from in_order(submit, items, pending, self._number, self._budget, _first_of)
        except BrokenProcessPool as error:
            raise InputError(
                "A worker process ended by itself: if a script calls compress(workers=...), guard the call "
                'with `if __name__ == "__main__":`; if memory ran out, use fewer workers.'
            ) from error
        finally:
            for future, _ in pending:
                future.cancel()


def in_order(
    submit: Callable[[I], P],
    items: Iterable[I],
    pending: _Flights[P],
    workers: int,
    budget: int,
    first_of: Callable[[list[P]], object],
) -> Iterator[Any]:
    """Submit items as rules 1 and 2 allow, and yield their results in order.

    Args:
        submit: Hands an item to a worker.
        items: The items.
        pending: Receives the items that were submitted and not yet yielded.
        workers: Number of workers.
        budget: Bytes that items may take.
        first_of: Waits until one of the running items is done.
    """
    source = iter(items)
    drawn: I | None = None
    is_over = False
    while True:
        if pending and pending[0][0].done():
            yield pending.popleft()[0].result()
            continue
        running = [future for future, _ in pending if not future.done()]
        # With < in place of <=, a worker that becomes free would wait until the next item is drawn.
        if drawn is None and not is_over and len(running) <= workers:
            drawn = next(source, None)
            is_over = drawn is None
            continue  # The draw may have taken long, so the first result may be ready now.
        # This counts more than the running items: a result that waits for its turn takes memory, too.
        taken = sum(nbytes for _, nbytes in pending)
        if drawn is not None and (not pending or drawn.nbytes <= budget - taken):
            pending.append((submit(drawn), drawn.nbytes))
            drawn = None
        elif running:
            first_of(running)
        else:
            return


def _first_of(futures: Sequence[Future[Any]]) -> None:
    wait(futures, return_when=FIRST_COMPLETED)


def _ended(futures: Sequence[Future[Any]]) -> None:
    """Cancel the futures that have not begun, and wait for the others: the caller may close what they use."""
    wait([future for future in futures if not future.cancel()])


def _run(function: Function[I, R], item: I, device: str, workers: int) -> R:
    return compute(function, item, _backend(device, workers))


def compute(function: Function[I, R], item: I, backend: Backend) -> R:
    """Compute an item on a device, or on the CPU, with a warning, if the device cannot compute it."""
    return backend.attempt(lambda place: function(item, place), item.nbytes)


@cache
def _backend(device: str, workers: int) -> Backend:
    return resolve(device, share=1 / workers)
