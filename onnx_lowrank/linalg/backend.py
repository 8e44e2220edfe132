"""The place of the linear algebra: NumPy on the CPU, or a device for large matrices."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf, prod
from threading import Lock
from typing import Any, TypeVar

import array_api_compat
import numpy as np
import scipy
import threadpoolctl
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Array
from onnx_lowrank.errors import InputError
from onnx_lowrank.linalg.device import Device, packed

_log = logging.getLogger(__name__)

LARGE = 256
"""The least number of rows and columns for which a thread, or a call of a GPU's solver, per matrix pays."""


_LOCKED = 500
"""NumPy keeps the interpreter's lock while it computes results of at most so many numbers: 500 eigenvalues
take 20 ms, in which no other thread runs."""

Shared = Callable[[Callable[[int], Array], int], list[Array]]
"""Applies a function to the numbers 0 … n − 1, in the calling thread and in idle threads."""

R = TypeVar("R")

_PAYS = 5e11
"""The operations of all spectra of a model from which a GPU pays unasked: a few cores do as many while its
libraries load. The number of cores does not count, as it must not change a result."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A place for the linear algebra.

    Attributes:
        name: "cpu" or "cuda".
        xp: Its array API namespace: NumPy, or array-api-compat's CuPy.
        shared: Runs the parts of one task in idle threads, too; None if there are no other threads.
        device: The device that holds arrays; None if the namespace's arrays are those of the host.
        nbytes: Bytes of the device's memory that the current computation takes.
    """

    name: str
    xp: Any
    shared: Shared | None = field(default=None, compare=False, repr=False)
    device: Device | None = field(default=None, compare=False, repr=False)
    nbytes: int = field(default=0, compare=False, repr=False)

    @contextmanager
    def lane(self, size: int) -> Iterator[Backend]:
        """The place for matrices of a size: this one, with room in the device's memory, or the CPU.

        Args:
            size: The smaller number of rows and columns of the largest matrix.
        """
        if self.device is None:
            yield self
        elif size < self.device.least:
            yield self._host()
        else:
            with self.device.lane(self.nbytes):
                yield self

    def attempt(self, function: Callable[[Backend], R], nbytes: int) -> R:
        """Apply a function to this place; to the CPU, with a warning, if the device cannot compute it.

        Args:
            function: Computes something.
            nbytes: Approximate bytes that this takes.
        """
        if self.device is None:
            return function(self)
        if nbytes > self.device.capacity:
            needed, has = nbytes / 2**30, self.device.capacity / 2**30
            reason = f"needs {needed:.1f} GiB, and the GPU has room for {has:.1f} GiB"
        else:
            try:
                return function(replace(self, nbytes=nbytes))
            except self.device.failures as error:
                reason = f"failed on the GPU ({error})"
        _log.warning("A computation %s, so the CPU takes it over.", reason)
        return function(self._host())

    def held(self, array: NDArray[Any]) -> Array:
        """An array of any real dtype where this place computes, without a copy in float64."""
        if self.device is None:
            return array
        contiguous, axes = packed(array)
        return self.xp.permute_dims(self.device.upload(contiguous), axes)

    def asarray(self, array: NDArray[Any]) -> Array:
        """An array of any real dtype where this place computes, as float64."""
        return as_float64(self.held(array))

    def to_numpy(self, array: Array) -> NDArray[Any]:
        """Copy an array to the host, without changing its dtype."""
        if self.device is None or isinstance(array, np.ndarray):
            return np.asarray(array)
        return self.device.download(array)

    def _host(self) -> Backend:
        return Backend("cpu", np, self.shared)


def array_namespace(*arrays: Array) -> Any:
    """The array API namespace of arrays."""
    # NumPy 2 is one itself; array-api-compat's wrapper would import numpy.f2py and numpy.testing, too.
    if all(isinstance(array, np.ndarray) for array in arrays):
        return np
    return array_api_compat.array_namespace(*arrays)


