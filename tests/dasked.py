"""A Dask cluster on this machine: a scheduler and workers in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).parent
LONG = 300.0
"""Seconds in which everything happens, however slow the machine is."""


class Cluster:
    """The processes of a cluster.

    Attributes:
        address: The scheduler's address.
        scheduler: The scheduler's process.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._file = folder / "scheduler.json"
        self._stack = stack
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        deadline = time.monotonic() + LONG
        while not self._file.exists():
            assert self.scheduler.poll() is None, "the scheduler ended"
            assert time.monotonic() < deadline, "no scheduler came up"
            time.sleep(0.05)
        self.address: str = json.loads(self._file.read_text())["address"]

    def work(self, *options: str) -> subprocess.Popen[bytes]:
        """Start workers of one thread each; `--no-nanny` lets a dead one stay dead."""
        return self._start("worker", "--host", "127.0.0.1", "--nthreads", "1", "--no-dashboard", *options)

    def _start(self, kind: str, *options: str) -> subprocess.Popen[bytes]:
        # The scheduler writes its file, and workers read it.
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--scheduler-file", str(self._file)]
        process = subprocess.Popen(
            [*command, *options],
            env=_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._stack.callback(_ended, process)
        return process


def _environment() -> Mapping[str, str]:
    """That of the scheduler and of the workers, which import the modules of tests as this process does."""
    paths = [str(HERE.parent), str(HERE), str(HERE / "work")]
    more = {"PYTHONPATH": os.pathsep.join(paths), "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
    return {**os.environ, **more}


def _ended(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with all that it started: nannies start workers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(LONG)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A scheduler without workers; it ends with the block, and so do its workers."""
    with ExitStack() as stack:
        yield Cluster(folder, stack)
