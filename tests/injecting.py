"""Commands that meet a fault at a chosen change of files. Each is a forked process, so hundreds take seconds.

A change is a file that is made, a write, a sync, a rename, a link, a removal or a change of permissions. A
fault comes at its beginning, in the middle of a write, or right after it.
"""

from __future__ import annotations

import atexit
import builtins
import errno
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from onnx_lowrank import cli, compress
from onnx_lowrank.commands import compress as command

CHANGES = ("mkdir", "rmdir", "rename", "replace", "link", "unlink", "remove", "chmod", "truncate")


@dataclass
class Faults:
    """Counts the moments of a process at which a fault can come, and gives it one.

    Attributes:
        at: The number of the moment, from 1 on; 0 for no fault.
        fault: The name of a signal or of an error.
        reached: The number of moments until now.
    """

    at: int
    fault: str
    reached: int = 0

    def moment(self, half=lambda: None):
        """Reach a moment.

        Args:
            half: Does half of the change that begins, before a signal comes.
        """
        self.reached += 1
        if self.reached != self.at:
            return
        if self.fault.startswith("SIG"):
            half()
            os.kill(os.getpid(), getattr(signal, self.fault))
        else:
            number = getattr(errno, self.fault)
            raise OSError(number, os.strerror(number))

    def around(self, call, half=lambda: None):
        """Make a call, with a moment at its beginning and, for signals, one right after it."""
        self.moment(half)
        done = call()
        if self.fault.startswith("SIG"):
            self.moment()
        return done

    def install(self):
        """Put moments around all calls that change files."""
        for name in CHANGES:
            setattr(os, name, self._changing(getattr(os, name)))
        opened, synced, copied, plain = os.open, os.fsync, os.copy_file_range, io.open

        def opening(path, flags, *given, **named):
            def call():
                return opened(path, flags, *given, **named)

            return self.around(call) if flags & os.O_CREAT else call()

        def copying(source, target, count, *offsets):
            return self.around(
                lambda: copied(source, target, count, *offsets),
                lambda: copied(source, target, count // 2, *offsets),
            )

        def opening_file(file, mode="r", buffering=-1, *given, **named):
            if not set(mode) & set("wax+") or "b" not in mode or not buffering:
                return plain(file, mode, buffering, *given, **named)
            raw = _Raw(self, file, mode.replace("b", ""), opener=named.get("opener") or opening)
            return (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)

        os.open, os.copy_file_range = opening, copying
        os.fsync = self._changing(synced)
        io.open = builtins.open = opening_file

    def _changing(self, function):
        return lambda *given, **named: self.around(lambda: function(*given, **named))


class _Raw(io.FileIO):
    """A file whose writes are changes."""

    def __init__(self, faults, *given, **named):
        super().__init__(*given, **named)
        self._faults = faults

    def write(self, data):
        whole = super().write
        return self._faults.around(lambda: whole(data), lambda: whole(bytes(data)[: len(data) // 2]))


@dataclass
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code; negative for the signal that killed it.
        err: What it printed.
        reached: The number of moments that it reached; 0 if it was killed.
        living: The processes that it left.
    """

    code: int
    err: str
    reached: int
    living: list[int]


class Commands:
    """Runs commands in a folder; a context manager that keeps the process that forks them.

    Attributes:
        prepared: A model that is compressed once, so that all commands only write the result; None for
            commands that do all their work.
    """

    def __init__(self, folder: Path, temporary: Path, prepared: Path | None = None):
        self._folder, self._temporary = folder, temporary
        self.prepared = prepared

    def __enter__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__, *([str(self.prepared)] if self.prepared else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self._folder,
            env=os.environ | {"TMPDIR": str(self._temporary)},
        )
        return self

    def __exit__(self, *error):
        self._server.communicate()

    def run(self, *arguments, at=0, fault="SIGKILL", after=None) -> Ended:
        """Run a command to its end.

        Args:
            arguments: Those of the command.
            at: The number of the moment of the fault; 0 for none.
            fault: As for `Faults`.
            after: The seconds after which the fault, a signal, comes instead.
        """
        asked = {"arguments": [str(a) for a in arguments], "at": at, "fault": fault, "after": after}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return Ended(*json.loads(self._server.stdout.readline()))


def _serve(model=None):
    from tiny import cnn

    temporary = tempfile.gettempdir()
    if model is not None:
        tempfile.tempdir = str(Path(model).parent)  # The result has a file there.
    result = compress(model or cnn(), 0.5, cache=False)  # It imports all that commands import.
    tempfile.tempdir = temporary
    if model is not None:
        patch.object(command, "compress", lambda source, **options: nullcontext(result)).start()
    for line in sys.stdin:
        asked = json.loads(line)
        told, telling = os.pipe()
        child = os.fork()
        if not child:
            os.close(told)
            _command(asked, telling)
        os.close(telling)
        if asked["after"] is not None:
            time.sleep(asked["after"])
            os.kill(child, getattr(signal, asked["fault"]))
        with os.fdopen(told) as lines:
            err, _, reached = lines.read().partition("\0")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([code, err, int(reached or 0), _living(child)]), flush=True)


def _command(asked, telling):
    """Run a command in this process, and end it."""
    os.setsid()
    os.dup2(telling, 1)
    os.dup2(telling, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    faults = Faults(asked["at"], asked["fault"])
    faults.install()
    try:
        cli.main(asked["arguments"])
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 99
    faults.at = 0
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os.write(telling, f"\0{faults.reached}".encode())
    os._exit(code)


def _living(session, patience=20.0):
    """The processes of a session that go on living."""
    deadline = time.monotonic() + patience
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
                if int(its) == session and state != "Z":
                    found.append(int(path.parent.name))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
