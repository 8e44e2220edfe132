"""The rules of Windows for files, on Linux."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system be Windows as far as files go: no locks, no copies of ranges, open files stay.

    Windows neither replaces, renames nor deletes a file that is open or mapped, even in the same process.
    """
    if not Path("/proc/self/maps").exists():
        pytest.skip("the system does not list the files that a process has open")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    for name, paths in (("replace", 2), ("rename", 2), ("unlink", 1), ("remove", 1)):
        monkeypatch.setattr(os, name, _refusing(getattr(os, name), paths))


def _refusing(call: Callable[..., Any], paths: int) -> Callable[..., Any]:
    def refusing(*given: Any, dir_fd: int | None = None, **more: Any) -> Any:
        folder = Path() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
        for path in given[:paths]:
            if _is_open(folder / path):
                raise PermissionError(errno.EACCES, "The file is open", str(path))
        return call(*given, **more) if dir_fd is None else call(*given, dir_fd=dir_fd, **more)

    return refusing


def _is_open(path: Path) -> bool:
    """Whether this process has a file open or mapped."""
    opened = (link for link in Path("/proc/self/fd").iterdir() if link.exists())
    return path.exists() and (is_mapped(path) or any(link.samefile(path) for link in opened))


def is_mapped(path: Path) -> bool:
    """Whether this process has a file mapped."""
    maps = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    return any(line.endswith(f" {path.resolve()}") for line in maps)
