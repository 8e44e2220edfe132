"""Checks of the arguments that tell where a run computes and how much it may take."""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from math import inf
from numbers import Integral, Real
from pathlib import Path
from types import NoneType

from onnx_lowrank.calibrate.allowance import DEFAULT, LEAST, MOST, Allowance
from onnx_lowrank.errors import InputError
from onnx_lowrank.options import require

_MOST_THREADS = 1024
_MOST_WORKERS = 64
_MOST_ON_WINDOWS = 61  # which waits for at most 63 handles at once; a pool has two of its own


def thread_count(given: int) -> int:
    """Check a number of threads.

    Raises:
        InputError: The number is wrong.
    """
    require("threads", given, (Integral,), "a whole number")
    if not 0 <= given <= _MOST_THREADS:
        raise InputError(f"--threads is {given}: pass 1 to {_MOST_THREADS}, or 0 to let the runtime choose.")
    return int(given)


def worker_count(given: int) -> int:
    """Check a number of worker processes.

    Raises:
        InputError: The number is wrong.
    """
    require("workers", given, (Integral,), "a whole number")
    most = _MOST_ON_WINDOWS if sys.platform == "win32" else _MOST_WORKERS
    if not 0 <= given <= most:
        raise InputError(f"--workers is {given}: pass 1 to {most}, or 0 for the threads of one process.")
    return int(given)


def scheduler(given: str | None, workers: int) -> str | None:
    """Check the address of a scheduler.

    Raises:
        InputError: It is none, Dask is not installed, or worker processes are asked for, too.
    """
    require("scheduler", given, (str, NoneType), "an address such as tcp://10.0.0.1:8786")
    if given is None:
        return None
    if not re.fullmatch(r"(tcp|tls)://[^\s/]+:\d{1,5}", given):
        raise InputError(
            f"--scheduler is {given[:60]!r}: give the address that `dask scheduler` prints, such as "
            "tcp://10.0.0.1:8786."
        )
    if workers:
        raise InputError("--scheduler and --workers contradict each other: leave one of them out.")
    if find_spec("distributed") is None:
        raise InputError(
            'Dask, which --scheduler needs, is not installed: run `pip install "onnx-lowrank[distributed]"`.'
        )
    return given


def cache(given: bool | str | os.PathLike[str]) -> bool | Path:
    """Check the cache.

    Raises:
        InputError: It is neither a flag nor a path, or a file is in the place of its folder.
    """
    if isinstance(given, bool):
        return given
    require("cache", given, (str, os.PathLike), "a folder, True or False")
    folder = Path(given).absolute()
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"The cache {given} cannot be used ({reason}): name another folder.") from error
    found = next(path for path in (folder, *folder.parents) if path.exists())
    if not found.is_dir():
        raise InputError(f"The cache {given} cannot be used, as {found} is a file: name a folder.")
    return folder


def allowance(given: float | None, *, calibrated: bool) -> Allowance:
    """Check the memory that calibration may take.

    Args:
        given: GiB; None for the default.
        calibrated: Whether the run has calibration inputs.

    Raises:
        InputError: It is too little or no number, or there is no calibration.
    """
    require("memory", given, (Real, NoneType), "a number of GiB such as 2")
    if given is None:
        return Allowance()
    if not calibrated:
        raise InputError("--memory limits what --calibration takes: pass --calibration, too.")
    if not LEAST <= (gib := _float(given)) <= MOST:
        raise InputError(
            f"--memory is {given!s:.60}: pass GiB, from {LEAST:g} to {MOST:g}; the default is {DEFAULT:g}."
        )
    return Allowance.of(gib)


def _float(given: float) -> float:
    """A number as a float; infinity if it is too large for one."""
    try:
        return float(given)
    except OverflowError:
        return inf
