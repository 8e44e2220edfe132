"""Files that take their targets' places together, or not at all.

A file is written under a hidden name beside its target and renamed over it. Until then its run holds a
lock on it, which the system takes back when the run ends, whatever ends it. A hidden file that nobody has
locked belongs to a dead run, on this machine or on another one that shares the folder, and the next run
removes it. Where the system or the file system has no such locks, nothing is removed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

from onnx_lowrank.errors import InputError

_PREFIX, _SUFFIX = ".onnx-lowrank-", ".tmp"


def check_writable(target: Path) -> None:
    """See that a file can be written or replaced.

    Raises:
        InputError: It is a folder or a device, its folder is missing, or permissions forbid it.
    """
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target} cannot be written ({reason}): choose another name.") from error
    if mode is None and not target.parent.is_dir():
        raise InputError(f"{target} cannot be written, as there is no folder {target.parent}: create it.")
    if mode is not None and stat.S_ISDIR(mode):
        raise InputError(f"{target} is a folder: name a file to write.")
    if mode is not None and not stat.S_ISREG(mode):
        raise InputError(f"{target} is no regular file: name another to write.")
    if not os.access(target.parent if mode is None else target, os.W_OK):
        raise InputError(f"{target} cannot be written: change its permissions or choose another place.")


@contextmanager
def replacing(*targets: Path) -> Iterator[list[BinaryIO]]:
    """Open a temporary file beside each target and rename them over the targets when the block ends well.

    They are renamed in the order given. After any exception, an interrupt included, the temporary
    files are gone and every target is as it was. A file that is replaced passes its permissions on.

    Raises:
        InputError: A target is no file that can be written, or the disk is full.
    """
    for target in targets:
        check_writable(target)
    for folder in {target.parent for target in targets}:
        sweep(folder)
    try:
        with ExitStack() as cleaning:
            temporaries = [cleaning.enter_context(hidden(t.parent, permissions(t))) for t in targets]
            yield [file for _, file in temporaries]
            for _, file in temporaries:
                finish(file)
            _rename([path for path, _ in temporaries], targets)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{targets[-1]} cannot be written ({reason}): make room or choose another place."
        ) from error


def permissions(path: Path) -> int | None:
    """Who may do what with a file; None where there is none."""
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        return None


@contextmanager
def hidden(folder: Path, mode: int | None) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file under a hidden name, which goes with the block unless it is renamed.

    Args:
        folder: Where it is made.
        mode: Its permissions; None for those of any new file.
    """
    with ExitStack() as cleaning:
        path = folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        cleaning.callback(path.unlink, missing_ok=True)
        # Private from the start: whoever opens it before a later chmod could read all that follows.
        first = 0o666 if mode is None else 0o600
        private = partial(os.open, mode=first)
        file = cleaning.enter_context(open(path, "xb", opener=private))
        # Another run may have taken it for a dead run's and removed it before it was locked.
        if _locked(file.fileno(), waiting=True) and not os.fstat(file.fileno()).st_nlink:
            with hidden(folder, mode) as again:
                yield again
            return
        if mode is not None:
            path.chmod(mode)
        yield path, file


def finish(file: BinaryIO) -> None:
    """See that all that was written to a file is on the disk, before it is renamed; once is enough."""
    if file.closed:
        return
    file.flush()
    os.fsync(file.fileno())
    if sys.platform == "win32":  # It renames no open file.
        file.close()


def sweep(folder: Path, seen: Callable[[Path], object] = lambda path: None) -> None:
    """Remove the hidden files that dead runs left in a folder, as far as that is allowed.

    Args:
        folder: The folder.
        seen: Called with every such file before it goes.
    """
    with suppress(OSError):
        for path in sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}")):
            with suppress(OSError):
                _remove_dead(path, seen)


def _remove_dead(path: Path, seen: Callable[[Path], object]) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        return
    with path.open("rb") as file:
        # Its owner may rename it meanwhile. Then the lock is on the target, and the hidden name is gone.
        if _locked(file.fileno()):
            seen(path)
            path.unlink()


def _locked(file: int, *, waiting: bool = False) -> bool:
    """Lock an open file until it is closed; False where another run holds it or there are no locks.

    Args:
        file: Its descriptor.
        waiting: Wait for whoever holds it.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if waiting else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _rename(temporaries: list[Path], targets: tuple[Path, ...]) -> None:
    """Rename all; the last rename is atomic, and the ones before it are undone if a later one fails."""
    with ExitStack() as cleaning, ExitStack() as undo:
        for temporary, target in zip(temporaries[:-1], targets[:-1], strict=True):
            backup = cleaning.enter_context(_second_name(target))
            if backup is None:
                undo.callback(target.unlink, missing_ok=True)
            else:
                undo.callback(backup.replace, target)
            temporary.replace(target)
        temporaries[-1].replace(targets[-1])
        undo.pop_all()


@contextmanager
def _second_name(target: Path) -> Iterator[Path | None]:
    """A hidden name for what a target holds, if there is one; the target itself is never missing."""
    backup = target.parent / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
    if not os.path.lexists(target):
        yield None
        return
    with ExitStack() as cleaning:
        cleaning.callback(backup.unlink, missing_ok=True)
        with suppress(OSError):
            # A lock is on the file itself, so that its second name has it from the start.
            _locked(cleaning.enter_context(target.open("rb")).fileno())
        try:
            os.link(target, backup, follow_symlinks=False)
        except OSError:
            shutil.copy2(target, backup, follow_symlinks=False)
        yield backup
