"""Budgets: the quantities that a ratio can count.

Each module or package in this package that defines `BUDGET` is one budget; it needs no entry anywhere else.
Help and messages list budgets by their `order`, then by name. This module gives only the names; `registry`
gives the budgets.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any


def names() -> tuple[str, ...]:
    """The names of all budgets, in the order of help and messages."""
    return tuple(found())


def prices() -> tuple[str, ...]:
    """The names of the budgets that a recipe can trade against error: those with a formula."""
    return tuple(name for name, budget in found().items() if not budget.is_measured)


@cache
def found() -> Mapping[str, Any]:
    """The budgets by name; the first call imports the modules of this package."""
    stems = (module.name for module in pkgutil.iter_modules(__path__))
    modules = (importlib.import_module(f"{__name__}.{stem}") for stem in stems)
    budgets = [module.BUDGET for module in modules if hasattr(module, "BUDGET")]
    budgets.sort(key=lambda budget: (budget.order, budget.name))
    return {budget.name: budget for budget in budgets}
