"""The shapes of ONNX Runtime's own operators are those that the runtime gives."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from fused import feed
from fused import model as fused_model
from onnx_lowrank.files.load import load
from onnx_lowrank.graph.shapes import infer
from rewriting import found, run

X = "float[2,5,24] x"
OPERATORS = {
    # With a bias, as ONNX Runtime 1.26 ends the process without one.
    "Attention": (X, "y = M.Attention <num_heads = 4> (x, a, b)", {"a": (24, 96), "b": (96,)}),
    "Attention with sizes": (
        X,
        "y = M.Attention <num_heads = 4, qkv_hidden_sizes = [16, 16, 32]> (x, a, b)",
        {"a": (24, 64), "b": (64,)},
    ),
    "Attention with a past": (
        f"{X}, float[2,2,4,3,6] past",
        "y, p = M.Attention <num_heads = 4> (x, a, b, , past)",
        {"a": (24, 72), "b": (72,)},
    ),
    "SkipLayerNormalization": (X, "y = M.SkipLayerNormalization (x, x, g)", {"g": (24,)}),
    "its sum": (X, "n, , , y = M.SkipLayerNormalization (x, x, g)", {"g": (24,)}),
    "without a mean": (X, "y = M.SkipSimplifiedLayerNormalization (x, x, g)", {"g": (24,)}),
    "BiasGelu": (X, "y = M.BiasGelu (x, g)", {"g": (24,)}),
    "FastGelu": (X, "y = M.FastGelu (x)", {}),
    "Gelu": (X, "y = M.Gelu (x)", {}),
    "QuickGelu": (X, "y = M.QuickGelu (x)", {}),
    "FusedMatMul": (X, "y = M.FusedMatMul (x, w)", {"w": (24, 7)}),
    "left": ("float[2,24,5] x", "y = M.FusedMatMul <transA = 1> (x, w)", {"w": (24, 7)}),
    "right": (X, "y = M.FusedMatMul <transB = 1> (x, w)", {"w": (7, 24)}),
    "both": ("float[2,24,5] x", "y = M.FusedMatMul <transA = 1, transB = 1> (x, w)", {"w": (7, 24)}),
    "FusedGemm": (
        "float[24,5] x",
        'y = M.FusedGemm <activation = "Relu", transA = 1> (x, w)',
        {"w": (24, 7)},
    ),
    "FusedConv": (
        "float[2,3,9,9] x",
        'y = M.FusedConv <activation = "Relu", strides = [2,2], pads = [1,1,1,1]> (x, w)',
        {"w": (4, 3, 3, 3)},
    ),
}


def shape_of(proto, name, **shapes):
    return infer(load(proto), shapes).get(("", name))


@pytest.mark.parametrize("name", OPERATORS)
def test_it_is_that_of_the_runtime(name):
    inputs, node, weights = OPERATORS[name]
    outputs = "float[] y, float[] p" if "p =" in node else "float[] y"
    proto = fused_model(inputs, node.replace("M.", "com.microsoft."), outputs, **weights)
    assert shape_of(proto, "y") == run(proto, feed(proto))[0].shape


def test_an_embedding():
    weights = {"w": (9, 8), "p": (5, 8), "g": (8,)}
    node = "h, m, e = com.microsoft.EmbedLayerNormalization (ids, , w, p, , g, g) y = Identity (h)"
    proto = fused_model("int32[B,L] ids", node, **weights)
    shapes = infer(load(proto), {"ids": (2, 5)})
    assert [shapes["", name] for name in "yme"] == [(2, 5, 8), (2,), (2, 5, 8)]
    assert shape_of(proto, "h") == (None, None, 8)


def test_macs_behind_attention_are_counted():
    node = "h = com.microsoft.Attention <num_heads = 4> (x, a) y = MatMul (h, u)"
    seen = found(fused_model(X, node, a=(24, 96), u=(32, 7)))
    assert [layer.uses[0].evaluations.dense for layer in seen.layers.values()] == [10, 10]
    assert [scope.macs for scope in seen.work] == [2 * 5 * 5 * (32 + 32)]


def test_attention_whose_products_are_not_counted_leaves_the_shapes_open():
    node = "h = com.microsoft.MultiHeadAttention <num_heads = 4> (x, x, x) y = MatMul (h, u)"
    assert shape_of(fused_model(X, node, u=(24, 7)), "h") is None


def test_an_operator_that_does_not_fit_leaves_the_others_known():
    node = "h = Relu (x) y = com.microsoft.FusedMatMul <transB = 1> (h, w)"
    proto = fused_model(X, node, w=np.ones((7, 3), np.float32))
    assert shape_of(proto, "h") == (2, 5, 24)


def test_a_function_of_the_model_is_its_own():
    proto = fused_model(X, "y = com.microsoft.Gelu (x)")
    body = '<domain: "com.microsoft", opset_import: ["" : 17]> Gelu (x) => (y) { y = Transpose (x) }'
    proto.functions.append(parser.parse_function(body))
    assert shape_of(proto, "y") == (24, 5, 2)
