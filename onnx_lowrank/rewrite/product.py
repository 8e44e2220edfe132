"""The product of two adjacent linear maps: its existence, its weight and its bias.

This module computes the numbers for the rules of `rewrite.merge`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.core.factors import Certificate
from onnx_lowrank.files.load import Model, array
from onnx_lowrank.graph.walk import Place, attribute_of
from onnx_lowrank.graph.weights import Source
from onnx_lowrank.layers.find import canonical_weight
from onnx_lowrank.linalg.certificate import certify_product
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.convolution import spatial
from onnx_lowrank.operators.family import Operator

_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LinearMap:
    """A linear operator with a weight of its own.

    Attributes:
        place: Its place.
        node: Its proto.
        side: The operand that is its weight.
        weight: The source of its weight.
        shape: Shape of the weight as a map: (f, c, *kernel).
        bias: The node and the operand that read its bias; None if it has none.
    """

    place: Place
    node: NodeProto
    side: int
    weight: Source
    shape: tuple[int, ...]
    bias: tuple[Place, int] | None

    @property
    def family(self) -> Operator:
        """Its family of operators."""
        return registry.family(self.node)

    @property
    def is_pointwise(self) -> bool:
        """Whether it maps each position by itself, and skips and adds none."""
        return self.family.is_pointwise(self.node, self.shape[2:])

    @property
    def data(self) -> int:
        """The operand that is not the weight."""
        return 1 - self.side

    @property
    def adder(self) -> Place | None:
        """The Add behind it that adds its bias; None if the node itself does."""
        return None if self.bias is None or self.bias[0] == self.place else self.bias[0]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two operators that can become one.

    Attributes:
        first: A.
        second: B.
        shape: Shape of the product: (f, c, *kernel).
        biases: The sources of A's bias and of B's. If A has no bias, both are None, as B's bias stays.
        saved: Number of parameters saved.
    """

    first: LinearMap
    second: LinearMap
    shape: tuple[int, ...]
    biases: tuple[Source | None, Source | None]
    saved: int


@dataclass(frozen=True, slots=True)
class Product:
    """The numbers of one operator in place of two.

    Attributes:
        weight: The product in B's layout and in the stored dtype.
        bias: The new bias in B's layout and in the stored dtype; None if A has none.
        certificate: Bounds of the rounding error of the product.
    """

    weight: NDArray[Any]
    bias: NDArray[Any] | None
    certificate: Certificate


def multiplied(model: Model, pair: Pair) -> Product | None:
    """The product of two operators; None if it is not finite in the stored dtype (rule 6)."""
    first, second = pair.first, pair.second
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(second.weight.tensor.data_type))
    with np.errstate(all="ignore"):
        maps = _map(model, first) * _scalar(first, "alpha"), _map(model, second)
        weight, new_bias = _product(*maps).astype(dtype), _bias(model, pair, maps[1])
        bias = None if new_bias is None else new_bias.astype(dtype)
    if not all(array is None or np.isfinite(array).all() for array in (weight, bias)):
        return None
    shape = _stored_shape(second, weight)
    laid_out = second.family.laid_out(second.node, second.side, weight[None], shape)
    return Product(laid_out, bias, _certified(*maps, weight))


def _certified(first: _Array, second: _Array, weight: NDArray[Any]) -> Certificate:
    """The certificate of a product of two maps (f, c, *kernel); the kernel of one of them has size 1."""
    inputs = first.shape[1]
    if prod(second.shape[2:]) == 1:
        flat = (array.reshape(len(array), -1) for array in (first, second, weight))
        return certify_product(*flat)
    # The kernel is B's: its taps become rows of one matrix, and A multiplies this matrix from the right.
    taps, stored = (
        np.moveaxis(array.reshape(*array.shape[:2], -1), 2, 1).reshape(-1, array.shape[1])
        for array in (second, weight)
    )
    return certify_product(first.reshape(len(first), inputs), taps, stored)


