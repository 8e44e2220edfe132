"""Models with the ranges of tensors as outputs, and with tensors divided by scales (`stages.balancing`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnx_lowrank.files.load import Model
from onnx_lowrank.quantize.kind import opset

_AXES_ARE_AN_INPUT = 18
"""The opset from which ReduceMax reads its axes as an input."""

SUFFIX = "lowrank_balanced"


def showing(model: Model, sizes: Mapping[str, int]) -> ModelProto:
    """The model whose outputs are the largest sizes of the features of tensors.

    Args:
        model: The model.
        sizes: The number of features of each tensor, which are its last axis.

    Returns:
        A model with an output `NAME/lowrank_balanced` for every tensor.
    """
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    del graph.output[:]
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), f"{SUFFIX}_axis"))
    for name, size in sizes.items():
        shape, rows, positive, shown = (f"{name}/{SUFFIX}{part}" for part in ("_shape", "_rows", "_size", ""))
        graph.initializer.append(numpy_helper.from_array(np.array([-1, size]), shape))
        if opset(model) < _AXES_ARE_AN_INPUT:
            reduced = helper.make_node("ReduceMax", [positive], [shown], axes=[0], keepdims=0)
        else:
            reduced = helper.make_node("ReduceMax", [positive, f"{SUFFIX}_axis"], [shown], keepdims=0)
        graph.node.extend(
            [
                helper.make_node("Reshape", [name, shape], [rows]),
                helper.make_node("Abs", [rows], [positive]),
                reduced,
            ]
        )
        graph.output.append(helper.make_tensor_value_info(shown, TensorProto.FLOAT, [size]))
    return proto


def with_scales(
    proto: ModelProto, scales: Mapping[str, NDArray[np.float64]], outputs: Collection[str]
) -> ModelProto:
    """A copy in which some nodes read their first inputs divided by scales, one Mul for each tensor.

    Args:
        proto: The model.
        scales: The scale of every feature of these inputs, by their names.
        outputs: The first outputs of the nodes.
    """
    made = ModelProto()
    made.CopyFrom(proto)
    nodes: list[NodeProto] = []
    written = set()
    for node in made.graph.node:
        if node.output and node.output[0] in outputs:
            name = node.input[0]
            if name not in written:
                written.add(name)
                factor = (1 / scales[name]).astype(np.float32)
                made.graph.initializer.append(numpy_helper.from_array(factor, f"{name}/{SUFFIX}_by"))
                ends = [name, f"{name}/{SUFFIX}_by"], [f"{name}/{SUFFIX}"]
                nodes.append(helper.make_node("Mul", *ends, name=f"{name}/{SUFFIX}"))
            node.input[0] = f"{name}/{SUFFIX}"
        nodes.append(NodeProto.FromString(node.SerializeToString()))
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made
