"""What fused operators add to the result of a layer, and what calibration makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from calibrating import made, measured, plan_of, run, seen
from fused import model
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.graph.walk import Place
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.operators.adding import Addends, addends
from onnx_lowrank.probe.segments import Segments
from rewriting import found

X = "float[N,4,8] x"
BEHIND = {
    "add": ("y = Add (h, b)", 1),
    "gelu": ("y = com.microsoft.BiasGelu (h, b)", 1),
    "fast gelu": ("y = com.microsoft.FastGelu (h, b)", 1),
    "skip": ("y = com.microsoft.SkipLayerNormalization (h, x, s, t, b)", 4),
    "skip, second": ("y = com.microsoft.SkipLayerNormalization (x, h, s, t, b)", 4),
    "simplified": ("y = com.microsoft.SkipSimplifiedLayerNormalization (x, h, s, b)", 3),
}
WITHOUT = {
    "gelu": "y = com.microsoft.FastGelu (h)",
    "skip": "y = com.microsoft.SkipLayerNormalization (h, x, s, t)",
    "simplified": "y = com.microsoft.SkipSimplifiedLayerNormalization (x, h, s)",
    "gamma": "y = com.microsoft.SkipLayerNormalization (x, x, h, t, b)",
    "quick": "y = com.microsoft.QuickGelu (h)",
}


def proto(behind, f=8):
    names = behind.replace(",", " ").replace("(", " ").replace(")", " ").split()
    ones = {name: np.ones(f, np.float32) for name in ("s", "t") if name in names}
    biases = {"b": np.linspace(-1, 1, f, dtype=np.float32)} if "b" in names else {}
    return model(X, f"h = MatMul (x, w) {behind}", w=(8, f), **ones, **biases)


@pytest.mark.parametrize(
    ("op", "operand", "expected"),
    [
        ("BiasGelu", 0, Addends(None, 1)),
        ("BiasGelu", 1, None),
        ("SkipLayerNormalization", 0, Addends(1, 4)),
        ("SkipLayerNormalization", 1, Addends(0, 4)),
        ("SkipLayerNormalization", 2, None),
        ("SkipSimplifiedLayerNormalization", 1, Addends(0, 3)),
        ("Gelu", 0, None),
    ],
)
def test_addends(op, operand, expected):
    assert addends(helper.make_node(op, ["a"] * 5, ["y"], domain="com.microsoft"), operand) == expected
    assert addends(helper.make_node(op, ["a"] * 5, ["y"]), operand) is None


@pytest.mark.parametrize("operand", [0, 1])
def test_an_add_adds_the_other_operand(operand):
    assert addends(helper.make_node("Add", ["a", "b"], ["y"]), operand) == Addends(1 - operand, None)


@pytest.mark.parametrize("name", BEHIND)
def test_the_bias_of_a_fused_operator_is_that_of_the_layer(name):
    text, operand = BEHIND[name]
    known = found(proto(text))
    own = bias(known.model, known.walk, known.bindings[0])
    assert (own.place, own.operand, own.shape, own.in_node) == (Place("", 1), operand, (8,), False)
    np.testing.assert_allclose(own.values, np.linspace(-1, 1, 8), rtol=1e-6)


@pytest.mark.parametrize("first", ["h, k", "k, h"])
def test_of_two_layers_that_one_node_adds_up_the_first_has_the_bias(first):
    text = f"k = MatMul (x, v) y = com.microsoft.SkipLayerNormalization ({first}, s, t, b)"
    arrays = {"s": np.ones(8, np.float32), "t": np.ones(8, np.float32), "b": np.ones(8, np.float32)}
    known = found(model(X, f"h = MatMul (x, w) {text}", w=(8, 8), v=(8, 8), **arrays))
    owners = {b.layer.id for b in known.bindings if bias(known.model, known.walk, b) is not None}
    assert owners == {"w" if first == "h, k" else "v"}


@pytest.mark.parametrize("name", WITHOUT)
def test_an_operator_without_a_bias_gives_none(name):
    known = found(proto(WITHOUT[name]))
    assert bias(known.model, known.walk, known.bindings[0]) is None


@pytest.mark.parametrize(
    ("behind", "beside"),
    [
        (BEHIND["skip"][0], "x"),
        (BEHIND["skip, second"][0], "x"),
        (BEHIND["simplified"][0], "x"),
        (BEHIND["gelu"][0], None),
        ("y = com.microsoft.SkipLayerNormalization (h, h, s, t)", None),
        ("e = Exp (x) y = com.microsoft.SkipLayerNormalization (h, e, s, t)", None),
    ],
)
def test_a_residual_inside_a_fused_operator_lies_beside_the_layer(behind, beside):
    known = found(proto(behind))
    segments = Segments(known.model, known.walk, known.bindings)
    assert (segments.beside(0), segments.rectified(0)) == (beside, False)


def inputs(number, seed):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((number, 4, 5)) @ np.random.default_rng(9).standard_normal((5, 8))
    return (mixed + 0.3 * rng.standard_normal((number, 4, 8)) + 0.5).astype(np.float32)


CHAINS = {
    "skip": "m = MatMul (x, u) a = MatMul (m, w) h = com.microsoft.BiasGelu (a, b) c = MatMul (h, v)"
    " y = com.microsoft.SkipLayerNormalization (c, m, s, t, d)",
    "gemm": 'r = Reshape (x, rows) h = com.microsoft.FusedGemm <activation = "Relu"> (r, w, b)'
    ' k = com.microsoft.FusedGemm <activation = "Tanh"> (h, v, d) y = MatMul (k, u)',
    "attention": "h = MatMul (x, u) c = com.microsoft.Attention <num_heads = 2> (h, q, e)"
    " y = com.microsoft.SkipLayerNormalization (c, x, s, t, d)",
}


def chain(name):
    rng = np.random.default_rng(3)
    shapes = {"w": (8, 16), "v": (16, 8), "u": (8, 8), "q": (8, 24), "b": (16,), "d": (8,), "e": (24,)}
    arrays = {key: rng.standard_normal(shape).astype(np.float32) / 2 for key, shape in shapes.items()}
    arrays |= {"s": np.ones(8, np.float32), "t": np.zeros(8, np.float32), "rows": np.array([-1, 8])}
    text = CHAINS[name]
    names = text.replace(",", " ").replace("(", " ").replace(")", " ").split()
    return model(X, text, **{key: value for key, value in arrays.items() if key in names})


RANKS = {"skip": {"u": 6, "w": 7, "v": 7}, "gemm": {"w": 5, "v": 5, "u": None}, "attention": {"u": 5, "q": 6}}


@pytest.mark.parametrize("name", CHAINS)
def test_recovery_lowers_the_error_of_fused_models(name):
    proto, layers = chain(name), seen(chain(name))
    picks = [RANKS[name].get(layer.id) for layer in layers.layers]
    options = [None if rank is None else Option(Fold.ENCODE, 1, rank) for rank in picks]
    given, other = inputs(1500, 1), inputs(500, 2)
    wanted = run(proto, x=other)
    with measured(layers, {"x": given}) as calibration:
        plain, walked = (
            made(layers, plan_of(layers, options, recover=flag), calibration) for flag in (False, True)
        )
    lost = [np.linalg.norm(run(each.rewritten.model.proto, x=other) - wanted) for each in (plain, walked)]
    assert 0 < lost[1] < 0.98 * lost[0]
    assert not any(fit.recovered for fit in plain.fits.values())
    assert walked.fits[{"skip": "v", "gemm": "v", "attention": "q"}[name]].recovered
