"""Layers that read the same tensor: which groups are found, and every reason not to find one."""

from __future__ import annotations

import pytest

from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import find_layers
from rewriting import model


def groups(body, functions="", **weights):
    """The groups of siblings; every layer of a group knows all of it."""
    found = find_layers(load(model(body, functions=functions, **weights)), {}, (), ())
    known = {layer.id: layer.siblings for layer in found.layers if layer.siblings}
    assert all(name in ids and known[name] == ids for ids in known.values() for name in ids)
    return sorted(set(known.values()))


def pair(nodes, x="float[4,16]", y="float[4,24]", **weights):
    return groups(f"g ({x} x) => ({y} y) {{ {nodes} y = Add (a, b) }}", **weights)


MATRIX = (16, 24)

FOUND = {
    "matmul": ("a = MatMul (x, v) b = MatMul (x, w)", {"v": MATRIX, "w": MATRIX}),
    "gemm": ("a = Gemm <transB = 1> (x, v) b = Gemm (x, w)", {"v": (24, 16), "w": MATRIX}),
    "scales of biases": (
        "a = Gemm <beta = 0.5> (x, v, c) b = Gemm (x, w)",
        {"v": MATRIX, "w": MATRIX, "c": (24,)},
    ),
    "transposed": (
        "t = Transpose <perm = [1, 0]> (x) a = Gemm <transA = 1> (t, v) b = Gemm <transA = 1> (t, w)",
        {"v": MATRIX, "w": MATRIX},
    ),
}


@pytest.mark.parametrize(("nodes", "weights"), FOUND.values(), ids=FOUND)
def test_layers_that_read_one_tensor_are_siblings(nodes, weights):
    assert pair(nodes, **weights) == [("v", "w")]


LEFT = {
    "other tensors": ("r = Relu (x) a = MatMul (x, v) b = MatMul (r, w)", {"v": MATRIX, "w": MATRIX}),
    "other operators": ("a = MatMul (x, v) b = Gemm (x, w)", {"v": MATRIX, "w": MATRIX}),
    "two uses": (
        "a = MatMul (x, v) r = Relu (x) c = MatMul (r, v) d = MatMul (x, w) b = Add (c, d)",
        {"v": MATRIX, "w": MATRIX},
    ),
    "other scales": ("a = Gemm <alpha = 0.5> (x, v) b = Gemm (x, w)", {"v": MATRIX, "w": MATRIX}),
    "one layer": ("a = MatMul (x, v) b = Relu (a)", {"v": MATRIX}),
}


@pytest.mark.parametrize(("nodes", "weights"), LEFT.values(), ids=LEFT)
def test_other_layers_are_not(nodes, weights):
    assert pair(nodes, **weights) == []


def test_weights_on_both_sides_are_apart():
    body = """g (float[16,16] x) => (float[16,16] y) {
        a = MatMul (x, v) b = MatMul (w, x) c = MatMul (u, x) d = Add (a, b) y = Add (c, d) }"""
    assert groups(body, v=(16, 16), w=(16, 16), u=(16, 16)) == [("w", "u")]


def test_sizes_of_outputs_may_differ():
    body = """g (float[4,16] x) => (float[4,24] y, float[4,8] z) { y = MatMul (x, v) z = MatMul (x, w) }"""
    assert groups(body, v=MATRIX, w=(16, 8)) == [("v", "w")]


@pytest.mark.parametrize(
    ("other", "is_found"),
    [
        ("<pads = [1,1,1,1]>", True),
        ("<pads = [1,1,1,1], kernel_shape = [3,3], strides = [1,1]>", True),
        ("<pads = [2,2,2,2], dilations = [2,2]>", False),
        ("<pads = [1,1,1,1], strides = [2,2]>", False),
        ("<pads = [1,1,1,1], group = 2>", False),
    ],
)
def test_convolutions_have_to_see_the_same_windows(other, is_found):
    body = f"""g (float[1,8,6,6] x) => (y, z) {{
        y = Conv <pads = [1,1,1,1]> (x, v) z = Conv {other} (x, w) }}"""
    channels = 4 if "group" in other else 8
    assert groups(body, v=(8, 8, 3, 3), w=(8, channels, 3, 3)) == ([("v", "w")] if is_found else [])


def test_kernels_have_to_be_alike():
    body = """g (float[1,8,6,6] x) => (y, z) { y = Conv (x, v) z = Conv (x, w) u = Conv (x, q) }"""
    body = body.replace("(y, z)", "(y, z, u)")
    assert groups(body, v=(8, 8, 3, 3), w=(8, 8, 1, 1), q=(4, 8, 1, 1)) == [("w", "q")]
