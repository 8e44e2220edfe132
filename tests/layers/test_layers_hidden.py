"""Hidden channels between layers: which pairs are found, and every reason not to find one."""

from __future__ import annotations

import re

import numpy as np
import pytest

from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import find_layers
from rewriting import model

UP, DOWN = (16, 24), (24, 16)
BIAS = np.linspace(-1, 1, 24).astype(np.float32)


def pairs(body, opset=17, exclude=(), **weights):
    """The ids of consumers with those of their producers."""
    found = find_layers(load(model(body, opset, **weights)), {}, (), exclude)
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


def image(between, opset=17, last="Conv (a, down)", down=(8, 24, 1, 1), **options):
    """A pointwise convolution, nodes between h and a, and a layer that reads a."""
    body = f"g (float[2,8,6,6] x) => (float[] y) {{ h = Conv (x, up) {between} y = {last} }}"
    given = {name: value for name, value in KERNELS.items() if re.search(rf"\b{name}\b", between)}
    return pairs(body, opset, up=(24, 8, 1, 1), down=down, **given, **options)


KERNELS = {
    "inner": (6, 24, 1, 1),
    "outer": (24, 6, 1, 1),
    "dw": (24, 1, 3, 3),
    "bias": BIAS,
    "column": BIAS[:, None, None],
    "twos": (24, 2, 3, 3),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "channels": np.array([1, 2, 1, 1], np.float32),
    "sizes": np.array([2, 24, 12, 12]),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "more": np.array([0, 1, 0, 0, 0, 1, 0, 0]),
}

APART = {
    "depthwise": "a = Conv <group = 24, pads = [1,1,1,1]> (h, dw)",
    "inverted residual": "b = Relu (h) c = Conv <group = 24, strides = [2,2]> (b, dw, bias) "
    "n = BatchNormalization (c, bias, bias, bias, bias) a = Clip (n)",
    "depthwise, transposed": "a = ConvTranspose <group = 24> (h, dw)",
    "two depthwise": "b = Conv <group = 24> (h, dw) a = Conv <group = 24> (b, dw)",
    "column": "b = Mul (h, column) a = PRelu (b, column)",
    "largest": "a = MaxPool <kernel_shape = [2,2]> (h)",
    "mean": "a = AveragePool <kernel_shape = [2,2]> (h)",
    "norm of a window": "a = LpPool <kernel_shape = [2,2]> (h)",
    "global mean": "a = GlobalAveragePool (h)",
    "global largest": "a = GlobalMaxPool (h)",
    "reduced": "a = ReduceMean <axes = [-1,2], keepdims = 1> (h)",
    "normalized": "a = InstanceNormalization (h, bias, bias)",
    "padded": "a = Pad (h, pads)",
    "resized": 'a = Resize <mode = "nearest"> (h, , scales)',
}


@pytest.mark.parametrize("between", APART.values(), ids=APART)
def test_operators_that_keep_channels_apart_may_stand_between(between):
    assert image(between) == {"down": ["up"]}


OLD = {
    "pads that torch computes": (
        17,
        """p = Constant <value_ints = [1, 1, 1, 1]> () n = Constant <value_ints = [4]> ()
        z = ConstantOfShape <value = int64 {0}> (n) c = Concat <axis = 0> (p, z)
        t = Constant <value_ints = [-1, 2]> () r = Reshape (c, t) s = Constant <value_ints = [-1]> ()
        e = Constant <value_ints = [-9223372036854775807]> () i = Constant <value_ints = [0]> ()
        f = Slice (r, s, e, i, s) g = Transpose <perm = [1, 0]> (f) k = Reshape (g, s) q = Cast <to = 7> (k)
        a = Pad (h, q)""",
    ),
    "upsampled": (9, 'a = Upsample <mode = "nearest"> (h, scales)'),
    "upsampled by an attribute": (7, 'a = Upsample <mode = "nearest", scales = [1.0, 1.0, 2.0, 2.0]> (h)'),
    "resized": (10, 'a = Resize <mode = "nearest"> (h, scales)'),
    "padded": (10, "a = Pad <pads = [0,0,1,1,0,0,1,1]> (h)"),
    "padded along named axes": (
        18,
        "p = Constant <value_ints = [1, 2]> () n = Constant <value_ints = [-1]> () a = Pad (h, p, , n)",
    ),
    "reduced": (18, "n = Constant <value_ints = [2, 3]> () a = ReduceMax <keepdims = 1> (h, n)"),
}


@pytest.mark.parametrize(("opset", "between"), OLD.values(), ids=OLD)
def test_other_opsets_write_them_otherwise(opset, between):
    assert image(between, opset) == {"down": ["up"]}


MIXED = {
    "two channels for a group": "a = Conv <group = 12, pads = [1,1,1,1]> (h, twos)",
    "computed kernels": "k = Relu (dw) a = Conv <group = 24> (h, k)",
    "a computed bias": "s = ReduceMax <axes = [0,2,3], keepdims = 0> (x) t = Concat <axis = 0> (s, s, s) "
    "a = Conv <group = 24> (h, dw, t)",
    "padded channels": "b = Pad (h, more) a = MaxPool <kernel_shape = [1,1]> (b)",
    "resized channels": 'a = Resize <mode = "nearest"> (h, , channels)',
    "resized to a shape": 'a = Resize <mode = "nearest"> (h, , , sizes)',
    "resized by a rule that moves elements": 'a = Resize <mode = "nearest", '
    'coordinate_transformation_mode = "tf_half_pixel_for_nn", nearest_mode = "ceil"> (h, , scales)',
    "reduced channels": "m = ReduceMean <axes = [1], keepdims = 1> (h) a = Mul (h, m)",
    "places of the largest": "a, i = MaxPool <kernel_shape = [2,2]> (h)",
    "normalized over channels": "a = LRN <size = 3> (h)",
    "moved": "a = SpaceToDepth <blocksize = 1> (h)",
}


