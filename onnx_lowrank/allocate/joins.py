"""The sets of siblings, layers that read the same tensor, that may share an encoder.

Rules:

1. Every set of two or more of a few siblings may share one, so a plan may join all, join some, or leave all
   apart.
2. Many siblings have too many sets. Layers whose outputs vary together need the same directions of the input,
   so average linkage makes a tree of sets, the most alike first. The last sets of a large tree may share an
   encoder: they are the largest and save the most encoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
import scipy
from numpy.typing import NDArray

from onnx_lowrank.core.layer import Layer

FEW = 4
"""Every set of two or more of up to so many siblings may share an encoder."""

_MOST = 7
"""The most sets of more siblings; with 8 siblings these are all that average linkage joins."""


def families(layers: Iterable[Layer]) -> tuple[tuple[str, ...], ...]:
    """The ids of all layers that read the same tensor, for every such tensor, in graph order."""
    return tuple(dict.fromkeys(layer.siblings for layer in layers if layer.siblings))


def joins(
    siblings: Sequence[str], likeness: NDArray[np.float64] | None = None
) -> tuple[tuple[str, ...], ...]:
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
