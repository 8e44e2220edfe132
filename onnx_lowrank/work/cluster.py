"""An executor for the workers of a running Dask cluster.

Rules, beside those of `work.executor`:

1. The client has few items in flight: as many as the workers have threads, and one more. Results stay on the
   workers until their turn comes.
2. Dask computes an item again if its worker dies, as often as the scheduler allows (by default three times).
   An item that ends one worker after the other is an error.
3. A scheduler that is lost, or has no worker for some time, is an error. Nothing is written by then, and a
   cache keeps the results whose turn came.
"""

from __future__ import annotations

import logging
import pickle
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Generic, Self
from uuid import uuid4

from onnx_lowrank.errors import InputError
from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.work.carried import (
    PROCESSOR,
    Foreign,
    Unseen,
    Versions,
    computed,
    differing,
    mark,
    packed,
    sees,
    versions,
)
from onnx_lowrank.work.executor import Function, I, R, Threads, in_order

_log = logging.getLogger(__name__)

_PATIENCE = 60.0
"""Seconds without a worker after which a run ends."""

_POLL = 5.0
"""Seconds between two looks at the workers."""

_PACKAGE = "onnx-lowrank"

_SILENCED = ("distributed", "distributed.client", "tornado")
"""The loggers that report what ends in an error here anyway."""


