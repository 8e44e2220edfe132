"""Times the planning of ResNet-50, VGG-16 and ViT-B: candidates and solution, for all that ship.

The spectra are random and decay; only their shapes matter here.

    python tests/benchmarks/bench_planning.py [--recipe NAME] [--ratio 0.5]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from math import prod
from time import perf_counter

import numpy as np

from onnx_lowrank import recipe as recipes
from onnx_lowrank.allocate.cost import parameters, wanted_spectra
from onnx_lowrank.allocate.options import candidates
from onnx_lowrank.allocate.solve import solve
from onnx_lowrank.types import Budget, Fold, Layer, Positions, Spectra, Use


def layer(name: str, f: int, c: int, kernel: tuple[int, ...] = ()) -> Layer:
    use = Use("", 0, name, "Conv" if kernel else "MatMul", 1, positions=Positions(1, (7, 7), (7, 7)))
    folds = tuple(Fold) if prod(kernel) > 1 else (Fold.ENCODE,)
    slices = tuple(k for k in range(1, c + 1) if c % k == 0)
    return Layer(name, use.op, f, c, kernel, 1, "float32", folds, slices, (use,))


def resnet50() -> Iterator[Layer]:
    yield layer("stem", 64, 3, (7, 7))
    c = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            name = f"{stage}.{block}"
            if block == 0:
                yield layer(f"{name}.down", 4 * width, c, (1, 1))
            yield layer(f"{name}.1", width, c, (1, 1))
            yield layer(f"{name}.2", width, width, (3, 3))
            yield layer(f"{name}.3", 4 * width, width, (1, 1))
            c = 4 * width
    yield layer("fc", 1000, 2048)


def vgg16() -> Iterator[Layer]:
    c = 3
    for i, f in enumerate((64, 64, 128, 128, 256, 256, 256, *(512,) * 6)):
        yield layer(f"conv{i}", f, c, (3, 3))
        c = f
    for i, (f, c) in enumerate(((4096, 25088), (4096, 4096), (1000, 4096))):
        yield layer(f"fc{i}", f, c)


def vit_b() -> Iterator[Layer]:
    yield layer("patch", 768, 3, (16, 16))
    for block in range(12):
        yield layer(f"{block}.qkv", 2304, 768)
        yield layer(f"{block}.proj", 768, 768)
        yield layer(f"{block}.up", 3072, 768)
        yield layer(f"{block}.down", 768, 3072)
    yield layer("head", 1000, 768)


def decaying_spectra(of: Layer, wanted: dict[Fold, tuple[int, ...]], rng: np.random.Generator) -> Spectra:
    """Power laws with some noise, smaller for narrower slices."""
    spectra = {}
    decay = rng.uniform(0.2, 1.0)
    for fold, ks in wanted.items():
        for k in ks:
            r = of.full_rank(fold, k)
            values = np.arange(1, r + 1) ** -decay * k**-0.3 * rng.uniform(0.9, 1.0, (1, k, r))
            spectra[fold, k] = -np.sort(-values, axis=-1)
    return spectra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", action="append", help="name or file; may be repeated")
    parser.add_argument("--ratio", type=float, default=0.5)
    arguments = parser.parse_args()
    chosen = [recipes.load(name) for name in arguments.recipe] if arguments.recipe else recipes.load_all()
    print(f"{'model':10} {'recipe':12} {'options':>8} {'candidates':>11} {'solve':>8} {'gap':>6} objective")
    for model in (resnet50, vgg16, vit_b):
        layers = tuple(model())
        budget = int(arguments.ratio * sum(map(parameters, layers)))
        for recipe in chosen:
            rng = np.random.default_rng(0)
            spectra = [decaying_spectra(of, wanted_spectra(of, recipe, Budget.PARAMS), rng) for of in layers]
            start = perf_counter()
            tables = [candidates(*pair, recipe, Budget.PARAMS) for pair in zip(layers, spectra, strict=True)]
            middle = perf_counter()
            solution = solve(tables, budget, recipe)
            end = perf_counter()
            count = sum(table.cost.size for table in tables)
            print(
                f"{model.__name__:10} {recipe.name:12} {count:8} "
                f"{middle - start:9.3f} s {end - middle:6.3f} s "
                f"{solution.gap:6.1g} {solution.objective:.9g}"
            )


if __name__ == "__main__":
    main()
