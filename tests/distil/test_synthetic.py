"""Inputs made from the statistics of BatchNormalizations."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank import InputError, compress
from onnx_lowrank.core.plan import Round
from onnx_lowrank.distil import learning, synthetic
from onnx_lowrank.distil.schedule import replayed
from onnx_lowrank.files.load import load
from tiny import built, decaying

NORMED = """
<ir_version: 8, opset_import: ["": 17]>
normed (float[N, 8, 6, 6] x) => (float[N, 4] y) {
  a = Conv <pads = [1, 1, 1, 1]> (x, conv1)
  s = Sigmoid (a)
  b = BatchNormalization (s, scale, shift, mean, variance)
  c = Conv <pads = [1, 1, 1, 1]> (b, conv2)
  d = GlobalAveragePool (c)
  e = Flatten (d)
  y = Gemm <transB = 1> (e, fc)
}
"""


def normed():
    arrays = {"conv1": decaying(1, 16, 8, 3, 3), "conv2": decaying(2, 16, 16, 3, 3), "fc": decaying(3, 4, 16)}
    one = np.ones(16, np.float32)
    rng = np.random.default_rng(5)
    mean, variance = rng.uniform(0.3, 0.7, 16), rng.uniform(0.02, 0.05, 16)
    arrays |= {"scale": one, "shift": one, "mean": mean.astype(np.float32)}
    return built(NORMED, arrays | {"variance": variance.astype(np.float32)})


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(synthetic, "COUNT", 64)
    monkeypatch.setattr(synthetic.synthesized, "__defaults__", (64,))


def sigmoid_of_conv(x):
    weight = decaying(1, 16, 8, 3, 3).astype(float)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return 1 / (1 + np.exp(-np.einsum("nchwij,fcij->nfhw", windows, weight)))


def test_made_inputs_have_the_stored_statistics_better_than_noise():
    shares = []
    x = synthetic.synthesized(load(normed()), {}, shares.append, count=64)["x"]
    assert x.shape == (64, 8, 6, 6)
    assert shares[-1] == pytest.approx(1.0)
    stored = {t.name: np.frombuffer(t.raw_data, np.float32) for t in normed().graph.initializer}

    def misfit(inputs):
        values = sigmoid_of_conv(inputs.astype(float))
        mean, variance = values.mean((0, 2, 3)), values.var((0, 2, 3))
        shift = (mean - stored["mean"]) ** 2 / stored["variance"]
        return float(np.mean(shift + np.log(variance / stored["variance"]) ** 2))

    noise = np.random.default_rng(0).standard_normal(x.shape)
    assert misfit(x) < 0.2 * misfit(noise)
    again = synthetic.synthesized(load(normed()), {}, shares.append, count=64)["x"]
    assert np.array_equal(x, again)


@pytest.mark.usefixtures("few")
def test_a_model_is_distilled_on_made_inputs_and_the_report_says_so(monkeypatch):
    rounds = [Round(30, 0.002), Round(30, 0.0005)]
    monkeypatch.setattr(learning.Learner, "schedule", lambda self, seconds: replayed(rounds))
    made = compress(normed(), 0.3, distil=True, synthetic=True, recipe="activation", cache=False)
    assert made.report.validation.distilled is not None
    assert made.report.calibration.source.startswith("made inputs: 64 samples")
    assert any("were made from the statistics" in warning for warning in made.report.warnings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            NORMED.replace("BatchNormalization (s, scale, shift, mean, variance)", "Relu (s)"),
            "has no BatchNorm",
        ),
        (NORMED.replace("float[N, 8, 6, 6] x", "float[N, 8, H, 6] x"), "The shape of 'x' is open"),
        (NORMED.replace("float[N, 8, 6, 6] x", "float[N, 8, 6, 6] x, float[N] z"), "makes a single input"),
    ],
)
def test_models_without_statistics_are_refused(text, message):
    arrays = {
        t.name: np.frombuffer(t.raw_data, np.float32).reshape(t.dims) for t in normed().graph.initializer
    }
    with pytest.raises(InputError, match=message):
        compress(built(text, arrays), 0.5, distil=True, synthetic=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distil": True, "calibration": {"x": np.ones((40, 8, 6, 6), np.float32)}}, "leave one of them out"),
        ({}, "--synthetic makes inputs for a distillation"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        compress(normed(), 0.5, synthetic=True, **options)
