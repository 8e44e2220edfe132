"""Files that replace their targets together, or not at all.

A file is written under a hidden name beside its target and then renamed over the target. Until then, its run
holds a lock on it. The system releases the lock when the run ends for any reason. So a hidden file without a
lock belongs to a dead run, on this machine or on another machine that shares the folder, and the next run
removes it. If the system or the file system has no such locks, nothing is removed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.deferring import deferred_signals

_PREFIX, _SUFFIX = ".onnx-lowrank-", ".tmp"

MODEL = ".model"
"""The mark in the names of models' hidden files. Those of dead runs tell whose the data files beside them
are, so only `save` removes them."""


def check_writable(target: Path) -> None:
    """Check that a file can be written or replaced.

    Raises:
        InputError: The target is a folder or a device, its folder is missing, or permissions forbid writing.
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
def replacing(*targets: Path, mark: str = "", leads: bool = False) -> Iterator[list[BinaryIO]]:
    """Open a temporary file beside each target; rename them over the targets if the block succeeds.

    They are renamed in the order given. After any exception, an interrupt included, the temporary files are
    gone and every target is as it was. The new file gets the permissions of the file that it replaces.

    Args:
        targets: The files.
        mark: As for `hidden`, for the first file.
        leads: Whether the others describe the first one. Then there are none while it changes, so that no
            run, however it ends, leaves any that describe another one.

    Raises:
        InputError: A target is no file that can be written, or the disk is full.
    """
    for target in targets:
        check_writable(target)
    for folder in {target.parent for target in targets}:
        sweep(folder)
    marks = [mark, *[""] * (len(targets) - 1)]
    with told(targets[0 if leads else -1]), ExitStack() as cleaning:
        temporaries = [
            cleaning.enter_context(hidden(t.parent, permissions(t), m))
            for t, m in zip(targets, marks, strict=True)
        ]
        yield [file for _, file in temporaries]
        for _, file in temporaries:
            finish(file)
        _rename([path for path, _ in temporaries], targets, marks, targets[1:] if leads else ())


@contextmanager
def told(target: Path) -> Iterator[None]:
    """Tell of a file that cannot be written, by its name.

    Raises:
        InputError: The system refuses a step of the block.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{target} cannot be written ({reason}): make room or choose another place."
        ) from error


def permissions(path: Path) -> int | None:
    """The permission bits of a file; None if there is no file."""
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        return None


@contextmanager
def hidden(folder: Path, mode: int | None, mark: str = "") -> Iterator[tuple[Path, BinaryIO]]:
    """A new file under a hidden name; the end of the block removes it unless it was renamed.

    Args:
        folder: The folder of the file.
        mode: Its permissions; None for the defaults.
        mark: A part of its name: `MODEL` or nothing.
    """
    with ExitStack() as cleaning:
        path = _hidden_name(folder, mark)
        cleaning.callback(surely, partial(path.unlink, missing_ok=True))
        # Private from the start: anyone who opens it before a later chmod could read all later writes.
        first = 0o666 if mode is None else 0o600
        private = partial(os.open, mode=first)
        file = cleaning.enter_context(open(path, "x+b", opener=private))
        # Before it was locked, another run may have mistaken it for a dead run's file and removed it.
        if locked(file.fileno(), waiting=True) and not os.fstat(file.fileno()).st_nlink:
            with hidden(folder, mode, mark) as again:
                yield again
            return
        if mode is not None:
            path.chmod(mode)
        yield path, file


def _hidden_name(folder: Path, mark: str) -> Path:
    return folder / f"{_PREFIX}{secrets.token_hex(8)}{mark}{_SUFFIX}"


def surely(action: Callable[[], object]) -> None:
    """Do a part of a clean-up, again if an interrupt cuts it short; what a broken disk keeps is no error."""
    try:
        with suppress(OSError):
            action()
    except BaseException:
        with suppress(OSError):
            action()
        raise


def finish(file: BinaryIO) -> None:
    """Put the whole contents of a file on the disk, before it is renamed; a second call does nothing new."""
    if file.closed:
        return
    file.flush()
    # Without it, a power failure could leave an empty file under the target's name.
    os.fsync(file.fileno())
    if sys.platform == "win32":  # Windows renames no open file.
        file.close()


def sweep(folder: Path, model: Callable[[Path], object] | None = None) -> None:
    """Remove the hidden files that dead runs left in a folder; files that cannot be removed stay.

    Args:
        folder: The folder.
        model: Called with every model among them before it is removed; None to leave the models.
    """
    with suppress(OSError):
        for path in sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}")):
            with suppress(OSError):
                is_model = path.name.endswith(f"{MODEL}{_SUFFIX}")
                if not is_model or model is not None:
                    _remove_dead(path, model if is_model else None)


def _remove_dead(path: Path, model: Callable[[Path], object] | None) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        return
    with path.open("rb") as file:
        # If its owner renames it meanwhile, this locks the target, and there is no hidden name to remove.
        if locked(file.fileno()):
            if model is not None:
                model(path)
            path.unlink()


def locked(file: int, *, waiting: bool = False) -> bool:
    """Lock an open file until it is closed; False if another run holds the lock or there are no locks.

    Args:
        file: The file's descriptor.
        waiting: Wait until no other run holds the lock.
    """
    return _lock(file, waiting=waiting) is True


def is_taken(file: int) -> bool:
    """Lock an open file until it is closed; True if another run holds the lock, False without locks, too."""
    return _lock(file) is False


def _lock(file: int, *, waiting: bool = False) -> bool | None:
    """Lock an open file until it is closed; False if another run holds the lock, None without locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX if waiting else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def lock_folder(folder: Path, stack: ExitStack, *, waiting: bool) -> bool:
    """Lock a folder until a stack is closed; False if another run holds the lock or there are no locks.

    Args:
        folder: The folder; no symbolic link.
        stack: Releases the lock.
        waiting: Wait until no other run holds the lock.

    Raises:
        OSError: The folder cannot be opened.
    """
    if sys.platform == "win32":  # which opens no folder
        return False
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    stack.callback(os.close, opened)
    return locked(opened, waiting=waiting)


