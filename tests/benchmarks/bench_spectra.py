"""Time of all spectra of ResNet-50 against one values-only float32 LAPACK SVD per layer.

Run `python tests/benchmarks/bench_spectra.py [repeats]`. The three jobs are interleaved, so that other
load on the machine meets them alike, and all go through the same `parallel_map`. The ratios are medians
over the repeats.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.linalg.backend import Backend, parallel_map, resolve
from onnx_lowrank.linalg.spectra import spectra
from onnx_lowrank.types import Fold

Weight = NDArray[np.float32]
Job = Callable[[Weight], Any]


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Canonical shapes (g, f, c, *kernel) of the 54 weights of ResNet-50."""
    shapes: list[tuple[int, ...]] = [(1, 64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(1, width, channels, 1, 1), (1, width, width, 3, 3), (1, 4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((1, 4 * width, channels, 1, 1))
            channels = 4 * width
    return [*shapes, (1, 1000, 2048)]


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def lapack(weight: Weight) -> Any:
    """One values-only SVD of the encode fold with k = 1."""
    return np.linalg.svd(weight.reshape(weight.shape[1], -1), compute_uv=False)


def encode(backend: Backend) -> Job:
    return lambda weight: spectra(weight, {Fold.ENCODE: divisors(weight.shape[2])}, backend)


def all_folds(backend: Backend) -> Job:
    def job(weight: Weight) -> Any:
        counts = divisors(weight.shape[2])
        return spectra(weight, dict.fromkeys(Fold.distinct(weight.shape[3:]), counts), backend)

    return job


def seconds(job: Job, weights: list[Weight], backend: Backend) -> float:
    start = perf_counter()
    for _ in parallel_map(job, weights, backend):
        pass
    return perf_counter() - start


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(repeats: int) -> None:
    rng = np.random.default_rng(50)
    weights = [rng.standard_normal(shape, dtype=np.float32) for shape in resnet50_shapes()]
    backend = resolve("cpu")
    jobs = {"SVD, k = 1": lapack, "encode": encode(backend), "all four folds": all_folds(backend)}
    seconds(lapack, weights, backend)  # the first run pays for page faults and BLAS start-up
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            times[name].append(seconds(job, weights, backend))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"CPU {cpu_model()}, {cores} threads, NumPy {np.__version__}, median of {repeats} runs")
    base = times["SVD, k = 1"]
    for name, run in times.items():
        ratio = median(mine / svd for mine, svd in zip(run, base, strict=True))
        print(f"{name:>16}  {median(run):7.2f} s  {ratio:5.2f} x")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
