"""Tensors between two parts of a model, on disk."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.scratch import scratch

_GIB = 2**30

Key = tuple[str, bool]
"""A tensor's name, and whether it belongs to the compressed prefix, not to the original model."""


class Shelf:
    """Arrays on disk, a file for each tensor and batch.

    Attributes:
        used: The bytes of all its files.
    """

    def __init__(self, folder: Path) -> None:
        self.used = 0
        self._folder = folder
        self._numbers: dict[Key, int] = {}
        self._dtypes: dict[Key, np.dtype[Any]] = {}

    def put(self, key: Key, batch: int, value: NDArray[Any]) -> None:
        """Write an array.

        Raises:
            InputError: The disk is full.
        """
        try:
            np.save(self._path(key, batch), value, allow_pickle=False)
        except OSError as error:
            raise InputError(
                f"{self._folder.parent} cannot be written ({error.strerror}): make room there, or use fewer "
                "inputs with --calibration-samples."
            ) from error
        self._dtypes[key] = value.dtype
        self.used += self._path(key, batch).stat().st_size

    def get(self, key: Key, batch: int) -> NDArray[Any]:
        """Read an array."""
        array: NDArray[Any] = np.load(self._path(key, batch), allow_pickle=False)
        # A file keeps the bits of bfloat16, but not its name.
        return array.view(self._dtypes[key]) if array.dtype.kind == "V" else array

    def drop(self, key: Key, batch: int) -> None:
        """Delete an array."""
        path = self._path(key, batch)
        self.used -= path.stat().st_size
        path.unlink()

    def require(self, further: int) -> None:
        """Check that the disk has room.

        Args:
            further: The bytes still to write.

        Raises:
            InputError: The disk has less room.
        """
        free = shutil.disk_usage(self._folder).free
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
    """A context manager that keeps tensors on a shelf in a temporary folder."""

    def __enter__(self) -> Self:
        """Make the folder."""
        self._resources = ExitStack()
        self._shelf = Shelf(self._resources.enter_context(scratch()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the folder."""
        self._resources.close()