def as_float64(array: Array) -> Array:
    """An array of any real dtype in float64, where it is."""
    if isinstance(array, np.ndarray):
        return array.astype(np.float64, copy=False)
    xp = array_namespace(array)
    return xp.astype(array, xp.float64, copy=False)


def check_device(device: str) -> str:
    """The name of a device, if it can be used.

    Args:
        device: As for `resolve`.

    Raises:
        InputError: The name is unknown, or it is "cuda" and CuPy or a device is missing.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"There is no device {device!r}: choose auto, cpu or cuda.")
    missing = _missing_cuda() if device == "cuda" else None
    if missing is not None:
        raise InputError(
            f"The device 'cuda' cannot be used, because {missing}: install what it needs with "
            '`pip install "onnx-lowrank[gpu]"` on a machine with an NVIDIA GPU, or choose --device cpu.'
        )
    return device


def resolve(device: str, operations: float = inf, *, share: float = 1.0) -> Backend:
    """The backend that `--device` asks for.

    Args:
        device: "cpu", "cuda", or "auto": CUDA if CuPy and a device are available and the work is large enough
            for it, otherwise the CPU.
        operations: Floating-point operations of the work (`linalg.spectra.operations`).
        share: The share of the device's free memory that belongs to this process.

    Raises:
        InputError: As for `check_device`.
    """
    if check_device(device) == "auto":
        missing = "the work is too small for a GPU" if operations < _PAYS else _missing_cuda()
        device = "cpu" if missing else "cuda"
        _log.debug("linear algebra runs on %s%s", device, f": {missing}" if missing else "")
    if device == "cpu":
        return Backend("cpu", np)
    from array_api_compat import cupy

    from onnx_lowrank.linalg.cuda import Cuda

    return Backend("cuda", cupy, device=Cuda(share=share))


def _missing_cuda() -> str | None:
    """The reason why CUDA cannot be used, or None."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no usable device ({error})"
    return None if count else "CuPy finds no device"


def of_each(
    function: Callable[[Array], Array], matrices: Array, backend: Backend, together: int = 1
) -> Array:
    """Apply a function of stacked matrices to a stack, whose parts are shared among idle threads.

    The layer that takes longest runs last and alone, so its slices can share the cores.

    Args:
        function: Maps every matrix of a stack to one array, independently of the others.
        matrices: Shape (..., rows, cols).
        backend: The device of the matrices, with the idle threads.
        together: The number of matrices that a thread takes at once; 1 for large ones alone.
    """
    *stack, rows, cols = matrices.shape
    is_large = min(rows, cols) >= LARGE
    if array_namespace(matrices) is not np:
        if is_large and _is_slow_on_stacks(matrices):
            return _by_parts(function, matrices, in_turn)  # Other threads have no stream of the device.
    elif backend.shared is not None and prod(stack) > together and (is_large or together > 1):
        return _by_parts(function, matrices, backend.shared, together)
    return function(matrices)


