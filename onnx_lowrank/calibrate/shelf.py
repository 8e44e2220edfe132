"""Tensors between two parts of a model, in memory as far as it reaches, and otherwise on disk."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.allowance import Allowance
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.scratch import scratch
from onnx_lowrank.hardware import free_memory

_GIB = 2**30

Key = tuple[str, bool]
"""A tensor's name, and whether it belongs to the compressed prefix, not to the original model."""


MEMORY = Allowance().activations
"""The usual most bytes in memory. Files take time to write, read and delete, even in a cache."""

_SHARE = 8
"""They take at most 1 / _SHARE of the memory that is free when the shelf is made."""


class Shelf:
    """Arrays in memory or on disk; there is a file for each tensor and batch.

    Attributes:
        used: The bytes of all arrays.
    """

    def __init__(self, folder: Path, memory: int | None = None) -> None:
        """Start without arrays.

        Args:
            folder: A folder for the files.
            memory: The most bytes in memory; None for `MEMORY`.
        """
        self.used = 0
        self._folder = folder
        self._memory = min(MEMORY if memory is None else memory, free_memory() // _SHARE)
        self._in_memory: dict[tuple[Key, int], NDArray[Any]] = {}
        self._in_files = 0
        self._numbers: dict[Key, int] = {}
        self._dtypes: dict[Key, np.dtype[Any]] = {}

    def put(self, key: Key, batch: int, value: NDArray[Any]) -> None:
        """Keep an array, which nobody changes from then on.

        Raises:
            InputError: The disk is full.
        """
        if self.used - self._in_files + value.nbytes <= self._memory:
            self._in_memory[key, batch] = value
            self.used += value.nbytes
            return
        try:
            np.save(self._path(key, batch), value, allow_pickle=False)
        except OSError as error:
            raise InputError(
                f"{self._folder.parent} cannot be written ({error.strerror}): make room there, or use fewer "
                "inputs with --calibration-samples."
            ) from error
        self._dtypes[key] = value.dtype
        size = self._path(key, batch).stat().st_size
        self.used += size
        self._in_files += size

    def get(self, key: Key, batch: int) -> NDArray[Any]:
        """An array; do not change it."""
        if (known := self._in_memory.get((key, batch))) is not None:
            return known
        array: NDArray[Any] = np.load(self._path(key, batch), allow_pickle=False)
        # A file keeps the bits of bfloat16, but not its name.
        return array.view(self._dtypes[key]) if array.dtype.kind == "V" else array

    def drop(self, key: Key, batch: int) -> None:
        """Delete an array."""
        if (known := self._in_memory.pop((key, batch), None)) is not None:
            self.used -= known.nbytes
            return
        path = self._path(key, batch)
        size = path.stat().st_size
        path.unlink()
        self.used -= size
        self._in_files -= size

    def require(self, further: int) -> None:
        """Check that memory and disk have room.

        Args:
            further: The bytes still to keep.

        Raises:
            InputError: They have less room.
        """
        free = shutil.disk_usage(self._folder).free
        further = self.used + further - self._memory - self._in_files
        if further > free:
            raise InputError(
                f"The activations between two layers take {further / _GIB:.1f} GiB more, but "
                f"{self._folder.parent} has only {free / _GIB:.1f} GiB free: make room there, or use fewer "
                "inputs with --calibration-samples."
            )

    def _path(self, key: Key, batch: int) -> Path:
        # The name of a tensor may not be a valid file name.
        return self._folder / f"{self._numbers.setdefault(key, len(self._numbers))}-{batch}.npy"


class Shelved:
    """A context manager that keeps tensors on a shelf; its temporary folder has what memory cannot hold."""

    _memory: int | None = None
    """The most bytes in memory; None for `MEMORY`."""

    def __enter__(self) -> Self:
        """Make the folder."""
        self._resources = ExitStack()
        self._shelf = Shelf(self._resources.enter_context(scratch()), self._memory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the folder."""
        self._resources.close()
