"""ALDS on ResNet-20: this package's score against the reference code's score and the known global optima.

Score: the largest error over layers, max_i σ_{i,j+1} / σ_1, for the encode fold and all k. Size: the
remaining share of the 268,336 weights of the 19 convolutions and the classifier.

    python tests/benchmarks/bench_alds.py [MODEL.onnx]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from onnx_lowrank.allocate.cost import Linear
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.limits import Limits
from onnx_lowrank.allocate.options import candidates
from onnx_lowrank.allocate.solve import solve
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.documents import recipes
from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import find_layers
from onnx_lowrank.linalg import backend
from onnx_lowrank.measures import Evidence, named
from onnx_lowrank.work.scoring import WeightItem, singular_values
from onnx_lowrank.work.weights import reference

GRID = Grid(Linear(parameters))
MODEL = Path(__file__).parents[3] / "shared" / "models" / "resnet20_cifar10.onnx"
REFERENCE = ((0.8025, 0.1296), (0.6029, 0.1846), (0.4991, 0.2087), (0.3998, 0.2474), (0.2496, 0.3148))
OPTIMA = ((0.8, 0.1261), (0.6, 0.1830), (0.5, 0.2061), (0.4, 0.2434), (0.25, 0.3075))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    path = parser.parse_args().model
    if not path.is_file():
        print(f"There is no model {path}: name a ResNet-20 as an ONNX file.", file=sys.stderr)
        return 2
    found = find_layers(load(path), {}, (), ())
    total = sum(layer.size for layer in found.layers)
    print(f"{len(found.layers)} layers, {total:,} weights")
    recipe, cpu = recipes.load("alds"), backend.resolve("cpu")
    tables = []
    for binding in found.bindings:
        weight = reference(found.model, found.walk, binding)
        values = singular_values(WeightItem(weight, GRID.wanted_spectra(binding.layer, recipe)), cpu)
        errors = named(recipe.measure).errors(Evidence(values), relative=recipe.relative)
        tables.append(candidates(binding.layer, errors, recipe, GRID))
    ok = True
    print(f"{'size at most':>12} {'score to reach':>15} {'size':>8} {'score':>8}")
    for name, rows in (("reference code", REFERENCE), ("global optimum", OPTIMA)):
        print(name)
        for size, score in rows:
            solution = solve(tables, Limits.single(tables, int(size * total)), recipe)
            # The scores to reach are known to four digits.
            reached = round(solution.objective, 4)
            ok &= reached <= score
            verdict = "" if reached <= score else "  WORSE"
            print(f"{size:12.4f} {score:15.4f} {solution.cost / total:8.4f} {reached:8.4f}{verdict}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
