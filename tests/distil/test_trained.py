"""The stored tensors that distillation trains, and the inner values that it compares."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_lowrank.distil.features import MOST, ends, features
from onnx_lowrank.distil.trained import trained
from onnx_lowrank.files.load import load
from onnx_lowrank.graph.walk import Walk


def names(text, **arrays):
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return list(trained(load(proto), Walk(proto)))


def floats(*shape):
    return np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)


def test_trains_weights_biases_and_scales():
    text = """<ir_version: 8, opset_import: ["": 17]>
    m (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) {
      a = Conv <pads = [1, 1, 1, 1]> (x, w, b)
      c = BatchNormalization (a, scale, shift, mean, variance)
      y = Add (c, added)
    }"""
    arrays = {"w": floats(4, 4, 3, 3), "b": floats(4), "scale": floats(4), "shift": floats(4)}
    arrays |= {"mean": floats(4), "variance": floats(4), "added": floats(4, 1, 1)}
    assert names(text, **arrays) == ["w", "b", "scale", "shift", "added"]


def test_trains_a_weight_behind_views_and_in_a_constant():
    text = """<ir_version: 8, opset_import: ["": 17]>
    m (float[N, 4] x) => (float[N, 4] y) {
      t = Transpose (w)
      c = Constant <value = float[4, 4] {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}> ()
      a = MatMul (x, t)
      y = MatMul (a, c)
    }"""
    assert names(text, w=floats(4, 4)) == ["w", "c"]


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Gather (w, i) b = MatMul (a, m) y = MatMul (b, w)",  # a table that is a weight, too
        "a = MatMul (x, m) y = Mul (a, w)",  # a mask or a scale of scores
        "y = MatMul (x, m) z = Identity (w)",  # the caller reads it
    ],
)
def test_leaves_tensors_with_other_readers(nodes):
    results = "float[N, 4] y, float[4, 4] z" if " z = " in nodes else "float[N, 4] y"
    indices = "i = Constant <value = int64[2] {0, 1}> ()" if "Gather" in nodes else ""
    text = f'<ir_version: 8, opset_import: ["": 17]> m (float[N, 4] x) => ({results}) {{ {indices} {nodes} }}'
    assert names(text, w=floats(4, 4), m=floats(4, 4)) == ["m"]


def test_leaves_positions_that_an_add_gives_each_place():
    text = """<ir_version: 8, opset_import: ["": 17]>
    m (float[N, 5, 4] x) => (float[N, 5, 4] y) { y = Add (x, positions) }"""
    assert names(text, positions=floats(1, 5, 4)) == []


def test_leaves_numbers_that_are_no_floats():
    text = """<ir_version: 8, opset_import: ["": 17]>
    m (int32[N, 4] x) => (int32[N, 4] y) { y = MatMul (x, w) }"""
    assert names(text, w=np.ones((4, 4), np.int32)) == []


RESIDUAL = """<ir_version: 8, opset_import: ["": 17]>
m (float[N, 4] x) => (float[N, 4] y) {
  a = MatMul (x, w1)
  b = Relu (a)
  c = MatMul (b, w2)
  d = Relu (c)
  e = MatMul (d, w3)
  f = Add (b, e)
  g = Relu (f)
  y = MatMul (g, w4)
}"""


def test_a_block_ends_where_one_value_carries_everything():
    graph = onnx.parser.parse_model(RESIDUAL).graph
    # Not c or d, as b is needed beside them; g, not f, as nothing trained lies between.
    assert ends(graph, {"w1", "w2", "w3", "w4"}) == ["b", "g"]


def test_a_mask_beside_the_blocks_does_not_hide_their_ends():
    text = RESIDUAL.replace("float[N, 4] x)", "float[N, 4] x, float[N, 4] mask)")
    text = text.replace("c = MatMul (b, w2)", "k = Mul (mask, mask) bb = Mul (b, k) c = MatMul (bb, w2)")
    text = text.replace("g = Relu (f)", "h = Mul (f, k) g = Relu (h)")
    assert ends(onnx.parser.parse_model(text).graph, {"w1", "w2", "w3", "w4"}) == ["b", "g"]


def test_features_are_known_to_the_original_evenly_spaced_and_end_with_the_last():
    found = [f"v{number}" for number in range(40)]
    chosen = features(found, {*found} - {"v39"})
    assert chosen[-1] == "v38"
    assert len(chosen) <= MOST
    gaps = np.diff([int(name[1:]) for name in chosen])
    assert len(set(gaps)) == 1
