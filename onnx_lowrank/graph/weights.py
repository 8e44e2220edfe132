"""The source of a weight's numbers, and how to read them.

A weight is an initializer or a Constant node. Exporters often leave a chain of views (Identity, Transpose,
Reshape, Cast, ...) between it and the node that applies it. A Concat that joins Slices of one tensor in
another order is one view, too: PyTorch reorders the gates of an LSTM like this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto

from onnx_lowrank.files.load import Model, array
from onnx_lowrank.graph.walk import Place, Walk, attribute_of, is_op

FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}
"""The element types in which weights are decomposed, with their dtype names."""

VIEWS = frozenset({"Identity", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Cast"})
"""Operators that pass the numbers of a constant on without computing new ones."""

_NARROW = re.compile(r"U?INT[248]$|FLOAT[48]")
"""The names of the element types that quantizers store weights in."""

COMPUTED = "its operands are computed and none is a constant weight: there is nothing to decompose"
"""The reason to skip an operator that has no weight at all."""

ARGUMENT = "an operand comes from the function's caller: if it is a weight, inline the functions first"
"""The reason to skip an operator in a function if one of its operands may be a weight."""

_FOLDABLE = "its weight is computed from constants: constant-fold the model first"
_INVARIANT = (
    "an operand is a state that its loop never changes: if it is a weight, let the body read it from outside"
)
_QUANTIZED = "its weight is quantized: compress before quantizing"
_LONGEST_CHAIN = 32


@dataclass(frozen=True, slots=True)
class Source:
    """The tensor that holds a weight's numbers.

    Attributes:
        scope: Path of the scope that defines the tensor.
        name: The tensor's name there.
        place: The Constant node; None for an initializer.
        tensor: The proto.
        value: The walk's tensor; the walk gives its readers.
    """

    scope: str
    name: str
    place: Place | None
    tensor: TensorProto
    value: Any


@dataclass(frozen=True, slots=True)
class Stored:
    """A constant operand: its source, and the views from the source to the reader, in order."""

    source: Source
    views: tuple[Place, ...]


def resolve(walk: Walk, tensor: Any) -> Stored | str:
    """Find the source of an operand, or the reason why it has no source that can be decomposed."""
    chain = _chain(walk, tensor)
    if isinstance(chain, str):
        return chain
    views, end = chain
    source = _source(walk, end)
    if source is None:
        return _sourceless(walk, end)
    kinds = [source.tensor.data_type]
    kinds += [attribute_of(walk.node(p), "to", 1) for p in views if walk.node(p).op_type == "Cast"]
    for verb, kind in zip(("stored as", *["cast to"] * len(kinds)), kinds, strict=False):
        if kind not in FLOATS:
            names = {number: name for name, number in TensorProto.DataType.items()}
            name = names.get(kind, str(kind))
            advice = "if it is quantized, compress before quantizing"
            only = advice if _NARROW.match(name) else "only float weights are decomposed"
            return f"its weight is {verb} {name}: {only}"
    # One change of type is allowed: a chain has one Cast behind each factor (`cast_of`).
    if sum(one != other for one, other in pairwise(kinds)) > 1:
        return "its weight passes through several Casts: constant-fold the model first"
    return Stored(source, views)


def _sourceless(walk: Walk, tensor: Any) -> str:
    """The reason to skip an operand that is no stored tensor."""
    place = walk.producer(tensor)
    if place is not None and _dequantizes(walk.node(place)):
        inside = walk.operand(place, 0)
        return _QUANTIZED if inside is not None and walk.is_fixed(inside) else COMPUTED
    if walk.is_fixed(tensor):
        return _FOLDABLE
    if walk.is_invariant(tensor):
        return _INVARIANT
    return ARGUMENT if walk.is_argument(tensor) else COMPUTED


def _dequantizes(node: NodeProto) -> bool:
    # Quantizers write ONNX Runtime's operator of the same name for types that older opsets lack.
    return node.op_type == "DequantizeLinear" and node.domain in ("", "ai.onnx", "com.microsoft")


def _chain(walk: Walk, tensor: Any) -> tuple[tuple[Place, ...], Any] | str:
    """The views behind an operand, from the source on, and the tensor that the first view reads."""
    views: list[Place] = []
    while len(views) <= _LONGEST_CHAIN:
        if tensor is None:
            return "its weight is missing"
        place = walk.producer(tensor)
        slices = [] if place is None else _slices(walk, place)
        if place is None or not (slices or is_op(walk.node(place), VIEWS)):
            return tuple(reversed(views)), tensor
        views.append(place)
        tensor = walk.operand(slices[0] if slices else place, 0)
    return "its weight stands behind too many views: constant-fold the model first"


def _slices(walk: Walk, place: Place) -> list[Place]:
    """The Slices that a Concat joins if all of them read one tensor; otherwise none."""
    node = walk.node(place)
    if not is_op(node, ("Concat",)):
        return []
    operands = [walk.operand(place, index) for index in range(len(node.input))]
    producers = [None if operand is None else walk.producer(operand) for operand in operands]
    slices = [p for p in producers if p is not None and is_op(walk.node(p), ("Slice",))]
    wholes = [walk.operand(piece, 0) for piece in slices]
    cut_one_tensor = all(whole is not None and whole is wholes[0] for whole in wholes)
    return slices if cut_one_tensor and len(slices) == len(operands) else []


def _source(walk: Walk, tensor: Any) -> Source | None:
    """The initializer or Constant of a tensor; None if it is neither or holds no dense numbers."""
    scope, name = walk.origin(tensor)
    place = walk.producer(tensor)
    if place is None:
        found = walk.initializers.get((scope, name))
        return None if found is None else Source(scope, name, None, found, tensor)
    node = walk.node(place)
    if not is_op(node, ("Constant",)):
        return None
    literals = (_literal(attribute) for attribute in node.attribute if not attribute.ref_attr_name)
    value = next((literal for literal in literals if literal is not None), None)
    return None if value is None else Source(scope, name, place, value, tensor)


def _literal(attribute: AttributeProto) -> TensorProto | None:
    """The tensor that the attribute of a Constant node defines; None for attributes without numbers."""
    match attribute.name:
        case "value":
            return attribute.t
        case "value_float":
            return TensorProto(data_type=TensorProto.FLOAT, float_data=[attribute.f])
        case "value_floats":
            floats = attribute.floats
            return TensorProto(data_type=TensorProto.FLOAT, dims=[len(floats)], float_data=floats)
        case "value_int":
            return TensorProto(data_type=TensorProto.INT64, int64_data=[attribute.i])
        case "value_ints":
            return TensorProto(
                data_type=TensorProto.INT64, dims=[len(attribute.ints)], int64_data=attribute.ints
            )
    return None


def constant(walk: Walk, model: Model, tensor: Any) -> NDArray[Any] | None:
    """The value of a constant operand after its views; None if it is computed or absent."""
    chain = _chain(walk, tensor)
    source = None if isinstance(chain, str) else _source(walk, chain[1])
    if isinstance(chain, str) or source is None:
        return None
    with np.errstate(all="ignore"):  # a cast may overflow, as it does in the model
        return _applied(walk, model, array(model, source.tensor), chain[0], cast=True)


def viewed(walk: Walk, model: Model, stored: Stored) -> NDArray[Any] | None:
    """The operand's array in its stored dtype, after its views.

    None if a view's parameters are computed or do not fit the array (a runtime would reject the model).
    """
    return _applied(walk, model, array(model, stored.source.tensor), stored.views, cast=False)


def _applied(
    walk: Walk, model: Model, value: NDArray[Any] | None, views: Iterable[Place], *, cast: bool
) -> NDArray[Any] | None:
    for place in views:
        if value is None:
            return None
        try:
            value = _view(walk, model, place, value, cast)
        except (ValueError, TypeError, IndexError, KeyError, OverflowError):
            return None
    return value


def _view(walk: Walk, model: Model, place: Place, value: NDArray[Any], cast: bool) -> NDArray[Any] | None:
    """Apply one view node; None if its parameters are computed, any error if they do not fit."""
    node = walk.node(place)
    match node.op_type:
        case "Identity":
            return value
        case "Cast":
            dtype = onnx.helper.tensor_dtype_to_np_dtype(attribute_of(node, "to", 1))
            return value.astype(dtype) if cast else value
        case "Transpose":
            return value.transpose(attribute_of(node, "perm", list(range(value.ndim))[::-1]))
        case "Flatten":
            axis = attribute_of(node, "axis", 1)
            axis += value.ndim if axis < 0 else 0
            if not 0 <= axis <= value.ndim:
                return None
            return value.reshape(prod(value.shape[:axis]), prod(value.shape[axis:]))
        case "Concat":
            return _reordered(walk, model, place, value)
    # Reshape, Unsqueeze and Squeeze: the parameter is an attribute in old opsets, an operand in new ones.
    operand = walk.operand(place, 1)
    if operand is None:
        numbers = attribute_of(node, "shape" if node.op_type == "Reshape" else "axes")
    else:
        numbers = _parameter(walk, model, operand)
    if numbers is None:
        return np.squeeze(value) if node.op_type == "Squeeze" and operand is None else None
    return _reshaped(node, value, [int(n) for n in np.ravel(numbers)])


def _reordered(walk: Walk, model: Model, place: Place, value: NDArray[Any]) -> NDArray[Any] | None:
    """Join slices of an array along their axis; None unless every element occurs exactly once."""
    axis = range(value.ndim)[attribute_of(walk.node(place), "axis", 1)]
    positions = np.arange(value.shape[axis])
    parts = []
    for piece in _slices(walk, place):
        starts, ends, axes, steps = (_slicing(walk, model, piece, n) for n in range(1, 5))
        if starts is None or ends is None or len(starts) != 1 or (steps or [1]) != [1]:
            return None
        if [range(value.ndim)[n] for n in axes or [0]] != [axis]:
            return None
        parts.append(positions[starts[0] : ends[0]])
    order = np.concatenate(parts)
    return value.take(order, axis) if np.array_equal(np.sort(order), positions) else None


def _slicing(walk: Walk, model: Model, place: Place, operand: int) -> list[int] | None:
    """The starts (1), ends (2), axes (3) or steps (4) of a Slice; None if they are left out.

    Before opset 10 they are attributes.

    Raises:
        ValueError: The numbers are computed.
    """
    tensor = walk.operand(place, operand)
    if tensor is None:
        numbers = attribute_of(walk.node(place), ("starts", "ends", "axes", "steps")[operand - 1])
    elif (numbers := _parameter(walk, model, tensor)) is None:
        raise ValueError("a computed parameter")
    return None if numbers is None else [int(n) for n in np.ravel(numbers)]


def _parameter(walk: Walk, model: Model, operand: Any) -> NDArray[Any] | None:
    """The parameter of a view; None if it is computed or behind views other than Identity and Cast."""
    # Not any view: views with parameters would recurse as deep as the model wants.
    chain = _chain(walk, operand)
    if isinstance(chain, str) or any(walk.node(p).op_type not in ("Identity", "Cast") for p in chain[0]):
        return None
    return constant(walk, model, operand)


def _reshaped(node: NodeProto, value: NDArray[Any], numbers: list[int]) -> NDArray[Any]:
    if node.op_type == "Unsqueeze":
        return np.expand_dims(value, tuple(numbers))
    if node.op_type == "Squeeze":
        return np.squeeze(value, tuple(numbers))
    copies = not attribute_of(node, "allowzero", 0)
    return value.reshape([value.shape[i] if n == 0 and copies else n for i, n in enumerate(numbers)])


def cast_of(walk: Walk, stored: Stored) -> int | None:
    """The element type to which the views cast the weight; None if they do not cast it."""
    casts = [walk.node(place) for place in stored.views if walk.node(place).op_type == "Cast"]
    return int(attribute_of(casts[-1], "to", 1)) if casts else None


def readers(walk: Walk, source: Source) -> list[tuple[Place, int]] | None:
    """Every (node, operand) that reads a source, directly or behind views; None if a graph returns it."""
    found: set[tuple[Place, int]] = set()
    tensors = [source.value]
    seen: set[Place] = set()
    while tensors:
        tensor = tensors.pop()
        if walk.is_output(tensor):
            return None
        for place, operand in walk.consumers(tensor):
            result = walk.result(place)
            if result is None or not _hands_on(walk, place, operand):
                found.add((place, operand))
            elif place not in seen:
                seen.add(place)
                tensors.append(result)
    return sorted(found)


def _hands_on(walk: Walk, place: Place, operand: int) -> bool:
    """Whether a node is a view of this operand, or a Slice that only such views read."""
    if is_op(walk.node(place), ("Concat",)):
        return bool(_slices(walk, place))
    if is_op(walk.node(place), ("Slice",)):
        result = walk.result(place)
        parts = [] if result is None or walk.is_output(result) else walk.consumers(result)
        return not operand and bool(parts) and all(_slices(walk, reader) for reader, _ in parts)
    return not operand and is_op(walk.node(place), VIEWS)


def dtype_of(walk: Walk, stored: Stored) -> np.dtype[Any]:
    """The dtype in which the node reads an operand, after any Cast."""
    kind = cast_of(walk, stored) or stored.source.tensor.data_type
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
