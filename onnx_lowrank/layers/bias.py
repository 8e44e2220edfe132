"""The constant bias of a layer: its values, and the place where a rewrite can put a new one.

Factors that fit activations change the mean of a layer's results. A new bias corrects the mean at no cost
(`Bias.scale` is α): b' = b + α (W − Ŵ) E[x]. A layer has such a bias under these rules:

1. The layer has one use. Several uses would each need a correction of their own.
2. A BatchNorm is folded into the layer, which makes a new bias anyway. Or its operator has a bias (and
   β ≠ 0). Or its result has one reader in the same scope, an Add or a fused operator that adds a bias
   (`Operator.adds_behind`, `operators.adding`).
3. The bias is constant and finite, and has one value per output feature that broadcasts over the other axes.
4. Nothing else reads the bias or shares its bytes in a data file. Then the new bias replaces the old one,
   and the number of parameters stays the same. Of two layers whose results one node adds up with one bias,
   the first has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnx_lowrank.files.load import Model
from onnx_lowrank.files.tensors import is_external
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.graph.weights import Source, constant, readers, resolve
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.adding import addends
from onnx_lowrank.operators.family import Operator


@dataclass(frozen=True, slots=True)
class Bias:
    """The bias of a layer that computes scale · W x + values.

    Attributes:
        values: The addends of all features, over all groups in the order of the output, shape (f,). They
            include a Gemm's β and a folded BatchNorm.
        scale: The factor of W x: a Gemm's α, otherwise 1. A folded BatchNorm is in W.
        place: The node that adds the bias: the layer's own node (also with a folded BatchNorm), or the Add
            or the fused operator behind a MatMul.
        operand: The input of that node that holds the bias.
        shape: The shape of that input.
        in_node: Whether the layer's own node adds the bias, so that its result includes it.
    """

    values: NDArray[np.float64]
    scale: float
    place: Place
    operand: int
    shape: tuple[int, ...]
    in_node: bool


def bias(model: Model, walk: Walk, binding: Binding) -> Bias | None:
    """The bias of a layer; None if there is no bias that a rewrite can change at no cost."""
    layer = binding.layer
    if len(layer.uses) > 1:
        return None
    (use,) = layer.uses
    place = Place(use.scope, use.node)
    node = walk.node(place)
    operator = registry.family(node)
    scale = operator.scale(node)
    if layer.batchnorm is not None and operator.bias is not None:
        return Bias(layer.batchnorm.bias, scale, place, operator.bias, (layer.f,), in_node=True)
    adder = _adder(walk, operator, place)
    value = None if adder is None else _own_constant(model, walk, *adder)
    axis = operator.feature_axis(use)
    if adder is None or value is None or not _is_per_feature(value.shape, layer.f, axis):
        return None
    beta = operator.bias_scale(node)
    with np.errstate(all="ignore"):
        values = beta * value.astype(np.float64).ravel()
    if beta == 0 or not np.isfinite(values).all():
        return None
    return Bias(values, scale, *adder, value.shape, in_node=adder[0] == place)


def _adder(walk: Walk, operator: Operator, place: Place) -> tuple[Place, int] | None:
    """Rule 2: the node and the operand that add a bias to the product of the node at `place`."""
    if operator.bias is not None:
        return place, operator.bias
    result = walk.result(place)
    # Before opset 7, Add has other rules of broadcasting.
    if not operator.adds_behind or walk.opsets[place.scope] < 7 or walk.is_output(result):
        return None
    found = walk.consumers(result)
    if len(found) != 1:
        return None
    behind, operand = found[0]
    added = addends(walk.node(behind), operand) if behind.scope == place.scope else None
    if added is None:
        return None
    constant_operand = added.other if added.bias is None else added.bias
    if constant_operand is None or (
        added.bias is not None and _is_second(walk, behind, operand, added.other)
    ):
        return None
    return behind, constant_operand


def _is_second(walk: Walk, place: Place, operand: int, other: int | None) -> bool:
    """Whether a sum with one bias has a layer before this one that takes it: two would both change it."""
    if other is None or other > operand or (tensor := walk.operand(place, other)) is None:
        return False
    first = walk.producer(tensor)
    operator = None if first is None else registry.known(walk.node(first))
    return operator is not None and operator.adds_behind and len(walk.consumers(tensor)) == 1


def _own_constant(model: Model, walk: Walk, place: Place, operand: int) -> NDArray[np.generic] | None:
    """Rules 3 and 4: the value of a constant operand with no other reader; None for other operands."""
    tensor = walk.operand(place, operand)
    if tensor is None:
        return None
    stored = resolve(walk, tensor)
    if isinstance(stored, str) or not is_own(model, walk, stored.source, place, operand):
        return None
    return constant(walk, model, tensor)


def is_own(model: Model, walk: Walk, source: Source, place: Place, operand: int) -> bool:
    """Rule 4: whether a constant has no reader but one operand of one node, and shares no bytes."""
    return readers(walk, source) == [(place, operand)] and not _shares_bytes(model, walk, source.tensor)


def _shares_bytes(model: Model, walk: Walk, tensor: TensorProto) -> bool:
    """Whether another tensor refers to the same bytes of a data file."""
    return is_external(tensor) and walk.readers_of_bytes(model, tensor) > 1


def _is_per_feature(shape: tuple[int, ...], f: int, axis: int | None) -> bool:
    """Whether an array of this shape has f elements, all along the axis (counted from the end)."""
    return axis is not None and len(shape) >= -axis and shape[axis] == f == prod(shape)