class Cluster:
    """The workers of a Dask cluster.

    Attributes:
        threads: The threads of this process.
        processors: The workers' kinds of processors, if one differs from this machine's; else empty.
    """

    def __init__(self, scheduler: str, backend: Backend, *, budget: int) -> None:
        """Prepare; `__enter__` connects.

        Args:
            scheduler: The scheduler's address, such as "tcp://10.0.0.1:8786".
            backend: Where this process and the workers compute.
            budget: Bytes that the items of one worker may take.
        """
        self.processors: tuple[str, ...] = ()
        self.scheduler = scheduler
        self.threads = Threads(backend, budget=budget)
        self._budget = budget
        self._device = backend.name
        self._carried: set[Path] = set()
        self._empty_since: float | None = None

    def __enter__(self) -> Self:
        """Connect to the scheduler, and check its workers.

        Raises:
            InputError: The scheduler cannot be reached, has no workers, or one has other versions.
        """
        import dask
        import distributed  # noqa: F401 - it has the defaults of its settings, which the change below needs

        with ExitStack() as stack:
            stack.enter_context(self.threads)
            stack.enter_context(_silenced())
            # Weights travel in tasks, as data that Dask holds apart would be lost with their worker.
            stack.enter_context(dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}))
            self._client = self._connected(stack)
            self._check()
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the cluster; what it computes for this run no longer counts."""
        self._resources.__exit__(kind, error, trace)

    def map(self, function: Function[I, R], items: Iterable[I]) -> Iterator[R]:
        """Like `Executor.map`; the function and the items can be imported by the workers."""
        pending: deque[tuple[_Sent[R], int]] = deque()
        number, threads = self._size()
        try:
            yield from in_order(
                lambda item: _Sent(self, function, item),
                items,
                pending,
                threads,
                self._budget * number,
                self.first_of,
            )
        finally:
            for sent, _ in pending:
                sent.cancel()

    def reaches(self, files: Iterable[Path]) -> bool:
        """Whether all workers see these files."""
        marks = tuple(map(mark, files))
        with self._lost_if(OSError):
            seen = self._client.run(sees, marks)
        if not all(seen.values()):
            _log.debug("a worker does not see the data files of the model: this process runs the model")
        return all(seen.values())

    def send(self, function: Function[I, R], item: I) -> Any:
        """Submit an item; the future of what a worker answers."""
        data = packed(function, item, self._carried, self._device, versions(self._device))
        key = f"{getattr(function, '__name__', 'item')}-{uuid4().hex}"
        try:
            return self._client.submit(computed, data, key=key, pure=False)
        except Exception as error:  # of a kind of its own for a closed client
            if self._client.status == "running":
                raise
            raise self._lost() from error

    def carry(self, path: Path) -> None:
        """Send the content of a file, and of those beside it that hold moments, with all further items."""
        if path not in self._carried:
            _log.debug("a worker does not see %s: items carry what they need of it", path)
        self._carried |= {path, path.parent}

    def first_of(self, sent: list[_Sent[Any]]) -> None:
        """Wait until one of several items has an answer.

        Raises:
            InputError: The scheduler is lost, or has no workers.
        """
        from distributed import wait

        while True:
            try:
                with self._lost_if(CancelledError), self._client.as_current():
                    wait([one.future for one in sent], timeout=_POLL, return_when="FIRST_COMPLETED")
            except TimeoutError:
                self._size()
            else:
                return

    def answer(self, future: Any, nbytes: int) -> Any:
        """What a worker answered.

        Args:
            future: A future that is done.
            nbytes: The bytes that the item takes.

        Raises:
            InputError: The workers that computed the item died, one is of another version, or the scheduler
                is lost.
            Exception: The function failed for the item.
        """
        from distributed import KilledWorker

        if future.status == "error":
            try:
                future.result()
            except KilledWorker as error:
                raise InputError(
                    f"An item of about {nbytes / 2**30:.2f} GiB ended {error.allowed_failures + 1} workers "
                    f"one after the other, the last at {error.last_worker.address}: if their memory ran out, "
                    "give them more (`dask worker --memory-limit`), or run without --scheduler."
                ) from error
        with self._lost_if(OSError, CancelledError):
            found = future.result()
        if isinstance(found, Foreign):
            raise self._other_version(f"worker {found.worker}", found.versions)
        return found

    def _connected(self, stack: ExitStack) -> Any:
        from distributed import Client

        try:
            client = Client(self.scheduler, set_as_default=False)
        except (OSError, ValueError) as error:
            raise InputError(
                f"The Dask scheduler at {self.scheduler} cannot be reached ({_reason(error)}): start it with "
                "`dask scheduler`, or correct the address."
            ) from error
        except TypeError as error:
            if not self.scheduler.startswith("tls://"):
                raise
            raise InputError(
                f"The Dask scheduler at {self.scheduler} needs certificates ({_reason(error)}): set "
                "distributed.comm.tls.ca-file, distributed.comm.tls.client.cert and "
                "distributed.comm.tls.client.key in Dask's configuration."
            ) from error
        stack.callback(_closed, client)
        return client

    def _check(self) -> None:
        """Check that the scheduler and all workers have the versions of this process."""
        with self._lost_if(OSError):
            try:
                self._client.wait_for_workers(1, timeout=_PATIENCE)
            except TimeoutError as error:
                raise self._empty() from error
            # Not every machine may be able to import this package, so the first question does without it.
            asked = {
                f"worker {w}": v for w, v in self._client.run(version, _PACKAGE, on_error="return").items()
            }
            try:
                asked["scheduler"] = self._client.run_on_scheduler(version, _PACKAGE)
            except PackageNotFoundError as error:
                asked["scheduler"] = error
            self._check_package(asked)
            known = self._client.run(versions, self._device, on_error="return")
        for worker, found in sorted(known.items()):
            if not isinstance(found, Mapping):
                raise InputError(f"The Dask worker {worker} cannot be used ({_reason(found)}): repair it.")
            if differing(found, versions(self._device)):
                raise self._other_version(f"worker {worker}", found)
        self._note_processors({worker: found[PROCESSOR] for worker, found in known.items()})

    def _check_package(self, asked: Mapping[str, str | Exception]) -> None:
        """Check the versions of this package at all places, or the errors of those without it."""
        own = versions(self._device)["onnx-lowrank"]
        for place, found in sorted(asked.items()):
            if isinstance(found, PackageNotFoundError):
                raise InputError(
                    f"The Dask {place} has no {_PACKAGE}: install version {own} there, as everywhere in the "
                    "cluster."
                )
            if found != own:
                raise self._other_version(place, {"onnx-lowrank": str(found)})

    def _note_processors(self, kinds: Mapping[str, str]) -> None:
        own = versions(self._device)[PROCESSOR]
        others = {kind: worker for worker, kind in sorted(kinds.items()) if kind != own}
        if others:
            self.processors = tuple(sorted({*kinds.values()}))
            kind, worker = next(iter(others.items()))
            _log.warning(
                "the Dask worker %s has another processor (%s) than this machine (%s), so the last bits of "
                "results can differ from those of a run without --scheduler",
                worker,
                kind,
                own,
            )

    def _size(self) -> tuple[int, int]:
        """The number of workers, and that of their threads.

        Raises:
            InputError: The scheduler is lost, or has had no worker for some time.
        """
        with self._lost_if(OSError, CancelledError):
            threads = self._client.nthreads()
        if threads:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = monotonic()
        elif monotonic() - self._empty_since > _PATIENCE:
            raise self._empty()
        return max(1, len(threads)), max(1, sum(threads.values()))

    def _empty(self) -> InputError:
        return InputError(
            f"The Dask scheduler at {self.scheduler} has had no worker for {_PATIENCE:g} seconds: start some "
            f"with `dask worker {self.scheduler}`, and run again."
        )

    def _other_version(self, name: str, found: Versions) -> InputError:
        own = versions(self._device)
        library = next(iter(differing(found, own)))
        if library == "code":
            library, theirs, ours = "code of onnx-lowrank", found["code"][:12], own["code"][:12]
        else:
            theirs, ours = found.get(library) or "none", own[library] or "none"
        return InputError(
            f"The Dask {name} has another {library} ({theirs}) than this machine ({ours}): install the same "
            "versions everywhere in the cluster."
        )

    @contextmanager
    def _lost_if(self, *errors: type[BaseException]) -> Iterator[None]:
        """Tell that the scheduler is lost if one of these errors comes; TimeoutError stays as it is."""
        try:
            yield
        except (InputError, TimeoutError):
            raise
        except errors as error:
            raise self._lost() from error

    def _lost(self) -> InputError:
        return InputError(
            f"The connection to the Dask scheduler at {self.scheduler} is lost: start it and its workers "
            "again, and run again; with --cache DIR, finished results are taken from there."
        )


class _Sent(Generic[R]):
    """An item that is with the cluster."""

    def __init__(self, cluster: Cluster, function: Function[I, R], item: I) -> None:
        self._cluster = cluster
        self._function: Function[Any, R] = function
        self._item: Any = item
        self.future = cluster.send(function, item)

    def done(self) -> bool:
        """Whether there is an answer."""
        return bool(self.future.done())

    def result(self) -> R:
        """The result; a worker that does not see a file of the item gets it again, with the content."""
        while isinstance(found := self._cluster.answer(self.future, self._item.nbytes), Unseen):
            self._cluster.carry(found.path)
            self.future = self._cluster.send(self._function, self._item)
            self._cluster.first_of([self])
        result: R = pickle.loads(found)  # noqa: S301 - of a worker, as every result of Dask
        return result

    def cancel(self) -> None:
        """Ask no longer for the result."""
        with suppress(Exception):
            self.future.cancel()


def _closed(client: Any) -> None:
    with suppress(Exception):
        client.close(timeout=2)


@contextmanager
def _silenced() -> Iterator[None]:
    """Silence the loggers of Dask during the block."""
    loggers = [logging.getLogger(name) for name in _SILENCED]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: object) -> str:
    """The last line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].rstrip(".")
