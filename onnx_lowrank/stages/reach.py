"""Whether a ratio can be reached, and what to do about a model whose weights are stored in another form."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets.budget import Meter
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.errors import BudgetError
from onnx_lowrank.layers.found import Found
from onnx_lowrank.layers.withheld import withheld
from onnx_lowrank.stages import planning


def check(found: Found, ratio: float, recipes: Sequence[Recipe], grid: Grid[Meter]) -> None:
    """Check from costs alone that a ratio can be reached, as `planning.check_reach` does.

    Raises:
        BudgetError: It cannot; where most weights are quantized or fused, the error says so.
        InputError: The model cannot be counted.
    """
    held = withheld(found.skipped, len(found.layers))
    if held is not None and not found.layers and ratio < 1:
        raise _error(found, held, 1.0)  # The budgets that measure have no costs yet.
    try:
        planning.check_reach(found.model, found.layers, ratio, recipes, grid)
    except BudgetError as error:
        if held is None:
            raise
        raise _error(found, held, error.smallest_ratio or 1.0) from error


def _error(found: Found, held: tuple[str, str], least: float) -> BudgetError:
    fact, advice = held
    return BudgetError(
        f"{found.model.name} cannot get smaller than a ratio of {least:g}, as {fact}: {advice}.", least
    )
