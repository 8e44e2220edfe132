"""126 layers of 3.3 GiB go through the executor within its bound on memory, without their computation."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from devices import fake
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.work import executor as module
from onnx_lowrank.work.executor import executor
from onnx_lowrank.work.fitting import CertificateItem, FactorsItem
from onnx_lowrank.work.scoring import WeightItem
from onnx_lowrank.work.weights import WeightRef

LAYERS, F, C = 126, 16384, 53248
SLICES = tuple(k for k in range(1, C + 1) if C % k == 0)
WEIGHT = 4 * F * C


def reference(number):
    """A MatMul's float32 weight in a file that is absent."""
    strides = (WEIGHT, 4, 4 * F)
    return WeightRef(Path("absent"), number * WEIGHT, np.dtype(np.float32), (1, F, C), strides, None)


def spectra(number):
    return WeightItem(reference(number), {Fold.ENCODE: SLICES})


def factors(number):
    return FactorsItem(reference(number), Option(Fold.ENCODE, (1, 2, 26)[number % 3], 1024))


def certificates(number):
    return CertificateItem(reference(number), reference(number))


class Memory:
    """Counts the bytes that computations hold, and the results that wait."""

    def __init__(self):
        self._lock = threading.Lock()
        self.held, self.most, self.drawn = 0, 0, 0

    def items(self, make):
        for number in range(LAYERS):
            self.drawn += 1
            yield make(number)

    def compute(self, item, backend):
        with backend.lane(F) as place:
            with self._lock:
                self.held += item.nbytes
                self.most = max(self.most, self.held)
            time.sleep(0.001)
            with self._lock:
                self.held -= item.nbytes
            return place.name, item.nbytes


@pytest.mark.parametrize("make", [spectra, factors, certificates])
@pytest.mark.parametrize("workers", [2, 64])
def test_126_layers_of_3_gib_stay_within_the_bound(make, workers, monkeypatch):
    """1 GiB and 12 times the largest weight, however much memory and however many cores there are."""
    monkeypatch.setattr(module, "free_memory", lambda: 2**42)
    monkeypatch.setattr(module, "cores", lambda: workers)
    memory = Memory()
    with executor(0, resolve("cpu"), WEIGHT) as running:
        for number, (place, nbytes) in enumerate(running.map(memory.compute, memory.items(make))):
            assert place == "cpu"
            # One more is in hand, which has no weight in memory yet.
            assert (memory.drawn - number - 2) * nbytes <= 2**28 + 8 * WEIGHT
    assert memory.drawn == LAYERS
    assert make(0).nbytes >= WEIGHT
    assert make(0).nbytes <= memory.most <= 2**30 + 12 * WEIGHT


@pytest.mark.parametrize(("gib", "together"), [(79, 1), (139, 3)])
def test_a_device_has_no_more_layers_at_once_than_its_memory_holds(gib, together, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda: 2**42)
    monkeypatch.setattr(module, "cores", lambda: 16)
    memory, backend = Memory(), fake(capacity=gib * 2**30 * 4 // 5)
    with executor(0, backend, None) as running:
        found = list(running.map(memory.compute, memory.items(spectra)))
    assert found == [("cuda", spectra(0).nbytes)] * LAYERS
    assert backend.device.lanes == [spectra(0).nbytes] * LAYERS
    assert backend.device.most == together * spectra(0).nbytes <= backend.device.capacity


def test_layers_that_no_device_holds_go_to_the_cpu(monkeypatch, caplog):
    monkeypatch.setattr(module, "free_memory", lambda: 2**42)
    memory, backend = Memory(), fake(capacity=24 * 2**30)
    with executor(0, backend, WEIGHT) as running:
        found = list(running.map(memory.compute, memory.items(spectra)))
    assert found == [("cpu", spectra(0).nbytes)] * LAYERS
    assert "needs 31.7 GiB, and the GPU has room for 24.0 GiB" in caplog.text
