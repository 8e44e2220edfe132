"""Entries on disk that any run can use again: a folder of bounded size, a file for each entry.

Rules:

1. The name of a file is the key of its entry. A key is a digest of all that the entry depends on, so an entry
   never changes, and two runs that write the same key write the same bytes.
2. A file is written under a hidden name and renamed, so no run sees a part of it. No run waits for another.
3. Files are untrusted. An entry is a regular file that repeats its key and has the digest of its contents. No
   more bytes are allocated than the file has and the caller expects. All else counts as absent.
4. An entry is read as a whole into memory. It may be removed after that, by this run or by another one.
5. Where the entries exceed the bound, those whose last use is longest ago go first.
6. A folder that cannot be written costs one warning; the run goes on without writing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.files.atomic import hidden, sweep

_log = logging.getLogger(__name__)

BOUND = 16 * 2**30
"""The most bytes of all entries."""

USUAL = 2**28
"""The most bytes of an entry, unless the caller expects more."""

_MAGIC = b"onnx-lowrank entry 1\n"
_HEAD = 2**16  # bytes of the description of an entry's arrays
_CHUNK = 2**20
_SLACK = 16  # a run counts the entries of others again when it has written a sixteenth of the bound
_KEPT = 15 / 16  # of the bound, after old entries are removed, so that not every new entry removes one
_NAME = re.compile(r"[0-9a-f]{64}\.entry")
_DTYPE = re.compile(r"[<>|][biuf][1248]")
_OPENED = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class _DamageError(Exception):
    """The file is no entry with the key."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The contents of an entry.

    Attributes:
        text: Bytes of any meaning.
        arrays: Arrays of numbers, of any shape. The order of their axes in memory stays, as sums follow it; a
            view that skips or reverses elements is read in C order.
    """

    text: bytes
    arrays: Sequence[NDArray[Any]] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the contents."""
        return len(self.text) + sum(array.nbytes for array in self.arrays)