@pytest.mark.parametrize("between", MIXED.values(), ids=MIXED)
def test_operators_that_may_mix_channels_may_not(between):
    assert image(between) == {}


def test_a_channel_axis_named_by_an_operand_is_left():
    named = "p = Constant <value_ints = [1, 1]> () n = Constant <value_ints = [-3]> () a = Pad (h, p, , n)"
    assert image(named, 18) == {}


def test_more_channels_behind_a_depthwise_convolution_are_left():
    twice = "a = Conv <group = 24> (h, both)"
    assert "down" not in image(twice, down=(8, 48, 1, 1), both=(48, 1, 3, 3))


def test_a_depthwise_convolution_that_others_read_is_left():
    body = """g (float[2,8,6,6] x) => (float[] y, float[] z) {
        h = Conv (x, up) a = Conv <group = 24> (h, dw) y = Conv (a, down) z = Relu (a) }"""
    assert pairs(body, up=(24, 8, 1, 1), dw=(24, 1, 3, 3), down=(8, 24, 1, 1)) == {}


def test_a_depthwise_convolution_that_the_user_wants_left_alone_is_left():
    assert image("a = Conv <group = 24> (h, dw)", exclude=("a",)) == {}


def test_channels_that_are_squeezed_and_excited_are_left():
    between = """m = GlobalAveragePool (h) r = Conv (m, inner) s = Relu (r) e = Conv (s, outer)
        t = Sigmoid (e) a = Mul (h, t)"""
    assert image(between) == {"outer": ["inner"]}


def test_a_vector_as_long_as_the_rows_of_an_image_is_no_constant_of_its_channels():
    body = "g (float[2,8,24,24] x) => (float[] y) { h = Conv (x, up) a = Mul (h, bias) y = Conv (a, down) }"
    assert pairs(body, up=(24, 8, 1, 1), down=(8, 24, 1, 1), bias=BIAS) == {}


HEADS = {
    "flattened": "p = GlobalAveragePool (h) a = Flatten (p)",
    "a constant before": "p = GlobalAveragePool (h) q = Mul (p, column) a = Flatten (q)",
    "reshaped to a stated width": ""
    "p = ReduceMean <axes = [-2,-1]> (h) r = Constant <value_ints = [-1, 24]> () a = Reshape (p, r)",
    "reshaped": "p = GlobalAveragePool (h) r = Constant <value_ints = [0, -1]> () a = Reshape (p, r)",
    "reshaped to the rows of the input": "p = GlobalAveragePool (h) s = Shape (x) "
    "i = Constant <value_ints = [0]> () b = Gather (s, i) r = Constant <value_ints = [-1]> () "
    "t = Concat <axis = 0> (b, r) a = Reshape (p, t)",
    "squeezed": "p = GlobalAveragePool (h) r = Constant <value_ints = [3, 2]> () a = Squeeze (p, r)",
    "reduced": "q = Mul (h, column) b = ReduceMean <axes = [2,3], keepdims = 0> (q) a = Relu (b)",
    "depthwise to one position": "p = Conv <group = 24> (h, whole) a = Flatten (p)",
}


@pytest.mark.parametrize("between", HEADS.values(), ids=HEADS)
def test_a_matrix_may_read_the_channels_of_one_position(between):
    given = {"whole": (24, 1, 6, 6)} if "whole" in between else {}
    assert image(between, last="Gemm (a, down)", down=(24, 8), **given) == {"down": ["up"]}
    assert image(between, last="MatMul (a, down)", down=(24, 8), **given) == {"down": ["up"]}


NO_HEADS = {
    "positions beside channels": ("a = Flatten (h)", 24 * 36),
    "channels beside positions": ("p = ReduceMean <axes = [1,2], keepdims = 0> (h) a = Relu (p)", 6),
    "images beside channels": ("p = GlobalAveragePool (h) a = Flatten <axis = 0> (p)", 48),
    "a stated width of all positions": ("r = Constant <value_ints = [-1, 24]> () a = Reshape (h, r)", 24),
    "another stated width": (
        "p = GlobalAveragePool (h) r = Constant <value_ints = [-1, 12]> () a = Reshape (p, r)",
        12,
    ),
}


@pytest.mark.parametrize(("between", "width"), NO_HEADS.values(), ids=NO_HEADS)
def test_a_matrix_that_reads_more_than_channels_is_left(between, width):
    assert image(between, last="MatMul (a, down)", down=(width, 8)) == {}


def test_a_matrix_that_is_flattened_to_itself_may_stand_between():
    assert mlp("r = Flatten (h) a = Relu (r)") == {"down": ["up"]}
    assert mlp("s = Constant <value_ints = [-1, 24]> () r = Reshape (h, s) a = Relu (r)") == {"down": ["up"]}
