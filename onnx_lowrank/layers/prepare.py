"""Folding the BatchNormalization behind a layer into it, before the layer is decomposed.

It is folded under these conditions; otherwise it stays as it is:

1. The layer is one node, its operator takes a bias per output feature (`Operator.folds_batchnorm`), and only
   the BatchNormalization reads its output.
2. The BatchNormalization runs in inference mode and computes one output.
3. Its four parameters and the layer's bias are constants with one value per output feature, and the folded
   scale and bias are finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import numpy as np
from ml_dtypes import finfo
from numpy.typing import NDArray

from onnx_lowrank.core.layer import BatchNorm
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk, attribute_of, is_op
from onnx_lowrank.graph.weights import Stored, constant, dtype_of, readers, resolve
from onnx_lowrank.operators import registry

_EPSILON = float(np.float32(1e-5))
"""The default of epsilon: a float32, like every float attribute."""

_LARGEST_NORM = 2.0**511
"""The square is the largest power of four in float64."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """The BatchNorm that is folded into a layer when it is rewritten.

    Attributes:
        batchnorm: The BatchNorm, or None if there is none to fold.
        freed: Number of parameters without readers after folding: the BatchNorm's and the old bias's.
    """

    batchnorm: BatchNorm | None = None
    freed: int = 0


def prepare(walk: Walk, model: Model, place: Place, operand: int, features: int) -> Preparation:
    """Find the BatchNorm that can be folded into the layer of the node at `place`, its only use.

    Args:
        walk: The model's walk.
        model: The model.
        place: The layer's node.
        operand: Index of the node's input that is the weight.
        features: Output features of the layer, f.
    """
    operator = registry.family(walk.node(place))
    if operator.bias is None or not operator.folds_batchnorm(operand, walk.opsets[place.scope]):
        return Preparation()
    behind = _only_reader(walk, place)
    if behind is None or not _in_inference(walk, behind):
        return Preparation()
    folded = _fold(walk, model, place, behind, features)
    if folded is None:
        return Preparation()
    tensors = [*_operands(walk, behind, (1, 2, 3, 4)), *_operands(walk, place, (operator.bias,))]
    return Preparation(folded, _freed(walk, tensors, {place, behind}))


def too_large(weight: NDArray[Any], batchnorm: BatchNorm | None) -> str | None:
    """Why a weight's numbers cannot be decomposed, or None where they can.

    Factors are U√Σ and √ΣVᵀ, with numbers of up to √σ_1 ≤ √‖W‖_F, which the weight's dtype has to hold. And
    float64 has to hold ‖W‖²_F, in which errors are counted.

    Args:
        weight: Canonical weight, shape (g, f, c, *kernel), finite.
        batchnorm: The BatchNorm that goes into it.
    """
    if batchnorm is None and weight.dtype != np.float64:
        return None  # Its norm is far below the square of its dtype's largest number.
    axes = tuple(range(2, weight.ndim))
    largest = np.maximum(weight.max(axis=axes), -weight.min(axis=axes)).astype(np.float64)
    with np.errstate(over="ignore"):
        scaled = largest if batchnorm is None else largest * np.abs(batchnorm.scale.reshape(largest.shape))
        norm = float(np.max(scaled)) * sqrt(weight.size)
        bound = min(np.square(largest_of(weight.dtype)), _LARGEST_NORM)
    if norm <= bound:
        return None
    behind = "" if batchnorm is None else " with the BatchNormalization behind it"
    return (
        f"its numbers are too large: they reach {np.max(scaled):.3g}{behind}, beyond what factors of "
        f"{weight.dtype.name} hold: rescale them"
    )


def largest_of(dtype: np.dtype[Any]) -> np.float64:
    """The largest number of a dtype of floats."""
    # NumPy's finfo knows no bfloat16.
    return np.float64(finfo(dtype).max)  # type: ignore[no-untyped-call]


def _only_reader(walk: Walk, place: Place) -> Place | None:
    """The BatchNormalization of the same scope that is the only reader of a node's output."""
    output = walk.result(place)
    found = [] if output is None or walk.is_output(output) else walk.consumers(output)
    if len(found) != 1:
        return None
    behind, operand = found[0]
    is_norm = is_op(walk.node(behind), ("BatchNormalization",)) and operand == 0
    return behind if is_norm and behind.scope == place.scope else None


def _in_inference(walk: Walk, place: Place) -> bool:
    node, opset = walk.node(place), walk.opsets[place.scope]
    training = attribute_of(node, "training_mode", 0) if opset >= 14 else 0
    if opset < 7:  # before opset 7, the mode was an attribute with training as its default
        training = not attribute_of(node, "is_test", 0)
    per_feature = attribute_of(node, "spatial", 1)
    alone = walk.result(place) is not None and not any(node.output[1:])
    return not training and bool(per_feature) and alone


def _fold(walk: Walk, model: Model, place: Place, behind: Place, features: int) -> BatchNorm | None:
    """The scale and the bias with which the layer alone computes BN(layer).

    BN(y) = γ (y − μ) / √(σ² + ε) + β per feature (ONNX operator specification, BatchNormalization).
    """
    values = [constant(walk, model, walk.operand(behind, index)) for index in (1, 2, 3, 4)]
    bias = _bias(walk, model, place, features)
    if bias is None or any(value is None or value.shape != (features,) for value in values):
        return None
    gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in values)
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + attribute_of(walk.node(behind), "epsilon", _EPSILON))
        folded = scale * (bias - mean) + beta
        stored_bias = folded.astype(_dtype(walk, place))
    if not (np.isfinite(scale).all() and np.isfinite(stored_bias).all()):
        return None
    return BatchNorm(behind.node, scale, folded)


def _dtype(walk: Walk, place: Place) -> np.dtype[Any]:
    """The dtype in which a layer's node reads its weight; the bias is stored in it."""
    stored = resolve(walk, walk.operand(place, 1))
    return np.dtype(np.float64) if isinstance(stored, str) else dtype_of(walk, stored)


def _bias(walk: Walk, model: Model, place: Place, features: int) -> NDArray[np.float64] | None:
    """The addends of a layer's output features, shape (f,); None if they are not constant."""
    operator = registry.family(walk.node(place))
    tensor = None if operator.bias is None else walk.operand(place, operator.bias)
    if tensor is None:
        return np.zeros(features)
    value = constant(walk, model, tensor)
    if value is None or prod(value.shape[:-1]) != 1 or value.size not in (1, features):
        return None
    beta = operator.bias_scale(walk.node(place))
    return np.broadcast_to(beta * np.asarray(value, np.float64).ravel(), (features,))


def _operands(walk: Walk, place: Place, indices: tuple[int, ...]) -> list[Any]:
    tensors = (walk.operand(place, index) for index in indices)
    return [tensor for tensor in tensors if tensor is not None]


def _freed(walk: Walk, tensors: list[Any], nodes: set[Place]) -> int:
    """Number of elements of the stored tensors behind `tensors` that only `nodes` read."""
    stored = [resolve(walk, tensor) for tensor in tensors]
    sources = {(s.source.scope, s.source.name): s.source for s in stored if isinstance(s, Stored)}
    total = 0
    for source in sources.values():
        found = readers(walk, source)
        if found is not None and all(place in nodes for place, _ in found):
            total += prod(source.tensor.dims)
    return total
