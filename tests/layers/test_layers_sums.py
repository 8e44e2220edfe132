"""Layers whose results are added: which sums are found, and every reason not to find one."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import find_layers
from rewriting import model

X = "float[4,16] x"
Y = "float[4,24] y"
MATRIX, BIAS = (16, 24), (24,)
PAIR = "a = MatMul (x, v) b = MatMul (x, w)"
TWO = {"v": MATRIX, "w": MATRIX}


def bindings(nodes, x=X, y=Y, exclude=(), opset=17, **weights):
    proto = model(f"g ({x}) => ({y}) {{ {nodes} }}", opset=opset, **weights)
    return find_layers(load(proto), {}, (), exclude).bindings


def groups(nodes, **options):
    """The sums; every layer of a sum knows all of it."""
    found = bindings(nodes, **options)
    known = {b.layer.id: b.layer.addends for b in found if b.layer.addends}
    assert all(name in ids and known[name] == ids for ids in known.values() for name in ids)
    assert all((b.sum is not None) == bool(b.layer.addends) for b in found)
    return sorted(set(known.values()))


FOUND = {
    "add": (f"{PAIR} y = Add (a, b)", TWO),
    "in the other order": (f"{PAIR} y = Add (b, a)", TWO),
    "biases behind": (
        f"{PAIR} c = Add (a, p) d = Add (q, b) y = Add (c, d)",
        TWO | {"p": BIAS, "q": BIAS},
    ),
    "a residual between": (
        f"{PAIR} r = MatMul (x, u) s = Tanh (r) c = Add (a, s) y = Add (c, b)",
        TWO | {"u": MATRIX},
    ),
    "a sum of many": (
        f"{PAIR} c = MatMul (x, u) r = Tanh (c) y = Sum (a, r, b)",
        TWO | {"u": MATRIX},
    ),
    "gemm": (
        "a = Gemm <transB = 1, beta = 0.5> (x, v, p) b = Gemm (x, w, q) y = Add (a, b)",
        {"v": (24, 16), "w": MATRIX, "p": BIAS, "q": (1, 24)},
    ),
    "an end that is read often": (
        f"{PAIR} s = Add (a, b) c = Tanh (s) d = Abs (s) y = Mul (c, d)",
        TWO,
    ),
}


@pytest.mark.parametrize(("nodes", "weights"), FOUND.values(), ids=FOUND)
def test_layers_whose_results_are_added_know_each_other(nodes, weights):
    assert groups(nodes, **weights) == [("v", "w")]


LEFT = {
    "one layer": ("a = MatMul (x, v) b = Tanh (a) y = Add (a, b)", {"v": MATRIX}),
    "a result that is read twice": (f"{PAIR} c = Tanh (a) d = Add (a, b) y = Add (c, d)", TWO),
    "a sum that is read before its end": (
        f"{PAIR} r = MatMul (x, u) c = Add (a, q) d = Tanh (c) e = Add (c, b) f = Mul (d, r) y = Add (f, e)",
        TWO | {"u": MATRIX, "q": BIAS},
    ),
    "a result that is added to itself": (f"{PAIR} c = Add (a, a) d = Tanh (b) y = Add (c, d)", TWO),
    "an operator between": (f"{PAIR} c = Tanh (a) y = Add (c, b)", TWO),
    "other operators": ("a = MatMul (x, v) b = Gemm (x, w) y = Add (a, b)", TWO),
    "two uses": (
        f"{PAIR} c = Add (a, b) r = Tanh (x) d = MatMul (r, v) e = Tanh (d) y = Mul (c, e)",
        TWO,
    ),
    "a factor": ("a = Gemm <alpha = 0.5> (x, v) b = Gemm (x, w) y = Add (a, b)", TWO),
    "a bias that others read": (
        "a = Gemm (x, v, p) b = Gemm (x, w) c = Add (a, b) d = Tanh (p) y = Add (c, d)",
        TWO | {"p": BIAS},
    ),
    "a difference": (f"{PAIR} y = Sub (a, b)", TWO),
}


@pytest.mark.parametrize(("nodes", "weights"), LEFT.values(), ids=LEFT)
def test_other_layers_do_not(nodes, weights):
    assert groups(nodes, **weights) == []


def test_a_result_that_the_model_returns_is_no_addend():
    assert groups(f"{PAIR} y = Add (a, b)", y=f"{Y}, float[4,24] a", **TWO) == []


def test_a_sum_that_the_model_returns_ends_there():
    nodes = f"{PAIR} c = MatMul (x, u) s = Add (a, b) y = Add (s, c)"
    assert groups(nodes, y=f"{Y}, float[4,24] s", **TWO, u=MATRIX) == [("v", "w")]
    assert groups(nodes, **TWO, u=MATRIX) == [("v", "w", "u")]


def test_results_have_one_shape():
    """A sum of more positions than each result has would make the decoder dearer than it is counted."""
    wide = "float[4,16] x, float[1,16] z"
    nodes = "a = MatMul (x, v) b = MatMul (z, w) y = Add (a, b)"
    assert groups(nodes, x=wide, **TWO) == []
    assert groups(nodes, x=wide.replace("1,", "4,"), **TWO) == [("v", "w")]
    assert groups(nodes, x=wide.replace("4,", "N,").replace("1,", "N,"), **TWO) == [("v", "w")]


def test_weights_on_both_sides_are_apart():
    nodes = "a = MatMul (x, v) b = MatMul (w, x) c = MatMul (u, x) d = Add (a, b) y = Add (d, c)"
    square = dict.fromkeys(("v", "w", "u"), (16, 16))
    assert groups(nodes, x="float[16,16] x", y="float[16,16] y", **square) == [("w", "u")]


def test_kernels_and_strides_may_differ():
    x, y = "float[1,8,6,6] x, float[1,8,3,3] z", "float[1,5,3,3] y"
    nodes = "a = Conv <pads = [1,1,1,1], strides = [2,2]> (x, v) b = Conv (z, w) y = Add (a, b)"
    assert groups(nodes, x=x, y=y, v=(5, 8, 3, 3), w=(5, 8, 1, 1)) == [("v", "w")]
    grouped = nodes.replace("Conv (z", "Conv <group = 2> (z")
    assert groups(grouped, x=x, y=y, v=(5, 8, 3, 3), w=(5, 4, 1, 1)) == []


def test_an_excluded_layer_is_another_addend():
    nodes = f"{PAIR} c = MatMul (x, u) s = Add (a, b) y = Add (s, c)"
    (group,) = groups(nodes, exclude=["w"], **TWO, u=MATRIX)
    assert group == ("v", "u")
    (first, _) = bindings(nodes, exclude=["w"], **TWO, u=MATRIX)
    assert first.sum.results == ("a", "c")
    assert [(place.node, operand) for place, operand in first.sum.others] == [(3, 1)]
    assert groups(nodes, exclude=["u", "w"], **TWO, u=MATRIX) == []


@pytest.mark.parametrize(
    ("nodes", "added"),
    [
        ("a = Gemm (x, v) b = Gemm (x, w) y = Add (a, b)", 0),
        ("a = Gemm (x, v, p) b = Gemm (x, w) y = Add (a, b)", 0),
        ("a = Gemm (x, v, p) b = Gemm (x, w, q) y = Add (a, b)", -24),
        ("a0 = Gemm (x, v, p) a = BatchNormalization (a0, k, l, m, n) b = Gemm (x, w, q) y = Add (a, b)", 0),
        ("a0 = Gemm (x, v) a = BatchNormalization (a0, k, l, m, n) b = Gemm (x, w) y = Add (a, b)", 24),
    ],
)
def test_the_first_layer_has_the_biases(nodes, added):
    biases = {name: BIAS for name in "pqklm" if f", {name}" in nodes}
    if ", n)" in nodes:
        biases["n"] = np.ones(24, np.float32)
    first, last = bindings(nodes, **TWO, **biases)
    assert first.layer.addends == ("v", "w")
    assert (first.layer.summed_bias, last.layer.summed_bias) == (added, 0)


def test_at_most_two_biases_move():
    nodes = "a = Gemm (x, v, p) b = Gemm (x, w, q) c = Gemm (x, u, r) y = Sum (a, b, c)"
    three = TWO | {"u": MATRIX, "p": BIAS, "q": BIAS}
    assert groups(nodes, **three, r=BIAS) == []
    assert groups(nodes.replace(", r)", ")"), **three) == [("v", "w", "u")]


def test_old_adds_do_not_broadcast():
    x, y = "float[4,16] x", "float[4,24] y"
    assert groups(f"{PAIR} y = Add (a, b)", x=x, y=y, opset=6, **TWO) == []


def test_results_of_unknown_rank_are_no_addends():
    nodes = f"r = Reshape (x, s) {PAIR.replace('(x', '(r')} y = Add (a, b)"
    assert groups(nodes, x="float[4,16] x, int64[K] s", y="float[M] y", **TWO) == []
