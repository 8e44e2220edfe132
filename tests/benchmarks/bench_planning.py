"""Times of planning ResNet-50, VGG-16 and ViT-B: candidates and solution, for all built-in recipes.

The models are those of `models/zoo.py`. The times do not include finding layers and computing spectra.

    python tests/benchmarks/bench_planning.py [--recipe NAME] [--ratio 0.5] [--model resnet50]
"""

from __future__ import annotations

import argparse
from time import perf_counter

from zoo_layers import zoo_layers

from onnx_lowrank.allocate.cost import Linear
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.limits import Limits
from onnx_lowrank.allocate.options import candidates
from onnx_lowrank.allocate.solve import solve
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.core.factors import Spectra
from onnx_lowrank.documents import recipes
from onnx_lowrank.layers.found import Found
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.measures import Evidence, named
from onnx_lowrank.work.executor import Threads
from onnx_lowrank.work.scoring import WeightItem, singular_values
from onnx_lowrank.work.weights import reference

GRID = Grid(Linear(parameters))
MODELS = ("resnet50", "vgg16", "vit_b_16")


def all_spectra(found: Found) -> list[Spectra]:
    """Every spectrum that any recipe may want, of every layer."""
    items = (
        WeightItem(
            reference(found.model, found.walk, binding),
            dict.fromkeys(binding.layer.folds, binding.layer.slices),
        )
        for binding in found.bindings
    )
    with Threads(resolve("cpu")) as threads:
        return list(threads.map(singular_values, items))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", action="append", help="name or file; may be repeated")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated")
    arguments = parser.parse_args()
    chosen = [recipes.load(name) for name in arguments.recipe] if arguments.recipe else recipes.load_all()
    print(f"{'model':10} {'recipe':12} {'options':>8} {'candidates':>11} {'solve':>8} {'gap':>6} objective")
    for model in arguments.model or MODELS:
        found = zoo_layers(model)
        values = all_spectra(found)
        budget = int(arguments.ratio * sum(map(parameters, found.layers)))
        for recipe in chosen:
            measure = named(recipe.measure)
            start = perf_counter()
            tables = [
                candidates(layer, measure.errors(Evidence(of), relative=recipe.relative), recipe, GRID)
                for layer, of in zip(found.layers, values, strict=True)
            ]
            middle = perf_counter()
            solution = solve(tables, Limits.single(tables, budget), recipe)
            end = perf_counter()
            count = sum(table.cost.size for table in tables)
            gap = "rule" if solution.gap is None else f"{solution.gap:.1g}"
            print(
                f"{model:10} {recipe.name:12} {count:8} {middle - start:9.3f} s {end - middle:6.3f} s "
                f"{gap:>6} {solution.objective:.9g}"
            )


if __name__ == "__main__":
    main()
