"""What a plan has chosen from: the error of every layer by rank, and its best decompositions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.core.factors import Spectra
from onnx_lowrank.core.option import Option
from onnx_lowrank.core.plan import Plan
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.measures import Errors
from onnx_lowrank.report.content import Alternative, Curve, Detail
from onnx_lowrank.stages.score import Scores

_RANKS = 24
_ALTERNATIVES = 10
_DIGITS = 5


def details(scores: Scores, recipes: Sequence[Recipe], plan: Plan) -> Mapping[str, Detail]:
    """What a plan was chosen from, by layer, at a few ranks each; empty for a plan of none of the recipes.

    Args:
        scores: The scores on which the plan was made.
        recipes: The recipes, one of which made it.
        plan: The plan.
    """
    recipe = next((recipe for recipe in recipes if recipe.name == plan.recipe), None)
    if recipe is None:
        return {}
    chosen = {choice.layer: choice.option for choice in plan.choices}
    found = scores.fitted(recipe.factors).considered(recipe)
    return {
        table.layer: Detail(_curve(chosen.get(table.layer), errors, spectra), _alternatives(table))
        for table, errors, spectra in found
    }


def _curve(option: Option | None, errors: Errors, spectra: Spectra) -> Curve | None:
    """The errors by rank of the chosen decomposition; of the first one for a layer that was kept."""
    key = next(iter(errors), None)
    if option is not None and (option.fold, option.k) in errors:
        key = option.fold, option.k
    if key is None or not errors[key].size:
        return None
    ranks = _spread(errors[key].size, _RANKS)
    values: tuple[float, ...] = ()
    if key in spectra:
        largest = spectra[key].max(axis=(0, 1))  # of all groups and slices
        values = _rounded(largest[np.minimum(ranks, largest.size - 1)])
    return Curve(*key, tuple(ranks.tolist()), _rounded(errors[key][ranks]), values)


def _alternatives(table: Candidates) -> tuple[Alternative, ...]:
    """Some of the options that no other beats."""
    return tuple(
        Alternative(found, int(table.cost[index]), *_rounded(table.error[[index]]))
        for index in (_spread(table.cost.size - 1, _ALTERNATIVES) + 1).tolist()
        if (found := table.option(index)) is not None
    )


def _spread(size: int, most: int) -> NDArray[np.intp]:
    """At most as many of the indices below a size: the ends, and some between at equal steps."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(np.intp))


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Numbers to a few digits, more than a chart shows."""
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values.tolist())
