"""Work items on their way to workers on other machines.

An item names the files of its weights and moments. A worker that sees the same files reads them there; a
`Mark` proves that they are the same. For other workers, the item carries the content. A worker computes an
item only with the versions and on the device of the client, because these decide the bits of its result.

Items and results travel as pickles, as all tasks of Dask do: client, scheduler and workers trust each other.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from threading import Condition
from types import MappingProxyType
from typing import Any

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.keeping import environment
from onnx_lowrank.files.load import Model
from onnx_lowrank.hardware import free_memory, processor_kind
from onnx_lowrank.linalg.backend import Backend, one_blas_thread, resolve
from onnx_lowrank.work.executor import Function, I, R, compute
from onnx_lowrank.work.moments import LayerMoments, MomentsRef
from onnx_lowrank.work.weights import WeightRef

_PIECES, _PIECE = 64, 4096
"""A mark covers so many pieces of a file, of so many bytes each."""

_SHARE = 2
"""The items of a worker take together at most 1 / _SHARE of its memory."""

PROCESSOR = "processor"
"""The key of the processor among the versions: another one changes the last bits of results at most."""

Versions = Mapping[str, str]
"""The versions of the libraries that decide the bits of results, a digest of the code, and the processor."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A file as one machine sees it; a machine that finds the same mark sees the same file.

    Attributes:
        path: The file.
        size: Its bytes.
        modified: The time of its last change, in nanoseconds.
        digest: A digest of evenly spaced pieces of its content.
    """

    path: Path
    size: int
    modified: int
    digest: str


@dataclass(frozen=True, slots=True)
class Packed:
    """An item with its function.

    Attributes:
        data: Both, pickled.
        nbytes: Bytes of memory that the computation takes.
        marks: The files that it reads.
        device: The name of the device that computes it.
        versions: The versions that it needs.
    """

    data: bytes
    nbytes: int
    marks: tuple[Mark, ...]
    device: str
    versions: Versions


@dataclass(frozen=True, slots=True)
class Unseen:
    """The answer of a worker that does not see a file of an item.

    Attributes:
        path: The file.
    """

    path: Path


@dataclass(frozen=True, slots=True)
class Foreign:
    """The answer of a worker that has other versions.

    Attributes:
        worker: Its address.
        versions: Its versions.
    """

    worker: str
    versions: Versions


@dataclass(frozen=True, slots=True, eq=False)
class CarriedMoments(MomentsRef):
    """Moments that an item carries.

    Attributes:
        carried: The moments.
    """

    carried: LayerMoments = field(default_factory=LayerMoments)

    def read(self) -> LayerMoments:
        """Give the moments."""
        return self.carried


class _Packer(pickle.Pickler):
    """Pickles an item, with the content of some files.

    Attributes:
        files: The other files that the item reads.
    """

    def __init__(self, file: io.BytesIO, carried: Collection[Path]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.files: dict[Path, None] = {}
        self._carried = carried

    def reducer_override(self, value: Any) -> Any:
        """The content in place of a reference to a carried file."""
        if type(value) is WeightRef and isinstance(value.source, Path):
            if value.source in self._carried:
                return value.loaded().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
            self.files[value.source] = None
        if type(value) is MomentsRef:
            if value.folder in self._carried:
                place = value.folder, value.number, value.of_outputs, None, value.least, value.fit
                return CarriedMoments, (*place, value.read())
            # Those of transposed uses are a reference of their own, which is pickled with this one.
            self.files.update(dict.fromkeys(value.files))
        if type(value) is Model:
            for path in value.files.values():
                if path in self._carried:
                    raise InputError(
                        f"A Dask worker does not see {path}, which calibration reads: put the model where "
                        "all machines see it, or run again with the same workers from the start."
                    )
                self.files[path] = None
        if isinstance(value, MappingProxyType):
            return _read_only, (dict(value),)
        return NotImplemented


def _read_only(mapping: dict[Any, Any]) -> Mapping[Any, Any]:
    return MappingProxyType(mapping)


def packed(
    function: Function[I, R], item: I, carried: Collection[Path], device: str, versions: Versions
) -> Packed:
    """Pack an item.

    Args:
        function: Computes it.
        item: The item.
        carried: The data files, and the folders of moments, that no worker has to see.
        device: The name of the device that computes it.
        versions: The versions of the client.

    Raises:
        InputError: A data file has changed.
    """
    file = io.BytesIO()
    packer = _Packer(file, carried)
    packer.dump((function, item))
    try:
        marks = tuple(map(mark, packer.files))
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}): restore it as it was, and run again."
        ) from error
    return Packed(file.getvalue(), item.nbytes, marks, device, versions)


def computed(item: Packed) -> bytes | Unseen | Foreign:
    """Compute an item in a Dask worker.

    Returns:
        The pickled result; or the reason why this worker must not compute the item as it is.
    """
    from distributed import get_worker

    worker = get_worker()
    own = versions(item.device)
    if differing(own, item.versions):
        return Foreign(str(worker.address), own)
    for given in item.marks:
        if not sees([given]):
            return Unseen(given.path)
    with _room(worker.memory_manager.memory_limit).taken(item.nbytes), one_blas_thread(solvers=True):
        function, argument = pickle.loads(item.data)  # noqa: S301 - the client's, as every task of Dask
        result = compute(function, argument, _backend(item.device))
        return pickle.dumps(result, pickle.HIGHEST_PROTOCOL)


@cache
def versions(device: str) -> Versions:
    """What decides the bits of results in this process.

    Args:
        device: The name of the device of the linear algebra.
    """
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    own = {name: version(name) for name in ("onnx-lowrank", "distributed")}
    return {**own, **environment(provider, device), PROCESSOR: processor_kind(provider)}


def differing(own: Versions, wanted: Versions) -> tuple[str, ...]:
    """The names of the versions that differ, without the processor."""
    return tuple(name for name in wanted if name != PROCESSOR and own.get(name) != wanted[name])


def mark(path: Path) -> Mark:
    """The mark of a file.

    Raises:
        OSError: It cannot be read.
    """
    state = path.stat()
    return _mark(path, state.st_size, state.st_mtime_ns)


def sees(marks: Sequence[Mark]) -> bool:
    """Whether this process sees the files of all marks."""
    try:
        return all(mark(given.path) == given for given in marks)
    except OSError:
        return False


@lru_cache(maxsize=4096)
def _mark(path: Path, size: int, modified: int) -> Mark:
    made, last = hashlib.sha256(), max(0, size - _PIECE)
    with path.open("rb") as file:
        for number in range(_PIECES):
            file.seek(last * number // (_PIECES - 1))
            made.update(file.read(_PIECE))
    return Mark(path, size, modified, made.hexdigest())


class Room:
    """The bytes that the items of one process take together; one item always runs, whatever it takes."""

    def __init__(self, nbytes: int) -> None:
        self._most = nbytes
        self._taken: list[int] = []
        self._left = Condition()

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        """Wait until there is room, and take it during the block."""
        with self._left:
            self._left.wait_for(lambda: not self._taken or sum(self._taken) + nbytes <= self._most)
            self._taken.append(nbytes)
        try:
            yield
        finally:
            with self._left:
                self._taken.remove(nbytes)
                self._left.notify_all()


@cache
def _room(memory: int | None) -> Room:
    """The room of this worker.

    Args:
        memory: Its bytes of memory; None without a limit.
    """
    return Room((memory or free_memory()) // _SHARE)


@cache
def _backend(device: str) -> Backend:
    return resolve(device)
