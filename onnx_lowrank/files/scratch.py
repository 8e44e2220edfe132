"""Temporary folders that do not outlive a killed run by more than one run.

A folder is deleted at the end of its block. A run that is killed cannot do that, and its tensors may take as
much of the disk as the model. Therefore every run holds a lock on its folders, which the system releases when
the run ends for any reason, and every run first removes the folders without a lock. If the system or the file
system has no such locks, nothing is removed.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.atomic import locked
from onnx_lowrank.files.regions import FULL

_PREFIX, _SUFFIX = "onnx-lowrank-", ".scratch"


@contextmanager
def scratch(folder: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A new, empty folder for temporary files; the end of the block deletes it with its files.

    Args:
        folder: The folder that contains it; None for the system's temporary folder.

    Raises:
        OSError: The folder cannot be made.
    """
    where = Path(tempfile.gettempdir() if folder is None else folder)
    _sweep(where)
    with ExitStack() as stack:
        # Windows deletes no file that is still mapped, and a result must not fail for that.
        made = tempfile.TemporaryDirectory(_SUFFIX, _PREFIX, where, ignore_cleanup_errors=True)
        path = Path(stack.enter_context(made)).resolve()
        # Before it was locked, another run may have mistaken it for a dead run's folder and removed it.
        _lock(path, stack, waiting=True)
        if path.is_dir():
            yield path
            return
    with scratch(folder) as again:
        yield again


@contextmanager
def roomy() -> Iterator[None]:
    """Turn the error of a full disk, in any temporary file of the block, into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = error.filename or tempfile.gettempdir()
        raise InputError(
            f"{place} cannot be written ({error.strerror}): make room there, or set TMPDIR to a larger disk."
        ) from error


def discard(file: IO[bytes]) -> None:
    """Close a temporary file; the rest of its bytes may fail to be written, as on a full disk."""
    with suppress(OSError):
        file.close()


def _sweep(folder: Path) -> None:
    """Remove what dead runs left in a folder; what cannot be removed stays."""
    with suppress(OSError):
        for path in sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}")):
            with ExitStack() as stack:
                if _lock(path, stack, waiting=False):
                    shutil.rmtree(path, ignore_errors=True)


def _lock(path: Path, stack: ExitStack, *, waiting: bool) -> bool | None:
    """Lock a folder until the stack is closed.

    Returns:
        Whether it is locked; None if the folder cannot be opened.
    """
    if sys.platform == "win32":  # which opens no folder
        return False
    try:
        opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    stack.callback(os.close, opened)
    return locked(opened, waiting=waiting)
