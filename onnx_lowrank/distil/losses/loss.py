"""Words for losses: facts about an output, and the interface of a kind of loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

ERROR = "relative error"
"""The name of the loss that every output has."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Compares rows ŷ with rows y, both of shape (n, features): gives a number with a gradient."""


@dataclass(frozen=True, slots=True)
class Known:
    """Facts about an output of the original model, from its held-out inputs.

    Attributes:
        power: E(y − ȳ)² over its elements, ȳ the mean over the samples; E y² where it does not vary.
        is_class: Whether its rows stand for classes (`engines.classes`).
        is_share: Whether its rows are probabilities.
        is_direction: Whether its rows are directions (`engines.embedding`).
    """

    power: float
    is_class: bool = False
    is_share: bool = False
    is_direction: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """A loss for a kind of output.

    Attributes:
        name: Its name in reports.
        make: Makes the loss of an output; None if the output is not of this kind.
    """

    name: str
    make: Callable[[Known], Loss | None]
