"""The command on untrusted files, each run in a process of its own with bounds on memory and time.

A server imports the package once, and forks for every run: a run that crashes or hangs ends alone.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

MEMORY = 2 * 2**30
"""The most bytes of memory that a run may take."""

SECONDS = 20
"""The most seconds of processor time that a run may take; the time on a clock depends on other programs."""

_CLOCK = 15 * SECONDS  # A run that only waits takes no processor time.
_CODES = (0, 2, 3, 4)
_EAGER = ("onnx.reference", "onnxruntime", "PIL.Image", "PIL.ImageOps", "tokenizers", "scipy.linalg")


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the command that has ended.

    Attributes:
        code: Its exit code; the negative number of the signal that ended it.
        out: Its standard output.
        err: Its standard error.
        peak: The most bytes of memory that it took.
    """

    code: int
    out: str
    err: str
    peak: int

    @property
    def fault(self) -> str:
        """What a run on untrusted files must not do, in words; "" if it did none of it."""
        if self.peak > MEMORY:
            return f"it took {self.peak >> 20} MiB"
        if self.code < 0:
            return f"it ended by {signal.Signals(-self.code).name}"
        if self.code not in _CODES or "Traceback" in self.err or "Internal error" in self.err:
            return f"it ended with {self.code}"
        text = self.out + self.err
        if any(not char.isprintable() and char != "\n" for char in text):
            return "it printed control characters"
        if self.code and not self.message.endswith((".", "?")):
            return "its error is no sentence"
        return ""

    @property
    def message(self) -> str:
        """The last line of its standard error."""
        return self.err.strip().rpartition("\n")[2]


class Server:
    """Runs the command in forks of a process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        """Start.

        Args:
            folder: An empty folder for temporary files.
        """
        self._folder = folder
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "120"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, folder: Path, *arguments: object) -> Run:
        """Run the command in a folder."""
        asked = json.dumps([str(folder), *map(str, arguments)])
        self._pipe(self._process.stdin).write(asked + "\n")
        self._pipe(self._process.stdin).flush()
        code, peak = json.loads(self._pipe(self._process.stdout).readline())
        out, err = ((self._folder / name).read_text("utf-8", "replace") for name in ("out", "err"))
        return Run(code, out, err, peak)

    @property
    def is_clean(self) -> bool:
        """Whether the last run left no temporary files."""
        return not any((self._folder / "temporary").iterdir())

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


_OPTIONAL = re.compile(r"\.(toolchains|distil)\.")


def _serve(folder: Path) -> None:
    import onnx_lowrank

    for module in pkgutil.walk_packages(onnx_lowrank.__path__, "onnx_lowrank."):
        # These import packages that may be absent.
        if module.name != "onnx_lowrank.linalg.cuda" and not _OPTIONAL.search(module.name):
            importlib.import_module(module.name)
    for name in _EAGER:
        importlib.import_module(name)
    temporary = folder / "temporary"
    tempfile.tempdir = str(temporary)
    for line in sys.stdin:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        place, *arguments = json.loads(line)
        child = os.fork()
        if not child:
            _command(folder, place, arguments)
        print(json.dumps(_awaited(child)), flush=True)


def _command(folder: Path, place: str, arguments: Sequence[str]) -> None:
    """Run the command in a fork, and end it."""
    from onnx_lowrank import cli

    code = 70
    try:
        for number, name in enumerate(("out", "err"), 1):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(place)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        cli.main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _awaited(child: int) -> tuple[int, int]:
    """The exit code of a fork and its peak memory; it is ended where it exceeds its bounds."""
    peak, until = 0, time.monotonic() + _CLOCK
    while True:
        ended, status, _ = os.wait4(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return (-signal.SIGXCPU if code == -signal.SIGKILL and peak <= MEMORY else code), peak
        peak = max(peak, _resident(child))
        if peak > MEMORY or time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.004)


def _resident(process: int) -> int:
    """The most bytes of memory that a process has taken so far."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) << 10 if found else 0


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
