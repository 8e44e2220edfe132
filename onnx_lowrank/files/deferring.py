"""Signals that wait until a step is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Let signals that end the program wait for the end of the block, which has to be short.

    Only the main thread handles signals, so the block is for nothing in another one. A signal of any thread
    interrupts the main thread, so a mask of the main thread's signals would not be enough.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    with ExitStack() as raising:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                handler = signal.getsignal(number)
                if handler not in (None, signal.SIG_IGN):
                    raising.callback(signal.signal, number, handler)
                    signal.signal(number, note)
        yield
    for number in came:
        signal.raise_signal(number)
