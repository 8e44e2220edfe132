"""One model or more for the gradients of every form: nodes, and what they read.

Operands whose names begin with `p` are between 0.2 and 0.9, the others are normally distributed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from onnx import ModelProto

from differentiating import model
from rewriting import DTYPES

Operands = Mapping[str, Any]
"""The shape of every operand, or its values if it has whole numbers."""

ELEMENTWISE: list[tuple[str, Operands]] = [
    *[
        (f"y = {name} (x)", {"x": (2, 3)})
        for name in (
            *(
                "Abs",
                "Asinh",
                "Atan",
                "Cos",
                "Cosh",
                "Erf",
                "Exp",
                "HardSwish",
                "Mish",
                "Neg",
                "Relu",
                "Sigmoid",
            ),
            *(
                "Sin",
                "Sinh",
                "Softplus",
                "Softsign",
                "Tan",
                "Tanh",
                "Elu",
                "Celu",
                "Selu",
                "HardSigmoid",
                "Gelu",
            ),
            *("LeakyRelu", "ThresholdedRelu", "Swish", "Identity", "Dropout", "Softmax", "LogSoftmax"),
        )
    ],
    *[(f"y = {name} (p)", {"p": (2, 3)}) for name in ("Acos", "Asin", "Atanh", "Log", "Reciprocal", "Sqrt")],
    *[(f"y = {name} (x, p)", {"x": (2, 3), "p": (2, 1)}) for name in ("Add", "Div", "Mul", "Sub", "PRelu")],
    *[
        (f"y = {name} (a, b, c)", {"a": (2, 3), "b": (3,), "c": (2, 1)})
        for name in ("Max", "Min", "Sum", "Mean")
    ],
    ("h = Reciprocal (p) y = Acosh (h)", {"p": (2, 3)}),
    ("y = Pow (p, x)", {"p": (2, 3), "x": (3,)}),
    ("l = Neg (p) y = Clip (x, l, p)", {"x": (3, 4), "p": ()}),
    ("y = Shrink <lambd = 0.3, bias = 0.2> (x)", {"x": (3, 4)}),
    ("y = Where (c, a, b)", {"c": np.array([True, False, True]), "a": (2, 3), "b": (2, 1)}),
    ("y = Cast <to = 11> (x)", {"x": (2, 3)}),
    ("y = CastLike (x, p)", {"x": (2, 3), "p": (1,)}),
    ("y = com.microsoft.Gelu (x)", {"x": (2, 3)}),
    ("y = com.microsoft.BiasGelu (x, b)", {"x": (2, 3), "b": (3,)}),
    ("y = com.microsoft.FastGelu (x, b)", {"x": (2, 3), "b": (3,)}),
    ("y = com.microsoft.QuickGelu (x)", {"x": (2, 3)}),
    ("y = com.microsoft.BiasSoftmax <axis = 2> (x, b)", {"x": (2, 2, 3), "b": (1, 2, 3)}),
    ("y = com.microsoft.BiasAdd (x, b, s)", {"x": (2, 2, 3), "b": (3,), "s": (2, 2, 3)}),
]

NORMS: list[tuple[str, Operands]] = [
    ("y = BatchNormalization (x, s, b, m, p)", {"x": (2, 3, 2), "s": (3,), "b": (3,), "m": (3,), "p": (3,)}),
    ("y = InstanceNormalization (x, s, b)", {"x": (2, 3, 4), "s": (3,), "b": (3,)}),
    ("y = GroupNormalization <num_groups = 2> (x, s, b)", {"x": (2, 4, 3), "s": (4,), "b": (4,)}),
    ("y, m, v = LayerNormalization <axis = 1> (x, s, b)", {"x": (2, 3, 2), "s": (3, 2), "b": (3, 2)}),
    ("y = LayerNormalization <axis = 1> (x, s, b)", {"x": (2, 3, 2), "s": (2,), "b": (3, 1)}),
    ("y = RMSNormalization (x, s)", {"x": (2, 3), "s": (3,)}),
    ("y = SimplifiedLayerNormalization (x, s)", {"x": (2, 3), "s": (3,)}),
    ("y = com.microsoft.SimplifiedLayerNormalization (x, s)", {"x": (2, 3), "s": (3,)}),
    (
        "y, m, v, t = com.microsoft.SkipLayerNormalization (x, k, s, b, c)",
        {"x": (2, 2, 3), "k": (2, 2, 3), "s": (3,), "b": (3,), "c": (3,)},
    ),
    (
        "y, , v, t = com.microsoft.SkipSimplifiedLayerNormalization (x, k, s, c)",
        {"x": (2, 2, 3), "k": (2, 2, 3), "s": (3,), "c": (3,)},
    ),
    (
        "y, m, t = com.microsoft.EmbedLayerNormalization (i, j, w, o, g, s, b)",
        {
            "i": np.array([[3, 0, 3]], np.int32),
            "j": np.array([[0, 1, 1]], np.int32),
            "w": (4, 3),
            "o": (5, 3),
            "g": (2, 3),
            "s": (3,),
            "b": (3,),
        },
    ),
    ("y = LRN <size = 3, alpha = 0.5> (x)", {"x": (2, 5, 2)}),
    ("y = LpNormalization <axis = 1> (x)", {"x": (2, 3)}),
    ("y = MeanVarianceNormalization <axes = [0, 2]> (x)", {"x": (2, 3, 2)}),
    *[
        (f"y = Reduce{name} <keepdims = 0> (p, a)", {"p": (2, 3, 2), "a": np.array([-1, 0])})
        for name in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")
    ],
]

PRODUCTS: list[tuple[str, Operands]] = [
    ("y = MatMul (a, b)", {"a": (2, 2, 3), "b": (3, 2)}),
    (
        "y = com.microsoft.FusedMatMul <transA = 1, transBatchA = 1, transB = 1, alpha = 0.5> (a, b)",
        {"a": (3, 2, 2), "b": (2, 4, 3)},
    ),
    ("y = Gemm <transA = 1, alpha = 0.5, beta = 2.0> (a, b, c)", {"a": (3, 2), "b": (3, 2), "c": (2,)}),
    (
        'y = com.microsoft.FusedGemm <transB = 1, activation = "LeakyRelu", activation_alpha = 0.2>'
        " (a, b, c)",
        {"a": (2, 3), "b": (2, 3), "c": (2,)},
    ),
    ('y = Einsum <equation = "...ij, jk -> ...ik"> (a, b)', {"a": (2, 2, 3), "b": (3, 2)}),
    (
        'y = Conv <auto_pad = "SAME_LOWER", strides = [2, 1], group = 2> (x, w, b)',
        {"x": (1, 2, 4, 3), "w": (4, 1, 2, 2), "b": (4,)},
    ),
    (
        "y = ConvTranspose <strides = [3], pads = [1, 0], output_padding = [2], group = 2> (x, w, b)",
        {"x": (1, 2, 3), "w": (2, 2, 2), "b": (4,)},
    ),
    (
        'y = com.microsoft.FusedConv <activation = "Tanh", pads = [1, 1]> (x, w, b, z)',
        {"x": (1, 2, 4), "w": (2, 2, 3), "b": (2,), "z": (1, 2, 4)},
    ),
    (
        "y = AveragePool <kernel_shape = [2, 2], pads = [1, 0, 0, 1], strides = [2, 1]> (x)",
        {"x": (1, 2, 4, 3)},
    ),
    ("y = AveragePool <kernel_shape = [2], dilations = [2], ceil_mode = 1> (x)", {"x": (1, 2, 5)}),
    ("y = MaxPool <kernel_shape = [3], strides = [2], pads = [1, 1], ceil_mode = 1> (x)", {"x": (1, 2, 6)}),
    ("y = LpPool <kernel_shape = [2], pads = [1, 0]> (x)", {"x": (1, 2, 4)}),
    *[(f"y = Global{name}Pool (x)", {"x": (2, 2, 3, 2)}) for name in ("Average", "Max", "Lp")],
]

_TWO = np.array([2], np.int64)
SHAPES: list[tuple[str, Operands]] = [
    ("y = Reshape (x, s)", {"x": (2, 3, 2), "s": np.array([0, -1])}),
    ("y = Flatten <axis = 2> (x)", {"x": (2, 3, 2)}),
    ("y = Transpose <perm = [1, 2, 0]> (x)", {"x": (2, 3, 2)}),
    ("y = Squeeze (x, a)", {"x": (2, 1, 3), "a": np.array([1])}),
    ("y = Unsqueeze (x, a)", {"x": (2, 3), "a": np.array([0, -1])}),
    ("y = Concat <axis = 1> (a, b)", {"a": (2, 3), "b": (2, 1)}),
    ("y, z = Split <axis = 1> (x, s)", {"x": (2, 3), "s": np.array([1, 2])}),
    (
        "y = Slice (x, b, e, a, s)",
        {
            "x": (4, 5),
            "b": np.array([3, 1]),
            "e": np.array([-9, 9]),
            "a": np.array([0, -1]),
            "s": np.array([-1, 2]),
        },
    ),
    ("y = Expand (x, s)", {"x": (3, 1), "s": np.array([2, 1, 2])}),
    ("y = Tile (x, s)", {"x": (2, 2), "s": np.array([2, 1])}),
    *[
        (f'y = Pad <mode = "{mode}"> (x, s)', {"x": (3, 3), "s": np.array([1, 2, 0, 1])})
        for mode in ("constant", "reflect", "edge", "wrap")
    ],
    ("y = Pad (x, s)", {"x": (3, 3), "s": np.array([1, -1, 0, 2])}),
    *[
        (f'y = DepthToSpace <blocksize = 2, mode = "{mode}"> (x)', {"x": (1, 4, 1, 2)})
        for mode in ("DCR", "CRD")
    ],
    ("y = SpaceToDepth <blocksize = 2> (x)", {"x": (1, 1, 2, 4)}),
    ("y = Gather (x, i)", {"x": (3, 2), "i": np.array([[0, -1], [0, 1]])}),
    ("y = Gather <axis = 1> (x, i)", {"x": (2, 3, 2), "i": np.array([2, 0])}),
    ("y = GatherElements <axis = 1> (x, i)", {"x": (2, 3), "i": np.array([[2, -3], [1, 1]])}),
    ("y = GatherND <batch_dims = 1> (x, i)", {"x": (2, 3, 2), "i": np.array([[[2], [-1]], [[0], [0]]])}),
    *[
        (
            f'y = ScatterND <reduction = "{kind}"> (x, i, u)',
            {"x": (3, 2), "i": np.array([[0], [2]]), "u": (2, 2)},
        )
        for kind in ("none", "add", "mul", "max", "min")
    ],
    *[
        (
            f'y = ScatterElements <axis = 1, reduction = "{kind}"> (x, i, u)',
            {"x": (2, 4), "i": np.array([[3, 1], [0, -1]]), "u": (2, 2)},
        )
        for kind in ("none", "add", "mul", "max", "min")
    ],
    ("y = TensorScatter <axis = 1> (x, u, i)", {"x": (2, 4, 2), "u": (2, 2, 2), "i": np.array([0, 1])}),
    ("y, i = TopK <axis = 0, largest = 0> (x, k)", {"x": (4, 2), "k": _TWO}),
    ("y = Compress <axis = 1> (x, c)", {"x": (2, 3), "c": np.array([True, False, True])}),
    ("y = CumSum <exclusive = 1, reverse = 1> (x, a)", {"x": (2, 4), "a": np.array(1)}),
    ("y = Trilu <upper = 0> (x, k)", {"x": (2, 3, 3), "k": np.array(-1)}),
    ("y = ReverseSequence <time_axis = 1, batch_axis = 0> (x, l)", {"x": (2, 4), "l": np.array([3, 2])}),
    ("y = OneHot (i, d, v)", {"i": np.array([0, -1]), "d": np.array(3), "v": (2,)}),
    ("y = CenterCropPad <axes = [0, 1]> (x, s)", {"x": (3, 4, 2), "s": np.array([6, 1])}),
    *[
        (f'y = Resize <mode = "{mode}", {rest}> (x, , , s)', {"x": (1, 1, 4, 3), "s": np.array([1, 1, 3, 6])})
        for mode in ("linear", "cubic", "nearest")
        for rest in (
            'coordinate_transformation_mode = "align_corners"',
            "antialias = 1",
            "exclude_outside = 1",
        )
        if mode != "nearest" or "align" in rest
    ],
]

_GATED = {"x": (3, 2, 2), "w": (2, 8, 2), "r": (2, 8, 2), "b": (2, 16), "l": np.array([3, 2], np.int32)}
_STATES = {"h": (2, 2, 2), "c": (2, 2, 2), "o": (2, 6)}
LAYERS: list[tuple[str, Operands]] = [
    (
        'y, n, m = LSTM <hidden_size = 2, direction = "bidirectional"> (x, w, r, b, l, h, c, o)',
        {**_GATED, **_STATES},
    ),
    (
        "y, n = GRU <hidden_size = 2, linear_before_reset = 1> (x, w, r, b)",
        {"x": (3, 2, 2), "w": (1, 6, 2), "r": (1, 6, 2), "b": (1, 12)},
    ),
    (
        'y, n = GRU <hidden_size = 2, direction = "reverse"> (x, w, r)',
        {"x": (3, 2, 2), "w": (1, 6, 2), "r": (1, 6, 2)},
    ),
    (
        'y, n = RNN <hidden_size = 2, layout = 1, activations = ["Elu"], activation_alpha = [0.7]>'
        " (x, w, r, b, , h)",
        {"x": (2, 3, 2), "w": (1, 2, 2), "r": (1, 2, 2), "b": (1, 4), "h": (2, 1, 2)},
    ),
    (
        "y, k, v, s = Attention <is_causal = 1, softcap = 2.0, qk_matmul_output_mode = 1> (q, a, b, , c, d)",
        {"q": (1, 4, 2, 2), "a": (1, 2, 2, 2), "b": (1, 2, 2, 3), "c": (1, 2, 1, 2), "d": (1, 2, 1, 3)},
    ),
    (
        "y = Attention <q_num_heads = 2, kv_num_heads = 1> (q, a, b, m)",
        {"q": (1, 2, 4), "a": (1, 3, 2), "b": (1, 3, 2), "m": np.array([[True, False, True], [False] * 3])},
    ),
    (
        "y = RotaryEmbedding <interleaved = 1> (x, c, s, i)",
        {"x": (1, 2, 2, 4), "c": (3, 2), "s": (3, 2), "i": _TWO[None].repeat(2, 1)},
    ),
    (
        "y = com.microsoft.RotaryEmbedding (x, i, c, s)",
        {"x": (1, 2, 8), "i": np.array([1]), "c": (3, 2), "s": (3, 2)},
    ),
    (
        "y, k = com.microsoft.Attention <num_heads = 2, unidirectional = 1> (x, w, b, m)",
        {"x": (2, 3, 4), "w": (4, 12), "b": (12,), "m": np.array([3, 2], np.int32)},
    ),
    (
        "y, k, v = com.microsoft.MultiHeadAttention <num_heads = 2> (q, a, b, c, m, e)",
        {
            "q": (1, 2, 4),
            "a": (1, 3, 4),
            "b": (1, 3, 4),
            "c": (12,),
            "m": np.array([[1, 0, 1]], np.int32),
            "e": (1, 2, 2, 3),
        },
    ),
    (
        "y, k, v = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1, do_rotary = 1>"
        " (q, a, b, , , l, t, c, s)",
        {
            "q": (1, 3, 8),
            "a": (1, 3, 4),
            "b": (1, 3, 4),
            "l": np.array([2], np.int32),
            "t": np.array(3, np.int32),
            "c": (4, 2),
            "s": (4, 2),
        },
    ),
]

ALL = [*ELEMENTWISE, *NORMS, *PRODUCTS, *SHAPES, *LAYERS]


def built(
    text: str, operands: Operands, dtype: str = "double", opset: int = 24
) -> tuple[ModelProto, dict[str, Any]]:
    """A model whose outputs are those of its last node, and what to feed it."""
    feed = dict(_values(operands, DTYPES[dtype]))
    types = {one: name for name, one in DTYPES.items()}
    inputs = ", ".join(
        f"{types.get(v.dtype, v.dtype)}[{', '.join(map(str, v.shape))}] {k}" for k, v in feed.items()
    )
    last = text.split(") ")[-1].split(" = ")[0]
    outputs = ", ".join(f"{dtype}[?] {name.strip()}" for name in last.split(",") if name.strip())
    return model(f"g ({inputs}) => ({outputs}) {{ {text} }}", opset), feed


def _values(operands: Operands, dtype: Any) -> Iterator[tuple[str, Any]]:
    rng = np.random.default_rng(3)
    for name, given in operands.items():
        if isinstance(given, np.ndarray):
            yield name, given
        elif name.startswith("p"):
            yield name, rng.uniform(0.2, 0.9, given).astype(dtype)
        else:
            yield name, rng.standard_normal(given).astype(dtype)
