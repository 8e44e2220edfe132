"""Devices with memory of their own: their interface, and the sharing of their memory among threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Array

LEAST = 512
"""The least rows and columns of matrices for a GPU. Eigenvalues of smaller ones take a GPU as long as a CPU
of 16 cores (docs/benchmarks.md), and both work at the same time. It is a constant, because the place of a
computation decides the last bits of its result."""


class Device(Protocol):
    """A device with memory of its own.

    Attributes:
        least: The least rows and columns of the matrices that it computes.
        capacity: Bytes of its memory that computations may take together.
        failures: The errors after which the CPU has to compute instead.
    """

    least: int
    capacity: int
    failures: tuple[type[Exception], ...]

    def lane(self, nbytes: int) -> AbstractContextManager[object]:
        """A stream for the calling thread, as soon as the memory has room.

        Args:
            nbytes: Bytes that the computation takes.
        """

    def upload(self, array: NDArray[Any]) -> Array:
        """Copy a C-contiguous array to the device, without changing its dtype."""

    def download(self, array: Array) -> NDArray[Any]:
        """Copy an array to the host, without changing its dtype."""


class Room:
    """Memory that computations of several threads share; one always runs, even when it exceeds all of it."""

    def __init__(self, capacity: int) -> None:
        """Start with nothing taken.

        Args:
            capacity: Bytes that computations may take together.
        """
        self._capacity = capacity
        self._taken = 0
        self._running = 0
        self._changed = threading.Condition()
        self._own = threading.local()

    @contextmanager
    def take(self, nbytes: int) -> Iterator[None]:
        """Wait for memory, and hold it during the block; a block in a block of the same thread holds none."""
        if getattr(self._own, "holds", False):
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._running or self._taken + nbytes <= self._capacity)
            self._taken, self._running = self._taken + nbytes, self._running + 1
        self._own.holds = True
        try:
            yield
        finally:
            self._own.holds = False
            with self._changed:
                self._taken, self._running = self._taken - nbytes, self._running - 1
                self._changed.notify_all()


def packed(array: NDArray[Any]) -> tuple[NDArray[Any], tuple[int, ...]]:
    """An array in the order of its addresses, in which no copy permutes it: a device does this faster.

    Args:
        array: Any real dtype. Others than float32 and float64 become such, exactly.

    Returns:
        A C-contiguous array, and the permutation of its axes that gives the array.
    """
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32 if array.dtype.itemsize <= 2 else np.float64)
    order = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    inverse = tuple(order.index(axis) for axis in range(array.ndim))
    return np.ascontiguousarray(array.transpose(order)), inverse
