"""Models with activations between all layers, so that only factors follow each other, and their count."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx

from tiny import built, cnn, decaying

_LINEAR = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
_LAYOUT = {"ReorderInput", "ReorderOutput", "Identity"}

MLP = """
<ir_version: 8, opset_import: ["": 17]>
mlp (float[N, 32] x) => (float[N, 16] y) {
  a = MatMul (x, first)
  b = Add (a, shift)
  c = Relu (b)
  d = MatMul (c, second)
  e = Relu (d)
  y = Gemm (e, third)
}
"""


def mlp() -> onnx.ModelProto:
    """Three matrices."""
    shift = np.random.default_rng(4).standard_normal(48).astype(np.float32)
    weights = {"first": decaying(5, 32, 48), "second": decaying(6, 48, 48), "third": decaying(7, 48, 16)}
    return built(MLP, weights | {"shift": shift})


MODELS = {"convolutions": (cnn, (2, 8, 6, 6)), "matrices": (mlp, (2, 32))}
"""A function that builds the model, and the shape of its input x."""


def feed(name: str) -> dict[str, np.ndarray]:
    """An input of a model."""
    return {"x": np.random.default_rng(8).standard_normal(MODELS[name][1]).astype(np.float32)}


def pairs(model: onnx.ModelProto) -> int:
    """How often a linear operator with constant weight reads another one, with no activation between."""
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    makers = {name: node for node in model.graph.node for name in node.output}

    def is_linear(node: onnx.NodeProto) -> bool:
        return node.op_type in _LINEAR and node.input[1] in constants

    def maker(name: str) -> onnx.NodeProto | None:
        found = makers.get(name)
        return maker(found.input[0]) if found is not None and found.op_type in _LAYOUT else found

    makers_of_data = [maker(node.input[0]) for node in model.graph.node if is_linear(node)]
    return sum(
        first is not None and is_linear(first) and all(a.name != "activation" for a in first.attribute)
        for first in makers_of_data
    )


def operators(model: onnx.ModelProto) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(node.op_type for node in model.graph.node)
