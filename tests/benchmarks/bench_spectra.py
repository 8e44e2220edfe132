"""Time of all spectra of `models/zoo.py`'s ResNet-50 against one values-only float32 LAPACK SVD per layer.

Run `python tests/benchmarks/bench_spectra.py [repeats]`. The three jobs are interleaved, so other load on the
machine affects all of them alike, and all run as work items of the same threads. The ratios are medians over
the repeats.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from zoo_layers import zoo_layers

from onnx_lowrank.core.option import Fold
from onnx_lowrank.hardware import cores
from onnx_lowrank.layers.found import Found
from onnx_lowrank.linalg.backend import Backend, resolve
from onnx_lowrank.work.executor import Threads
from onnx_lowrank.work.scoring import WeightItem, singular_values
from onnx_lowrank.work.weights import reference

Job = Callable[[WeightItem, Backend], Any]


def lapack(item: WeightItem, backend: Backend) -> Any:
    """One values-only SVD of the encode fold with k = 1, for every group."""
    weight = item.weight.read()
    return np.linalg.svd(weight.reshape(*weight.shape[:2], -1), compute_uv=False)


def items(found: Found, folds: tuple[Fold, ...]) -> Iterator[WeightItem]:
    """Asks for all spectra that the layers offer in some folds."""
    for binding in found.bindings:
        layer = binding.layer
        wanted = {fold: layer.slices for fold in layer.folds if fold in folds}
        yield WeightItem(reference(found.model, found.walk, binding), wanted)


def seconds(job: Job, found: Found, folds: tuple[Fold, ...], threads: Threads) -> float:
    start = perf_counter()
    for _ in threads.map(job, items(found, folds)):
        pass
    return perf_counter() - start


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(repeats: int) -> None:
    found = zoo_layers("resnet50")
    jobs: dict[str, tuple[Job, tuple[Fold, ...]]] = {
        "SVD, k = 1": (lapack, (Fold.ENCODE,)),
        "encode": (singular_values, (Fold.ENCODE,)),
        "all four folds": (singular_values, tuple(Fold)),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    with Threads(resolve("cpu")) as threads:
        seconds(lapack, found, (), threads)  # the first run pays for page faults and BLAS start-up
        for _ in range(repeats):
            for name, (job, folds) in jobs.items():
                times[name].append(seconds(job, found, folds, threads))
    print(f"CPU {cpu_model()}, {cores()} threads, NumPy {np.__version__}, median of {repeats} runs")
    base = times["SVD, k = 1"]
    for name, run in times.items():
        ratio = median(mine / svd for mine, svd in zip(run, base, strict=True))
        print(f"{name:>16}  {median(run):7.2f} s  {ratio:5.2f} x")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
