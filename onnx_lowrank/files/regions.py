"""Ranges of bytes in files, and copies of them that the system makes without passing them through memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from onnx_lowrank.errors import InputError

_CHUNK = 1 << 20
_AT_ONCE = 1 << 26  # An interrupt waits for one call of the system.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The errors of a disk without room."""


@dataclass(frozen=True, slots=True)
class Region:
    """The bytes of one external tensor: `length` bytes of the file from `offset` on."""

    path: Path
    offset: int
    length: int

    def chunks(self, begin: int = 0) -> Iterator[bytes]:
        """The bytes from byte `begin` of the region on, in chunks.

        Raises:
            InputError: The file cannot be read, or has become shorter.
        """
        with _translated(self.path), self.path.open("rb") as file:
            file.seek(self.offset + begin)
            left = self.length - begin
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise InputError(f"{self.path} lacks {left} bytes that it had: restore it and run again.")
                left -= len(chunk)
                yield chunk

    def copy(self, out: BinaryIO) -> None:
        """Write the bytes to a file at its position.

        The system copies them if it can. Some file systems then share the blocks of both files instead.

        Raises:
            InputError: The file of the region cannot be read, or has become shorter.
            OSError: The other file cannot be written.
        """
        out.flush()
        begin = out.tell()
        done = self._copied(out.fileno(), begin)
        out.seek(begin + done)
        for chunk in self.chunks(done):
            out.write(chunk)

    def _copied(self, out: int, begin: int) -> int:
        """The number of bytes that the system copies; the rest has to be read and written.

        Raises:
            OSError: There is no room.
        """
        if not hasattr(os, "copy_file_range"):
            return 0
        done = 0
        with _translated(self.path), self.path.open("rb") as file:
            source = file.fileno()
            while done < self.length:
                most = min(self.length - done, _AT_ONCE)
                try:
                    count = os.copy_file_range(source, out, most, self.offset + done, begin + done)
                except OSError as error:
                    if error.errno in FULL:
                        raise _FullError(error.errno, error.strerror) from error
                    break
                if not count:
                    break
                done += count
        return done


class _FullError(OSError):
    """There is no room for a copy."""


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into an InputError."""
    try:
        yield
    except _FullError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the file.") from error
