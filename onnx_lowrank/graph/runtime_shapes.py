"""The shapes that ONNX Runtime's own operators give; ONNX's shape inference does not know these operators.

In a light copy, each operator becomes a function of ONNX's operators that give the same shapes (not the same
numbers), and shape inference goes through functions. Operators whose multiply-accumulates are not counted,
such as MultiHeadAttention, stay unknown, so that no budget of MACs counts without them.
"""

from __future__ import annotations

from functools import cache

from onnx import FunctionProto, ModelProto, NodeProto, parser

from onnx_lowrank.graph.scopes import scopes
from onnx_lowrank.graph.walk import attribute_of

_DOMAIN = "com.microsoft"

_SAME = ("BiasGelu", "BiasSoftmax", "FastGelu", "Gelu", "QuickGelu")
"""Operators whose result has the shape of their first input."""

_NORM = "y = Identity (x) mean = ReduceMean <axes = [-1]> (x) inverse = Identity (mean) sum = Identity (x)"
_SPLIT = "all = MatMul (x, w) queries, keys, y = Split"
_EMBEDDED = "y = Gather (words, ids) mask_index = ReduceMax <axes = [1], keepdims = 0> (ids)"
_SIZED = "split : ints = @qkv_hidden_sizes"
_TRANSPOSED = 'Einsum <equation = "...ij->...ji">'  # a Transpose would need the rank
_WINDOW = "kernel_shape : ints = @kernel_shape, strides : ints = @strides, dilations : ints = @dilations"
_PADDED = "pads : ints = @pads, auto_pad : string = @auto_pad, group : int = @group"

# fmt: off
_BODIES = {
    **dict.fromkeys(_SAME, "(x) => (y) { y = Identity (x) }"),
    **dict.fromkeys(
        ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
        f"(x) => (y, mean, inverse, sum) {{ {_NORM} }}",
    ),
    "EmbedLayerNormalization":
        f"(ids, segment_ids, words) => (y, mask_index, sum) {{ {_EMBEDDED} sum = Identity (y) }}",
    "Attention": f"(x, w) => (y) {{ {_SPLIT} <axis = -1> (all) }}",
    "Attention sized":
        f"<qkv_hidden_sizes> (x, w) => (y) {{ {_SPLIT} <axis = -1, {_SIZED}> (all) }}",
    "FusedMatMul": "(a, b) => (y) { y = MatMul (a, b) }",
    "FusedMatMul A": f"(a, b) => (y) {{ left = {_TRANSPOSED} (a) y = MatMul (left, b) }}",
    "FusedMatMul B": f"(a, b) => (y) {{ right = {_TRANSPOSED} (b) y = MatMul (a, right) }}",
    "FusedMatMul AB":
        f"(a, b) => (y) {{ left = {_TRANSPOSED} (a) right = {_TRANSPOSED} (b) y = MatMul (left, right) }}",
    "FusedGemm":
        "<transA, transB> (a, b, c) => (y) {"
        "y = Gemm <transA : int = @transA, transB : int = @transB> (a, b, c) }",
    "FusedConv":
        "<kernel_shape, strides, dilations, pads, auto_pad, group> (x, w) => (y) {"
        f"y = Conv <{_WINDOW}, {_PADDED}> (x, w) }}",
}
# fmt: on
"""Signatures and bodies of the functions, by operator and variant."""


def know_runtime(light: ModelProto) -> None:
    """Define ONNX Runtime's own operators in a light copy of a model, in place.

    Args:
        light: The copy. The nodes keep their places; their types and outputs may change.
    """
    own = {(function.domain, function.name) for function in light.functions}
    used = dict[str, FunctionProto]()
    for scope in scopes(light):
        for node in scope.nodes:
            variant = _variant(node) if node.domain == _DOMAIN else ""
            if variant not in _BODIES or (node.domain, node.op_type) in own:
                continue
            function = used[variant] = _function(variant)
            node.op_type = function.name
            # Inference fails at a node with fewer outputs than its function.
            node.output.extend([""] * (len(function.output) - len(node.output)))
    light.functions.extend(used.values())


def _variant(node: NodeProto) -> str:
    """The operator of a node, with the attributes that change its shape."""
    if node.op_type == "Attention":
        return "Attention sized" if attribute_of(node, "qkv_hidden_sizes", []) else "Attention"
    if node.op_type == "FusedMatMul":
        if any(attribute_of(node, name, 0) for name in ("transBatchA", "transBatchB")):
            return ""
        flipped = "A" * bool(attribute_of(node, "transA", 0)) + "B" * bool(attribute_of(node, "transB", 0))
        return f"FusedMatMul {flipped}".rstrip()
    return str(node.op_type)


@cache
def _function(variant: str) -> FunctionProto:
    """The function of a variant; in opset 12, sizes of a Split and axes are attributes."""
    name = variant.replace(" ", "_")
    body = _BODIES[variant]
    return parser.parse_function(f'<domain: "{_DOMAIN}", opset_import: ["" : 12]> {name} {body}')
