"""The names of measures and budgets that documents may use. Only this module of the package lists them.

To msgspec, a field of one of these types is any text. `check` looks the name up, and messages list the known
names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta

from onnx_lowrank import budgets as known_budgets
from onnx_lowrank import measures as known_measures


def measures() -> tuple[str, ...]:
    """The names of all measures."""
    return known_measures.names()


def budgets() -> tuple[str, ...]:
    """The names of all budgets."""
    return known_budgets.names()


def prices() -> tuple[str, ...]:
    """The names of the budgets that a recipe can name as its price."""
    return known_budgets.prices()


MeasureName = Annotated[str, Meta(extra={"names": measures})]
BudgetName = Annotated[str, Meta(extra={"names": budgets})]
PriceName = Annotated[str, Meta(extra={"names": prices})]


def check(key: str, name: str, known: Sequence[str]) -> None:
    """Check that a name is known.

    Raises:
        ValueError: The name is unknown; the message gives the key and the known names.
    """
    if name not in known:
        raise ValueError(f"{key} is {name!r}, but it must be one of {', '.join(known)}")