def _rename(
    temporaries: Sequence[Path], targets: Sequence[Path], marks: Sequence[str], absent: Sequence[Path]
) -> None:
    """Rename all files; if a step fails, the earlier ones are undone. The last rename is atomic.

    Args:
        temporaries: The files.
        targets: Their new names.
        marks: The marks in the names of backups.
        absent: The targets of which there are none while the others get their names.
    """
    with deferred_signals(), ExitStack() as cleaning, ExitStack() as undo:
        for target, mark in zip(targets, marks, strict=True):
            if target == targets[-1] and target not in absent:
                continue
            backup = cleaning.enter_context(second_name(target, mark))
            if backup is None:
                undo.callback(target.unlink, missing_ok=True)
            else:
                undo.callback(backup.replace, target)
        for target in absent:
            target.unlink(missing_ok=True)
        for temporary, target in zip(temporaries[:-1], targets[:-1], strict=True):
            temporary.replace(target)
        try:
            temporaries[-1].replace(targets[-1])
        finally:
            if not temporaries[-1].exists():  # An interrupt may come right after the rename.
                undo.pop_all()


@contextmanager
def second_name(target: Path, mark: str = "") -> Iterator[Path | None]:
    """A second, hidden name for a target's file, or None if there is no file; the target keeps its name.

    Args:
        target: The file.
        mark: As for `hidden`.
    """
    backup = _hidden_name(target.parent, mark)
    if not os.path.lexists(target):
        yield None
        return
    with ExitStack() as cleaning:
        cleaning.callback(surely, partial(backup.unlink, missing_ok=True))
        if sys.platform != "win32":  # Windows has no such locks, and replaces no open file.
            with suppress(OSError):
                # Locked before it has the second name: locks belong to files, so no run removes that name.
                locked(cleaning.enter_context(target.open("rb")).fileno())
        try:
            os.link(target, backup, follow_symlinks=False)
        except (OSError, NotImplementedError):  # Not every system links without following symbolic links.
            shutil.copy2(target, backup, follow_symlinks=False)
        yield backup
