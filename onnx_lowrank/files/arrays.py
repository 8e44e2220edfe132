"""Arrays in files (.npy, .npz, .pb): calibration data, and the inputs to compare models on.

The files are untrusted: nothing is unpickled. Headers are read first and data only on demand, so that
callers can check names, dtypes, shapes and sizes before (see `bounded`).
"""

from __future__ import annotations

import io
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto

from onnx_lowrank.errors import InputError
from onnx_lowrank.files import tensors

MAX_BYTES = 2**30
"""The most bytes that one sample, or one feed, may take in memory."""

_HEADER_BYTES = 2**14  # NumPy refuses longer headers, but only after it has read them completely
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,  # NotImplementedError and RecursionError included
    zipfile.BadZipFile,
    zlib.error,
    SyntaxError,  # this and the next: from NumPy's second parser, for a header that is no literal
    tokenize.TokenError,
)

Take = Callable[[NDArray[np.intp]], NDArray[Any]]
"""Reads rows of an array by their numbers; the numbers must ascend over all calls."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """An array that the caller holds."""

    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its dtype."""
        return self.array.dtype

    @contextmanager
    def reader(self) -> Iterator[Take]:
        """Open the array; gives a function that reads rows."""
        yield self.array.__getitem__

    def read(self) -> NDArray[Any]:
        """The whole array."""
        return self.array


@dataclass(frozen=True, slots=True)
class Stored:
    """An array in an .npy file or in a member of an .npz archive.

    Attributes:
        path: The file.
        member: The archive's member; None where the file is the array.
        shape: The array's shape.
        dtype: Its dtype.
        is_transposed: Whether its elements are in Fortran order, so that its rows are not contiguous.
        offset: Number of bytes in front of its first element.
    """

    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_transposed: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Number of bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize

    @contextmanager
    def reader(self) -> Iterator[Take]:
        """Open the file; gives a function that reads the rows asked for and no others, in one pass.

        Raises:
            InputError: The file cannot be read, now or when rows are read, or it is in Fortran order.
        """
        if self.is_transposed:
            raise InputError(
                f"{_label(self.path, self.member)} is in Fortran order, so its samples are not contiguous: "
                "save numpy.ascontiguousarray of it."
            )
        with _opened(self.path, self.member) as stream:

            def take(rows: NDArray[np.intp]) -> NDArray[Any]:
                out = self._empty((len(rows), *self.shape[1:]))
                starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
                for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
                    self._fill(stream, int(rows[start]), out[start:stop])
                return out

            yield take

    def read(self) -> NDArray[Any]:
        """The whole array, in C order.

        Raises:
            InputError: The file cannot be read.
        """
        out = self._empty(self.shape[::-1] if self.is_transposed else self.shape)
        with _opened(self.path, self.member) as stream:
            self._fill(stream, 0, out)
        return np.ascontiguousarray(out.T) if self.is_transposed else out

    def _empty(self, shape: tuple[int, ...]) -> NDArray[Any]:
        # Checked even for a shape with a 0: it takes no bytes, but its other sizes may exceed NumPy's limits.
        with _readable(self.path):
            return np.empty(shape, self.dtype)

    def _fill(self, stream: IO[bytes], first: int, out: NDArray[Any]) -> None:
        """Read consecutive rows, from number `first` on, into an array."""
        with _readable(self.path):
            data = out.reshape(-1).view(np.uint8).data
            stream.seek(self.offset + first * prod(self.shape[1:]) * self.dtype.itemsize)
            done = 0
            while done < len(data):
                # In parts: readinto of an archive's member makes a second copy of everything that it reads.
                part = stream.read(min(len(data) - done, 2**20))
                if not part:
                    raise EOFError
                data[done : done + len(part)] = part
                done += len(part)
            # NumPy does not check code points; invalid ones would fail only when a string is used.
            if self.dtype.kind == "U" and out.size:
                codes = out.reshape(-1).view(np.dtype(np.uint32).newbyteorder(self.dtype.byteorder))
                if codes.max() > sys.maxunicode:
                    raise ValueError


class Column(Protocol):
    """An array whose rows can be read, a few at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its dtype."""

    def reader(self) -> AbstractContextManager[Take]:
        """Open the array; gives a function that reads rows."""

    def read(self) -> NDArray[Any]:
        """The whole array."""


