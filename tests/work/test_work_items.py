"""Work items: the same bits wherever they run, small where they travel, and no larger than they say."""

from __future__ import annotations

import pickle
import threading
import tracemalloc
from dataclasses import fields, is_dataclass

import numpy as np
import pytest

from devices import fake
from onnx_lowrank.core.factors import Moments
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.linalg.backend import one_blas_thread, resolve
from onnx_lowrank.linalg.certificate import certify
from onnx_lowrank.work.executor import Processes, Threads
from onnx_lowrank.work.fitting import CertificateItem, DenseItem, FactorsItem, certificate, dense, fitted
from onnx_lowrank.work.moments import MomentsRef
from onnx_lowrank.work.scoring import ActivationItem, WeightItem, activation_errors, singular_values
from onnx_lowrank.work.weights import refer

CPU = resolve("cpu")
OPTIONS = [Option(Fold.ENCODE, 1, 4), Option(Fold.ENCODE, 2, 3), Option(Fold.DECODE, 1, 4)]


def weight_of(shape, seed=0, dtype=np.float32, folder=None):
    """A reference to a weight, inline or in a file of the folder."""
    array = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    if folder is None:
        return refer(array)
    path = folder / f"{seed}.data"
    path.write_bytes(array.tobytes())
    return refer(np.asarray(np.memmap(path, dtype, "r", 0, shape)))


def moments_of(folder, g, n, of_outputs=False, number=0, count=500):
    """Moments of drawn vectors, and of held-out ones."""
    rng = np.random.default_rng(5)
    shares = []
    for _ in range(2):
        x = rng.standard_normal((g, count, n)) * np.linspace(0.1, 2, n) + 1
        centred = x - x.mean(axis=1, keepdims=True)
        shares.append(Moments(count, x.mean(axis=1), np.swapaxes(centred, 1, 2) @ centred / count))
    made = MomentsRef(folder, number, of_outputs)
    made.write(*shares)
    return made


def every_item(folder):
    """Items of all kinds, each with the function that computes it."""
    folder.mkdir(exist_ok=True)
    weight, grouped = weight_of((1, 12, 8, 3, 3)), weight_of((2, 6, 8), 1, np.float16)
    inputs, outputs = moments_of(folder, 1, 72), moments_of(folder, 1, 12, of_outputs=True, number=1)
    scaled = refer(weight.read(), np.linspace(0.5, 2, 12))
    tops = {(Fold.ENCODE, 1): 12, (Fold.ENCODE, 2): 10, (Fold.DECODE, 4): 2}
    yield singular_values, WeightItem(weight, {Fold.ENCODE: (1, 2, 8), Fold.ROWS: (1,)})
    yield singular_values, WeightItem(scaled, {Fold.ENCODE: (1, 4)})
    yield singular_values, WeightItem(grouped, {Fold.ENCODE: (1, 2)})
    yield activation_errors, ActivationItem(weight, inputs, True, tops)
    yield activation_errors, ActivationItem(weight, outputs, False, tops)
    for option in OPTIONS:
        yield fitted, FactorsItem(scaled, option)
        yield fitted, FactorsItem(weight, option, inputs, centred=True)
    yield dense, DenseItem(weight, tuple(OPTIONS), inputs, centred=True)
    yield dense, DenseItem(weight, tuple(OPTIONS), outputs, centred=True, added=np.ones(12))
    yield fitted, FactorsItem(weight, OPTIONS[0], outputs, centred=True, added=np.arange(12.0))
    factors = fitted(FactorsItem(weight, OPTIONS[1]), CPU).factors
    yield certificate, CertificateItem(weight, factors)


