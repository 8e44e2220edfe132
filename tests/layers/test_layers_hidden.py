"""Hidden channels between layers: which pairs are found, and every reason not to find one."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import find_layers
from rewriting import model

UP, DOWN = (16, 24), (24, 16)
BIAS = np.linspace(-1, 1, 24).astype(np.float32)


def pairs(body, **weights):
    """The ids of consumers with those of their producers."""
    found = find_layers(load(model(body, **weights)), {}, (), ())
    return {layer.id: [partner.id for partner in layer.partners] for layer in found.layers if layer.partners}


def mlp(between, **weights):
    """Two matrices with nodes between h and a."""
    body = f"g (float[4,16] x) => (float[4,16] y) {{ h = MatMul (x, up) {between} y = MatMul (a, down) }}"
    return pairs(body, up=UP, down=DOWN, **weights)


FOUND = {
    "relu": "a = Relu (h)",
    "nothing": "a = Identity (h)",
    "bias": "b = Add (h, bias) a = Relu (b)",
    "bias first": "b = Add (bias, h) a = Relu (b)",
    "gelu": "s = Constant <value_float = 1.41> () d = Div (h, s) e = Erf (d) "
    "o = Constant <value_float = 1.0> () p = Add (e, o) m = Mul (h, p) a = Mul (m, s)",
    "silu": "s = Sigmoid (h) a = Mul (h, s)",
    "slope": "a = PRelu (h, bias)",
    "norm": "a = BatchNormalization (h, bias, bias, bias, variance)",
}


@pytest.mark.parametrize("between", FOUND.values(), ids=FOUND)
def test_channelwise_operators_may_stand_between(between):
    constants = {
        name: value for name, value in {"bias": BIAS, "variance": BIAS**2 + 1}.items() if name in between
    }
    assert mlp(between, **constants) == {"down": ["up"]}


LEFT = {
    "softmax": "a = Softmax <axis = -1> (h)",
    "layernorm": "a = LayerNormalization <axis = -1> (h, bias)",
    "transpose": "t = Transpose (h) r = Relu (t) a = Transpose (r)",
    "other constant": "a = Mul (h, rows)",
    "matrix of constants": "a = Mul (h, full)",
    "reduction": "s = ReduceSum (h) a = Mul (h, s)",
}


@pytest.mark.parametrize("between", LEFT.values(), ids=LEFT)
def test_other_operators_may_not(between):
    known = {"bias": BIAS, "rows": np.ones((4, 1), np.float32), "full": np.ones((4, 24), np.float32)}
    assert mlp(between, **{name: value for name, value in known.items() if name in between}) == {}


def test_a_tensor_that_another_node_reads_is_left():
    body = """g (float[4,16] x) => (float[4,16] y, float[4] s) {
        h = MatMul (x, up) a = Relu (h) y = MatMul (a, down) s = ReduceMax <axes = [1], keepdims = 0> (a) }"""
    assert pairs(body, up=UP, down=DOWN) == {}


def test_an_output_is_left():
    body = """g (float[4,16] x) => (float[4,16] y, float[4,24] a) {
        h = MatMul (x, up) a = Relu (h) y = MatMul (a, down) }"""
    assert pairs(body, up=UP, down=DOWN) == {}


def test_a_weight_with_two_uses_is_left():
    body = """g (float[4,16] x) => (float[4,16] y) {
        h = MatMul (x, up) a = Relu (h) u = MatMul (a, down)
        v = MatMul (u, up) b = Relu (v) y = MatMul (b, other) }"""
    assert pairs(body, up=UP, down=DOWN, other=DOWN) == {}


def test_a_gated_block_has_two_producers():
    body = """g (float[4,16] x) => (float[4,16] y) {
        h = MatMul (x, gate) s = Sigmoid (h) g0 = Mul (h, s)
        u = MatMul (x, up) a = Mul (g0, u) y = MatMul (a, down) }"""
    assert pairs(body, gate=UP, up=UP, down=DOWN) == {"down": ["gate", "up"]}


def test_of_a_chain_every_other_pair_is_taken_the_largest_first():
    body = """g (float[4,16] x) => (float[4,16] y) {
        a = MatMul (x, w0) b = Relu (a) c = MatMul (b, w1) d = Relu (c) y = MatMul (d, w2) }"""
    assert pairs(body, w0=(16, 20), w1=(20, 40), w2=(40, 16)) == {"w2": ["w1"]}
    assert pairs(body, w0=(16, 40), w1=(40, 20), w2=(20, 16)) == {"w1": ["w0"]}


def test_convolutions_share_channels_on_their_second_axis():
    body = """g (float[2,8,6,6] x) => (float[2,8,6,6] y) {
        h = Conv <pads = [1,1,1,1]> (x, w0, b0) n = BatchNormalization (h, s, s, s, v) a = Relu (n)
        y = Conv <pads = [1,1,1,1]> (a, w1) }"""
    s = np.ones(12, np.float32)
    assert pairs(body, w0=(12, 8, 3, 3), b0=s, w1=(8, 12, 3, 3), s=s, v=s) == {"w1": ["w0"]}


def test_a_grouped_convolution_is_left():
    body = """g (float[2,8,6,6] x) => (float[2,8,6,6] y) {
        h = Conv <pads = [1,1,1,1]> (x, w0) a = Relu (h) y = Conv <group = 2, pads = [1,1,1,1]> (a, w1) }"""
    assert pairs(body, w0=(12, 8, 3, 3), w1=(8, 6, 3, 3)) == {}


def test_weights_on_the_left_share_rows():
    body = "g (float[16,4] x) => (float[16,4] y) { h = MatMul (up, x) a = Relu (h) y = MatMul (down, a) }"
    assert pairs(body, up=(24, 16), down=(16, 24)) == {"down": ["up"]}
    mixed = "g (float[24,16] x) => (float[24,16] y) { h = MatMul (up, x) a = Relu (h) y = MatMul (a, down) }"
    assert pairs(mixed, up=(24, 24), down=(16, 16)) == {}


def test_a_matrix_behind_a_norm_of_the_second_axis_needs_two_axes():
    body = """g (float[4,24,16] x) => (float[4,24,16] y) {
        h = MatMul (x, up) n = BatchNormalization (h, s, s, s, v) a = Relu (n) y = MatMul (a, down) }"""
    s = np.ones(24, np.float32)
    assert pairs(body, up=UP, down=DOWN, s=s, v=s) == {}
