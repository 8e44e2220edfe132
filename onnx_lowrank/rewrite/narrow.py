"""Makes partners of a layer narrower: their weights, and the constants between.

The layer's own weight is part of its `Replacement`. Rules:

1. Nodes stay as they are; only their constant operands change, and the `group` of depthwise convolutions.
   A new constant is stored beside the old one. A shape that states the number of channels is a new constant.
2. Shapes that the model states for the activations between no longer hold, so they go. Numbers in the shapes
   that it reads there change with the width; numbers that it computes from them stay (`rewrite.heads`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Factors
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.folded import folded
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.graph.weights import constant, resolve
from onnx_lowrank.layers.binding import Binding, Hidden
from onnx_lowrank.operators import registry
from onnx_lowrank.rewrite.edits import Edits


def narrow(
    model: Model,
    walk: Walk,
    edits: Edits,
    hidden: Hidden,
    less: Less,
    width: int,
    packed: Container[tuple[Place, int]],
    fresh: Mapping[tuple[Place, int], NDArray[Any]],
) -> None:
    """Plan the edits that take features from the partners and from the constants behind them.

    Args:
        model: The model.
        walk: Its walk.
        edits: Receives the edits.
        hidden: The channels between the layers.
        less: Makes the features of an array fewer, given their axis.
        width: The number of channels that stay.
        packed: Places and operands of the constants that `rewrite.packed` makes narrower.
        fresh: New values of constants that the nodes of the partners read, by node and operand.

    Raises:
        InputError: A data file has changed.
    """
    places = [each for each in changing(walk, hidden) if each[:2] not in packed]
    # Once for all its readers: two copies of a shared bias would be parameters that nobody counts.
    stored: dict[tuple[str, int], str] = {}
    for place, operand, axis in places:
        tensor = walk.operand(place, operand)
        key = ("" if tensor is None else tensor.name), axis
        if key not in stored:
            value = fresh.get((place, operand))
            stored[key] = _taken(model, walk, edits, hidden.producers[0], tensor, value, axis, less)
        edits.scopes[place.scope].repointed[place.node, operand] = stored[key]
        edits.unread(place, operand)
    for place, operand in hidden.targets:
        name = _target(walk, edits, model, hidden, walk.operand(place, operand), width)
        edits.scopes[place.scope].repointed[place.node, operand] = name
        edits.unread(place, operand)
    edits.scopes[""].attributes.update(((place.node, "group"), width) for place in hidden.grouped)
    edits.scopes[""].forgotten.update(hidden.tensors)


def changing(walk: Walk, hidden: Hidden) -> list[tuple[Place, int, int]]:
    """Places and operands of the constants with the features of partners, and the axis of the features."""
    places = [*hidden.constants]
    for producer in hidden.producers:
        use = producer.layer.uses[0]
        places.append((Place(use.scope, use.node), use.operand, varying_axis(walk, producer, 1)))
    return places


Less = Callable[[NDArray[Any], int], NDArray[Any]]
"""Makes the features along an axis of an array fewer."""


def varying_axis(walk: Walk, binding: Binding, canonical: int) -> int:
    """The axis of a layer's weight, as its node reads it, along which an axis of the canonical form lies.

    Args:
        walk: The model's walk.
        binding: A layer of one operator group.
        canonical: The axis of the canonical form: 1 for output features, 2 for input channels.
    """
    layer = binding.layer
    ones = [1] * (len(layer.shape) - canonical - 1)
    index = np.broadcast_to(np.arange(layer.shape[canonical]).reshape(-1, *ones), layer.shape)
    laid_out = _laid_out(walk, binding, index, layer.uses[0].laid_out)
    steps = (laid_out.take(0, axis) != laid_out.take(-1, axis) for axis in range(laid_out.ndim))
    return next(axis for axis, step in enumerate(steps) if step.any())


def narrow_weight(walk: Walk, binding: Binding, factors: Factors, width: int) -> NDArray[Any]:
    """The weight of a layer with fewer input channels or output features, as its node reads it.

    Args:
        walk: The model's walk.
        binding: The layer.
        factors: Its factors, one of which is the weight.
        width: Its width.
    """
    layer = binding.layer
    own, axis = (factors.encoder, 1) if layer.loses_features else (factors.decoder, 2)
    shape = list(layer.uses[0].laid_out)
    *_, narrow = layer.at_width(width)
    shape[varying_axis(walk, binding, axis)] = narrow.f if layer.loses_features else narrow.c
    return _laid_out(walk, binding, own.reshape(narrow.shape), shape)


def _laid_out(walk: Walk, binding: Binding, canonical: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    use = binding.layer.uses[0]
    node = walk.node(Place(use.scope, use.node))
    return registry.family(node).laid_out(node, use.operand, canonical, shape)


def _taken(
    model: Model,
    walk: Walk,
    edits: Edits,
    beside: Binding,
    tensor: Any,
    value: NDArray[Any] | None,
    axis: int,
    less: Less,
) -> str:
    """Store a constant, or a new value in its place, with fewer features; returns its new name."""
    if value is None and tensor is not None:
        value = constant(walk, model, tensor)
    found = resolve(walk, tensor)
    source = beside.stored.source if isinstance(found, str) else found.source
    taken = np.ascontiguousarray(less(_read(value, beside), axis))
    return edits.keep(source, f"{walk.origin(tensor)[1]}_narrow", taken)


def _target(walk: Walk, edits: Edits, model: Model, hidden: Hidden, tensor: Any, width: int) -> str:
    """Store a shape that ends with the number of channels that stay; returns its name."""
    beside = hidden.producers[0]
    shape = _read(folded(walk, model, tensor), beside).copy()
    shape[-1] = width
    return edits.keep(beside.stored.source, f"{walk.origin(tensor)[1]}_narrow", shape)


def _read(value: NDArray[Any] | None, beside: Binding) -> NDArray[Any]:
    """A constant: `layers.hidden` could read it, so where it is unknown, its file has changed since."""
    if value is None:
        raise InputError(f"A constant beside {beside.layer.id!r} changed while it was read: run again.")
    return value
