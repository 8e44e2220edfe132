"""A device that is none: it counts bytes and lanes, and holds arrays of the strict array API."""

import threading
from contextlib import contextmanager

import array_api_strict
import numpy as np

from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.linalg.device import Room


class OutOfMemoryError(Exception):
    """Stands for the device's own error."""


class Fake:
    """See `linalg.device.Device`.

    Attributes:
        up: Bytes of every transfer to the device.
        down: Bytes of every transfer from it.
        lanes: Bytes of every lane.
        most: The largest number of bytes in lanes at the same time.
        broken: Whether the next transfers fail for want of memory.
    """

    failures = (OutOfMemoryError, np.linalg.LinAlgError)

    def __init__(self, *, least=1, capacity=2**40):
        self.least, self.capacity = least, capacity
        self.up, self.down, self.lanes = [], [], []
        self.most, self.broken = 0, False
        self._room, self._lock, self._taken = Room(capacity), threading.Lock(), 0

    @contextmanager
    def lane(self, nbytes):
        with self._room.take(nbytes):
            self._count(nbytes)
            try:
                yield
            finally:
                self._count(-nbytes)

    def upload(self, array):
        if self.broken:
            raise OutOfMemoryError("no memory is left")
        assert array.flags.c_contiguous
        self.up.append(array.nbytes)
        return array_api_strict.asarray(array, copy=True)

    def download(self, array):
        result = np.array(array)
        self.down.append(result.nbytes)
        return result

    def _count(self, nbytes):
        with self._lock:
            self._taken += nbytes
            self.most = max(self.most, self._taken)
            if nbytes >= 0:
                self.lanes.append(nbytes)


def fake(**options):
    """A backend on a fake device."""
    return Backend("cuda", array_api_strict, device=Fake(**options))
