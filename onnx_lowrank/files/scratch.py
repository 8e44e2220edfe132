"""Temporary folders that do not outlive a killed run by more than one run.

A folder is deleted at the end of its block. A run that is killed cannot do that, and its tensors may take as
much of the disk as the model. Therefore every run holds a lock on its folders, which the system releases when
the run ends for any reason, and every run first removes the folders without a lock. If the system or the file
system has no such locks, nothing is removed.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.atomic import lock_folder, surely
from onnx_lowrank.files.regions import FULL

_PREFIX, _SUFFIX = "onnx-lowrank-", ".scratch"
_FAULTS = (*FULL, errno.EIO, errno.EROFS)


@contextmanager
def scratch(folder: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A new, empty folder for temporary files; the end of the block deletes it with its files.

    Args:
        folder: The folder that contains it; None for the system's temporary folder.

    Raises:
        InputError: The system has no folder for temporary files.
        OSError: The folder cannot be made.
    """
    where = temporary_folder() if folder is None else Path(folder)
    _sweep(where)
    with ExitStack() as stack:
        path = where.resolve() / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        # Before the folder is there, as an interrupt may come right after that.
        stack.callback(_remove, path, os.getpid())
        path.mkdir(0o700)
        # Before it was locked, another run may have mistaken it for a dead run's folder and removed it.
        # Any other error of opening it is one: without a lock, the next sweep would remove it.
        with suppress(FileNotFoundError):
            lock_folder(path, stack, waiting=True)
        if path.is_dir():
            yield path
            return
    with scratch(folder) as again:
        yield again


def temporary_folder() -> Path:
    """The system's folder for temporary files.

    Raises:
        InputError: No folder takes any.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise InputError(
            f"No folder takes temporary files ({error.strerror}): set TMPDIR to one that can be written."
        ) from error


def unnamed() -> IO[bytes]:
    """A new temporary file without a name, which goes when it is closed, or when the process ends.

    Raises:
        InputError: The system has no folder for temporary files.
        OSError: The file cannot be made.
    """
    return tempfile.TemporaryFile(prefix=_PREFIX, dir=temporary_folder())


@contextmanager
def roomy() -> Iterator[None]:
    """Turn the error of a full or broken disk, in any temporary file of the block, into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FAULTS:
            raise
        place = error.filename or temporary_folder()
        raise InputError(
            f"{place} cannot be written ({error.strerror}): make room there, or set TMPDIR to another disk."
        ) from error


def discard(file: IO[bytes]) -> None:
    """Close a temporary file; the rest of its bytes may fail to be written, as on a full disk."""
    with suppress(OSError):
        file.close()


def _sweep(folder: Path) -> None:
    """Remove what dead runs left in a folder; what cannot be removed stays."""
    with suppress(OSError):
        for path in sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}")):
            with suppress(OSError), ExitStack() as stack:
                if lock_folder(path, stack, waiting=False):
                    shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path, owner: int) -> None:
    """Remove a folder; what cannot be removed stays until the next run removes it.

    Args:
        path: The folder.
        owner: The process that made it. A process that was forked from it must not remove it.
    """
    if os.getpid() == owner:
        surely(lambda: shutil.rmtree(path, ignore_errors=True))