class Store:
    """Entries in a folder; threads may share it, and processes may share the folder.

    Attributes:
        folder: The folder of the entries.
    """

    def __init__(self, folder: Path, bound: int = BOUND) -> None:
        """Prepare; nothing is written yet.

        Args:
            folder: The folder of the entries. It is made when the first entry is written.
            bound: The most bytes of all entries.
        """
        self.folder = folder
        self._bound = bound
        self._lock = threading.Lock()
        self._is_writable = True
        self._room = 0  # bytes to write before the entries are counted again

    def get(self, key: str, largest: int = USUAL) -> Entry | None:
        """Read an entry, and note its use; None if it is absent or damaged.

        Args:
            key: Its key, 64 hexadecimal digits.
            largest: The most bytes of its contents; a larger entry counts as damaged.
        """
        path = self._path(key)
        try:
            # Not Path.open: a pipe would wait for a writer, and a link may lead to any file.
            with os.fdopen(os.open(path, _OPENED), "rb") as file:
                entry = _read(file, key, largest)
                with suppress(OSError):  # The folder may be read-only.
                    os.utime(path)
                return entry
        except FileNotFoundError:
            return None
        except (OSError, _DamageError) as error:
            _log.debug("%s counts as absent: %s", path, error)
            return None

    def put(self, key: str, entry: Entry) -> None:
        """Write an entry in place of any that has its key; a folder that cannot be written is no error."""
        if not self._is_writable or entry.nbytes > self._bound:
            return
        try:
            with self._lock:
                self._make_room(entry.nbytes)
            with hidden(self.folder, 0o600) as (path, file):
                _write(file, key, entry)
                file.close()
                self._place(path, self._path(key))
        except OSError as error:
            if self._is_writable:
                self._is_writable = False
                reason = error.strerror or error
                _log.warning(
                    "The cache %s cannot be written (%s), so nothing more is kept there.", self.folder, reason
                )

    @staticmethod
    def _place(written: Path, path: Path) -> None:
        """Give a written file its name.

        Raises:
            OSError: It cannot have the name.
        """
        try:
            written.replace(path)
        except PermissionError:
            # Windows replaces no file that is open, as the entry is while it is read. It stays (rule 1).
            if not path.is_file():
                raise

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.entry"

    def _make_room(self, size: int) -> None:
        """Make the folder, and remove the entries with the oldest use if the bound is exceeded.

        Raises:
            OSError: The folder cannot be made.
        """
        if size > self._room:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            sweep(self.folder)
            found = sorted(self._entries())
            taken = sum(size for _, _, size in found)
            for _, path, freed in found if taken + size > self._bound else ():
                if taken + size <= self._bound * _KEPT:
                    break
                with suppress(OSError):
                    path.unlink()
                taken -= freed
            self._room = max(size, min(self._bound - taken, self._bound // _SLACK))
        self._room -= size

    def _entries(self) -> Iterator[tuple[int, Path, int]]:
        """The time of the last use, the path and the bytes of all entries."""
        with os.scandir(self.folder) as found:
            for item in found:
                with suppress(OSError):  # Another run may have removed it.
                    if _NAME.fullmatch(item.name) and item.is_file(follow_symlinks=False):
                        status = item.stat(follow_symlinks=False)
                        yield status.st_mtime_ns, Path(item.path), status.st_size


def _write(file: BinaryIO, key: str, entry: Entry) -> None:
    """Write magic, key, digest of the rest; sizes as a line of JSON, text, arrays."""
    orders = [_order(array) for array in entry.arrays]
    stored = [np.asarray(a.transpose(o), order="C") for a, o in zip(entry.arrays, orders, strict=True)]
    described = [[a.dtype.str, o, *a.shape] for a, o in zip(entry.arrays, orders, strict=True)]
    head = json.dumps([len(entry.text), *described]).encode() + b"\n"
    parts: list[Any] = [head, entry.text, *(array.reshape(-1).view(np.uint8).data for array in stored)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    file.write(_MAGIC + bytes.fromhex(key) + digest.digest())
    for part in parts:
        file.write(part)


def _read(file: BinaryIO, key: str, largest: int) -> Entry:
    """Read the contents of an entry.

    Raises:
        OSError: The file cannot be read.
        _DamageError: It is no entry with this key, or is damaged.
    """
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise _DamageError("it is no regular file")
    known = _MAGIC + bytes.fromhex(key)
    if file.read(len(known)) != known:
        raise _DamageError("it is no entry with this key")
    wanted = file.read(hashlib.sha256().digest_size)
    head = file.readline(_HEAD)
    size, described = _described(head)
    taken = size + sum(prod(shape) * dtype.itemsize for dtype, _, shape in described)
    if taken > largest or file.tell() + taken != status.st_size:
        raise _DamageError(f"it has {status.st_size} bytes, other than the {taken} that it describes")
    digest = hashlib.sha256(head)
    text = bytearray(size)
    _fill(file, text, digest)
    arrays = []
    for dtype, order, shape in described:
        flat = np.empty(prod(shape), dtype)
        _fill(file, flat.view(np.uint8).data, digest)
        try:
            arrays.append(flat.reshape([shape[axis] for axis in order]).transpose(np.argsort(order)))
        except ValueError as error:  # An empty array may have sizes or axes beyond NumPy's limits.
            raise _DamageError("it describes an array that cannot be") from error
    if digest.digest() != wanted:
        raise _DamageError("its digest is another one")
    return Entry(bytes(text), tuple(arrays))


def _order(array: NDArray[Any]) -> list[int]:
    """The axes of an array as they follow each other in memory; as they are if it has gaps there."""
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    return order if array.transpose(order).flags.c_contiguous else list(range(array.ndim))


def _described(head: bytes) -> tuple[int, list[tuple[np.dtype[Any], tuple[int, ...], tuple[int, ...]]]]:
    """The bytes of the text, and the dtypes, orders of axes and shapes of the arrays.

    Raises:
        _DamageError: The line describes no entry.
    """
    try:
        size, *arrays = json.loads(head)
        described = [(np.dtype(_checked(kind)), tuple(order), tuple(shape)) for kind, order, *shape in arrays]
    except (ValueError, TypeError, RecursionError) as error:
        raise _DamageError("it describes no arrays") from error
    numbers = [size, *(number for _, order, shape in described for number in (*order, *shape))]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise _DamageError("it describes sizes that are none")
    if any(sorted(order) != list(range(len(shape))) for _, order, shape in described):
        raise _DamageError("it describes axes that are none")
    return size, described


def _checked(kind: str) -> str:
    """A dtype of numbers.

    Raises:
        ValueError: It is another one.
    """
    if not _DTYPE.fullmatch(kind):
        raise ValueError(kind)
    return kind


def _fill(file: BinaryIO, target: Any, digest: Any) -> None:
    """Fill a buffer from a file, and add it to a digest.

    Raises:
        _DamageError: The file has become shorter.
    """
    view, done = memoryview(target), 0
    while done < len(view):
        read = file.readinto(view[done : done + _CHUNK])  # type: ignore[attr-defined]
        if not read:
            raise _DamageError("it has become shorter")
        digest.update(view[done : done + read])
        done += read
