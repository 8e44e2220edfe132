"""Files that take their targets' places together, or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from onnx_lowrank.errors import InputError


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
    files are gone and every target is as it was.

    Raises:
        InputError: A target is no file that can be written, or the disk is full.
    """
    for target in targets:
        check_writable(target)
    try:
        with ExitStack() as cleaning:
            temporaries = [_beside(target) for target in targets]
            files: list[BinaryIO] = []
            for temporary in temporaries:
                cleaning.callback(temporary.unlink, missing_ok=True)
                files.append(cleaning.enter_context(temporary.open("xb")))
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
                file.close()
            _rename(temporaries, targets)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{targets[-1]} cannot be written ({reason}): make room or choose another place."
        ) from error


def _beside(target: Path) -> Path:
    return target.parent / f".onnx-lowrank-{secrets.token_hex(8)}.tmp"


def _rename(temporaries: list[Path], targets: tuple[Path, ...]) -> None:
    """Rename all; the last rename is atomic, and the ones before it are undone if a later one fails."""
    backups = [_beside(target) for target in targets[:-1]]
    with ExitStack() as undo:
        for temporary, backup, target in zip(temporaries[:-1], backups, targets[:-1], strict=True):
            undo.callback(_restore, backup, target, target.exists())
            if target.exists():
                target.replace(backup)
            temporary.replace(target)
        temporaries[-1].replace(targets[-1])
        undo.pop_all()
    for backup in backups:
        backup.unlink(missing_ok=True)


def _restore(backup: Path, target: Path, existed: bool) -> None:
    if backup.exists():
        backup.replace(target)
    elif not existed:
        target.unlink(missing_ok=True)
