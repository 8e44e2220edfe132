"""The names of measures and budgets that documents may use: the one place where this package lists them.

A field of one of these types is a text to msgspec; `check` looks its name up, and messages list the known
ones.
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
    """The names of the budgets that a recipe can take as a price."""
    return known_budgets.prices()


MeasureName = Annotated[str, Meta(extra={"names": measures})]
BudgetName = Annotated[str, Meta(extra={"names": budgets})]
PriceName = Annotated[str, Meta(extra={"names": prices})]


def check(key: str, name: str, known: Sequence[str]) -> None:
    """Check that a name is known.

    Raises:
        ValueError: It is not; the message says where, and what is known.
    """
    if name not in known:
        raise ValueError(f"{key} is {name!r}, which has to be one of {', '.join(known)}")
