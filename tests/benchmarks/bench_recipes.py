"""Scores of recipes over models and ratios: `python tests/benchmarks/bench_recipes.py [options]`.

Without options: every built-in recipe, on every model, at the ratios of the table in passes/README.md.
With --search: also a grid of rules that are no recipes; this measurement decided the default.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import numpy as np
from scores import Task, tasks

from onnx_lowrank import BudgetError, Recipe, compress
from onnx_lowrank.core.option import Fold
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents.recipes import load_all
from onnx_lowrank.measures import named, names

NEAR_HALF = (0.49, 0.495, 0.5, 0.505, 0.51)


def grid() -> Iterable[Recipe]:
    """Every combination of measure, power and folds that could be a data-free default."""
    folds = {"encode": (Fold.ENCODE,), "all": tuple(Fold), "encode+decode": (Fold.ENCODE, Fold.DECODE)}
    for fold_name, chosen in folds.items():
        for measure in (name for name in names() if not named(name).calibrated):
            for power in (1.0, 2.0, 3.0, 4.0, 6.0, 8.0):
                name = f"{measure}^{power:g} {fold_name}"
                yield Recipe(name, "", chosen, None, measure, aggregate=Aggregate.SUM, power=power)


def score(task: Task, recipe: Recipe, ratios: Sequence[float]) -> float:
    """Mean score over ratios; NaN where one of them is out of reach."""
    values = []
    for ratio in ratios:
        shape = task.shape if recipe.price == "macs" else {}
        try:
            result = compress(task.model(), ratio, recipe=recipe, input_shape=shape)
        except BudgetError:
            return float("nan")
        values.append(task.measure(result.proto))
    return float(np.mean(values))


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[], help="names of models; by default all")
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.8, 0.65, 0.5, 0.35])
    parser.add_argument("--near-half", action="store_true", help=f"the mean over {NEAR_HALF} instead")
    parser.add_argument("--search", action="store_true", help="a grid of rules beside the recipes")
    parser.add_argument("--recipes", nargs="*", default=[], help="names of recipes or rules; by default all")
    options = parser.parse_args()
    recipes = [*load_all(), *(grid() if options.search else ())]
    if options.recipes:
        recipes = [recipe for recipe in recipes if recipe.name in options.recipes]
    groups = [NEAR_HALF] if options.near_half else [(ratio,) for ratio in options.ratios]
    chosen = tasks(tuple(options.models))
    heads = ["near 0.5"] if options.near_half else [f"{ratio:g}" for ratio in options.ratios]
    print(
        "| recipe | " + " | ".join(f"{t.name}, {t.score}: {', '.join(heads)}" for t in chosen) + " | mean |"
    )
    print("| --- " * (len(chosen) + 2) + "|")
    for recipe in recipes:
        rows = [[score(task, recipe, group) for group in groups] for task in chosen]
        cells = [" ".join(f"{value:.3f}" for value in row) for row in rows]
        print(f"| {recipe.name} | " + " | ".join(cells) + f" | {np.nanmean(rows):.3f} |", flush=True)


if __name__ == "__main__":
    main()
