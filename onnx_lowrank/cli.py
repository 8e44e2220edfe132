"""The command: parse, call, print, exit code."""

from __future__ import annotations

import atexit
import gc
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from traceback import format_exc
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.text import Text

from onnx_lowrank import commands, completion
from onnx_lowrank.destinations import print_text
from onnx_lowrank.errors import InputError, LowRankError
from onnx_lowrank.logs import printable
from onnx_lowrank.progress import Lines

_INTERRUPTED = 130
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_NOTHING_HALF = "Interrupted; no file is half-written."
_ALIKE = 0.8  # difflib's similarity, at most 1: --ratoi suggests --ratio, but --clean does not suggest --plan

_EXAMPLES = {
    "onnx-lowrank": "onnx-lowrank IN.onnx OUT.onnx --ratio 0.5 halves a model",
    "onnx-lowrank sweep": "onnx-lowrank sweep IN.onnx FOLDER tries many ratios",
    "onnx-lowrank inspect": "onnx-lowrank inspect IN.onnx shows a model's layers",
    "onnx-lowrank compare": "onnx-lowrank compare A.onnx B.onnx compares two models",
    "onnx-lowrank explain": "onnx-lowrank explain PLAN.json shows a plan",
}


class _Terminated(BaseException):
    """A signal asked the program to end. No handler of errors may catch this; its argument is the signal."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its code."""
    # Not collected at exit: looking for cycles among all imported objects takes longer than a small model.
    atexit.register(gc.freeze)
    try:
        with _unwinding_on_signals():
            known = commands.names(), commands.DEFAULT, commands.command
            if (completed := completion.completions(*known)) is not None:
                print_text(f"{completed}\n")
                sys.exit(0)
            code = _run(sys.argv[1:] if arguments is None else list(arguments))
    except _Terminated as error:
        _complain(_NOTHING_HALF)
        code = 128 + int(error.args[0])
    except KeyboardInterrupt:  # outside of the command
        _complain(_NOTHING_HALF)
        code = _INTERRUPTED
    sys.exit(code)


@contextmanager
def _unwinding_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise an exception, as SIGINT does: by default they leave temporary files.

    Handlers that the caller of `main` has set stay. Only the main thread can set handlers.
    """
    is_main = threading.current_thread() is threading.main_thread()
    ours = [number for number in _ENDING if is_main and signal.getsignal(number) is signal.SIG_DFL]

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        for handled in ours:
            signal.signal(handled, signal.SIG_IGN)  # A second signal must not interrupt the clean-up.
        raise _Terminated(number)

    for number in ours:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _run(arguments: Sequence[str]) -> int:
    line = shlex.join(("onnx-lowrank", *arguments))
    parsed: dict[str, Any] = {"verbose": 0, "as_json": False, "command": line}

    def complain(message: str, code: int, *, traceback: bool = False) -> None:
        if parsed["as_json"]:
            Lines(sys.stderr).failed(message, code)
        else:
            _complain(message, traceback=traceback)

    program, name = "onnx-lowrank", commands.DEFAULT
    if arguments and arguments[0] in commands.names():
        name, *arguments = arguments
        program = f"{program} {name}"
    try:
        _check_command(name, arguments)
        command = commands.command(name)
        code = command.main(arguments, prog_name=program, standalone_mode=False, obj=parsed)
        return int(code or 0)
    except click.ClickException as error:
        code = error.exit_code if error.exit_code == 2 else 1
        complain(_sentence(error, program), code)
        return code
    except (click.Abort, KeyboardInterrupt):
        complain(_NOTHING_HALF, _INTERRUPTED)
        return _INTERRUPTED
    except LowRankError as error:
        complain(str(error), error.exit_code, traceback=parsed["verbose"] > 1)
        return error.exit_code
    except Exception as error:
        is_shown = parsed["verbose"] > 0
        advice = "report it." if is_shown else "run again with --verbose and report what it prints."
        complain(f"Internal error ({type(error).__name__}: {error}): {advice}", 1, traceback=is_shown)
        return 1


def _check_command(name: str, arguments: Sequence[str]) -> None:
    """Check that the first word is no misspelt or unknown command: `compress` would take it for a model.

    Raises:
        InputError: It is one.
    """
    if name != commands.DEFAULT or not arguments or Path(arguments[0]).exists():
        return
    word, *others = arguments
    if word == "help":
        raise InputError(f"There is no command {word!r}: pass -h.")
    if alike := get_close_matches(word, commands.names(), cutoff=_ALIKE):
        raise InputError(f"There is no command {word!r}: pass {alike[0]}, or name a model file.")
    if word.isalpha() and others and Path(others[0]).is_file():
        known = ", ".join(commands.names())
        raise InputError(f"There is no command {word!r}: leave it out, or name one of {known}.")


def _sentence(error: click.ClickException, program: str) -> str:
    """The parser's message as one sentence that says what to do.

    Args:
        error: The parser's error.
        program: The words before the arguments.
    """
    message = " ".join(error.message.split()).rstrip(".")
    match error:
        case click.NoSuchOption():
            alike = get_close_matches(error.option_name, error.possibilities or (), cutoff=_ALIKE)
            hint = f"did you mean {' or '.join(alike)}?" if alike else "-h lists all."
            return f"There is no option {error.option_name}: {hint}"
        case click.MissingParameter(param=click.Parameter() as param):
            return f"{param.human_readable_name} is missing: {_EXAMPLES.get(program, f'see {program} -h')}."
        case click.BadParameter(param=click.Parameter() as param):
            return f"{param.opts[0]}: {message}."
    return f"{message}." if ": " in message else f"{message}: see -h."


def _complain(message: str, *, traceback: bool = False) -> None:
    console = Console(stderr=True, soft_wrap=True)
    if traceback:
        for line in format_exc().splitlines():
            console.print(Text(printable(line)))
    console.print(Text(printable(f"onnx-lowrank: {message}"), style="red"))
