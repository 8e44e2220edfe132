"""The groups of layers that can share a factor: an encoder, or a decoder behind the sum of their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx_lowrank.allocate.cost import Costs
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.options import sharings
from onnx_lowrank.allocate.pairs import Sharing, sharers
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.measures import Floats

Joined = tuple[Lowering, tuple[str, ...]]
"""Layers that can share a factor, by their ids in graph order: an encoder (SHARED) or a decoder (SUMMED)."""


def joined(layer: Layer) -> tuple[Joined, ...]:
    """The groups of layers that may share a factor that counts as this layer's.

    The layers of a sum share a decoder all together or not at all: it stands behind the whole sum.
    """
    summed = ((Lowering.SUMMED, layer.addends),) if layer.holds_factor(Lowering.SUMMED) else ()
    return (*((Lowering.SHARED, names) for names in sharers(layer)), *summed)


def sharings_of(
    layers: Sequence[Layer], errors: Mapping[Joined, Sequence[Floats]], grid: Grid[Costs]
) -> tuple[Sharing, ...]:
    """The groups of layers that can share a factor, each cheaper at some rank than as it is.

    Args:
        layers: All layers, in graph order.
        errors: For the layers of every group, the errors at the ranks 0, 1, … of their factor.
        grid: The ranks to choose from, and their costs.

    Raises:
        InputError: The costs depend on an unknown dimension.
    """
    numbers = {layer.id: number for number, layer in enumerate(layers)}
    made = []
    for (lowering, names), curves in errors.items():
        members = tuple(numbers[name] for name in names)
        tables = sharings([layers[n] for n in members], lowering, curves, grid)
        made.append(Sharing(tables, members, lowering is Lowering.SUMMED))
    return tuple(group for group in made if group.tables[0].cost.size > 1)
