"""The stored tensors that distillation trains: weights, biases, and the scales of normalizations.

Rules:

1. A tensor is trained if all that reads it, directly or behind views, uses it as one of these, in the main
   graph. So the numbers of shapes, masks, positions and quantizations stay.
2. A table stays: most of its rows are read in none of the calibration inputs. The layers behind it are
   trained.
3. The statistics of a BatchNormalization stay, because its scale and its bias say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.files.load import Model, array
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.graph.weights import Source, readers, resolve

_ADDED = "Add"
_OWN = "com.microsoft"

# fmt: off
OPERANDS: Mapping[tuple[str, str], tuple[int, ...]] = MappingProxyType({
    ("", "Conv"): (1, 2), ("", "ConvTranspose"): (1, 2), ("", "Gemm"): (0, 1, 2), ("", "MatMul"): (0, 1),
    ("", "Einsum"): (0, 1, 2, 3), ("", "PRelu"): (1,),
    ("", "BatchNormalization"): (1, 2), ("", "InstanceNormalization"): (1, 2),
    ("", "LayerNormalization"): (1, 2), ("", "GroupNormalization"): (1, 2), ("", "RMSNormalization"): (1,),
    ("", "SimplifiedLayerNormalization"): (1,), ("", _ADDED): (0, 1),
    (_OWN, "Attention"): (1, 2), (_OWN, "BiasGelu"): (1,), (_OWN, "FastGelu"): (1,),
    (_OWN, "FusedConv"): (1, 2), (_OWN, "FusedGemm"): (0, 1, 2), (_OWN, "FusedMatMul"): (0, 1),
    (_OWN, "SkipLayerNormalization"): (2, 3, 4), (_OWN, "SkipSimplifiedLayerNormalization"): (2, 3),
})
# fmt: on
"""The operands that are weights, biases or scales, by domain and operator."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A stored tensor to train.

    Attributes:
        source: Its place in the model.
        values: Its numbers.
    """

    source: Source
    values: NDArray[Any]


def trained(model: Model, walk: Walk) -> dict[str, Trained]:
    """The tensors to train, by name, in the order of the nodes that read them.

    Args:
        model: The low-rank model.
        walk: Its walk.

    Raises:
        InputError: A data file has changed.
    """
    found: dict[str, Trained] = {}
    seen: set[str] = set()
    for place in walk.places():
        if place.scope:
            continue
        for operand in _operands(walk, place):
            stored = resolve(walk, walk.operand(place, operand))
            if isinstance(stored, str) or stored.source.scope or stored.source.name in seen:
                continue
            source = stored.source
            seen.add(source.name)
            if _is_trained(walk, source):
                found[source.name] = Trained(source, array(model, source.tensor))
    return found


def _operands(walk: Walk, place: Place) -> tuple[int, ...]:
    node = walk.node(place)
    given = OPERANDS.get((node.domain.removeprefix("ai.onnx"), node.op_type), ())
    return tuple(operand for operand in given if operand < len(node.input) and node.input[operand])


def _is_trained(walk: Walk, source: Source) -> bool:
    """Whether all readers use a tensor as a weight, a bias or a scale (rule 1)."""
    found = readers(walk, source)
    return found is not None and all(
        not place.scope and operand in _operands(walk, place) and _is_vector_of(walk, place, source)
        for place, operand in found
    )


def _is_vector_of(walk: Walk, place: Place, source: Source) -> bool:
    """Whether an Add takes a tensor as a bias: a number for each feature, not for each position."""
    sizes = np.array(source.tensor.dims)
    return walk.node(place).op_type != _ADDED or bool((sizes > 1).sum() == 1)