def eigenvalues(matrices: Array, backend: Backend, function: Callable[[Array], Array] | None = None) -> Array:
    """The eigenvalues of every symmetric matrix of a stack, ascending, with the idle threads.

    Args:
        matrices: Shape (..., n, n).
        backend: The device of the matrices, with the idle threads.
        function: Computes the eigenvalues of a stack; by default the library's own function.

    Returns:
        Shape (..., n), on the device of the matrices.
    """
    function, size = function or array_namespace(matrices).linalg.eigvalsh, matrices.shape[-1]
    return of_each(function, matrices, backend, max(_LOCKED // size + 1, (LARGE // size) ** 3))


def eigenvectors(matrices: Array) -> Array:
    """The eigenvectors of every symmetric matrix of a stack, as columns, by ascending eigenvalues.

    Args:
        matrices: Shape (..., n, n).

    Returns:
        The same shape, on the device of the matrices.
    """
    if matrices.shape[-1] < LARGE or not _is_slow_on_stacks(matrices):
        return _eigenvectors(matrices)
    return _by_parts(_eigenvectors, matrices, in_turn)


def _eigenvectors(matrices: Array) -> Array:
    return array_namespace(matrices).linalg.eigh(matrices)[1]


def _is_slow_on_stacks(matrices: Array) -> bool:
    # CuPy solves stacks, of one matrix too, with a batched Jacobi method: ten times as slow at n = 512.
    return bool(array_api_compat.is_cupy_array(matrices))


def in_turn(function: Callable[[int], Array], number: int) -> list[Array]:
    """`Shared` without other threads."""
    return [function(n) for n in range(number)]


def _by_parts(function: Callable[[Array], Array], matrices: Array, run: Shared, together: int = 1) -> Array:
    xp = array_namespace(matrices)
    *stack, rows, cols = matrices.shape
    flat = xp.reshape(matrices, (-1, rows, cols))
    if together == 1:  # CuPy solves even a stack of one matrix as it solves stacks.
        results: list[Array] = run(lambda n: function(flat[n, ...])[None, ...], flat.shape[0])
    else:
        parts = range(0, flat.shape[0], together)
        results = run(lambda n: function(flat[parts[n] : parts[n] + together]), len(parts))
    joined = xp.concat(results)
    return xp.reshape(joined, (*stack, *joined.shape[1:]))


def solve_triangular(lower: Array, right: Array, *, transposed: bool = False) -> Array:
    """L⁻¹ B, or L⁻ᵀ B, for every pair of a stack; the array API has no triangular solver.

    Args:
        lower: Lower triangles L, shape (g, n, n).
        right: B, shape (g, n, m).
        transposed: Whether to solve with Lᵀ.

    Returns:
        Shape (g, n, m), on the device of the arguments.
    """
    xp = array_namespace(lower)
    if array_api_compat.is_cupy_array(lower):
        from onnx_lowrank.linalg.cuda import solve_triangular as solve
    else:
        solve, lower, right = scipy.linalg.solve_triangular, np.asarray(lower), np.asarray(right)
    trans = int(transposed)
    pairs = zip(lower, right, strict=True)
    solved = [solve(one, other, trans=trans, lower=True, check_finite=False) for one, other in pairs]
    return xp.stack([xp.asarray(array) for array in solved])


class _BlasLimit:
    """The process-wide limit of BLAS to one thread, with the number of its holders."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._holders = 0
        self._limits: list[threadpoolctl.threadpool_limits] = []
        self._has_solvers = False

    def acquire(self, *, solvers: bool) -> None:
        with self._lock:
            if not self._limits or (solvers and not self._has_solvers):
                if solvers:
                    importlib.import_module("scipy.linalg")
                self._has_solvers = "scipy.linalg" in sys.modules
                _take_control()
                self._limits.append(threadpoolctl.threadpool_limits(limits=1, user_api="blas"))
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            # The limits know the original number of threads; only the last holder may restore it.
            while self._holders == 0 and self._limits:
                _take_control()
                self._limits.pop().restore_original_limits()


def _take_control() -> None:
    """Let the calling thread set limits.

    From threadpoolctl 3.8 on, one thread sets the limits of OpenBLAS, which count for the process, and the
    calls of all others do nothing. Here a lock lets one thread at a time set them.
    """
    clear = getattr(threadpoolctl.OpenBLASController, "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)


_BLAS_LIMIT = _BlasLimit()


@contextmanager
def one_blas_thread(*, solvers: bool = False) -> Iterator[None]:
    """Limit BLAS to one thread in the whole process, so the number of cores does not change any bits.

    BLAS libraries split sums by their number of threads. These contexts may overlap in any order, in several
    threads: the limit holds from the first entry to the last exit.

    Args:
        solvers: Whether SciPy's solvers for dense matrices run. They bring a BLAS of their own, and only a
            library that is loaded can be limited, so it is loaded now.
    """
    _BLAS_LIMIT.acquire(solvers=solvers)
    try:
        yield
    finally:
        _BLAS_LIMIT.release()
