"""Models that were exported in training mode are measured as ONNX Runtime runs them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

import onnx_lowrank
from calibrating import measured, seen
from onnx_lowrank.probe.inference import without_dropout
from rewriting import model

TEXT = """g (float[N,12] x) => (float[N,8] y) {
    a = MatMul (x, w) d0 = Relu (a) d = Dropout (d0, rate, train)
    b = MatMul (d, u) e = Dropout (b, rate, train) y = MatMul (e, v) }"""
PLAIN = TEXT.replace("Dropout (d0, rate, train)", "Identity (d0)").replace(
    "Dropout (b, rate, train)", "Identity (b)"
)


def drawn(text):
    rng = np.random.default_rng(0)
    weights = {
        name: (rng.standard_normal(shape) / 3).astype(np.float32)
        for name, shape in {"w": (12, 10), "u": (10, 9), "v": (9, 8)}.items()
    }
    more = {"rate": np.float32(0.5), "train": np.array(True)} if "Dropout" in text else {}
    return model(text, **weights, **more)


X = np.random.default_rng(1).standard_normal((60, 12)).astype(np.float32)


def test_onnx_runtime_runs_the_model_without_dropout():
    one, other = (
        onnxruntime.InferenceSession(drawn(text).SerializeToString()).run(None, {"x": X})[0]
        for text in (TEXT, PLAIN)
    )
    np.testing.assert_array_equal(one, other)


def test_moments_are_those_without_dropout():
    made = []
    for text in (TEXT, PLAIN):
        with measured(seen(drawn(text)), X) as calibration:
            made.append({layer: calibration.statistics[layer].inputs for layer in ("w", "u", "v")})
    for layer, known in made[0].items():
        np.testing.assert_array_equal(known.second, made[1][layer].second)
        np.testing.assert_array_equal(known.mean, made[1][layer].mean)


@pytest.mark.parametrize("recipe", ["activation", "output"])
def test_factors_are_those_without_dropout(recipe):
    made = []
    for text in (TEXT, PLAIN):
        with onnx_lowrank.compress(drawn(text), ratio=0.7, recipe=recipe, calibration=X) as result:
            made.append((result.proto, result.report.trials))
    (one, trials), (other, plain) = made
    assert [trial.error for trial in trials] == [trial.error for trial in plain]
    weights = [{t.name: t.raw_data for t in proto.graph.initializer} for proto in (one, other)]
    assert {name: raw for name, raw in weights[0].items() if name not in ("rate", "train")} == weights[1]
    assert [node.op_type for node in one.graph.node].count("Dropout") == 2


def test_a_mask_that_is_returned_keeps_its_dropout():
    text = TEXT.replace("d = Dropout", "d, mask = Dropout")
    proto = drawn(text)
    without_dropout(proto.graph)
    assert [node.op_type for node in proto.graph.node].count("Dropout") == 1
    onnx.checker.check_model(proto)


def test_bodies_are_changed_too():
    text = """g (float[N,12] x, bool c) => (float[N,12] y) {
        y = If (c) <then_branch = t () => (float[N,12] a) { a = Dropout (x, rate, train) },
                    else_branch = f () => (float[N,12] b) { b = Identity (x) }> }"""
    proto = model(text, rate=np.float32(0.5), train=np.array(True))
    without_dropout(proto.graph)
    (body,) = (a.g for a in proto.graph.node[0].attribute if a.name == "then_branch")
    assert [(node.op_type, list(node.input)) for node in body.node] == [("Identity", ["x"])]
