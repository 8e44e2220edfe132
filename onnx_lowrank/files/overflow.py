"""Arrays of which some are in memory, and the others in a temporary file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import IO, Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.scratch import discard, temporary_folder, unnamed

Held = Callable[[], NDArray[Any]]
"""Gives an array, read again from the file if it is there."""


class Overflow:
    """Takes arrays: the first ones stay in memory, the others go to a file without a name."""

    def __init__(self, most: int) -> None:
        """Take arrays; there is no file before it is needed.

        Args:
            most: The bytes that stay in memory.
        """
        self._left = most
        self._file: IO[bytes] | None = None

    def put(self, array: NDArray[Any]) -> Held:
        """Take an array of numbers.

        Raises:
            InputError: The disk is full.
        """
        if array.nbytes <= self._left:
            self._left -= array.nbytes
            return lambda: array
        try:
            if self._file is None:
                self._file = unnamed()
                finalize(self, discard, self._file)
            offset = self._file.seek(0, 2)
            self._file.write(np.ascontiguousarray(array).data)
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{temporary_folder()} cannot be written ({error.strerror}): make room there, or set "
                "TMPDIR to a larger disk."
            ) from error
        return partial(_read, self, self._file, offset, array.shape, array.dtype)


def _read(
    owner: Overflow, file: IO[bytes], offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Read an array; its owner is an argument so that it keeps the file open."""
    array: NDArray[Any] = np.empty(shape, dtype)
    file.seek(offset)
    file.readinto(array.reshape(-1).view(np.uint8).data)  # type: ignore[attr-defined]
    return array
