"""One layer in its surroundings, as a model of its own: what is timed in place of the whole model.

Rules:

1. The node keeps its operator, attributes, shapes and dtypes; its numbers are random, as time does not
   depend on them. A bias and a BatchNorm behind it come along, since they are fused into it.
2. A convolution stands between poolings of size 1, with a Relu behind it: kernels that compute in blocks
   of channels lay their tensors out for it, which the neighbours in a network do for each other. Alone, the
   layer would pay for that each time.
3. The model is the same for layers that differ in names and numbers only: `key` tells which are alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import nan, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto
from onnx.helper import (
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor_value_info,
    tensor_dtype_to_np_dtype,
)

from onnx_lowrank.core.factors import Certificate, Factors
from onnx_lowrank.core.layer import Layer, Positions, Use
from onnx_lowrank.core.option import Option
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.shapes import infer
from onnx_lowrank.graph.walk import Place, Walk, attribute_of
from onnx_lowrank.layers.find import Binding, find
from onnx_lowrank.rewrite.replace import Replacement, rewrite

_IR_VERSION = 8
_INPUT, _OUTPUT, _WEIGHT = "x", "y", "w"
_BLOCK = 2**16 - 1  # odd, so that no two columns of a weight are alike


@dataclass(frozen=True, slots=True)
class Micro:
    """One use of a layer as a model of its own.

    Attributes:
        key: Digest of everything that its time depends on: equal for layers that are alike.
        structure: The model without the numbers of its weights.
        shape: Of the input that the layer reads.
        dtype: Of that input.
    """

    key: str
    structure: ModelProto
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def dense(self) -> Model:
        """The layer as it is."""
        proto = ModelProto()
        proto.CopyFrom(self.structure)
        for tensor in proto.graph.initializer:
            fan_in = prod(tensor.dims) // max(1, tensor.dims[0])
            tensor.CopyFrom(inline(tensor.name, _numbers(tuple(tensor.dims), self.dtype, fan_in)))
        return Model(proto, self.key, {}, "")

    @property
    def bytes(self) -> int:
        """Size of the layer's weight, and of what comes along."""
        elements = sum(prod(tensor.dims) for tensor in self.structure.graph.initializer)
        return elements * self.dtype.itemsize

    def decomposed(self, options: Iterable[Option]) -> Iterator[tuple[Option, Model]]:
        """The layer's chains under some options, one by one."""
        dense = self.dense()
        walk = Walk(dense.proto)
        (binding,), _ = find(dense, walk, infer(dense, {}), (_WEIGHT,), ())
        for option in options:
            yield option, rewrite(dense, walk, [placeholder(binding, option, self.dtype)], {}).model

    def feed(self) -> dict[str, NDArray[Any]]:
        """An input to run it on."""
        return {_INPUT: _numbers(self.shape, self.dtype, 1)}


def micro(walk: Walk, binding: Binding, index: int) -> Micro | None:
    """Cut one use of a layer out of its model, or None where that cannot be done.

    That are batches of matrices, whose input's shape nothing tells, and nodes that have no known positions.

    Args:
        walk: The model's walk.
        binding: The layer.
        index: Which of the layer's uses.
    """
    layer, use = binding.layer, binding.layer.uses[index]
    positions = use.positions
    is_batched = layer.groups > 1 and not layer.kernel
    if positions is None or not positions.batch or use.op == "Gather" or is_batched:
        return None
    node = walk.node(Place(use.scope, use.node))
    kind = binding.casts[index] or binding.stored.source.tensor.data_type
    dtype = tensor_dtype_to_np_dtype(kind)
    shape = _input_shape(layer, use, node, positions)
    structure = _structure(layer, use, node, shape, kind, walk.opsets[use.scope])
    key = hashlib.sha256(structure.SerializeToString(deterministic=True)).hexdigest()
    return Micro(key, structure, shape, dtype)


