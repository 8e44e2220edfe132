"""Smaller heads of attention: what a partner takes in, and the numbers in the shapes between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.core.factors import Factors
from onnx_lowrank.core.layer import Between, Layer, Rows
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.graph.weights import Source, constant
from onnx_lowrank.layers.binding import Binding, Hidden, Size
from onnx_lowrank.linalg.narrowing import blocks
from onnx_lowrank.linalg.selection import selected
from onnx_lowrank.rewrite.edits import Edits
from onnx_lowrank.rewrite.narrow import Less


def less_of(layer: Layer, factors: Factors, shared: int) -> Less:
    """The way in which partners of a layer get narrower: by the factor that the layer does not keep.

    Args:
        layer: The layer.
        factors: Its factors.
        shared: The number of heads of the layer that meet one head of a partner.
    """
    narrowing = layer.narrowing
    if narrowing is None or narrowing.between is Between.CHANNELS:
        kept = selected(factors)
        return lambda values, axis: values.take(kept, axis)
    width = factors.decoder.shape[3]
    if narrowing.between is Between.VALUES:
        maps = blocks(factors.encoder.reshape(width, layer.c), narrowing.heads)
    else:
        maps = blocks(factors.decoder.reshape(layer.f, width), narrowing.heads).swapaxes(1, 2)
    return lambda values, axis: _mapped(values, axis, maps[::shared])


def _mapped(values: NDArray[Any], axis: int, maps: NDArray[np.float64]) -> NDArray[Any]:
    """Multiply every head along an axis by its matrix (r, d)."""
    moved = np.moveaxis(values, axis, 0)
    heads = moved.astype(np.float64).reshape(*maps.shape[::2], -1)
    made = (maps @ heads).reshape(-1, *moved.shape[1:])
    return np.moveaxis(made, 0, axis).astype(values.dtype)


def narrow_bias(layer: Layer, factors: Factors, values: NDArray[Any], width: int) -> NDArray[Any]:
    """The bias of a layer with fewer output features; of any other layer, the bias itself.

    Args:
        layer: The layer.
        factors: Its factors.
        values: The bias that the product of its factors needs, shape (f,), in the range of the decoder.
        width: The width of the layer.
    """
    if not layer.loses_features or layer.narrowing is None:
        return values
    decoder = factors.decoder.reshape(layer.f, -1)
    step = layer.width // layer.width_step
    made, old, new = [], 0, 0
    for rows in sorted(layer.narrowing.rows, key=lambda each: each.start) or [Rows(0, layer.f)]:
        # Between the parts of a packed matrix that get narrower, the decoder is the identity.
        made.append(values[old : rows.start])
        new += rows.start - old
        old, small = rows.start + rows.size, rows.size * width // layer.width
        maps = blocks(decoder[rows.start : old, new : new + small], rows.size // step)
        part = values[rows.start : old].reshape(*maps.shape[:2], 1)
        made.append(np.asarray(np.linalg.pinv(maps) @ part).reshape(-1))
        new += small
    return np.concatenate([*made, values[old:]])


def resize(model: Model, walk: Walk, edits: Edits, binding: Binding, width: int) -> None:
    """Plan the edits of the numbers between a layer and its partners (`layers.binding.Hidden`).

    Args:
        model: The model.
        walk: Its walk.
        edits: Receives the edits.
        binding: The layer.
        width: Its new width.
    """
    hidden = binding.hidden or Hidden((), (), ())
    source = binding.stored.source
    for size in hidden.sizes:
        if size not in edits.changed:
            change_number(model, walk, edits, source, size, (width, binding.layer.width))
    for pin in hidden.pins:
        if pin in edits.changed:
            continue
        edits.changed.add(pin)
        value = np.full(pin.shape, pin.value, np.int64)
        edits.scopes[""].repointed[pin.place.node, pin.operand] = edits.keep(
            before(source, pin.place), f"{source.name}_head_size", value
        )


def change_number(
    model: Model, walk: Walk, edits: Edits, source: Source, size: Size, share: tuple[int, int], lost: int = 0
) -> None:
    """Plan the edit of one number in a shape.

    Args:
        model: The model.
        walk: Its walk.
        edits: Receives the edit.
        source: Where the weight of the layer is stored.
        size: The number.
        share: The new width and the old one; the number falls as the width does.
        lost: How much less the number is then.
    """
    edits.changed.add(size)
    shape = walk.operand(size.place, size.operand)
    concat = None if size.part is None else walk.producer(shape)
    place, operand = size.place, size.operand
    if concat is not None and size.part is not None:
        place, operand = concat, size.part
    tensor = walk.operand(place, operand)
    value = constant(walk, model, tensor) if size.stated is None else np.array([size.stated])
    if value is None or tensor is None:  # `layers.heads` could read it, so its file has changed since
        raise InputError(f"A shape of {model.name} changed while it was read: run again.")
    changed = value.copy()
    changed.reshape(-1)[size.index] = changed.reshape(-1)[size.index] * share[0] // share[1] - lost
    is_own = concat is None or (
        walk.consumers(shape) == [(size.place, size.operand)] and not walk.is_output(shape)
    )
    reader = place if is_own else size.place
    stored = edits.keep(before(source, reader), f"{walk.origin(tensor)[1]}_narrow", changed)
    if is_own:
        edits.scopes[""].repointed[place.node, operand] = stored
        edits.unread(place, operand)
        return
    copy = NodeProto()
    copy.CopyFrom(walk.node(place))
    copy.name = edits.unique(f"{copy.name}_narrow")
    copy.input[operand] = stored
    copy.output[0] = edits.unique(f"{copy.output[0]}_narrow")
    edits.scopes[""].before.setdefault(size.place.node, []).append(copy)
    edits.scopes[""].repointed[size.place.node, size.operand] = copy.output[0]


def before(source: Source, place: Place) -> Source:
    """Where to store a number that a node reads: as the weights are, but in the node's place."""
    return source if source.place is None else replace(source, place=place)
