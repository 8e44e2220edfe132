"""Where a weight's numbers live, and how to read them.

A weight stands in an initializer or a Constant node, and often behind a chain of views (Identity,
Transpose, Reshape, Cast, ...) that an exporter left between it and the node that applies it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from onnx_lowrank.graph.model import Model, array
from onnx_lowrank.graph.walk import Place, Walk, attribute_of

FLOATS = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}
"""The element types in which weights are decomposed, with their dtype names."""

VIEWS = frozenset({"Identity", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Cast"})
"""Operators that hand on a constant's numbers without computing new ones."""

_LONGEST_CHAIN = 32


@dataclass(frozen=True, slots=True)
class Source:
    """The tensor that holds a weight's numbers.

    Attributes:
        scope: Path of the scope that defines it.
        name: Its name there.
        place: Its Constant node; None for an initializer.
        tensor: The proto.
        value: The walk's tensor, from which its readers can be asked.
    """

    scope: str
    name: str
    place: Place | None
    tensor: TensorProto
    value: Any


@dataclass(frozen=True, slots=True)
class Stored:
    """A constant operand: its source, and the views between the source and the reader, in order."""

    source: Source
    views: tuple[Place, ...]


def resolve(walk: Walk, tensor: Any) -> Stored | str:
    """Find the source of an operand, or say why it has none that can be decomposed."""
    views: list[Place] = []
    for _ in range(_LONGEST_CHAIN):
        place = walk.producer(tensor)
        if place is None:
            source = _initializer(walk, tensor)
            break
        node = walk.node(place)
        if node.op_type == "Constant":
            source = _constant(walk, place)
            break
        if node.op_type in ("DequantizeLinear", "DynamicQuantizeLinear"):
            return "its weight is quantized: compress before quantizing"
        if node.op_type not in VIEWS or node.domain not in ("", "ai.onnx"):
            source = None
            break
        views.append(place)
        tensor = walk.operand(place, 0)
        if tensor is None:
            return "its weight is missing"
    else:
        return "its weight stands behind too many views: constant-fold the model first"
    if source is None:
        return "its operands are computed, none is a constant weight"
    if source.tensor.data_type not in FLOATS:
        kind = onnx.TensorProto.DataType.Name(source.tensor.data_type)
        return f"its weight is stored as {kind}: only float weights are decomposed"
    return Stored(source, tuple(reversed(views)))


def _initializer(walk: Walk, tensor: Any) -> Source | None:
    scope, name = walk.origin(tensor)
    found = walk.initializers.get((scope, name))
    return None if found is None else Source(scope, name, None, found, tensor)


def _constant(walk: Walk, place: Place) -> Source | None:
    node = walk.node(place)
    value = next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)
    return None if value is None else Source(place.scope, node.output[0], place, value, walk.result(place))


def constant(walk: Walk, model: Model, tensor: Any) -> NDArray[Any] | None:
    """The value of a constant operand behind any views; None where it is computed or absent."""
    if tensor is None:
        return None
    place = walk.producer(tensor)
    if place is None:
        source = _initializer(walk, tensor)
        return None if source is None else array(model, source.tensor)
    node = walk.node(place)
    if node.op_type == "Constant":
        return _literal(walk, model, place)
    if node.op_type in VIEWS and node.domain in ("", "ai.onnx"):
        value = constant(walk, model, walk.operand(place, 0))
        return None if value is None else view(walk, model, place, value)
    return None


def _literal(walk: Walk, model: Model, place: Place) -> NDArray[Any] | None:
    source = _constant(walk, place)
    if source is not None:
        return array(model, source.tensor)
    node = walk.node(place)
    for name in ("value_float", "value_floats", "value_int", "value_ints"):
        value = attribute_of(node, name)
        if value is not None:
            return np.asarray(value, np.float32 if "float" in name else np.int64)
    return None


def view(walk: Walk, model: Model, place: Place, value: NDArray[Any], *, cast: bool = True) -> NDArray[Any] | None:
    """Apply one view node to an array; None where its parameters are not constant.

    Args:
        walk: The model's walk.
        model: The model.
        place: The view node.
        value: Its input.
        cast: Whether a Cast changes the dtype; False reads a weight in its stored dtype.
    """
    node = walk.node(place)
    match node.op_type:
        case "Identity":
            return value
        case "Cast":
            dtype = onnx.helper.tensor_dtype_to_np_dtype(attribute_of(node, "to", TensorProto.FLOAT))
            return value.astype(dtype) if cast else value
        case "Transpose":
            return value.transpose(attribute_of(node, "perm", list(range(value.ndim))[::-1]))
        case "Flatten":
            axis = attribute_of(node, "axis", 1)
            axis += value.ndim if axis < 0 else 0
            return value.reshape(prod(value.shape[:axis]), -1)
        case _:
            return _reshaped(walk, model, place, value)


def _reshaped(walk: Walk, model: Model, place: Place, value: NDArray[Any]) -> NDArray[Any] | None:
    """Reshape, Unsqueeze and Squeeze: their parameter is an attribute in old opsets, an operand in new."""
    node = walk.node(place)
    attribute = attribute_of(node, "shape" if node.op_type == "Reshape" else "axes")
    operand = walk.operand(place, 1)
    numbers = constant(walk, model, operand) if operand is not None else attribute
    if numbers is None:
        return np.squeeze(value) if node.op_type == "Squeeze" and operand is None else None
    parameters = [int(n) for n in np.ravel(numbers)]
    if node.op_type == "Reshape":
        copies = not attribute_of(node, "allowzero", 0)
        return value.reshape([value.shape[i] if n == 0 and copies else n for i, n in enumerate(parameters)])
    if node.op_type == "Unsqueeze":
        return np.expand_dims(value, tuple(parameters))
    return np.squeeze(value, tuple(parameters))


def viewed(walk: Walk, model: Model, stored: Stored) -> NDArray[Any] | None:
    """The operand's array in its stored dtype, after its views.

    None where a view's parameters are computed, or do not fit the array (a runtime would reject it).
    """
    value: NDArray[Any] | None = array(model, stored.source.tensor)
    try:
        for place in stored.views:
            if value is not None:
                value = view(walk, model, place, value, cast=False)
    except (ValueError, IndexError):
        return None
    return value


def cast_of(walk: Walk, stored: Stored) -> int | None:
    """The element type to which the views cast the weight, None where they do not."""
    casts = [walk.node(place) for place in stored.views if walk.node(place).op_type == "Cast"]
    return int(attribute_of(casts[-1], "to", TensorProto.FLOAT)) if casts else None


def readers(walk: Walk, source: Source) -> list[tuple[Place, int]] | None:
    """Every (node, operand) that reads a source, directly or behind views; None where a graph returns it."""
    found: list[tuple[Place, int]] = []
    tensors = [source.value]
    while tensors:
        tensor = tensors.pop()
        if walk.is_output(tensor):
            return None
        for place, operand in walk.consumers(tensor):
            node = walk.node(place)
            if node.op_type in VIEWS and node.domain in ("", "ai.onnx") and operand == 0:
                tensors.append(walk.result(place))
            else:
                found.append((place, operand))
    return sorted(found)
