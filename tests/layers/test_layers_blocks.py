"""The block of a layer: which sum ends it, and every reason not to find one."""

from __future__ import annotations

import pytest

from onnx_lowrank.files.load import load
from onnx_lowrank.layers.blocks import Block, Blocks
from onnx_lowrank.layers.found import find_layers
from rewriting import model

WIDE, BACK, SQUARE = (16, 24), (24, 16), (16, 16)


def blocks(nodes, x="float[4,16]", inputs="", **weights):
    """The blocks of a model's layers, by id; the model returns y."""
    return blocks_of(model(f"g ({x} x{inputs}) => ({x} y) {{ {nodes} }}", **weights))


def blocks_of(proto):
    found = find_layers(load(proto), {}, (), ())
    known = Blocks(found.walk)
    return {binding.layer.id: known.of(binding) for binding in found.bindings}


PRE = "n = LayerNormalization (x, s) u = MatMul (n, up) b = Add (u, c) r = Relu (b) d = MatMul (r, down)"
NORM = {"s": (16,), "c": (24,), "up": WIDE, "down": BACK}


def test_a_bias_ends_no_block():
    found = blocks(f"{PRE} e = Add (d, t) y = Add (x, e)", t=(16,), **NORM)
    assert found == {"up": Block("x", "e", -1), "down": Block("x", "e", -1)}


def test_a_normalization_behind_the_sum():
    nodes = "p = Relu (x) u = MatMul (p, up) r = Relu (u) d = MatMul (r, down) a = Add (d, p)"
    found = blocks(f"{nodes} y = LayerNormalization (a, s)", s=(16,), up=WIDE, down=BACK)
    assert found["up"] == found["down"] == Block("p", "d", -1)


def test_a_sum_in_a_normalization():
    nodes = "u = MatMul (x, up) r = Relu (u) d = MatMul (r, down) y = Sum (x, d, s)"
    proto = model(f"g (float[4,16] x) => (float[4,16] y) {{ {nodes} }}", s=(16,), up=WIDE, down=BACK)
    proto.graph.node[-1].op_type, proto.graph.node[-1].domain = "SkipLayerNormalization", "com.microsoft"
    assert set(blocks_of(proto).values()) == {Block("x", "d", -1)}


def test_a_convolution_has_its_features_on_another_axis():
    nodes = "a = Conv (x, v) b = Relu (a) c = Conv (b, w) d = Add (c, x) y = Relu (d)"
    found = blocks(nodes, x="float[2,4,6,6]", v=(8, 4, 1, 1), w=(4, 8, 1, 1))
    assert found == dict.fromkeys(("v", "w"), Block("x", "c", -3))


def attention(x, y, n):
    """The nodes of a block of attention with a mask, from x to y; n makes its names unique."""
    return f"""q{n} = MatMul ({x}, wq{n}) k{n} = MatMul ({x}, wk{n}) t{n} = Transpose <perm = [1, 0]> (k{n})
        s{n} = MatMul (q{n}, t{n}) m{n} = Add (s{n}, mask) p{n} = Softmax (m{n}) v{n} = MatMul ({x}, wv{n})
        a{n} = MatMul (p{n}, v{n}) o{n} = MatMul (a{n}, wo{n}) {y} = Add ({x}, o{n})"""


def test_a_mask_ends_no_block():
    """Neither in the first block, nor in the second one, whose input follows from the mask, too."""
    weights = {f"w{name}{n}": SQUARE for name in "qkvo" for n in (1, 2)}
    nodes = f"{attention('x', 'h', 1)} {attention('h', 'y', 2)}"
    found = blocks(nodes, inputs=", float[1,4] mask", **weights)
    assert {found[name] for name in ("wq1", "wk1", "wv1")} == {Block("x", "o1", -1)}
    assert {found[name] for name in ("wq2", "wk2", "wv2")} == {Block("h", "o2", -1)}
    # What the last projection reads follows from the mask, too.
    assert found["wo1"] is found["wo2"] is None


def test_shapes_say_nothing_about_what_is_read():
    nodes = """z = Shape (x) f = Reshape (n, z) u = MatMul (f, up) r = Relu (u) d = MatMul (r, down)
        y = Add (d, p)"""
    found = blocks(f"p = Relu (x) n = Sigmoid (p) {nodes}", up=WIDE, down=BACK)
    assert found["up"] == Block("p", "d", -1)


NONE = {
    "no sum": "u = MatMul (x, up) r = Relu (u) y = MatMul (r, down)",
    "a sum with another branch": "u = MatMul (x, up) d = MatMul (u, down) e = Sigmoid (x) y = Add (d, e)",
    "a sum with itself": "u = MatMul (x, up) d = MatMul (u, down) y = Add (d, d)",
    "a sum that its input is behind": "p = Relu (x) q = Add (p, x) u = MatMul (q, up) d = MatMul (u, down)"
    " y = Add (d, p)",
}


@pytest.mark.parametrize("nodes", NONE.values(), ids=NONE)
def test_other_layers_have_none(nodes):
    assert set(blocks(nodes, up=WIDE, down=BACK).values()) == {None}


def test_a_layer_of_two_uses_has_none():
    nodes = "a = MatMul (x, w) b = Add (a, x) c = MatMul (b, w) y = Add (c, b)"
    assert blocks(nodes, w=SQUARE) == {"w": None}