def _structure(
    layer: Layer, use: Use, node: NodeProto, shape: tuple[int, ...], kind: int, opset: int
) -> ModelProto:
    copy = NodeProto(op_type=node.op_type)
    copy.attribute.extend(sorted(node.attribute, key=lambda attribute: attribute.name))
    weight = TensorProto(name=_WEIGHT, data_type=kind, dims=_weight_shape(layer, use, node))
    initializers, nodes = [weight], [copy]
    operands = ["entry" if layer.kernel else _INPUT, _WEIGHT]
    copy.input.extend(operands if use.operand == 1 else reversed(operands))
    if len(node.input) > 2 and node.input[2]:
        copy.input.append("bias")
        features = layer.c if use.transposed else layer.f
        dims = [features] if layer.kernel or use.operand == 1 else [features, 1]
        initializers.append(TensorProto(name="bias", data_type=kind, dims=dims))
    copy.output.append("result" if layer.kernel else _OUTPUT)
    if layer.kernel:
        window = [1] * len(layer.kernel)
        behind = copy.output[0]
        if layer.batchnorm is not None:
            names = ["scale", "shift", "mean", "var"]
            initializers += [TensorProto(name=name, data_type=kind, dims=[layer.f]) for name in names]
            nodes.append(make_node("BatchNormalization", [behind, *names], ["normed"]))
            behind = "normed"
        nodes = [make_node("MaxPool", [_INPUT], ["entry"], kernel_shape=window), *nodes]
        nodes.append(make_node("Relu", [behind], ["active"]))
        nodes.append(make_node("MaxPool", ["active"], [_OUTPUT], kernel_shape=window))
    graph = make_graph(
        nodes,
        "layer",
        [make_tensor_value_info(_INPUT, kind, shape)],
        [make_tensor_value_info(_OUTPUT, kind, None)],
        initializers,
    )
    return make_model(graph, opset_imports=[make_opsetid("", opset)], ir_version=_IR_VERSION)


def _input_shape(layer: Layer, use: Use, node: NodeProto, positions: Positions) -> tuple[int, ...]:
    if layer.kernel:
        return (positions.batch, layer.c, *positions.inputs)
    on_right = use.operand == 1
    features = layer.f if use.transposed else layer.c
    rank = use.rank or 2
    if rank == 1:
        return (features,)
    flipped = use.op == "Gemm" and bool(attribute_of(node, "transA" if on_right else "transB", 0))
    rows_first = on_right != flipped
    pair = (positions.batch, features) if rows_first else (features, positions.batch)
    return (*[1] * (rank - 2), *pair)


def _weight_shape(layer: Layer, use: Use, node: NodeProto) -> tuple[int, ...]:
    """As the node reads it."""
    f, c = layer.f, layer.c
    if use.op == "ConvTranspose":
        return (c, f // layer.groups, *layer.kernel)
    if layer.kernel:
        return (f, c // layer.groups, *layer.kernel)
    if use.transposed:
        f, c = c, f
    on_right = use.operand == 1
    flipped = use.op == "Gemm" and bool(attribute_of(node, "transB" if on_right else "transA", 0))
    return (c, f) if on_right != flipped else (f, c)


def placeholder(binding: Binding, option: Option, dtype: np.dtype[Any]) -> Replacement:
    """A layer's replacement with random factors: for its time, which does not depend on them."""
    groups, f, c, *_ = binding.layer.shape
    encoder, decoder = option.fold.kernels(binding.layer.kernel)
    factors = Factors(
        option.fold,
        _numbers((groups, option.k, option.j, c // option.k, *encoder), dtype, c // option.k * prod(encoder)),
        _numbers((groups, f, option.k, option.j, *decoder), dtype, option.k * option.j * prod(decoder)),
    )
    unknown = (nan,) * groups
    return Replacement(binding, option, factors, Certificate(unknown, unknown))


def _numbers(shape: tuple[int, ...], dtype: np.dtype[Any], fan_in: int) -> NDArray[Any]:
    """Random numbers of mean 1 / fan_in, which keep activations near their size.

    They are positive, as the variances among them are.
    """
    block = np.random.default_rng(0).uniform(0.5, 1.5, min(prod(shape), _BLOCK)) / max(1, fan_in)
    return np.resize(block.astype(dtype), shape)
