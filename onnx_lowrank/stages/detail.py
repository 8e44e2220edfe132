"""What a plan has chosen from: the error of every layer by rank, and its best decompositions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.core.factors import Spectra
from onnx_lowrank.core.option import Fold
from onnx_lowrank.core.plan import Plan
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.measures import Errors
from onnx_lowrank.report.content import Alternative, Curve, Detail

if TYPE_CHECKING:
    from onnx_lowrank.stages.score import Scores

_RANKS = 24
_ALTERNATIVES = 10
_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Considered:
    """What a report tells of the options of a layer, without partners.

    Attributes:
        layer: The id of the layer.
        curves: The errors at a few ranks, by fold and number of slices.
        alternatives: Some of the options that no other beats.
    """

    layer: str
    curves: Mapping[tuple[Fold, int], Curve]
    alternatives: tuple[Alternative, ...]


def considered(table: Candidates, errors: Errors, spectra: Spectra) -> Considered:
    """Take from the options of a layer what a report tells of them.

    Args:
        table: The options.
        errors: Their errors at all ranks.
        spectra: The spectra of the layer; empty if the measure needs none.
    """
    curves = {key: _curve(key, errors[key], spectra) for key in errors if errors[key].size}
    return Considered(table.layer, curves, _alternatives(table))


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
    made = {}
    for seen in scores.fitted(recipe.factors).considered[recipe.name]:
        option = chosen.get(seen.layer)
        first = next(iter(seen.curves.values()), None)
        curve = first if option is None else seen.curves.get((option.fold, option.k), first)
        made[seen.layer] = Detail(curve, seen.alternatives)
    return made


def _curve(key: tuple[Fold, int], errors: NDArray[np.float64], spectra: Spectra) -> Curve:
    """The errors of one decomposition by rank."""
    ranks = _spread(errors.size, _RANKS)
    values: tuple[float, ...] = ()
    if key in spectra:
        largest = spectra[key].max(axis=(0, 1))  # of all groups and slices
        values = _rounded(largest[np.minimum(ranks, largest.size - 1)])
    return Curve(*key, tuple(ranks.tolist()), _rounded(errors[ranks]), values)


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
