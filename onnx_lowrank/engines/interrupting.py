"""Runs that a signal can end: a runtime's call gives control back only at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from onnx_lowrank.errors import InputError

_LONGEST = 3600.0  # seconds; a Loop may count to 2**63

Call = Callable[[Any], list[Any]]
"""One run of a session; its argument is the runtime's `RunOptions`."""


@contextmanager
def interruptible(options: Callable[[], Any]) -> Iterator[Callable[[Call], list[Any]]]:
    """A function that runs a call of ONNX Runtime, and ends it at a signal or after an hour.

    Python handles signals in its main thread alone, and only between two of its own instructions. So every
    thread waits while another one makes its call.

    Args:
        options: Makes the runtime's `RunOptions`; a runtime asks their `terminate` before every node.

    Yields:
        The function. It raises InputError for a call that takes over an hour, and everything that the call
        raises.
    """
    with ThreadPoolExecutor(thread_name_prefix="run") as others:

        def run(call: Call) -> list[Any]:
            chosen = options()
            running = others.submit(call, chosen)
            try:
                wait((running,), _LONGEST)
                if not running.done():
                    raise InputError(
                        f"The model did not end within {_LONGEST:g} seconds on one batch of inputs: give "
                        "smaller ones with --input-shape or --inputs."
                    )
                return running.result()
            finally:
                chosen.terminate = True
                wait((running,))  # The call reads the inputs and the session until it ends.

        yield run
