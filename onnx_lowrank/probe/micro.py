"""One layer with its surroundings as a small model, which is timed in place of the whole model.

Rules:

1. The node keeps its operator, attributes, shapes and dtypes. Its numbers are random, as time does not
   depend on them. A bias and a BatchNorm behind the node are included, as runtimes fuse them.
2. A convolution stands between poolings of size 1, with a Relu behind it. Kernels that compute in blocks of
   channels need a layout of their own; in a network, the neighbours have it already. Alone, the layer would
   pay for the conversion each time.
3. Layers that differ only in names and numbers have the same model and the same `key`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
    np_dtype_to_tensor_dtype,
    tensor_dtype_to_np_dtype,
)

from onnx_lowrank.core.factors import Certificate, Factors
from onnx_lowrank.core.layer import Layer, Use
from onnx_lowrank.core.option import Lowering, Option
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.shapes import infer
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import find
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.family import Operator, Timed
from onnx_lowrank.rewrite.replace import Replacement, rewrite

_IR_VERSION = 8
_INPUT, _ENTRY, _OUTPUT, _WEIGHT, _BIAS = "x", "entry", "y", "w", "bias"
_POOLING = "MaxPool"
_BLOCK = 2**16 - 1  # odd, so that no two columns of a weight are alike


@dataclass(frozen=True, slots=True)
class Micro:
    """One use of a layer as a model of its own.

    Attributes:
        key: Digest of everything that determines its time; equal for layers that are alike.
        structure: The model without the numbers of its weights.
        shape: Shape of the layer's input.
        dtype: Dtype of the layer's input.
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
        """Number of bytes of the layer's weight and of the other stored tensors."""
        elements = sum(prod(tensor.dims) for tensor in self.structure.graph.initializer)
        return elements * self.dtype.itemsize

    def own(self, nodes: Sequence[tuple[str, float]]) -> float:
        """The time of the layer, or of its chain, without the poolings around it (rule 2).

        Args:
            nodes: The operator types and the times of all nodes of its model, in the order in which they run.
        """
        around = [index for index, (op, _) in enumerate(nodes) if op == _POOLING]
        if len(around) > 1 and self.structure.graph.node[0].op_type == _POOLING:
            nodes = nodes[around[0] + 1 : around[-1]]
        return max(1.0, sum(time for _, time in nodes))

    def chains(self) -> Chains:
        """The basis for the layer's chains."""
        dense = self.dense()
        walk = Walk(dense.proto)
        (binding,), _ = find(dense, walk, infer(dense, {}), (_WEIGHT,), ())
        return Chains(dense, walk, binding, self.structure, self.dtype)

    def feed(self) -> dict[str, NDArray[Any]]:
        """An input for a run."""
        return {_INPUT: _numbers(self.shape, self.dtype, 1)}


@dataclass(frozen=True, slots=True)
class Chains:
    """Makes the chains of a layer that stands alone; it holds the layer's weight in memory.

    Attributes:
        dense: The model of the layer as it is.
        walk: Its walk.
        binding: The layer in it.
        structure: The model without numbers.
        dtype: Dtype of the weight.
    """

    dense: Model
    walk: Walk
    binding: Binding
    structure: ModelProto
    dtype: np.dtype[Any]

    def decomposed(self, options: Iterable[Option]) -> Iterator[tuple[Option, Model]]:
        """The layer's chains under some options, one by one."""
        for option in options:
            chain = placeholder(self.binding, option, self.dtype)
            yield option, rewrite(self.dense, self.walk, [chain]).model

    def digest(self, option: Option) -> str:
        """Digest of the chain's model without numbers; it changes with the structure of the chain.

        This allocates no factors and copies no weight.
        """
        nothing = self.dtype.type(0)
        chain = _replacement(self.binding, option, lambda shape, _: np.broadcast_to(nothing, shape))
        hollow = replace(self.dense, proto=self.structure)
        return _digest(rewrite(hollow, self.walk, [chain], _without_numbers).model.proto)

    def decoder(self, option: Option) -> Micro | None:
        """The decoder of a chain of one slice as a layer of its own; None if it cannot be cut out.

        This allocates no factors.
        """
        nothing = self.dtype.type(0)
        chain = _replacement(self.binding, option, lambda shape, _: np.broadcast_to(nothing, shape))
        hollow = replace(self.dense, proto=self.structure)
        made = rewrite(hollow, self.walk, [chain], _without_numbers)
        proto, names = made.model.proto, made.chains[self.binding.layer.id][0]
        nodes = {node.name: node for node in proto.graph.node}
        first, *_, last = (nodes[name] for name in names)
        between = [value for name in names[:-1] for value in nodes[name].output if value in last.input]
        known = infer(replace(self.dense, proto=proto), {})
        shape = known.get(("", between[-1])) if between else None
        if shape is None or None in shape:
            return None
        # The decoder reads what the encoder did, in the shape of the encoder's result.
        entry = next(value for value in first.input if value in (_INPUT, _ENTRY))
        last.input[list(last.input).index(between[-1])] = entry
        sizes = tuple(n for n in shape if n is not None)
        proto.graph.input[0].CopyFrom(
            make_tensor_value_info(_INPUT, proto.graph.input[0].type.tensor_type.elem_type, sizes)
        )
        _prune(proto)
        return Micro(_digest(proto), proto, sizes, self.dtype)


