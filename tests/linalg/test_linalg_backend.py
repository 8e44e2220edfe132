"""Choice of the device, and the order, laziness and determinism of parallel work."""

import sys
import threading
import types

import array_api_compat.numpy
import ml_dtypes
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.errors import InputError
from onnx_lowrank.linalg import backend as backend_module
from onnx_lowrank.linalg.backend import of_each, one_blas_thread, parallel_map, resolve
from onnx_lowrank.linalg.factorize import certify, factorize
from onnx_lowrank.linalg.spectra import spectra

CPU = resolve("cpu")


class FakeCudaError(Exception):
    """Stands for CuPy's own error."""


def fake_cupy(count):
    def device_count():
        if count is None:
            raise FakeCudaError("cudaErrorNoDevice")
        return count

    runtime = types.SimpleNamespace(getDeviceCount=device_count, CUDARuntimeError=FakeCudaError)
    return types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))


@pytest.mark.parametrize(
    ("cupy", "reason"),
    [
        (None, "CuPy is not installed"),
        (fake_cupy(0), "CuPy finds no device"),
        (fake_cupy(None), "CuPy finds no usable device (cudaErrorNoDevice)"),
    ],
)
def test_without_a_device_cuda_is_an_error_and_auto_the_cpu(cupy, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(InputError) as caught:
        resolve("cuda")
    assert reason in str(caught.value)
    assert 'pip install "onnx-lowrank[gpu]"' in str(caught.value)
    assert caught.value.exit_code == 2
    assert resolve("auto") == resolve("cpu")


def test_cpu_is_numpy():
    assert CPU.name == "cpu"
    assert CPU.xp is array_api_compat.numpy


def test_an_unknown_device_is_an_error_that_names_it():
    with pytest.raises(InputError, match="'tpu': choose auto, cpu or cuda"):
        resolve("tpu")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_asarray_is_float64_and_exact(dtype):
    values = np.array([1.5, -2.0, 0.1], dtype)
    array = CPU.asarray(values)
    assert array.dtype == np.float64
    assert array.tolist() == [float(value) for value in values]


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_results_come_in_the_order_of_the_items(workers, count, monkeypatch):
    monkeypatch.setattr(backend_module, "cores", lambda: workers)
    assert list(parallel_map(lambda n: n * n, range(count), CPU)) == [n * n for n in range(count)]


@pytest.mark.parametrize("workers", [1, 3])
def test_items_are_drawn_only_when_their_turn_comes(workers, monkeypatch):
    monkeypatch.setattr(backend_module, "cores", lambda: workers)
    drawn = []

    def items():
        for n in range(50):
            drawn.append(n)
            yield n

    for done, _ in enumerate(parallel_map(lambda n: n, items(), CPU)):
        assert len(drawn) <= done + 2 * workers
    assert len(drawn) == 50


def test_workers_run_at_the_same_time(monkeypatch):
    monkeypatch.setattr(backend_module, "cores", lambda: 3)
    meeting = threading.Barrier(3, timeout=30)
    assert len(list(parallel_map(lambda _: meeting.wait(), range(3), CPU))) == 3


def test_each_task_has_one_blas_thread_and_the_limit_ends_with_the_work():
    def blas_threads(_=None):
        return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]

    with threadpool_limits(limits=2, user_api="blas"):
        before = blas_threads()
        inside = list(parallel_map(blas_threads, range(4), CPU))
        assert inside
        assert all(threads == 1 for task in inside for threads in task)
        assert blas_threads() == before
        leaving = parallel_map(blas_threads, range(9), CPU)
        next(leaving)
        leaving.close()
        assert blas_threads() == before


def test_overlapping_limits_hold_until_the_last_ends_and_restore_the_first_number():
    def blas_threads():
        return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}

    with threadpool_limits(limits=2, user_api="blas"):
        first, second = one_blas_thread(), one_blas_thread()
        first.__enter__()
        second.__enter__()
        assert blas_threads() == {1}
        first.__exit__(None, None, None)
        assert blas_threads() == {1}, "the second is still at work"
        second.__exit__(None, None, None)
        assert blas_threads() == {2}


def test_an_error_in_a_task_reaches_the_caller_and_stops_the_rest(monkeypatch):
    monkeypatch.setattr(backend_module, "cores", lambda: 1)
    started = []

    def fail_at_one(n):
        started.append(n)
        if n == 1:
            raise InputError("one")
        return n

    with pytest.raises(InputError, match="one"):
        list(parallel_map(fail_at_one, range(100), CPU))
    assert max(started) <= 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_have_the_same_bits_whatever_the_number_of_workers(dtype, monkeypatch):
    rng = np.random.default_rng(11)
    shapes = [(1, 48, 96, 3, 3), (1, 130, 64), (2, 40, 24, 3, 3), (1, 64, 128, 1, 1)] * 2
    weights = [rng.standard_normal(shape).astype(dtype) for shape in shapes]

    def job(weight):
        counts = [k for k in (1, 2, 4, 8, 24) if weight.shape[2] % k == 0]
        found = spectra(weight, {Fold.ENCODE: counts, Fold.DECODE: counts}, CPU)
        factors = factorize(weight, Option(Fold.DECODE, 2, 5), CPU)
        arrays = (*found.values(), factors.encoder, factors.decoder)
        return [array.tobytes() for array in arrays], certify(weight, factors)

    results = []
    for workers in (1, 2, 7):
        monkeypatch.setattr(backend_module, "cores", lambda workers=workers: workers)
        results.append(list(parallel_map(job, weights, CPU)))
    assert results[0] == results[1] == results[2]


def test_cuda_goes_one_after_the_other():
    main = threading.current_thread()
    sequential = backend_module.Backend("cuda", array_api_compat.numpy)
    threads = list(parallel_map(lambda _: threading.current_thread(), range(3), sequential))
    assert threads == [main] * 3


@pytest.mark.parametrize("stack", [(), (1,), (3,), (2, 2)])
@pytest.mark.parametrize("size", [4, 300])
def test_matrices_of_a_stack_give_the_same_bits_on_several_cores(stack, size):
    matrices = np.random.default_rng(0).standard_normal((*stack, size, size))
    found = of_each(np.linalg.svdvals, matrices, resolve("cpu"))
    assert (found == np.linalg.svdvals(matrices)).all()
