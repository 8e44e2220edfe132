"""Times of the linear algebra on a GPU, against NumPy on the same host and CuPy's own SVD.

    python tests/benchmarks/bench_gpu.py [--models …] [--jobs …] [--limit 60]

The layers are those of `models/zoo.py`'s networks at full size, and one matrix of 8192 × 28672, as a large
language model has it. The jobs:

- `cuda`: the singular values of all folds and all numbers of slices, as the program computes them on a GPU.
- `numpy`: the same on the CPU, on all cores.
- `cupy-svd`: CuPy's values-only float64 SVD in a loop over layers, folds and numbers of slices.
- `command-cuda`, `command-cpu`: the whole command at ratio 0.5, validation included.

A loop over layers stops at the limit; then the JSON has the share of the layers that it did. Beside the times
stands the floor: the operations of the Gram matrices (n² m) and of their tridiagonal forms (4/3 n³; G. Golub
and C. Van Loan, Matrix Computations, 4th ed., section 8.3), over the measured rate of a float64 product.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
from bench_spectra import cpu_model
from onnx import TensorProto, helper, numpy_helper
from scores import CHECKOUT
from zoo_layers import zoo_layers

from onnx_lowrank.core.option import Fold
from onnx_lowrank.files.load import load
from onnx_lowrank.hardware import cores
from onnx_lowrank.layers.found import Found, find_layers
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.linalg.device import LEAST
from onnx_lowrank.linalg.folding import fold as fold_slices
from onnx_lowrank.linalg.spectra import operations
from onnx_lowrank.work.executor import Threads
from onnx_lowrank.work.scoring import WeightItem, singular_values
from onnx_lowrank.work.weights import refer, reference

RESULTS = Path(__file__).parent / "results" / "gpu.json"
WIDE = (8192, 28672)
MODELS = ("resnet50", "bert_base", "vit_b_16", "vgg16", "wide")
JOBS = ("cuda", "cupy-svd", "numpy", "command-cuda", "command-cpu")


def wide() -> onnx.ModelProto:
    """One MatMul of 28672 × 8192."""
    rows, cols = WIDE
    weight = np.random.default_rng(0).standard_normal((cols, rows), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "wide")],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, cols])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, rows])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def found(name: str) -> Found:
    """The layers of one of the models."""
    return find_layers(load(wide()), {}, (), ()) if name == "wide" else zoo_layers(name)


def items(layers: Found) -> list[WeightItem]:
    """Asks for every spectrum of every layer."""
    return [
        WeightItem(
            reference(layers.model, layers.walk, binding),
            dict.fromkeys(binding.layer.folds, binding.layer.slices),
        )
        for binding in layers.bindings
    ]


def by_svd(item: WeightItem) -> None:
    """CuPy's values-only SVD of every fold and number of slices."""
    import cupy

    array = cupy.asarray(item.weight.read().astype(np.float64))
    for fold, counts in item.wanted.items():
        for k in counts:
            cupy.linalg.svd(fold_slices(array, fold, k), compute_uv=False)
    cupy.cuda.Device().synchronize()


def within(limit: float, work: Iterator[object], number: int) -> dict[str, float]:
    """Seconds of an iteration; and its share that was done, if it did not end within the limit."""
    start, done = perf_counter(), 0
    for done, _ in enumerate(work, 1):
        if perf_counter() - start > limit and done < number:
            break
    found = {"seconds": round(perf_counter() - start, 3)}
    return found if done == number else found | {"done": round(done / number, 3)}


def spectra(device: str, work: list[WeightItem], limit: float) -> dict[str, float]:
    """Time of all spectra as the program computes them, with libraries and kernels in memory."""
    with Threads(resolve(device)) as threads:
        for _ in threads.map(singular_values, [warming()] * cores()):
            pass
        return within(limit, threads.map(singular_values, work), len(work))


def warming() -> WeightItem:
    """A small layer whose spectra are computed in all of the ways, on a GPU and its host."""
    weight = np.random.default_rng(1).standard_normal((1, LEAST, 4 * LEAST)).astype(np.float32)
    return WeightItem(refer(weight), {Fold.ENCODE: (1, 2, 4, 8)})


def command(device: str, name: str) -> dict[str, float]:
    """Time of the whole command."""
    from zoo import build

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "in.onnx"
        onnx.save(build(name), model)
        words = [sys.executable, "-m", "onnx_lowrank", str(model), str(Path(folder) / "out.onnx")]
        start = perf_counter()
        subprocess.run([*words, "--ratio", "0.5", "--device", device, "--quiet"], cwd=CHECKOUT, check=True)
        return {"seconds": round(perf_counter() - start, 3)}


def floor(work: list[WeightItem]) -> float:
    """Operations of all spectra; a product counts twice for every pair of factors, as its rate does."""
    return sum(operations(item.weight.shape, item.wanted) for item in work)


def gemm(n: int = 8192) -> float:
    """Float64 operations per second of a square product on the GPU."""
    import cupy

    matrix = cupy.random.standard_normal((n, n))
    device, repeats = cupy.cuda.Device(), 5
    for timed in (False, True):
        start = perf_counter()
        for _ in range(repeats if timed else 1):
            matrix @ matrix
        device.synchronize()
    return float(2 * n**3 * repeats / (perf_counter() - start))


def device_name() -> str:
    import cupy

    return str(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())


def jobs(name: str, limit: float) -> dict[str, Callable[[list[WeightItem]], dict[str, float]]]:
    """What is measured of one model."""
    return {
        "cuda": lambda work: spectra("cuda", work, limit),
        "numpy": lambda work: spectra("cpu", work, limit),
        "cupy-svd": lambda work: within(limit, map(by_svd, work), len(work)),
        "command-cuda": lambda _: command("cuda", name),
        "command-cpu": lambda _: command("cpu", name),
    }


def main() -> None:
    """Measure, and write the JSON after every figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of one loop over layers")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    rate = gemm()
    results: dict[str, Any] = {
        "device": device_name(),
        "cpu": cpu_model(),
        "cores": cores(),
        "packages": {"numpy": np.__version__, "cupy": version("cupy-cuda13x")},
        "gemm_tflops": round(rate / 1e12, 1),
        "models": {},
    }
    for name in options.models:
        work = items(found(name))
        figures: dict[str, Any] = {"layers": len(work), "floor_seconds": round(floor(work) / rate, 4)}
        results["models"][name] = figures
        available = jobs(name, options.limit)
        for job in options.jobs:
            if job.startswith("command") and name == "wide":
                continue
            figures[job] = available[job](work)
            print(name, job, figures[job], flush=True)
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
