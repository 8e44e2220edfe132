"""The sets of layers that may share a factor: siblings an encoder, and the layers of a sum a decoder.

Siblings are layers that read the same tensor. Rules:

1. Every set of two or more of a few siblings may share an encoder, so a plan may join all, join some, or
   leave all apart.
2. Many siblings have too many sets. Layers whose outputs vary together need the same directions of the input,
   so average linkage makes a tree of sets, the most alike first. The last sets of a large tree may share an
   encoder: they are the largest and save the most encoders.
3. The layers of a sum share a decoder all together or not at all: it stands behind the whole sum.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
import scipy
from numpy.typing import NDArray

from onnx_lowrank.allocate.cost import Costs
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.options import sharings
from onnx_lowrank.allocate.pairs import Sharing
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.measures import Floats

FEW = 4
"""Every set of two or more of up to so many siblings may share an encoder."""

_MOST = 7
"""The most sets of more siblings; with 8 siblings these are all that average linkage joins."""

Names = tuple[str, ...]
"""The ids of layers, in graph order."""

Joined = tuple[Lowering, Names]
"""Layers that may share a factor: an encoder (SHARED) or a decoder (SUMMED)."""


def joined(
    layers: Iterable[Layer],
    ways: Container[Lowering],
    likeness: Mapping[Names, NDArray[np.float64]] | None = None,
) -> tuple[Joined, ...]:
    """The sets of layers that may share a factor.

    Args:
        layers: All layers, in graph order.
        ways: Whether siblings may share (SHARED), and layers of a sum (SUMMED).
        likeness: For families of more than a few siblings, how alike they are, as for `joins`.
    """
    layers, known = tuple(layers), likeness or {}
    made: list[Joined] = []
    if Lowering.SHARED in ways:
        for names in families(layers):
            made += [(Lowering.SHARED, chosen) for chosen in joins(names, known.get(names))]
    if Lowering.SUMMED in ways:
        sums = dict.fromkeys(layer.addends for layer in layers if layer.addends)
        made += [(Lowering.SUMMED, names) for names in sums]
    return tuple(made)


def families(layers: Iterable[Layer]) -> tuple[Names, ...]:
    """The ids of all layers that read the same tensor, for every such tensor, in graph order."""
    return tuple(dict.fromkeys(layer.siblings for layer in layers if layer.siblings))


def joins(siblings: Sequence[str], likeness: NDArray[np.float64] | None = None) -> tuple[Names, ...]:
    """The sets of siblings that may share an encoder, each in graph order.

    Args:
        siblings: Their ids, in graph order.
        likeness: How alike their outputs are, from 0 to 1, symmetric of shape (siblings, siblings). Only more
            than a few siblings need it: without it they are only joined all together.
    """
    if len(siblings) <= FEW:
        sizes = range(2, len(siblings) + 1)
        return tuple(chosen for size in sizes for chosen in combinations(siblings, size))
    if likeness is None:
        return (tuple(siblings),)
    apart = (1 - likeness)[np.triu_indices(len(siblings), 1)]
    found = [[number] for number in range(len(siblings))]
    for one, other, *_ in scipy.cluster.hierarchy.linkage(apart, "average"):
        found.append(sorted(found[int(one)] + found[int(other)]))
    last = found[: len(siblings) - 1 : -1][:_MOST]
    return tuple(tuple(siblings[number] for number in chosen) for chosen in last)


def sharings_of(
    layers: Sequence[Layer], errors: Mapping[Joined, Sequence[Floats]], grid: Grid[Costs]
) -> tuple[Sharing, ...]:
    """The groups of layers that can share a factor, each cheaper at some rank than as it is.

    Args:
        layers: All layers, in graph order.
        errors: For the layers of every set, the errors at the ranks 0, 1, … of their factor.
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
