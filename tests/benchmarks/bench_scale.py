"""Predicted time and memory for large language models, from measured rates.

    python tests/benchmarks/bench_scale.py --measure [--json FILE]   # the rates of a machine, and of its GPU
    python tests/benchmarks/bench_scale.py [--json FILE]             # the tables of docs/scale.md

The rates are seconds of eigenvalues and eigenvectors of one matrix by its size, float64 operations per second
of products, and bytes per second of transfers. The tables apply them to every matrix that a run needs:

- spectra: a product of 2 n² m operations for a Gram matrix that follows from no other, and k eigenproblems
  of n = min(f, c / k) rows for all k slices. A GPU solves those of at least 512 rows, the host the others.
  Items that are larger than the GPU's memory are the host's.
- factors, of one slice at half of the parameters: a Gram matrix, its eigenvectors, a product of 2 n m j.
- certificates, on the host: two Gram matrices, of the weight and of the residual.

One GPU works beside its host, so the longer of their times counts. W workers take 1 / W of all layers, and
one largest layer that comes last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from bench_spectra import cpu_model

from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.hardware import cores
from onnx_lowrank.linalg.backend import Backend, one_blas_thread, resolve
from onnx_lowrank.linalg.certificate import certify
from onnx_lowrank.linalg.device import LEAST
from onnx_lowrank.linalg.factorize import factorize
from onnx_lowrank.linalg.spectra import spectra
from onnx_lowrank.work.fitting import FactorsItem
from onnx_lowrank.work.scoring import WeightItem
from onnx_lowrank.work.weights import WeightRef

RESULTS = Path(__file__).parent / "results" / "rates.json"
_LONG = 1.0
SHARE = 0.8  # as in `linalg.cuda`, which needs CuPy
_HOST, _GPU = (64, 128, 256, 512, 1024, 2048, 4096), (512, 1024, 2048, 4096, 8192, 16384)

Rates = Mapping[str, Any]


@dataclass(frozen=True)
class Transformer:
    """A decoder: its number of layers, and the shapes (c, f) of a layer's matrices and of the tables."""

    name: str
    layers: int
    matrices: tuple[tuple[int, int], ...]
    tables: tuple[tuple[int, int], ...]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """All shapes, each as often as it occurs."""
        return [*self.matrices * self.layers, *self.tables]


def llama(name: str, layers: int, width: int, hidden: int, keys: int, words: int) -> Transformer:
    """A decoder of Llama's kind."""
    attention = ((width, width), (width, keys), (width, keys), (width, width))
    table = (words, width), (width, words)
    return Transformer(name, layers, (*attention, (width, hidden), (width, hidden), (hidden, width)), table)


MODELS = (
    llama("7B", 32, 4096, 11008, 4096, 32000),
    llama("70B", 80, 8192, 28672, 1024, 128256),
    llama("405B", 126, 16384, 53248, 1024, 128256),
)


def reference(c: int, f: int) -> WeightRef:
    """A float32 matrix in a file that nobody reads."""
    return WeightRef(Path("absent"), 0, np.dtype(np.float32), (1, f, c), (4 * f * c, 4, 4 * f), None)


def divisors(n: int) -> tuple[int, ...]:
    """All numbers of slices."""
    return tuple(k for k in range(1, n + 1) if n % k == 0)


def item(c: int, f: int) -> WeightItem:
    """Asks for all spectra of a matrix."""
    return WeightItem(reference(c, f), {Fold.ENCODE: divisors(c)})