def bits(value):
    """All numbers of a result."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, list):
        return [bits(part) for part in value]
    if is_dataclass(value):
        return {field.name: bits(getattr(value, field.name)) for field in fields(value)}
    return value


def test_results_have_the_same_bits_in_every_executor(tmp_path):
    items = list(every_item(tmp_path / "moments"))
    with one_blas_thread():
        wanted = [bits(function(item, CPU)) for function, item in items]
    with Threads(CPU, number=3) as threads, Processes(2, CPU) as processes:
        for running in (threads, processes):
            results = [next(running.map(function, [item])) for function, item in items]
            assert [bits(result) for result in results] == wanted


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_have_the_same_bits_whatever_the_number_of_threads(dtype):
    shapes = [(1, 48, 96, 3, 3), (1, 130, 64), (2, 40, 24, 3, 3), (1, 64, 128, 1, 1)] * 2
    weights = [weight_of(shape, seed, dtype) for seed, shape in enumerate(shapes)]
    wanted = []
    for _, _, channels, *_ in shapes:
        counts = tuple(k for k in (1, 2, 4, 8, 24) if channels % k == 0)
        wanted.append({Fold.ENCODE: counts, Fold.DECODE: counts})
    results = []
    for number in (1, 2, 7):
        with Threads(CPU, number=number) as running:
            spectra = running.map(singular_values, map(WeightItem, weights, wanted))
            factors = running.map(fitted, (FactorsItem(w, Option(Fold.DECODE, 2, 5)) for w in weights))
            results.append([bits(result) for result in (*spectra, *factors)])
    assert results[0] == results[1] == results[2]


def test_items_of_external_weights_are_small(tmp_path):
    """What is large stays on disk: the weight, and the moments."""
    size = 4096
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(4 * size * size)
    weight = refer(np.asarray(np.memmap(path, np.float32, "r", 0, (1, size, size))))
    counts = tuple(2**n for n in range(13))
    moments = MomentsRef(tmp_path, 3, of_outputs=False)
    for item in (
        WeightItem(weight, {Fold.ENCODE: counts}),
        ActivationItem(weight, moments, True, {(Fold.ENCODE, k): size // k for k in counts}),
        FactorsItem(weight, Option(Fold.ENCODE, 2, 100), moments, centred=True),
    ):
        assert len(pickle.dumps(item)) < 4096
        assert item.nbytes > 4 * size * size


def test_slice_counts_are_tried_until_one_pays_nowhere(tmp_path):
    rng = np.random.default_rng(3)
    moments = moments_of(tmp_path, 1, 16)
    counts = (1, 2, 4, 8)
    tops = {(Fold.ENCODE, k): 16 // k for k in counts}

    def tried(weight):
        return activation_errors(ActivationItem(refer(weight), moments, True, tops), CPU).relative

    low = rng.standard_normal((1, 12, 3)) @ rng.standard_normal((1, 3, 16))
    assert list(tried(low)) == [(Fold.ENCODE, 1), (Fold.ENCODE, 2)]
    # Every quarter of the columns has rank 1: four slices of rank 1 are exact, where one needs rank 4.
    quarters = rng.standard_normal((1, 12, 4, 1)) * rng.standard_normal((1, 1, 4, 4))
    found = tried(quarters.reshape(1, 12, 16))
    assert list(found) == list(tops)
    assert found[Fold.ENCODE, 4][1] < 1e-9
    assert found[Fold.ENCODE, 1][3] > 1e-3


def spectra_case(shape, wanted):
    return lambda folder: (singular_values, WeightItem(weight_of(shape), wanted))


def errors_case(shape, length, tops, of_outputs=False):
    return lambda folder: (
        activation_errors,
        ActivationItem(weight_of(shape), moments_of(folder, 1, length, of_outputs), True, tops),
    )


def factors_case(shape, option, length=None):
    def case(folder):
        if length is None:
            return fitted, FactorsItem(weight_of(shape), option)
        return fitted, FactorsItem(weight_of(shape), option, moments_of(folder, 1, length), centred=True)

    return case


def certificate_case(folder):
    weight = weight_of((1, 512, 512))
    factors = fitted(FactorsItem(weight, Option(Fold.ENCODE, 1, 100)), CPU).factors
    return certificate, CertificateItem(weight, factors)


CASES = {
    "wide spectra": spectra_case((1, 64, 2048), {Fold.ENCODE: (1, 2, 4, 8)}),
    "tall spectra": spectra_case((1, 2048, 64), {Fold.ENCODE: (1, 2, 64)}),
    "spectra of a convolution": spectra_case((1, 128, 64, 3, 3), dict.fromkeys(Fold, (1, 2, 4, 8))),
    "errors": errors_case((1, 64, 512), 512, {(Fold.ENCODE, k): 60 for k in (1, 2, 4)}),
    "errors of a convolution": errors_case((1, 48, 48, 3, 3), 432, {(fold, 1): 40 for fold in Fold}),
    "errors of outputs": errors_case((1, 512, 600), 512, {(Fold.ENCODE, 1): 60}, of_outputs=True),
    "factors": factors_case((1, 512, 512), Option(Fold.ENCODE, 1, 100)),
    "factors of slices": factors_case((1, 64, 2048), Option(Fold.ENCODE, 8, 20)),
    "fitted factors": factors_case((1, 64, 512), Option(Fold.ENCODE, 2, 20), 512),
    "certificate": certificate_case,
}


@pytest.mark.parametrize("name", CASES)
def test_an_item_takes_about_the_bytes_that_it_says(tmp_path, name):
    """What NumPy allocates for it; LAPACK's own is not seen, and in the estimate."""
    function, item = CASES[name](tmp_path)
    tracemalloc.start()
    try:
        function(item, CPU)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= item.nbytes <= 4 * peak


def test_all_threads_certify_at_once_while_each_fits_alone(monkeypatch):
    """The memory of a GPU that holds one layer is for one at a time; what the host does is not."""
    meeting = threading.Barrier(3, timeout=30)

    def certified(weight, factors, shared):
        meeting.wait()
        return certify(weight, factors, shared)

    monkeypatch.setattr("onnx_lowrank.work.fitting.certify", certified)
    items = [FactorsItem(weight_of((1, 40, 30), seed), Option(Fold.ENCODE, 1, 5)) for seed in range(3)]
    backend = fake(capacity=items[0].nbytes)
    with Threads(backend, number=3) as running:
        made = list(running.map(fitted, items))
    assert backend.device.lanes == [item.nbytes for item in items]
    assert backend.device.most == items[0].nbytes
    assert backend.device.up == [item.weight.nbytes for item in items]
    for item, layer in zip(items, made, strict=True):
        assert layer.certificate == certify(item.weight.read(), layer.factors)
