"""The losses of outputs, one module for each kind; several kinds of one output add up.

Every loss is 0 where the low-rank model's output equals the original's.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from onnx_lowrank.distil.losses.loss import ERROR, Kind, Known, Loss

KINDS: tuple[Kind, ...] = tuple(
    module.KIND
    for module in (import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__))
    if hasattr(module, "KIND")
)
"""All kinds."""


def losses(known: Known) -> dict[str, Loss]:
    """The losses of an output, by the name of their kind."""
    made = ((kind.name, kind.make(known)) for kind in KINDS)
    return {name: loss for name, loss in made if loss is not None}


__all__ = ["ERROR", "KINDS", "Kind", "Known", "Loss", "losses"]