def option(c: int, f: int) -> Option:
    """One slice at half of the parameters."""
    return Option(Fold.ENCODE, 1, max(1, c * f // 2 // (c + f)))


# --- rates ---------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object], wait: Callable[[], object] = lambda: None) -> float:
    """The time of a run, the second one if it is short: the first one loads libraries."""
    taken = 0.0
    for _ in range(2):
        if taken < _LONG:
            start = perf_counter()
            function()
            wait()
            taken = perf_counter() - start
    return taken


def symmetric(n: int) -> Any:
    """A Gram matrix of normal numbers as the weight of one slice of 2 n columns: shape (1, n, 2 n)."""
    return np.random.default_rng(n).standard_normal((1, n, 2 * n), np.float32)


def host_rates() -> dict[str, Any]:
    """The rates of one core, with one BLAS thread as in a run."""
    cpu = resolve("cpu")
    found: dict[str, Any] = {"name": cpu_model(), "cores": cores(), "values": {}, "vectors": {}}
    with one_blas_thread(solvers=True):
        square = np.random.default_rng(0).standard_normal((2048, 2048))
        found["flops"] = 2 * 2048**3 / seconds(lambda: square @ square)
        for n in _HOST:
            weight = symmetric(n)
            gram = 4 * n**3 / found["flops"]
            found["values"][n] = seconds(lambda w=weight: spectra(w, {Fold.ENCODE: (1,)}, cpu)) - gram
            half = Option(Fold.ENCODE, 1, n // 2)
            whole = seconds(lambda w=weight, o=half: factorize(w, o, cpu))
            found["vectors"][n] = whole - gram - 2 * n**3 / found["flops"]
        weight = symmetric(2048)
        factors = factorize(weight, Option(Fold.ENCODE, 1, 512), cpu).astype(np.dtype(np.float32))
        found["certified"] = 2 * 2 * 2048**2 * 4096 / seconds(lambda: certify(weight, factors))
    return found


def gpu_rates(backend: Backend) -> dict[str, Any]:
    """The rates of the GPU."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    wait = cupy.cuda.Device().synchronize
    found: dict[str, Any] = {"name": properties["name"].decode(), "memory": properties["totalGlobalMem"]}
    square = cupy.random.default_rng(0).standard_normal((8192, 8192))
    found["flops"] = 2 * 8192**3 / seconds(lambda: square @ square, wait)
    found["values"], found["vectors"] = {}, {}
    for n in _GPU:
        matrix = cupy.random.default_rng(n).standard_normal((n, n))
        matrix = matrix @ matrix.T
        found["values"][n] = seconds(lambda m=matrix: cupy.linalg.eigvalsh(m), wait)
        found["vectors"][n] = seconds(lambda m=matrix: cupy.linalg.eigh(m), wait)
    weight = np.ones((8192, 8192), np.float32)
    with backend.lane(8192) as place:
        found["upload"] = weight.nbytes / seconds(lambda: place.held(weight), wait)
    return found


def measure() -> dict[str, Any]:
    """The rates of this machine."""
    rates: dict[str, Any] = {"host": host_rates()}
    backend = resolve("auto")
    if backend.device is not None:
        rates["gpu"] = gpu_rates(backend)
    return rates


# --- predictions ---------------------------------------------------------------------------------------


def at(table: Mapping[str, float], n: int) -> float:
    """Seconds of a size: a power law between two measured sizes, and the cube of the size beyond the last."""
    sizes = sorted(map(int, table))
    if n >= sizes[-1]:
        return table[str(sizes[-1])] * (n / sizes[-1]) ** 3
    if n <= sizes[0]:
        return table[str(sizes[0])] * n / sizes[0]
    return exp(np.interp(log(n), [log(size) for size in sizes], [log(table[str(size)]) for size in sizes]))


@dataclass(frozen=True)
class Cost:
    """Seconds of a GPU, and of one core of the host."""

    gpu: float = 0.0
    core: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.gpu + other.gpu, self.core + other.core)


def spectra_cost(c: int, f: int, rates: Rates, *, with_gpu: bool) -> Cost:
    """All spectra of one matrix."""
    sizes = {k: min(f, c // k) for k in divisors(c)}
    products = 2 * f * c * max(sizes.values())
    with_gpu = with_gpu and item(c, f).nbytes <= SHARE * rates["gpu"]["memory"]
    on_gpu = {k: n for k, n in sizes.items() if with_gpu and n >= LEAST}
    core = sum(k * at(rates["host"]["values"], n) for k, n in sizes.items() if k not in on_gpu and n > 1)
    if not on_gpu:
        return Cost(core=core + products / rates["host"]["flops"])
    gpu = sum(k * at(rates["gpu"]["values"], n) for k, n in on_gpu.items())
    return Cost(gpu + products / rates["gpu"]["flops"] + 4 * c * f / rates["gpu"]["upload"], core)


def factors_cost(c: int, f: int, rates: Rates, *, with_gpu: bool) -> Cost:
    """The factors of one slice at half of the parameters, and their certificate."""
    n, m, j = min(c, f), max(c, f), option(c, f).j
    certificate = Cost(core=2 * 2 * n**2 * m / rates["host"]["certified"])
    place = rates["gpu"] if with_gpu and n >= LEAST else rates["host"]
    work = (2 * n**2 * m + 2 * n * m * j) / place["flops"] + at(place["vectors"], n)
    return certificate + (Cost(gpu=work) if place is not rates["host"] else Cost(core=work))


def duration(cost: Cost, number: int) -> float:
    """Seconds on a GPU and its host, which work at the same time."""
    return max(cost.gpu, cost.core / number)


def memory(shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """Bytes of the largest weight, and of the largest item."""
    weights = [reference(*shape).nbytes for shape in shapes]
    factors = [FactorsItem(reference(*shape), option(*shape)).nbytes for shape in shapes]
    return max(weights), max(*(item(*shape).nbytes for shape in shapes), *factors)


def layer_table(rates: Rates) -> str:
    """The cost of single matrices."""
    lines = ["| matrix | spectra, GPU + cores | spectra, cores | factors, GPU | certificate, cores | bytes |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for c, f in ((4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192), (16384, 16384), (53248, 16384)):
        both, alone = (spectra_cost(c, f, rates, with_gpu=gpu) for gpu in (True, False))
        factors = factors_cost(c, f, rates, with_gpu=True)
        needed = memory([(c, f)])[1] / 2**30
        lines.append(
            f"| {f:,} × {c:,} | {both.gpu:,.1f} s + {both.core:,.1f} s | {alone.core:,.0f} s "
            f"| {factors.gpu:,.1f} s | {factors.core:,.1f} s | {needed:.1f} GiB |"
        )
    return "\n".join(lines)


def model_table(rates: Rates) -> str:
    """Time and memory of whole models."""
    number = rates["host"]["cores"]
    lines = [
        "| model | float32 | one GPU: spectra + the rest | 8 GPUs | one host | 8 hosts | items in memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in MODELS:
        size = sum(4 * c * f for c, f in model.shapes) / 2**30
        cells = []
        for with_gpu in (True, False):
            stages = [
                [cost(*shape, rates, with_gpu=with_gpu) for shape in model.shapes]
                for cost in (spectra_cost, factors_cost)
            ]
            one = [duration(sum(costs, Cost()), number) for costs in stages]
            last = sum(max(duration(cost, number) for cost in costs) for costs in stages)
            cells += [f"{hours(one[0])} + {hours(one[1])}", hours(sum(one) / 8 + last)]
        weight, largest = memory(model.shapes)
        held = max(largest, 2**28 + 8 * weight) / 2**30
        lines.append(f"| {model.name} | {size:,.0f} GiB | {' | '.join(cells)} | {held:.1f} GiB |")
    return "\n".join(lines)


def hours(duration: float) -> str:
    """A time in minutes, or in hours from two hours on."""
    return f"{duration / 60:.0f} min" if duration < 7200 else f"{duration / 3600:.1f} h"


def main() -> None:
    """Measure, or print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="measure the rates, and write them")
    parser.add_argument("--json", type=Path, default=RESULTS, help="the file of the rates")
    options = parser.parse_args()
    if options.measure:
        options.json.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    rates = json.loads(options.json.read_text(encoding="utf-8"))
    if "gpu" in rates:
        print(layer_table(rates), model_table(rates), sep="\n\n")


if __name__ == "__main__":
    main()
