"""All budgets, and the lookup of one by its name."""

from __future__ import annotations

from onnx_lowrank import budgets
from onnx_lowrank.budgets.budget import Budget
from onnx_lowrank.errors import InputError


def every() -> tuple[Budget, ...]:
    """All budgets, in the order of `budgets.names`."""
    return tuple(budgets.found().values())


def named(name: str) -> Budget:
    """The budget with this name.

    Raises:
        InputError: No budget has this name.
    """
    if name not in budgets.names():
        raise InputError(f"There is no budget {name!r}: choose one of {', '.join(budgets.names())}.")
    budget: Budget = budgets.found()[name]
    return budget
