"""The product of two adjacent linear maps: which maps have one, its weight and its bias.

The rules are those of `rewrite.merge`; this module has their numbers.
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
from onnx_lowrank.linalg.factorize import certify_product
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.convolution import spatial
from onnx_lowrank.operators.operator import Operator

_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LinearMap:
    """A linear operator with a weight of its own.

    Attributes:
        place: Its place.
        node: Its proto.
        side: The operand that is its weight.
        weight: Where its weight is.
        shape: Shape of the weight as a map: (f, c, *kernel).
        bias: The node and the operand that read its bias, if it has one.
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
        """Whether it maps every position by itself, and all of them."""
        return self.family.is_pointwise(self.node, self.shape[2:])

    @property
    def data(self) -> int:
        """The operand that is no constant."""
        return 1 - self.side

    @property
    def adder(self) -> Place | None:
        """The Add behind it that adds its bias."""
        return None if self.bias is None or self.bias[0] == self.place else self.bias[0]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two operators that can become one.

    Attributes:
        first: A.
        second: B.
        shape: Shape of the product: (f, c, *kernel).
        biases: Where A's bias is, and B's; the latter only where A has one, otherwise it stays.
        saved: Parameters saved.
    """

    first: LinearMap
    second: LinearMap
    shape: tuple[int, ...]
    biases: tuple[Source | None, Source | None]
    saved: int


@dataclass(frozen=True, slots=True)
class Product:
    """One operator's numbers in place of two.

    Attributes:
        weight: The product as B reads its weight, as it is stored.
        bias: The new bias as B reads that, as it is stored; None where A has none.
        certificate: What rounding has done to the product of the two weights.
    """

    weight: NDArray[Any]
    bias: NDArray[Any] | None
    certificate: Certificate


def multiplied(model: Model, pair: Pair) -> Product | None:
    """The product of two operators; None where it is not finite as it is stored (rule 6)."""
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
    """The certificate of a product of maps (f, c, *kernel), one of which maps every position by itself."""
    inputs = first.shape[1]
    if prod(second.shape[2:]) == 1:
        flat = (array.reshape(len(array), -1) for array in (first, second, weight))
        return certify_product(*flat)
    # The kernel is B's: its taps are rows of one matrix, which A multiplies from the right.
    taps, stored = (
        np.moveaxis(array.reshape(*array.shape[:2], -1), 2, 1).reshape(-1, array.shape[1])
        for array in (second, weight)
    )
    return certify_product(first.reshape(len(first), inputs), taps, stored)


def _bias(model: Model, pair: Pair, second_map: _Array) -> _Array | None:
    """The new bias as B reads it (rule 5)."""
    first, second = pair.first, pair.second
    if pair.biases[0] is None:
        return None
    summed = second_map.reshape(*second.shape[:2], -1).sum(2)
    vector: _Array = _scalar(second, "alpha") * (summed @ _vector(model, first, pair.biases[0]))
    if pair.biases[1] is not None:
        vector += _vector(model, second, pair.biases[1])
    return vector if second.side else vector[:, None]


def _stored_shape(operator: LinearMap, weight: NDArray[Any]) -> tuple[int, ...]:
    """The shape in which an operator reads a product (f, c, *kernel)."""
    if operator.family.product == "kernel":
        return weight.shape
    is_stored = operator.side == operator.family.transposes(operator.node, operator.side)
    return weight.shape if is_stored else weight.shape[::-1]


def _map(model: Model, operator: LinearMap) -> _Array:
    """A weight as a map (f, c, *kernel)."""
    value = array(model, operator.weight.tensor)
    maps: Any = canonical_weight(operator.node, operator.side, value)
    return np.asarray(maps[0], np.float64)


def _vector(model: Model, operator: LinearMap, source: Source) -> _Array:
    """What an operator adds to each of its features, a Gemm's beta included."""
    value = np.asarray(array(model, source.tensor), np.float64)
    return _scalar(operator, "beta") * np.broadcast_to(value.ravel(), operator.shape[:1])


def product_shape(first: LinearMap, second: LinearMap) -> tuple[int, ...] | None:
    """Rules 3 and 4: the shape of the product; None where there is none."""
    (m, c, *inner), (f, width, *outer) = first.shape, second.shape
    if width != m or len(inner) != len(outer):
        return None
    if first.family.product == "matrix" or second.is_pointwise:
        return f, c, *inner
    return (f, c, *outer) if first.is_pointwise and not _grows(second) else None


def _product(first: _Array, second: _Array) -> _Array:
    """Two maps (f, c, *kernel), one of whose kernels is 1×1, as one."""
    kernel = first.shape[2:] if prod(second.shape[2:]) == 1 else second.shape[2:]
    (m, c), f = first.shape[:2], second.shape[0]
    if prod(second.shape[2:]) == 1:
        return (second.reshape(f, m) @ first.reshape(m, -1)).reshape(f, c, *kernel)
    offsets = np.moveaxis(second.reshape(f, m, -1), 2, 0)
    return np.moveaxis(offsets @ first.reshape(m, c), 0, 2).reshape(f, c, *kernel)


def _grows(conv: LinearMap) -> bool:
    """Whether a Conv pads so much that it could have more outputs than inputs along some axis."""
    kernel, pads = conv.shape[2:], spatial(conv.node, "pads")
    dilations = spatial(conv.node, "dilations") or [1] * len(kernel)
    around = zip(pads[: len(kernel)], pads[len(kernel) :], kernel, dilations, strict=True) if pads else ()
    return any(begin + end > (size - 1) * dilation for begin, end, size, dilation in around)


def pads_nothing(node: NodeProto) -> bool:
    """Whether a Conv reads no element beside its input."""
    return attribute_of(node, "auto_pad", "NOTSET") in ("", "NOTSET", "VALID") and not any(
        spatial(node, "pads")
    )


def is_per_feature(dims: Any, operator: LinearMap) -> bool:
    """Whether a bias has one value for every output feature, or one for all, along their axis."""
    f, shape = operator.shape[0], tuple(dims)
    if operator.family.product == "kernel":
        return shape == (f,)
    along = (1, f) if operator.side else (f, 1)
    try:
        return np.broadcast_shapes(shape, along) == along
    except ValueError:
        return False


def _scalar(operator: LinearMap, name: str) -> float:
    """A Gemm's alpha or beta; 1 for others."""
    family = operator.family
    return family.scale(operator.node) if name == "alpha" else family.bias_scale(operator.node)