def _prune(proto: ModelProto) -> None:
    """Remove the nodes and the tensors of a model that its output does not need."""
    needed, kept = {_OUTPUT}, []
    for node in reversed(proto.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    stored = [tensor for tensor in proto.graph.initializer if tensor.name in needed]
    del proto.graph.node[:], proto.graph.initializer[:], proto.graph.value_info[:]
    proto.graph.node.extend(reversed(kept))
    proto.graph.initializer.extend(stored)


def resized(walk: Walk, binding: Binding, index: int, f: int, c: int) -> Micro | None:
    """One use of a layer that has other numbers of features and channels; None if it cannot be cut out.

    Args:
        walk: The model's walk.
        binding: The layer as it is.
        index: Number of the use.
        f: Its output features.
        c: Its input channels.
    """
    layer = replace(binding.layer, f=f, c=c)
    made = micro(walk, replace(binding, layer=layer), index)
    if made is None:
        return None
    (weight,) = (tensor for tensor in made.structure.graph.initializer if tensor.name == _WEIGHT)
    # Some operators state the sizes of their weights elsewhere, too.
    return made if prod(weight.dims) == layer.size else None


def micro(walk: Walk, binding: Binding, index: int) -> Micro | None:
    """Cut one use of a layer out of its model.

    Args:
        walk: The model's walk.
        binding: The layer.
        index: Number of the use.

    Returns:
        The small model; None if the node's positions or the shape of its input are unknown.
    """
    layer, use = binding.layer, binding.layer.uses[index]
    node = walk.node(Place(use.scope, use.node))
    operator = registry.family(node)
    timed = operator.timed(layer, use, node)
    if timed is None or use.positions is None or not use.positions.batch:
        return None
    kind = binding.casts[index] or binding.stored.source.tensor.data_type
    dtype = tensor_dtype_to_np_dtype(kind)
    structure = _structure(node, operator, use, timed, layer, kind, walk.opsets[use.scope])
    return Micro(_digest(structure), structure, timed.input_shape, dtype)


def _structure(
    node: NodeProto, operator: Operator, use: Use, timed: Timed, layer: Layer, kind: int, opset: int
) -> ModelProto:
    copy = NodeProto(op_type=node.op_type, domain=node.domain)
    copy.attribute.extend(sorted(node.attribute, key=lambda attribute: attribute.name))
    initializers = [TensorProto(name=_WEIGHT, data_type=kind, dims=timed.weight_shape)]
    inputs = {
        use.operand: _WEIGHT,
        operator.activation(use.operand): _ENTRY if operator.surrounded else _INPUT,
    }
    for index, shape in timed.others.items():
        inputs[index] = _BIAS if index == operator.bias else f"operand_{index}"
        initializers.append(TensorProto(name=inputs[index], data_type=kind, dims=shape))
    copy.input.extend(inputs.get(index, "") for index in range(max(inputs) + 1))
    nodes, result = [copy], _OUTPUT
    if operator.surrounded:
        nodes, more = _surrounded(copy, layer, kind)
        initializers += more
    else:
        copy.output.append(result)
    graph = make_graph(
        nodes,
        "layer",
        [make_tensor_value_info(_INPUT, kind, timed.input_shape)],
        [make_tensor_value_info(_OUTPUT, kind, None)],
        initializers,
    )
    opsets = [make_opsetid("", opset), *([make_opsetid(node.domain, 1)] if node.domain else [])]
    return make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)


def _surrounded(copy: NodeProto, layer: Layer, kind: int) -> tuple[list[NodeProto], list[TensorProto]]:
    """The node between poolings (rule 2), with a BatchNorm behind it, and the BatchNorm's tensors."""
    window = [1] * len(layer.kernel)
    copy.output.append("result")
    nodes, behind, tensors = [copy], "result", []
    if layer.batchnorm is not None:
        names = ["scale", "shift", "mean", "var"]
        tensors = [TensorProto(name=name, data_type=kind, dims=[layer.f]) for name in names]
        nodes.append(make_node("BatchNormalization", [behind, *names], ["normed"]))
        behind = "normed"
    nodes = [make_node(_POOLING, [_INPUT], [_ENTRY], kernel_shape=window), *nodes]
    nodes.append(make_node("Relu", [behind], ["active"]))
    nodes.append(make_node(_POOLING, ["active"], [_OUTPUT], kernel_shape=window))
    return nodes, tensors


def placeholder(binding: Binding, option: Option, dtype: np.dtype[Any]) -> Replacement:
    """A layer's replacement with random factors, for timing."""
    return _replacement(binding, option, lambda shape, fan_in: _numbers(shape, dtype, fan_in))


def _replacement(
    binding: Binding, option: Option, numbers: Callable[[tuple[int, ...], int], NDArray[Any]]
) -> Replacement:
    """A layer's replacement with arbitrary factors.

    Args:
        binding: The layer.
        option: Its option.
        numbers: Makes a factor from a shape and a fan-in.
    """
    layer, k, j = binding.layer, option.k, option.j
    if option.lowering is Lowering.NARROW and layer.packs_own:
        j = layer.at_width(j)[-1].f  # The decoder has the other features, too.
    groups, f, c, *_ = layer.shape
    encoder, decoder = option.fold.kernels(layer.kernel)
    factors = Factors(
        option.fold,
        numbers((groups, k, j, c // k, *encoder), c // k * prod(encoder)),
        numbers((groups, f, k, j, *decoder), k * j * prod(decoder)),
    )
    unknown = (nan,) * groups
    return Replacement(binding, option, factors, Certificate(unknown, unknown))


def _digest(proto: ModelProto) -> str:
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def _without_numbers(name: str, values: NDArray[Any]) -> TensorProto:
    return TensorProto(name=name, data_type=np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)


def _numbers(shape: tuple[int, ...], dtype: np.dtype[Any], fan_in: int) -> NDArray[Any]:
    """Random numbers of mean 1 / fan_in, which keep activations near their size.

    They are positive, as some of them are variances.
    """
    block = np.random.default_rng(0).uniform(0.5, 1.5, min(prod(shape), _BLOCK)) / max(1, fan_in)
    return np.resize(block.astype(dtype), shape)
