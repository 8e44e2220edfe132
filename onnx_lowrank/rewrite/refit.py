"""New numbers for the weights of layers that stay as they are.

Rules:

1. No node changes: a tensor with new numbers takes the place of the old one, with its name, dtype and shape.
2. So the node reads the stored weight itself, without views between, and nothing else reads it.
3. A BatchNorm behind the layer stays: the new weight is divided by its scale, and its bias takes up the
   change of the layer's bias. Features that it nearly erases keep their numbers: divided by a tiny scale, new
   ones would be huge.
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
_ERASED = 1e-3  # the scale of a feature over the median of all, up to which it keeps its numbers


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
    # Zeros have no relative change, which a certificate needs.
    if value is None or not np.any(value):
        return False
    # A family may store more numbers than the canonical weight has, or others.
    if not np.array_equal(_laid_out(walk, binding, read(model, walk, binding)), value):
        return False
    if norm is not None:
        return _own(model, walk, Place(use.scope, norm.node), _BATCHNORM_BIAS) is not None
    return added is None or _own(model, walk, added.place, added.operand) is not None


def fixed_features(binding: Binding) -> NDArray[np.bool_]:
    """The output features that keep their numbers (rule 3), shape (f,)."""
    norm = binding.layer.batchnorm
    if norm is None:
        return np.zeros(binding.layer.f, bool)
    size = np.abs(norm.scale)
    return np.asarray(size <= _ERASED * np.median(size))


def operands(
    model: Model,
    walk: Walk,
    binding: Binding,
    weight: NDArray[Any],
    values: NDArray[np.float64] | None,
) -> Mapping[Operand, NDArray[Any]] | None:
    """The new values of the constants that a layer's nodes read; None if one is out of range.

    Args:
        model: The model.
        walk: Its walk.
        binding: The layer, for which `can_refit` holds.
        weight: Its new weight, as in `Refitted`.
        values: Its new bias, as in `Refitted`.
    """
    use, norm = binding.layer.uses[0], binding.layer.batchnorm
    place = Place(use.scope, use.node)
    with np.errstate(over="ignore"):
        if norm is not None:
            shape = *weight.shape[:2], *[1] * len(weight.shape[2:])
            old, fixed = read(model, walk, binding), fixed_features(binding).reshape(shape)
            scale = np.where(fixed, 1.0, norm.scale.reshape(shape))
            weight = np.where(fixed, old, weight / scale).astype(old.dtype)
        found = {(place, use.operand): np.ascontiguousarray(_laid_out(walk, binding, weight))}
        if values is not None:
            found |= _biased(model, walk, binding, values)
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
