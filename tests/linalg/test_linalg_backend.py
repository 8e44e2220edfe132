"""Choice of the device, who may use it at a time, and BLAS' threads."""

import logging
import subprocess
import sys
import types
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from devices import fake
from onnx_lowrank.errors import InputError
from onnx_lowrank.linalg.backend import (
    array_namespace,
    eigenvalues,
    eigenvectors,
    of_each,
    one_blas_thread,
    resolve,
    solve_triangular,
)

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
    assert CPU.xp is np


def test_an_unknown_device_is_an_error_that_names_it():
    with pytest.raises(InputError, match="'tpu': choose auto, cpu or cuda"):
        resolve("tpu")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_asarray_is_float64_and_exact(dtype):
    values = np.array([1.5, -2.0, 0.1], dtype)
    array = CPU.asarray(values)
    assert array.dtype == np.float64
    assert array.tolist() == [float(value) for value in values]


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


LATE = """
import sys
from threading import Thread
from threadpoolctl import threadpool_info, threadpool_limits
from onnx_lowrank.linalg.backend import one_blas_thread

def threads():
    return sorted(lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas")

def solve():
    with one_blas_thread(solvers=True):
        assert "scipy.linalg" in sys.modules
        print(*threads())

with threadpool_limits(limits=2, user_api="blas"), one_blas_thread():
    assert "scipy.linalg" not in sys.modules
    if sys.argv[1] == "here":
        solve()
    else:
        thread = Thread(target=solve)
        thread.start()
        thread.join()
    print(*threads())
"""


@pytest.mark.parametrize("where", ["here", "in another thread"])
def test_the_blas_of_solvers_that_are_loaded_late_is_limited_too(where):
    """NumPy and SciPy bring a BLAS each, and threadpoolctl limits only those that are loaded."""
    ran = subprocess.run([sys.executable, "-c", LATE, where], capture_output=True, text=True, check=True)
    numbers = ran.stdout.split()
    assert len(numbers) >= 4
    assert set(numbers) == {"1"}


THREADS = """
from threading import Event, Thread
import scipy.linalg
from threadpoolctl import threadpool_info, threadpool_limits
from onnx_lowrank.linalg.backend import one_blas_thread

def threads():
    return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}

def hold(entered, leave):
    with one_blas_thread():
        entered.set()
        leave.wait()

def started():
    entered, leave = Event(), Event()
    thread = Thread(target=hold, args=(entered, leave), daemon=True)
    thread.start()
    entered.wait()
    return thread, leave

threadpool_limits(limits=2, user_api="blas")
for _ in range(2):
    first, second = started(), started()
    for thread, leave in (first, second):
        assert threads() == {1}, threads()
        leave.set()
        thread.join()
    assert threads() == {2}, threads()
"""


def test_the_last_of_several_threads_restores_the_number_of_threads():
    subprocess.run([sys.executable, "-c", THREADS], check=True)


@pytest.mark.parametrize(("operations", "searched"), [(1e9, False), (1e13, True)])
def test_auto_looks_for_a_gpu_where_the_work_pays(operations, searched, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(0))
    with caplog.at_level(logging.DEBUG, "onnx_lowrank"):
        assert resolve("auto", operations) == CPU
    reason = "CuPy finds no device" if searched else "the work is too small for a GPU"
    assert [record.getMessage() for record in caplog.records] == [f"linear algebra runs on cpu: {reason}"]


@pytest.mark.parametrize("stack", [(), (1,), (3,), (2, 2)])
@pytest.mark.parametrize("size", [4, 300])
def test_matrices_of_a_stack_give_the_same_bits_one_by_one(stack, size):
    counts = []

    def shared(function, number):
        counts.append(number)
        return [function(n) for n in range(number)]

    matrices = np.random.default_rng(0).standard_normal((*stack, size, size))
    whole = of_each(np.linalg.svdvals, matrices, CPU)
    parts = of_each(np.linalg.svdvals, matrices, replace(CPU, shared=shared))
    assert (whole == np.linalg.svdvals(matrices)).all()
    assert (parts == whole).all()
    assert counts == ([int(np.prod(stack))] if size == 300 and np.prod(stack) > 1 else [])


@pytest.mark.parametrize(
    ("stack", "size", "parts"),
    [((2,), 256, 0), ((3,), 256, 2), ((2, 2), 300, 2), ((2,), 501, 2), ((5,), 255, 3), ((9, 2), 120, 3)],
)
def test_threads_get_as_many_matrices_as_pay_and_as_free_the_interpreter(stack, size, parts):
    """501 eigenvalues or more; of 120 rows 8 matrices."""
    counts, sizes = [], []

    def shared(function, number):
        counts.append(number)
        return [function(n) for n in range(number)]

    def values(matrices):
        sizes.append(np.prod(matrices.shape[:-1]))
        return np.linalg.eigvalsh(matrices)

    half = np.random.default_rng(0).standard_normal((*stack, size, size))
    matrices = half @ half.mT
    found = eigenvalues(matrices, replace(CPU, shared=shared), values)
    assert (found == np.linalg.eigvalsh(matrices)).all()
    assert sum(counts) == parts
    assert all(number > 500 for number in sizes[:-1])


@pytest.mark.parametrize("stack", [(), (1,), (3,), (2, 2)])
@pytest.mark.parametrize("size", [4, 300])
def test_eigenvectors_diagonalize_every_matrix(stack, size):
    check_eigenvectors(CPU, stack, size)


@pytest.mark.gpu
@pytest.mark.parametrize("stack", [(), (1,), (3,), (2, 2)])
@pytest.mark.parametrize("size", [4, 300])
def test_a_gpu_solves_small_stacks_and_large_matrices(stack, size, cuda):
    check_eigenvectors(cuda, stack, size)


def check_eigenvectors(backend, stack, size):
    half = np.random.default_rng(1).standard_normal((*stack, size, size))
    matrices = half @ np.swapaxes(half, -1, -2)
    values = backend.to_numpy(eigenvalues(backend.asarray(matrices), backend))
    vectors = backend.to_numpy(eigenvectors(backend.asarray(matrices)))
    assert (np.diff(values) > 0).all()
    np.testing.assert_allclose(
        np.swapaxes(vectors, -1, -2) @ matrices @ vectors,
        values[..., None] * np.eye(size),
        rtol=0,
        atol=1e-10 * np.max(values),
    )


def check_triangular(backend):
    n = 130
    rng = np.random.default_rng(3)
    lower = np.tril(rng.standard_normal((2, n, n)) / n) + np.eye(n)
    right = rng.standard_normal((2, n, 3))
    for transposed in (False, True):
        matrices = np.swapaxes(lower, 1, 2) if transposed else lower
        found = solve_triangular(backend.asarray(lower), backend.asarray(right), transposed=transposed)
        assert array_namespace(found) == backend.xp
        np.testing.assert_allclose(matrices @ backend.to_numpy(found), right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [CPU, fake()], ids=["cpu", "strict"])
def test_triangular_solutions_solve(backend):
    check_triangular(backend)


@pytest.mark.gpu
def test_triangular_solutions_solve_on_a_gpu(cuda):
    check_triangular(cuda)
