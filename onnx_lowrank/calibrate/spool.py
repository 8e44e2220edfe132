"""Feeds on disk, because an iterable gives them only once."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.scratch import temporary_folder, unnamed

_SPARE_BYTES = 2**26


class Spool:
    """Feeds in a temporary file instead of memory; `close` deletes the file."""

    def __init__(self, names: Iterable[str]) -> None:
        """Open the file in the system's temporary folder.

        Args:
            names: The names in every feed.
        """
        self._names = tuple(names)
        self._file = unnamed()
        self._offsets: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, feed: Mapping[str, NDArray[Any]], where: str) -> None:
        """Append one feed.

        Args:
            feed: An array for every name.
            where: The name of the feed in errors.

        Raises:
            InputError: The disk has no room for it.
        """
        # Strings arrive as objects, which NumPy would pickle.
        arrays = [a.astype(str) if a.dtype.kind == "O" else a for a in map(feed.__getitem__, self._names)]
        folder = temporary_folder()
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
        """The feed with this number."""
        self._file.seek(self._offsets[number])
        return {name: np.lib.format.read_array(self._file, allow_pickle=False) for name in self._names}

    def close(self) -> None:
        """Delete the file."""
        self._file.close()
