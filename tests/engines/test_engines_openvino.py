"""OpenVINO as the engine that compares and times models; the marked tests run the real package."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

import fused
from onnx_lowrank import InputError, compress
from onnx_lowrank.comparison import compare
from onnx_lowrank.engines import kinds
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.files.load import load
from rewriting import difference, feed_of, model, run
from tiny import DIGITS, cnn

CPU = "CPUExecutionProvider"
SHAPE = {"x": (2, 8, 6, 6)}


def test_without_the_package_a_sentence_comes_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    for option in ({"engine": "openvino"}, {"target": "openvino"}):
        with pytest.raises(InputError) as caught:
            compress("no such model.onnx", 0.5, **option)
        assert str(caught.value) == (
            "The engine 'openvino' needs the package openvino, which is not installed: install "
            "onnx-lowrank[openvino], or pass --engine onnxruntime."
        )
    with pytest.raises(InputError, match="no such model"):
        compress("no such model.onnx", 0.5, target="openvino", engine="onnxruntime")


def test_the_default_engine_is_onnx_runtime():
    assert kinds.names() == ("onnxruntime", "openvino")
    assert kinds.engine(None, CPU) == kinds.engine("onnxruntime", CPU)


needed = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the package openvino is not installed"
)


@pytest.fixture
def openvino():
    return kinds.engine("openvino", CPU)


@needed
@pytest.mark.toolchains
class TestOpenVino:
    def test_it_computes_what_onnx_runtime_computes(self, openvino):
        proto = cnn()
        feed = feed_of(proto)
        with openvino.open(load(proto)) as opened:
            outputs = opened(feed)
        assert list(outputs) == ["y"]
        assert difference(run(proto, feed), outputs.values()) < 1e-5

    def test_outputs_have_their_names_and_unread_inputs_do_no_harm(self, openvino):
        proto = model(
            "g (float[N,3] x, float[4] unread) => (float[N,3] b, float[N,3] a) { a = Relu (x) b = Neg (x) }"
        )
        x = np.array([[1, -2, 3]], np.float32)
        with openvino.open(load(proto)) as opened:
            outputs = opened({"x": x, "unread": np.zeros(4, np.float32)})
        assert list(outputs) == ["b", "a"]
        np.testing.assert_array_equal(outputs["b"], -x)
        np.testing.assert_array_equal(outputs["a"], np.maximum(x, 0))

    def test_inputs_that_do_not_fit_are_rejected(self, openvino):
        with (
            openvino.open(load(DIGITS)) as opened,
            pytest.raises(RejectedError, match=r"^(?!.*\.cpp)[^\n]*$"),
        ):
            opened({"image": np.zeros((1, 2, 8, 8), np.float32)})

    def test_data_files_are_found(self, openvino, tmp_path):
        import onnx

        proto = cnn()
        onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=64)
        proto, feed = cnn(), feed_of(proto)
        loaded = load(tmp_path / "m.onnx")
        with openvino.open(loaded) as opened:
            assert difference(run(proto, feed), opened(feed).values()) < 1e-5

    def test_a_foreign_operator_is_told_before_any_work(self, openvino):
        proto = fused.model("float[1,16,16] x", "h = MatMul (x, w) y = com.microsoft.Inverse (h)", w=(16, 16))
        with (
            pytest.raises(UnsupportedError, match=r"No conversion rule found for operations: com\.mic"),
            openvino.open(load(proto)),
        ):
            pass
        with pytest.raises(InputError, match=r"^The engine 'openvino' cannot run .*Inverse.*: pass --engine"):
            compress(proto, 0.5, engine="openvino")

    def test_a_run_is_compared_and_timed_on_it(self):
        result = compress(cnn(), 0.5, engine="openvino", time=True, input_shape=SHAPE)
        assert result.report.validation.engine == "OpenVINO CPU"
        assert result.report.timing.engine.startswith("OpenVINO CPU, ")
        usual = compress(cnn(), 0.5, input_shape=SHAPE)
        assert result.proto == usual.proto, "the engine changes no byte"
        (one,), (other,) = (each.report.validation.outputs for each in (result, usual))
        assert one.relative == pytest.approx(other.relative, rel=1e-4)

    def test_held_out_inputs_are_judged_on_it(self):
        rng = np.random.default_rng(1)
        data = {"x": rng.standard_normal((24, 8, 6, 6), np.float32)}
        check = {"x": rng.standard_normal((4, 8, 6, 6), np.float32)}
        options = {"calibration": data, "check": check}
        result, usual = compress(cnn(), 0.5, engine="openvino", **options), compress(cnn(), 0.5, **options)
        assert result.proto == usual.proto
        one, other = (each.report.validation for each in (result, usual))
        assert one.engine == "OpenVINO CPU"
        for ours, theirs in ((one.outputs, other.outputs), (one.other.outputs, other.other.outputs)):
            assert ours[0].relative == pytest.approx(theirs[0].relative, rel=1e-4)
            assert ours != theirs, "other kernels round in another way"

    def test_a_latency_budget_measures_on_it(self):
        result = compress(cnn(), 0.8, budget="latency", align=1, engine="openvino", input_shape=SHAPE)
        assert result.report.timing.engine.startswith("OpenVINO CPU, ")

    @pytest.mark.clock
    def test_real_times_are_measured(self, tmp_path):
        made = tmp_path / "made.onnx"
        with compress(DIGITS, 0.5) as result:
            result.save(made)
        found = compare(DIGITS, made, engine="openvino", time=True, threads=1)
        assert found.timing.engine == "OpenVINO CPU, 1 thread"
        assert found.timing.before > 0 < found.timing.after

    @pytest.mark.parametrize("style", ["conv", "matmul", "group-free"])
    def test_every_lowering_runs_on_it(self, openvino, style):
        proto = compress(cnn(), 0.3, lowering=style).proto
        feed = feed_of(cnn())
        with openvino.open(load(proto)) as opened:
            assert difference(run(proto, feed), opened(feed).values()) < 1e-5
