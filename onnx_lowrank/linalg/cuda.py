"""CUDA devices, through CuPy."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cupy
import cupyx
import numpy as np
from cupy.cuda import runtime
from cupyx.scipy.linalg import solve_triangular
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Array
from onnx_lowrank.linalg.device import LEAST, Room

__all__ = ["Cuda", "solve_triangular"]

_SHARE = 0.8
"""The share of the free memory that computations may take. Solvers and libraries need the rest."""

_PIECE = 1 << 23
"""Bytes of a buffer of pinned memory."""


class Cuda:
    """The current CUDA device; see `linalg.device.Device`.

    Every thread has a stream and two buffers of pinned memory. While the device copies one buffer, the
    thread fills the other, and other threads compute.
    """

    failures: tuple[type[Exception], ...] = (
        cupy.cuda.memory.OutOfMemoryError,
        runtime.CUDARuntimeError,
        cupy.cuda.cublas.CUBLASError,
        cupy.cuda.cusolver.CUSOLVERError,
        np.linalg.LinAlgError,
    )

    def __init__(self, *, least: int = LEAST, share: float = 1.0) -> None:
        """Use the current device.

        Args:
            least: The least rows and columns of the matrices that it computes.
            share: The share of its free memory that belongs to this process.
        """
        free, _ = runtime.memGetInfo()
        self.least = least
        self.capacity = int(_SHARE * share * free)
        self._room = Room(self.capacity)
        self._first = threading.RLock()
        self._has_kernels = False
        self._own = threading.local()

    @contextmanager
    def lane(self, nbytes: int) -> Iterator[None]:
        """A stream for the calling thread; solvers that do not converge raise `numpy.linalg.LinAlgError`."""
        with self._room.take(nbytes), self._compiled(), self._lane().stream, cupyx.errstate(linalg="raise"):
            yield

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """Let the others wait for the first computation: every thread would compile CuPy's kernels again."""
        if self._has_kernels:
            yield
            return
        with self._first:
            yield
            self._has_kernels = True

    def upload(self, array: NDArray[Any]) -> Array:
        """Copy a C-contiguous array to the device, through pinned memory."""
        target = cupy.empty(array.shape, array.dtype)
        self._lane().send(array.reshape(-1).view(np.uint8), target.data.ptr)
        return target

    def download(self, array: Array) -> NDArray[Any]:
        """Copy an array to the host, through pinned memory."""
        source = cupy.ascontiguousarray(array)
        result = np.empty(source.shape, source.dtype)
        self._lane().receive(source.data.ptr, result.reshape(-1).view(np.uint8))
        return result

    def _lane(self) -> _Lane:
        if not hasattr(self._own, "lane"):
            self._own.lane = _Lane()
        lane: _Lane = self._own.lane
        return lane


class _Lane:
    """The stream and the buffers of one thread."""

    def __init__(self) -> None:
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._buffers = [cupyx.empty_pinned(_PIECE, np.uint8) for _ in range(2)]
        self._done = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]

    def send(self, data: NDArray[np.uint8], address: int) -> None:
        """Copy bytes to an address on the device. The last copy may still run on the current stream."""
        stream = cupy.cuda.get_current_stream()
        for number, begin in enumerate(range(0, len(data), _PIECE)):
            piece = data[begin : begin + _PIECE]
            buffer, done = self._buffers[number % 2], self._done[number % 2]
            done.synchronize()
            buffer[: len(piece)] = piece
            runtime.memcpyAsync(
                address + begin, buffer.ctypes.data, len(piece), runtime.memcpyHostToDevice, stream.ptr
            )
            done.record(stream)

    def receive(self, address: int, data: NDArray[np.uint8]) -> None:
        """Copy bytes from an address on the device."""
        stream = cupy.cuda.get_current_stream()
        pieces = [data[begin : begin + _PIECE] for begin in range(0, len(data), _PIECE)]
        for number in range(len(pieces) + 1):
            if number < len(pieces):
                buffer, done = self._buffers[number % 2], self._done[number % 2]
                done.synchronize()
                source, length = address + number * _PIECE, len(pieces[number])
                runtime.memcpyAsync(
                    buffer.ctypes.data, source, length, runtime.memcpyDeviceToHost, stream.ptr
                )
                done.record(stream)
            if number:
                before = pieces[number - 1]
                self._done[(number - 1) % 2].synchronize()
                before[:] = self._buffers[(number - 1) % 2][: len(before)]
