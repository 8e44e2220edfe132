"""Arrays in files (.npy, .npz, .pb), and feeds spooled to disk: what calibration data is read from.

The files are untrusted: nothing is unpickled, and what is read at once is bounded by `MAX_BYTES`.
"""

from __future__ import annotations

import lzma
import shutil
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto

from onnx_lowrank.errors import InputError
from onnx_lowrank.files import tensors

MAX_BYTES = 2**30
"""What one sample, or one feed, may take in memory."""

_SPARE_BYTES = 2**26
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,  # NotImplementedError and RecursionError included
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    SyntaxError,  # both from NumPy's second look at a header that is no literal
    tokenize.TokenError,
)

Take = Callable[[NDArray[np.intp]], NDArray[Any]]
"""Reads rows of an array by their numbers, which ascend over all calls."""


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
        """What gives its rows."""
        yield self.array.__getitem__

    def read(self) -> NDArray[Any]:
        """All of it."""
        return self.array


@dataclass(frozen=True, slots=True)
class Stored:
    """A C-ordered array in an .npy file or in a member of an .npz archive.

    Attributes:
        path: The file.
        member: The archive's member; None where the file is the array.
        shape: The array's shape.
        dtype: Its dtype.
        offset: Number of bytes in front of its first element.
    """

    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @contextmanager
    def reader(self) -> Iterator[Take]:
        """Open the file; gives what reads rows, in one pass and only those asked for.

        Raises:
            InputError: The file cannot be read, here or when rows are taken.
        """
        with _opened(self.path, self.member) as stream:

            def take(rows: NDArray[np.intp]) -> NDArray[Any]:
                out = np.empty((len(rows), *self.shape[1:]), self.dtype)
                starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
                for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
                    self._fill(stream, int(rows[start]), out[start:stop])
                return out

            yield take

    def read(self) -> NDArray[Any]:
        """All of it.

        Raises:
            InputError: The file cannot be read.
        """
        out = np.empty(self.shape, self.dtype)
        with _opened(self.path, self.member) as stream:
            self._fill(stream, 0, out)
        return out

    def _fill(self, stream: IO[bytes], first: int, out: NDArray[Any]) -> None:
        """Read consecutive rows, from number `first` on, into an array of theirs."""
        with _readable(self.path):
            data = out.reshape(-1).view(np.uint8).data
            stream.seek(self.offset + first * prod(self.shape[1:]) * self.dtype.itemsize)
            done = 0
            while done < len(data):
                # In parts: readinto of an archive's member makes a second copy of all that it reads.
                part = stream.read(min(len(data) - done, 2**20))
                if not part:
                    raise EOFError
                data[done : done + len(part)] = part
                done += len(part)


Column = InMemory | Stored


def load(path: Path) -> Stored | dict[str, Stored]:
    """The array in an .npy file, or those in an .npz archive by name; only headers are read.

    Raises:
        InputError: The file is neither, is damaged, or holds an array that cannot be read by rows.
    """
    with _opened(path, None) as stream:
        with _readable(path):
            magic = stream.read(len(np.lib.format.MAGIC_PREFIX))
        if magic == np.lib.format.MAGIC_PREFIX:
            stream.seek(0)
            return _header(stream, path, None, path.stat().st_size)
    with _readable(path), zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
    found = {}
    for member, info in members.items():
        with _opened(path, member) as stream:
            found[member.removesuffix(".npy")] = _header(stream, path, member, info.file_size)
    return found


def _header(stream: IO[bytes], path: Path, member: str | None, size: int) -> Stored:
    label = f"{path}: the array {member.removesuffix('.npy')!r}" if member else f"{path}: the array"
    with _readable(path):
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(version)
        shape, fortran, dtype = _HEADERS[version](stream)
        offset = stream.tell()
    if dtype.hasobject:
        raise InputError(f"{label} holds pickled objects, which are not read: save an array of numbers.")
    if fortran and len(shape) > 1:
        raise InputError(
            f"{label} is in Fortran order, whose samples do not lie together: "
            "save numpy.ascontiguousarray of it."
        )
    if any(n < 0 for n in shape) or offset + prod(shape) * dtype.itemsize > size:
        raise InputError(
            f"{label} of the shape {list(shape)} does not fit into its {size} bytes: "
            "the file is damaged, write it again."
        )
    return Stored(path, member, shape, dtype, offset)


@contextmanager
def _opened(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    with _readable(path):
        stream: IO[bytes]
        if member is None:
            stream = path.open("rb")
        else:
            with zipfile.ZipFile(path) as archive:  # the member keeps the file open
                stream = archive.open(member)
    with stream:
        yield stream


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong on reading an .npy or .npz file into the error that says so."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the file.") from error
    except _DAMAGE as error:
        raise InputError(
            f"{path} is damaged, or neither an .npz archive nor an .npy array: write it with numpy.savez."
        ) from error


def tensor(path: Path) -> NDArray[Any]:
    """The array in a serialized TensorProto.

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
    """Refuse what takes more memory than `MAX_BYTES`.

    Raises:
        InputError: It does.
    """
    if size > MAX_BYTES:
        raise InputError(
            f"{what} takes {size / 2**30:.1f} GiB, more than {MAX_BYTES / 2**30:g} GiB: "
            "give smaller samples, or fewer in one feed."
        )


class Spool:
    """Feeds in a temporary file, so that memory need not hold them; it goes with `close`."""

    def __init__(self, names: Iterable[str]) -> None:
        """Open the file in the system's temporary folder.

        Args:
            names: The names in every feed.
        """
        self._names = tuple(names)
        self._file = tempfile.TemporaryFile(prefix="onnx-lowrank-")  # noqa: SIM115 - closed with the spool
        self._offsets: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, feed: Mapping[str, NDArray[Any]], where: str) -> None:
        """Write one feed behind the others.

        Args:
            feed: An array for every name.
            where: What to call it in errors.

        Raises:
            InputError: The disk has no room for it.
        """
        # Strings are objects to ONNX Runtime, and objects would be pickled.
        arrays = [a.astype(str) if a.dtype.kind == "O" else a for a in map(feed.__getitem__, self._names)]
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        full = f"{where} does not fit into {folder}, where {free / 2**20:.0f} MiB are free: "
        full += "pass fewer --calibration-samples, or set TMPDIR to a larger disk."
        if free < sum(array.nbytes for array in arrays) + _SPARE_BYTES:
            raise InputError(full)
        try:
            self._offsets.append(self._file.seek(0, 2))
            for array in arrays:
                np.lib.format.write_array(self._file, np.asarray(array, order="C"), allow_pickle=False)
        except OSError as error:
            raise InputError(full) from error

    def read(self, number: int) -> dict[str, NDArray[Any]]:
        """The feed of this number."""
        self._file.seek(self._offsets[number])
        return {name: np.lib.format.read_array(self._file, allow_pickle=False) for name in self._names}

    def close(self) -> None:
        """Delete the file."""
        self._file.close()
