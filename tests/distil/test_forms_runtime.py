"""Forms against ONNX Runtime: its own operators, and those of which the backend tests show little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from torch import Tensor

from differentiating import run
from gradient_cases import Operands, built
from onnx_lowrank.distil.forms import FORMS
from onnx_lowrank.distil.forms.form import Call

MASK = np.array([[1, 1, 0], [1, 0, 0]], np.int32)
LENGTHS = np.array([3, 2], np.int32)
X3, X4 = (2, 3, 8), (2, 2, 3, 4)
PACKED: Operands = {"x": X3, "w": (8, 24), "b": (24,)}
SEPARATE: Operands = {"q": X3, "k": X3, "v": X3}
GROUPS: Operands = {
    "q": (2, 3, 64),
    "k": (2, 3, 32),
    "v": (2, 3, 32),
    "l": np.array([2, 2], np.int32),
    "t": np.array(3, np.int32),
    "c": (4, 8),
    "s": (4, 8),
}
PAST: Operands = {
    "q": (1, 3, 64),
    "k": (1, 3, 32),
    "v": (1, 3, 32),
    "d": (1, 2, 2, 16),
    "e": (1, 2, 2, 16),
    "l": np.array([4], np.int32),
    "t": np.array(5, np.int32),
    "c": (9, 8),
    "s": (9, 8),
}
GROUPED = "y, p, r = GroupQueryAttention <num_heads = 4, kv_num_heads = 2"

CASES: list[tuple[str, Operands]] = [
    ("y = Gelu (x)", {"x": X3}),
    ("y = BiasGelu (x, b)", {"x": X3, "b": (8,)}),
    ("y = FastGelu (x, b)", {"x": X3, "b": (8,)}),
    ("y = QuickGelu <alpha = 1.3> (x)", {"x": X3}),
    ("y = FusedMatMul <transA = 1, alpha = 0.5> (a, b)", {"a": (2, 4, 3), "b": (2, 4, 5)}),
    ("y = FusedMatMul <transBatchA = 1, transB = 1> (a, b)", {"a": (3, 2, 4), "b": (2, 5, 4)}),
    (
        "y = FusedMatMul <transBatchA = 1, transA = 1, transBatchB = 1> (a, b)",
        {"a": (4, 2, 3), "b": (4, 2, 5)},
    ),
    *[
        (
            f"y = FusedGemm <transB = 1, alpha = 0.5, activation = {name}> (a, b, c)",
            {"a": (3, 4), "b": (5, 4), "c": (5,)},
        )
        for name in (
            '"Relu"',
            '"LeakyRelu", activation_alpha = 0.2',
            '"HardSigmoid", activation_alpha = 0.3, activation_beta = 0.4',
        )
    ],
    *[
        (
            f"y = FusedConv <pads = [1, 0, 1, 0], activation = {name}> (x, w, b)",
            {"x": (1, 2, 5, 4), "w": (4, 2, 3, 2), "b": (4,)},
        )
        for name in ('"Relu"', '"Clip", activation_params = [-0.5, 0.8]', '"Sigmoid"')
    ],
    (
        'y = FusedConv <pads = [1, 0, 1, 0], activation = "Relu"> (x, w, b, z)',
        {"x": (1, 2, 5, 4), "w": (4, 2, 3, 2), "b": (4,), "z": (1, 4, 5, 3)},
    ),
    (
        "y, m, v, t = SkipLayerNormalization (x, k, s, b, c)",
        {"x": X3, "k": X3, "s": (8,), "b": (8,), "c": (8,)},
    ),
    ("y, , v, t = SkipSimplifiedLayerNormalization (x, k, s, c)", {"x": X3, "k": X3, "s": (8,), "c": (8,)}),
    (
        "y, m = EmbedLayerNormalization (i, j, w, o, g, s, b, a)",
        {
            "i": MASK * 3,
            "j": MASK,
            "w": (4, 8),
            "o": (5, 8),
            "g": (2, 8),
            "s": (8,),
            "b": (8,),
            "a": MASK,
        },
    ),
    (
        "y, m = EmbedLayerNormalization (i, , w, o, , s, b)",
        {"i": MASK, "w": (4, 8), "o": (5, 8), "s": (8,), "b": (8,)},
    ),
    ("y = Attention <num_heads = 2> (x, w, b)", PACKED),
    ("y = Attention <num_heads = 2, scale = 0.3> (x, w, b, m)", {**PACKED, "m": MASK}),
    ("y = Attention <num_heads = 2, unidirectional = 1> (x, w, b, m)", {**PACKED, "m": LENGTHS}),
    (
        "y = Attention <num_heads = 2> (x, w, b, m)",
        {**PACKED, "m": np.stack([np.tri(3, dtype=np.int32)] * 2)},
    ),
    ("y = Attention <num_heads = 2> (x, w, b, , , e)", {**PACKED, "e": (2, 2, 3, 3)}),
    ("y, p = Attention <num_heads = 2, unidirectional = 1> (x, w, b, , q)", {**PACKED, "q": (2, 2, 2, 2, 4)}),
    (
        "y = Attention <num_heads = 2, qkv_hidden_sizes = [8, 8, 4]> (x, w, b)",
        {"x": X3, "w": (8, 20), "b": (20,)},
    ),
    ("y = MultiHeadAttention <num_heads = 2> (q, k, v)", SEPARATE),
    ("y, p, r = MultiHeadAttention <num_heads = 2> (q, k, v, b, m)", {**SEPARATE, "b": (24,), "m": MASK}),
    ("y = MultiHeadAttention <num_heads = 2, unidirectional = 1> (q, k, v, , m)", {**SEPARATE, "m": LENGTHS}),
    ("y = MultiHeadAttention <num_heads = 2, scale = 0.4> (q, k, v, , , e)", {**SEPARATE, "e": (1, 2, 3, 3)}),
    ("y = MultiHeadAttention <num_heads = 2> (q, k, v)", {"q": X3, "k": X4, "v": X4}),
    (
        "y, p, r = MultiHeadAttention <num_heads = 2> (q, k, v, , , , c, d)",
        {**SEPARATE, "c": (2, 2, 2, 4), "d": (2, 2, 2, 4)},
    ),
    (f"{GROUPED}> (q, k, v, , , l, t)", {name: GROUPS[name] for name in "qkvlt"}),
    (
        f"{GROUPED}, scale = 0.3, local_window_size = 2> (q, k, v, , , l, t)",
        {name: GROUPS[name] for name in "qkvlt"},
    ),
    (f"{GROUPED}, softcap = 2.0> (q, k, v, , , l, t)", {name: GROUPS[name] for name in "qkvlt"}),
    (f"{GROUPED}, do_rotary = 1> (q, k, v, , , l, t, c, s)", GROUPS),
    (f"{GROUPED}, do_rotary = 1, rotary_interleaved = 1> (q, k, v, , , l, t, c, s)", GROUPS),
    (f"{GROUPED}> (q, , , , , l, t)", {"q": (2, 3, 128), "l": GROUPS["l"], "t": GROUPS["t"]}),
    (f"{GROUPED}, do_rotary = 1> (q, k, v, d, e, l, t, c, s)", PAST),
    ("y = RotaryEmbedding (x, i, c, s)", {"x": X3, "i": np.array([1]), "c": (5, 2), "s": (5, 2)}),
    (
        "y = RotaryEmbedding <interleaved = 1> (x, i, c, s)",
        {"x": X4, "i": MASK.astype(np.int64), "c": (5, 2), "s": (5, 2)},
    ),
    (
        "y = RotaryEmbedding <num_heads = 2, rotary_embedding_dim = 2> (x, i, c, s)",
        {"x": X3, "i": MASK.astype(np.int64), "c": (5, 1), "s": (5, 1)},
    ),
]


@pytest.mark.parametrize(("text", "operands"), CASES, ids=[text for text, _ in CASES])
def test_outputs_are_those_of_the_runtime(text: str, operands: Operands) -> None:
    left, right = text.split(" = ", 1)
    check(*built(f"{left} = com.microsoft.{right}", operands, "float", opset=17))


_LAYER: Operands = {
    "x": (5, 3, 4),
    "w": (2, 12, 4),
    "r": (2, 12, 3),
    "b": (2, 24),
    "l": np.array([5, 2, 3], np.int32),
}
_BOTH = 'direction = "bidirectional", hidden_size = 3'
STANDARD: list[tuple[int, str, Operands]] = [
    (
        14,
        f"y, n, m = LSTM <{_BOTH}, clip = 0.5> (x, w, r, b, l, h, c, p)",
        {**_LAYER, "h": (2, 3, 3), "c": (2, 3, 3), "p": (2, 9)},
    ),
    (
        14,
        "y = LSTM <hidden_size = 3, input_forget = 1> (x, w, r)",
        {"x": (5, 3, 4), "w": (1, 12, 4), "r": (1, 12, 3)},
    ),
    (
        14,
        f"y, n = GRU <{_BOTH}> (x, w, r, b, l, h)",
        {**_LAYER, "w": (2, 9, 4), "r": (2, 9, 3), "b": (2, 18), "h": (2, 3, 3)},
    ),
    (
        14,
        f'y, n = GRU <{_BOTH}, activations = ["HardSigmoid", "Softsign", "Sigmoid", "ScaledTanh"],'
        " activation_alpha = [0.3, 1.5], activation_beta = [0.4, 0.5], linear_before_reset = 1>"
        " (x, w, r, b, l)",
        {**_LAYER, "w": (2, 9, 4), "r": (2, 9, 3), "b": (2, 18)},
    ),
    (
        14,
        'y, n = RNN <direction = "reverse", hidden_size = 3> (x, w, r, b, l)',
        {**_LAYER, "w": (1, 3, 4), "r": (1, 3, 3), "b": (1, 6)},
    ),
    *[
        (
            opset,
            f'y = {name} <mode = "{mode}"> (x, s)',
            {"x": (1, 2, 3, 4), "s": np.array([1, 1, 2, scale], np.float32)},
        )
        for opset, name in ((9, "Upsample"), (10, "Resize"))
        for mode in ("nearest", "linear")
        for scale in (1.0, 2.0, 2.5)
    ],
    *[
        (
            11,
            f'y = ConvTranspose <auto_pad = "{auto}", strides = [3, 2]> (x, w, b)',
            {"x": (1, 2, 3, 4), "w": (2, 3, 2, 3), "b": (3,)},
        )
        for auto in ("SAME_UPPER", "SAME_LOWER", "VALID")
    ],
    (
        11,
        "y = ConvTranspose <strides = [3], output_shape = [10], group = 2> (x, w)",
        {"x": (1, 4, 3), "w": (4, 1, 2)},
    ),
    *[
        (19, f"y = {name}Pool <kernel_shape = [3, 2], {rest}> (x)", {"x": (2, 2, 7, 6)})
        for name in ("Average", "Max")
        for rest in (
            "strides = [2, 3], ceil_mode = 1, pads = [1, 0, 1, 0]",
            "strides = [2, 2], pads = [0, 1, 2, 0]",
            "dilations = [2, 3], pads = [1, 1, 1, 1]",
            'auto_pad = "SAME_UPPER", strides = [2, 2]',
        )
    ],
    (19, "y = AveragePool <kernel_shape = [3], pads = [1, 1], count_include_pad = 1> (x)", {"x": (2, 2, 7)}),
    (11, "y = Softmax <axis = 1> (x)", {"x": (2, 3, 4)}),
]


@pytest.mark.parametrize(
    ("opset", "text", "operands"), STANDARD, ids=[f"{text} {o}" for o, text, _ in STANDARD]
)
def test_standard_operators_are_those_of_the_runtime(opset: int, text: str, operands: Operands) -> None:
    check(*built(text, operands, "float", opset=opset))


def check(proto: ModelProto, feed: Mapping[str, Any]) -> None:
    for value in proto.graph.output:
        value.type.Clear()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    wanted = session.run(None, feed)
    found = run(proto, feed)
    for one, value in zip(wanted, found.values(), strict=True):
        if one.size:
            assert one.shape == value.shape
            np.testing.assert_allclose(value, one, rtol=1e-4, atol=1e-5)


def called(name: str, operands: list[Any], **attributes: Any) -> Any:
    """A form by itself: the runtime has these operators for CUDA alone."""
    return FORMS["com.microsoft", name](Call(attributes, operands, 1))


def test_softmax_of_a_sum() -> None:
    x, bias = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 1, -1, 2])
    got = called("BiasSoftmax", [x, bias], axis=2)
    assert isinstance(got, Tensor)
    assert torch.allclose(got, torch.softmax(x + bias, dim=2))
    flat = called("BiasSoftmax", [x, bias], axis=1)
    assert torch.allclose(flat, torch.softmax((x + bias).flatten(1), dim=1).reshape(2, 3, 4))


def test_sum_of_three() -> None:
    x, bias, skip = torch.ones(1, 2, 3), torch.tensor([1.0, 2.0, 3.0]), torch.full((1, 2, 3), 4.0)
    assert called("BiasAdd", [x, bias, skip])[0, 1].tolist() == [6, 7, 8]


def test_packed_heads_are_those_that_are_apart() -> None:
    query, key, value = torch.randn(3, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    apart = called("MultiHeadAttention", [query, key, value], num_heads=2)[0]
    split = [x.reshape(2, 3, 2, 4) for x in (query, key, value)]
    for packed in ([torch.stack(split, dim=3)], [query, torch.stack(split[1:], dim=3)]):
        assert torch.equal(called("MultiHeadAttention", packed, num_heads=2)[0], apart)


@pytest.mark.parametrize(
    ("text", "operands", "variant"),
    [
        (
            "y = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, smooth_softmax = 1>"
            " (q, k, v, , , l, t)",
            GROUPS,
            "smooth_softmax",
        ),
        ("y = com.microsoft.Attention <num_heads = 2, do_rotary = 1> (x, w, b)", PACKED, "do_rotary"),
        (
            'y = com.microsoft.FusedGemm <activation = "Unheard"> (a, b)',
            {"a": (3, 4), "b": (4, 5)},
            "activation Unheard",
        ),
    ],
)
def test_a_variant_without_a_form_is_named(text: str, operands: Operands, variant: str) -> None:
    with pytest.raises(NotImplementedError, match=variant):
        run(*built(text, operands, "float", opset=17))
