"""ALDS on ResNet-20: our score against the reference code's, and the known global optima.

Score: largest error over layers, max_i σ_{i,j+1} / σ_1, encode fold, all k. Size: share of the 268,336
weights of the 19 convolutions and the classifier that is left.

    python tests/benchmarks/bench_alds.py [MODEL.onnx]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_lowrank import recipe as recipes
from onnx_lowrank.allocate.cost import wanted_spectra
from onnx_lowrank.allocate.options import candidates
from onnx_lowrank.allocate.solve import solve
from onnx_lowrank.linalg import backend
from onnx_lowrank.linalg.spectra import spectra
from onnx_lowrank.types import Budget, Fold, Layer

MODEL = Path(__file__).parents[3] / "shared" / "models" / "resnet20_cifar10.onnx"
REFERENCE = ((0.8025, 0.1296), (0.6029, 0.1846), (0.4991, 0.2087), (0.3998, 0.2474), (0.2496, 0.3148))
OPTIMA = ((0.8, 0.1261), (0.6, 0.1830), (0.5, 0.2061), (0.4, 0.2434), (0.25, 0.3075))


def layers_of(model: onnx.ModelProto) -> list[tuple[Layer, np.ndarray]]:
    """The Conv and Gemm weights (transB) of a model, as layers of the encode fold."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or node.input[1] not in tensors:
            continue
        weight = numpy_helper.to_array(tensors[node.input[1]])[np.newaxis]
        _, f, c, *kernel = weight.shape
        slices = tuple(k for k in range(1, c + 1) if c % k == 0)
        name = node.input[1]
        folds = (Fold.ENCODE,)
        layer = Layer(name, node.op_type, f, c, tuple(kernel), 1, "float32", folds, slices, uses=())
        layers.append((layer, weight))
    return layers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    path = parser.parse_args().model
    if not path.is_file():
        print(f"There is no model {path}: name a ResNet-20 as an ONNX file.", file=sys.stderr)
        return 2
    layers = layers_of(onnx.load(path))
    total = sum(layer.size for layer, _ in layers)
    print(f"{len(layers)} layers, {total:,} weights")
    recipe, cpu = recipes.load("alds"), backend.resolve("cpu")
    tables = []
    for layer, weight in layers:
        values = spectra(weight, wanted_spectra(layer, recipe, Budget.PARAMS), cpu)
        tables.append(candidates(layer, values, recipe, Budget.PARAMS))
    ok = True
    print(f"{'size at most':>12} {'score to reach':>15} {'size':>8} {'score':>8}")
    for name, rows in (("reference code", REFERENCE), ("global optimum", OPTIMA)):
        print(name)
        for size, score in rows:
            solution = solve(tables, int(size * total), recipe)
            # The scores to reach are known to four digits.
            reached = round(solution.objective, 4)
            ok &= reached <= score
            verdict = "" if reached <= score else "  WORSE"
            print(f"{size:12.4f} {score:15.4f} {solution.cost / total:8.4f} {reached:8.4f}{verdict}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