def load(path: Path) -> Stored | dict[str, Stored]:
    """The array in an .npy file, or the arrays in an .npz archive by name; only headers are read.

    Raises:
        InputError: The file is of neither kind, is damaged, or has an array that this module does not read.
    """
    with _opened(path, None) as stream:
        with _readable(path):
            magic = stream.read(len(np.lib.format.MAGIC_PREFIX))
        if magic == np.lib.format.MAGIC_PREFIX:
            stream.seek(0)
            return _header(stream, path, None, path.stat().st_size)
        return _members(stream, path)


def archive(path: Path, what: str = "") -> dict[str, Stored]:
    """The arrays in an .npz archive by name; only headers are read.

    Args:
        path: The file.
        what: Name of the file in errors, in front of its path.

    Raises:
        InputError: The file is no archive, is damaged, or has an array that this module does not read.
    """
    label = f"{what} {path}".lstrip()
    with _opened(path, None, label) as stream:
        with _readable(label):
            is_archive = zipfile.is_zipfile(stream)
        if not is_archive:
            raise InputError(f"{label} is not an .npz archive: write it with numpy.savez.")
        return _members(stream, path)


def _members(stream: IO[bytes], path: Path) -> dict[str, Stored]:
    """The arrays in an open archive."""
    found = {}
    with _readable(path), zipfile.ZipFile(stream) as archive:
        for member in archive.namelist():
            with _member(archive, member) as part:
                size = archive.getinfo(member).file_size
                found[member.removesuffix(".npy")] = _header(part, path, member, size)
    return found


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    # Only these two: for others, Python decompresses without a bound. NumPy writes no others.
    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError
    return archive.open(name)


def _header(stream: IO[bytes], path: Path, member: str | None, size: int) -> Stored:
    label = _label(path, member)
    with _readable(path):
        head = io.BytesIO(stream.read(_HEADER_BYTES))
        version = np.lib.format.read_magic(head)
        if version not in _HEADERS:
            raise ValueError(version)
        try:
            shape, fortran, dtype = _HEADERS[version](head)
        except MemoryError as error:  # Python's parser raises this for deep nesting, even in a short header
            raise ValueError from error
    if dtype.hasobject:
        raise InputError(f"{label} holds pickled objects, which are not read: save an array of numbers.")
    if any(n < 0 for n in shape) or head.tell() + prod(shape) * dtype.itemsize > size:
        raise InputError(
            f"{label} of the shape {list(shape)} does not fit into its {size} bytes: "
            "the file is damaged, write it again."
        )
    return Stored(path, member, shape, dtype, bool(fortran) and len(shape) > 1, head.tell())


def _label(path: Path, member: str | None) -> str:
    return f"{path}: the array {member.removesuffix('.npy')!r}" if member else f"{path}: the array"


@contextmanager
def _opened(path: Path, member: str | None, label: str = "") -> Iterator[IO[bytes]]:
    with _readable(label or path):
        stream: IO[bytes]
        if member is None:
            stream = path.open("rb")
        else:
            with zipfile.ZipFile(path) as archive:  # the member keeps the file open
                stream = _member(archive, member)
    with stream:
        yield stream


@contextmanager
def _readable(label: str | Path) -> Iterator[None]:
    """Turn the errors of reading an .npy or .npz file into an InputError with advice."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{label} cannot be read ({error.strerror or error}): check the file.") from error
    except _DAMAGE as error:
        raise InputError(
            f"{label} is damaged, or neither an .npz archive nor an .npy array: write it with numpy.savez."
        ) from error


def tensor(path: Path) -> NDArray[Any]:
    """The array in the file of a serialized TensorProto.

    Raises:
        InputError: The file is no TensorProto, or refers to another file.
    """
    proto = TensorProto()
    try:
        proto.ParseFromString(path.read_bytes())
        if not tensors.is_external(proto):
            return tensors.read(proto, {}, str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the file.") from error
    except (DecodeError, InputError) as error:
        raise InputError(
            f"{path} is no serialized TensorProto, or is damaged: "
            "write what numpy_helper.from_array of onnx gives."
        ) from error
    raise InputError(f"{path} keeps its data in another file: save the tensor with its data inside.")


def bounded(size: int, what: str) -> None:
    """Refuse samples and feeds of more than `MAX_BYTES`.

    Args:
        size: Number of bytes in memory.
        what: Name of the sample or feed in the error.

    Raises:
        InputError: The size exceeds `MAX_BYTES`.
    """
    if size > MAX_BYTES:
        raise InputError(
            f"{what} takes {size / 2**30:.1f} GiB, more than {MAX_BYTES / 2**30:g} GiB: "
            "give smaller samples, or fewer in one feed."
        )
