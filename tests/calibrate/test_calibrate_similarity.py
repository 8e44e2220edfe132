"""The importance of blocks against cosines computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from calibrating import measured, seen
from onnx_lowrank.calibrate import similarity
from onnx_lowrank.calibrate.shares import held_out
from onnx_lowrank.calibrate.similarity import importances
from onnx_lowrank.engines.engine import UnsupportedError
from rewriting import model

TWO = """g (float[N,8] x) => (float[N,4] y) {
    u = MatMul (x, up1) r = Relu (u) d = MatMul (r, down1) h = Add (x, d)
    v = MatMul (h, up2) t = Relu (v) e = MatMul (t, down2) k = Add (e, h) y = MatMul (k, last) }"""
CONV = """g (float[N,4,5,5] x) => (float[N,4,5,5] y) {
    a = Conv <pads = [1,1,1,1]> (x, v) b = Relu (a) c = Conv <pads = [1,1,1,1]> (b, w) y = Add (c, x) }"""


def drawn(seed, *shape):
    return (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)


def two():
    arrays = {"up1": (8, 12), "down1": (12, 8), "up2": (8, 12), "down2": (12, 8), "last": (8, 4)}
    made = {name: drawn(number, *shape) for number, (name, shape) in enumerate(arrays.items())}
    return made | {"down2": 8 * made["down2"]}


def score(x, y, axis=-1):
    x, y = x.astype(np.float64), (x + y).astype(np.float64)
    lengths = np.linalg.norm(x, axis=axis) * np.linalg.norm(y, axis=axis)
    return 1 - np.mean(np.sum(x * y, axis=axis) / lengths)


def found(proto, x):
    layers = seen(proto)
    with measured(layers, {"x": x}) as calibration:
        return importances(layers.model, layers.walk, layers.bindings, calibration)


def test_they_are_one_minus_the_mean_cosine_of_the_samples_to_fit_to():
    arrays, x = two(), drawn(9, 40, 8)
    given = found(model(TWO, **arrays), x)
    x = x[~held_out(40)]
    d = np.maximum(x @ arrays["up1"], 0) @ arrays["down1"]
    h = x + d
    e = np.maximum(h @ arrays["up2"], 0) @ arrays["down2"]
    assert given["up1"] == given["down1"] == pytest.approx(score(x, d), rel=1e-5)
    assert given["up2"] == given["down2"] == pytest.approx(score(h, e), rel=1e-5)
    assert given["up1"] < given["up2"]
    assert given["last"] == 1


def test_a_vector_is_that_of_the_channels():
    v, w, x = drawn(1, 6, 4, 3, 3), drawn(2, 4, 6, 3, 3), drawn(3, 20, 4, 5, 5)
    given = found(model(CONV, v=v, w=w), x)
    x = x[~held_out(20)]
    (y,) = ReferenceEvaluator(model(CONV, v=v, w=w)).run(None, {"x": x})
    assert given == pytest.approx(dict.fromkeys(("v", "w"), score(x, y - x, axis=1)), rel=1e-5)


def test_vectors_of_zeros_do_not_count():
    x = drawn(9, 40, 8)
    half = x.copy()
    half[::2] = 0
    arrays = two()
    with np.errstate(all="raise"):
        given = found(model(TWO, **arrays), half)
    x = half[~held_out(40) & (np.arange(40) % 2 == 1)]
    d = np.maximum(x @ arrays["up1"], 0) @ arrays["down1"]
    assert given["up1"] == pytest.approx(score(x, d), rel=1e-5)


def test_all_are_alike_where_the_model_does_not_run(monkeypatch):
    def fails(*_):
        raise UnsupportedError("no engine")

    monkeypatch.setattr(similarity, "_measured", fails)
    assert set(found(model(TWO, **two()), drawn(9, 40, 8)).values()) == {1.0}
