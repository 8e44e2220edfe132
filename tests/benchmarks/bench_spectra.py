"""Time of all spectra of `models/zoo.py`'s ResNet-50 against one values-only float32 LAPACK SVD per layer.

Run `python tests/benchmarks/bench_spectra.py [repeats]`. The three jobs are interleaved, so that other
load on the machine meets them alike, and all go through the same `parallel_map`. The ratios are medians
over the repeats.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from zoo_layers import zoo_layers

from onnx_lowrank.core.option import Fold
from onnx_lowrank.layers.find import Binding
from onnx_lowrank.layers.found import Found, prepared
from onnx_lowrank.linalg.backend import Backend, parallel_map, resolve
from onnx_lowrank.linalg.spectra import spectra

Job = Callable[[Found, Binding], Any]


def lapack(found: Found, binding: Binding) -> Any:
    """One values-only SVD of the encode fold with k = 1, for every group."""
    weight, _ = prepared(found, binding)
    return np.linalg.svd(weight.reshape(*weight.shape[:2], -1), compute_uv=False)


def ours(folds: tuple[Fold, ...], backend: Backend) -> Job:
    """All spectra that a layer offers in some folds."""

    def job(found: Found, binding: Binding) -> Any:
        layer = binding.layer
        weight, dtype = prepared(found, binding)
        return spectra(weight, {fold: layer.slices for fold in layer.folds if fold in folds}, backend, dtype)

    return job


def seconds(job: Job, found: Found, backend: Backend) -> float:
    start = perf_counter()
    for _ in parallel_map(partial(job, found), found.bindings, backend):
        pass
    return perf_counter() - start


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(repeats: int) -> None:
    found = zoo_layers("resnet50")
    backend = resolve("cpu")
    jobs = {
        "SVD, k = 1": lapack,
        "encode": ours((Fold.ENCODE,), backend),
        "all four folds": ours(tuple(Fold), backend),
    }
    seconds(lapack, found, backend)  # the first run pays for page faults and BLAS start-up
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            times[name].append(seconds(job, found, backend))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"CPU {cpu_model()}, {cores} threads, NumPy {np.__version__}, median of {repeats} runs")
    base = times["SVD, k = 1"]
    for name, run in times.items():
        ratio = median(mine / svd for mine, svd in zip(run, base, strict=True))
        print(f"{name:>16}  {median(run):7.2f} s  {ratio:5.2f} x")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
