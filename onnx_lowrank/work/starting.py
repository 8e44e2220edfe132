"""The start of worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from threading import Thread

from onnx_lowrank.linalg.backend import one_blas_thread

_HELD = ExitStack()
"""The contexts that a worker process keeps open until it ends."""


@contextmanager
def starting() -> Iterator[None]:
    """Block interrupts in this thread: worker processes that start now inherit that.

    An interrupt reaches all processes of a terminal, but only the parent process may react to it. A worker
    that still imports its modules would print a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # Its start ends with interrupts that are not blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start(reader: Connection) -> None:
    """Prepare a worker process, once.

    Args:
        reader: A pipe whose other end is open as long as the parent process lives.
    """
    # Libraries may clear the mask.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with, args=(reader,), daemon=True).start()
    _HELD.enter_context(one_blas_thread(solvers=True))


def _end_with(reader: Connection) -> None:
    """End this process when the other end of a pipe is closed."""
    try:
        reader.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
