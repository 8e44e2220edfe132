"""New numbers for the weights of layers that stay as they are.

Rules:

1. No node changes: a tensor with new numbers takes the place of the old one, with its name, dtype and shape.
2. So the node reads the stored weight itself, without views between, and nothing else reads it.
3. A BatchNorm behind the layer stays: the new weight is divided by its scale, and its bias takes up the
   change of the layer's bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Certificate
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.graph.weights import Source, constant, resolve
from onnx_lowrank.layers.bias import bias, is_own
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import read
from onnx_lowrank.operators import registry

Operand = tuple[Place, int]
"""A node and the index of one of its inputs."""

_BATCHNORM_BIAS = 2


@dataclass(frozen=True, slots=True)
class Refitted:
    """A layer that the plan keeps, with new numbers.

    Attributes:
        binding: The layer and the place of its weight.
        weight: The new weight in its stored dtype and canonical shape, with a folded BatchNorm in it.
        certificate: The proved bounds of the change.
        bias: The new bias in place of `bias(model, walk, binding).values`, shape (f,); None keeps the bias.
        is_narrowed: Whether a layer of the plan takes features from it.
    """

    binding: Binding
    weight: NDArray[Any]
    certificate: Certificate
    bias: NDArray[np.float64] | None
    is_narrowed: bool


def can_refit(model: Model, walk: Walk, binding: Binding) -> bool:
    """Whether a layer with one use can get new numbers without a change of its nodes (rules 1 to 3).

    Args:
        model: The model.
        walk: Its walk.
        binding: The layer.

    Raises:
        InputError: A data file has changed.
    """
    use, norm, added = binding.layer.uses[0], binding.layer.batchnorm, bias(model, walk, binding)
    value = _own(model, walk, Place(use.scope, use.node), use.operand)
    # A family may store more numbers than the canonical weight has, or others.
    if value is None or not np.array_equal(_laid_out(walk, binding, read(model, walk, binding)), value):
        return False
    if norm is not None:
        return _own(model, walk, Place(use.scope, norm.node), _BATCHNORM_BIAS) is not None
    return added is None or _own(model, walk, added.place, added.operand) is not None


def operands(model: Model, walk: Walk, refitted: Refitted) -> Mapping[Operand, NDArray[Any]] | None:
    """The new values of the constants that the layer's nodes read; None if one is out of range.

    Args:
        model: The model.
        walk: Its walk.
        refitted: The layer, for which `can_refit` holds.
    """
    binding, use = refitted.binding, refitted.binding.layer.uses[0]
    place, norm = Place(use.scope, use.node), binding.layer.batchnorm
    weight = refitted.weight
    with np.errstate(over="ignore"):
        if norm is not None:
            ones = [1] * len(weight.shape[2:])
            scale = norm.scale.reshape(*weight.shape[:2], *ones)
            old = read(model, walk, binding)
            weight = np.where(scale == 0, old, weight / np.where(scale == 0, 1.0, scale)).astype(old.dtype)
        found = {(place, use.operand): np.ascontiguousarray(_laid_out(walk, binding, weight))}
        if refitted.bias is not None:
            found |= _biased(model, walk, refitted.binding, refitted.bias)
    return found if all(np.isfinite(value).all() for value in found.values()) else None


def _biased(
    model: Model, walk: Walk, binding: Binding, values: NDArray[np.float64]
) -> dict[Operand, NDArray[Any]]:
    """The constant that adds new values in place of the layer's bias; empty if there is none."""
    norm = binding.layer.batchnorm
    if norm is not None:
        place = Place(binding.layer.uses[0].scope, norm.node)
        shift = _own(model, walk, place, _BATCHNORM_BIAS)
        change = values - norm.bias
        return {} if shift is None else {(place, _BATCHNORM_BIAS): (shift + change).astype(shift.dtype)}
    added = bias(model, walk, binding)
    value = None if added is None else _own(model, walk, added.place, added.operand)
    if added is None or value is None:
        return {}
    node = walk.node(added.place)
    # A Gemm's β multiplies the stored bias.
    scale = registry.family(node).bias_scale(node) if added.in_node else 1.0
    return {(added.place, added.operand): (values / scale).reshape(added.shape).astype(value.dtype)}


def source(walk: Walk, operand: Operand) -> Source | None:
    """The stored tensor that a node reads without views between; None if there is none."""
    stored = resolve(walk, walk.operand(*operand))
    return None if isinstance(stored, str) or stored.views else stored.source


def _own(model: Model, walk: Walk, place: Place, operand: int) -> NDArray[Any] | None:
    """The value of a stored tensor that only one operand of one node reads (rule 2); else None."""
    found = source(walk, (place, operand))
    if found is None or not is_own(model, walk, found, place, operand):
        return None
    return constant(walk, model, walk.operand(place, operand))


def _laid_out(walk: Walk, binding: Binding, canonical: NDArray[Any]) -> NDArray[Any]:
    """A canonical weight as the layer's node reads it."""
    use = binding.layer.uses[0]
    node = walk.node(Place(use.scope, use.node))
    return registry.family(node).laid_out(node, use.operand, canonical, use.laid_out)