def _bias(model: Model, pair: Pair, second_map: _Array) -> _Array | None:
    """The new bias in B's layout (rule 5)."""
    first, second = pair.first, pair.second
    if pair.biases[0] is None:
        return None
    summed = second_map.reshape(*second.shape[:2], -1).sum(2)
    vector: _Array = _scalar(second, "alpha") * (summed @ _vector(model, first, pair.biases[0]))
    if pair.biases[1] is not None:
        vector += _vector(model, second, pair.biases[1])
    return vector if second.side else vector[:, None]


def _stored_shape(operator: LinearMap, weight: NDArray[Any]) -> tuple[int, ...]:
    """The shape of a product (f, c, *kernel) in the layout of an operator."""
    if operator.family.product == "kernel":
        return weight.shape
    is_stored = operator.side == operator.family.transposes(operator.node, operator.side)
    return weight.shape if is_stored else weight.shape[::-1]


def _map(model: Model, operator: LinearMap) -> _Array:
    """The weight of an operator as a map (f, c, *kernel)."""
    value = array(model, operator.weight.tensor)
    maps: Any = canonical_weight(operator.node, operator.side, value)
    return np.asarray(maps[0], np.float64)


def _vector(model: Model, operator: LinearMap, source: Source) -> _Array:
    """The addend of each output feature, with a Gemm's beta, shape (f,)."""
    value = np.asarray(array(model, source.tensor), np.float64)
    return _scalar(operator, "beta") * np.broadcast_to(value.ravel(), operator.shape[:1])


def product_shape(first: LinearMap, second: LinearMap) -> tuple[int, ...] | None:
    """Rules 3 and 4: the shape of the product; None if there is none."""
    (m, c, *inner), (f, width, *outer) = first.shape, second.shape
    if width != m or len(inner) != len(outer):
        return None
    if first.family.product == "matrix" or second.is_pointwise:
        return f, c, *inner
    return (f, c, *outer) if first.is_pointwise and not _grows(second) else None


def _product(first: _Array, second: _Array) -> _Array:
    """The product of two maps (f, c, *kernel); the kernel of one of them has size 1."""
    kernel = first.shape[2:] if prod(second.shape[2:]) == 1 else second.shape[2:]
    (m, c), f = first.shape[:2], second.shape[0]
    if prod(second.shape[2:]) == 1:
        return (second.reshape(f, m) @ first.reshape(m, -1)).reshape(f, c, *kernel)
    offsets = np.moveaxis(second.reshape(f, m, -1), 2, 0)
    return np.moveaxis(offsets @ first.reshape(m, c), 0, 2).reshape(f, c, *kernel)


def _grows(conv: LinearMap) -> bool:
    """Whether a Conv's padding could give it more outputs than inputs along an axis."""
    kernel, pads = conv.shape[2:], spatial(conv.node, "pads")
    dilations = spatial(conv.node, "dilations") or [1] * len(kernel)
    around = zip(pads[: len(kernel)], pads[len(kernel) :], kernel, dilations, strict=True) if pads else ()
    return any(begin + end > (size - 1) * dilation for begin, end, size, dilation in around)


def pads_nothing(node: NodeProto) -> bool:
    """Whether a Conv reads no padding."""
    return attribute_of(node, "auto_pad", "NOTSET") in ("", "NOTSET", "VALID") and not any(
        spatial(node, "pads")
    )


def is_per_feature(dims: Any, operator: LinearMap) -> bool:
    """Whether a bias has one value per output feature, along their axis, or one value for all."""
    f, shape = operator.shape[0], tuple(dims)
    if operator.family.product == "kernel":
        return shape == (f,)
    along = (1, f) if operator.side else (f, 1)
    try:
        return np.broadcast_shapes(shape, along) == along
    except ValueError:
        return False


def _scalar(operator: LinearMap, name: str) -> float:
    """A Gemm's alpha or beta; 1 for other operators."""
    family = operator.family
    return family.scale(operator.node) if name == "alpha" else family.bias_scale(operator.node)
