"""`--then`: the command and compress() with quantization after the decomposition."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from calibrating import run
from editing import edited_plan
from onnx_lowrank import InputError, ValidationError, cli, compress
from onnx_lowrank.quantize import int8, kind
from onnx_lowrank.stages import quantizing
from onnx_lowrank.validation import Validator
from tiny import CNN, DIGITS, built, cnn, decaying

MATRICES = """
<ir_version: 8, opset_import: ["": 17]>
matrices (float[N, 96] x) => (float[N, 64] y) {
  a = MatMul (x, v)
  b = Add (a, c)
  d = Relu (b)
  y = MatMul (d, w)
}
"""
FEEDS = {"x": np.random.default_rng(7).standard_normal((40, 8, 6, 6)).astype(np.float32)}
ROWS = {"x": np.random.default_rng(8).standard_normal((60, 96)).astype(np.float32)}


def matrices():
    arrays = {"v": decaying(1, 96, 128), "c": np.ones(128, np.float32), "w": decaying(2, 128, 64)}
    return built(MATRICES, arrays)


def kinds(proto):
    return {node.op_type for node in proto.graph.node}


def table(result):
    return json.loads(result.report.to_json())


@pytest.mark.parametrize(
    ("proto", "options", "then", "wanted", "method"),
    [
        (cnn, {"calibration": FEEDS, "recipe": "activation"}, "int8", "DequantizeLinear", "quantize_static"),
        (cnn, {}, "int8", "ConvInteger", "quantize_dynamic"),
        (cnn, {}, "fp16", "Cast", "float16"),
        (
            matrices,
            {"calibration": ROWS, "recipe": "activation"},
            "int8",
            "MatMulInteger",
            "quantize_dynamic",
        ),
        (matrices, {}, "int4", "MatMulNBits", "MatMulNBits"),
        (matrices, {"calibration": ROWS, "recipe": "activation"}, "int4", "MatMulNBits", "MatMulNBits"),
    ],
    ids=["static", "dynamic", "half", "matrices", "packed", "packed, calibrated"],
)
def test_the_quantized_model_is_near_the_low_rank_one(proto, options, then, wanted, method):
    proto = proto()
    low = compress(proto, 0.6, **options)
    both = compress(proto, 0.6, then=then, **options)
    assert wanted in kinds(both.proto)
    assert wanted not in kinds(low.proto)
    feed = {
        proto.graph.input[0].name: (FEEDS | {"rows": ROWS["x"]})["x" if proto.graph.name == "cnn" else "rows"]
    }
    alone, made = run(low.proto, **feed), run(both.proto, **feed)
    assert 0 < np.linalg.norm(made - alone) < 0.2 * np.linalg.norm(alone)
    done = table(both)["validation"]["quantized"]
    assert (done["kind"], done["method"].split(",")[0]) == (then, method)
    assert done["refitted"] > 0
    assert done["floats_after"] < 0.2 * done["floats"]
    # The report has the errors of both models.
    assert [each["name"] for each in done["alone"]] == ["y"]
    assert done["alone"][0]["relative"] == pytest.approx(table(low)["validation"]["worst"], rel=1e-6)
    assert done["bytes_after"] == both.proto.ByteSize() < done["bytes"]
    # Parameters, MACs and bounds are those of the factors.
    for key in ("params", "macs"):
        assert table(both)["totals"][key] == table(low)["totals"][key]
    assert [row["certificate"] for row in table(both)["layers"]] == [
        row["certificate"] for row in table(low)["layers"]
    ]


def test_the_fit_lowers_the_error_of_coarse_blocks(monkeypatch):
    """Four bits are coarse enough for the fit to show."""
    fitted = compress(matrices(), 0.6, then="int4", calibration=ROWS, recipe="activation")
    monkeypatch.setattr("onnx_lowrank.stages.quantizing._walked", lambda *_: iter(()))
    plain = compress(matrices(), 0.6, then="int4", calibration=ROWS, recipe="activation")
    wanted = run(matrices(), **ROWS)
    errors = [np.linalg.norm(run(each.proto, **ROWS) - wanted) for each in (fitted, plain)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("opset", [17, 18])
def test_features_of_unequal_ranges_are_balanced_first(monkeypatch, opset):
    """One scale for a tensor leaves few steps to features of small ranges, whose weights are large here."""
    spread = (10.0 ** np.random.default_rng(3).uniform(-1.5, 1.5, 96)).astype(np.float32)
    arrays = {"v": decaying(1, 96, 128), "c": np.ones(128, np.float32), "w": decaying(2, 128, 64)}
    proto = built(MATRICES.replace("17", str(opset)), arrays | {"v": arrays["v"] / spread[:, None]})
    feeds = {"x": ROWS["x"] * spread}
    errors = []
    for balances in (True, False):
        monkeypatch.setattr(
            int8.Dynamic, "balances", property(lambda _, value=balances: value, lambda *_: None)
        )
        made = compress(proto, 0.6, then="int8", calibration=feeds, recipe="activation")
        assert (made.proto.graph.node[0].op_type == "Mul") == balances
        done = table(made)["validation"]
        errors.append((done["worst"], done["quantized"]["undecomposed"]["outputs"][0]["relative"]))
    assert errors[0][0] < 0.6 * errors[1][0]
    assert errors[0][1] < 0.6 * errors[1][1]


@pytest.mark.parametrize("ratio", [0.25, 0.2])
def test_the_budget_of_bytes_counts_what_balances(ratio):
    proto = matrices()
    made = compress(proto, ratio, then="int8", budget="bytes", calibration=ROWS, recipe="activation")
    assert "Mul" in kinds(made.proto)
    assert made.proto.ByteSize() <= ratio * proto.ByteSize()


def test_the_quantization_alone_stands_beside_the_pair(tmp_path):
    proto, path = matrices(), str(tmp_path / "alone.onnx")
    made = compress(proto, 0.6, then="int8", inputs=ROWS)
    alone = table(made)["validation"]["quantized"]["undecomposed"]
    with kind.silent():
        onnxruntime.quantization.quantize_dynamic(proto, path, per_channel=True)
    quantized = onnx.load(path)
    wanted, got = run(proto, **ROWS), run(quantized, **ROWS)
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert alone["outputs"][0]["relative"] == pytest.approx(error, rel=1e-5)
    assert alone["bytes"] == pytest.approx(quantized.ByteSize(), abs=300)  # our own note
    assert alone["note"] == ""


def test_a_pair_that_quantization_alone_beats_is_told():
    """Noise has no low rank: factors of nearly all ranks save less than their nodes take."""
    rng = np.random.default_rng(1)
    arrays = {"v": rng.standard_normal((96, 128)), "c": np.ones(128), "w": rng.standard_normal((128, 64))}
    proto = built(MATRICES, {name: array.astype(np.float32) for name, array in arrays.items()})
    for ratio, told in ((0.99, 1), (0.6, 0)):
        made = compress(proto, ratio, then="int8", inputs=ROWS)
        assert sum(text.startswith("int8 alone is better") for text in made.report.warnings) == told
        done = table(made)["validation"]["quantized"]
        assert (done["undecomposed"]["bytes"] <= done["bytes_after"]) == bool(told)


def test_where_no_layer_is_rewritten_the_result_is_the_quantization_alone():
    assert table(compress(matrices(), 1, then="fp16"))["validation"]["quantized"]["undecomposed"] is None


def test_a_quantization_alone_that_fails_is_no_error(monkeypatch):
    write = int8.Dynamic.write

    def fail(self, source, target, feeds, *, is_large):
        if "v" in {each.name for each in onnx.load(source).graph.initializer}:
            raise ValueError("no such thing\nin two lines")
        write(self, source, target, feeds, is_large=is_large)

    monkeypatch.setattr(int8.Dynamic, "write", fail)
    alone = table(compress(matrices(), 0.4, then="int8"))["validation"]["quantized"]["undecomposed"]
    assert alone["note"].startswith("ONNX Runtime cannot quantize the input model to int8 (no such thing")
    assert (alone["bytes"], alone["outputs"]) == (None, [])


def test_a_quantization_alone_that_cannot_be_compared_has_its_bytes(monkeypatch):
    def fail(*_):
        raise ValidationError("It gives NaN.")

    monkeypatch.setattr(Validator, "errors", fail)
    alone = table(compress(matrices(), 0.4, then="int8"))["validation"]["quantized"]["undecomposed"]
    assert (alone["note"], alone["outputs"]) == ("The outputs of int8 alone cannot be compared.", [])
    assert alone["bytes"] > 0


@pytest.mark.parametrize("over", [True, False])
def test_a_quantization_alone_that_needs_a_data_file_is_left_out(monkeypatch, over):
    proto = matrices()
    monkeypatch.setattr(quantizing, "PROTOBUF_LIMIT", proto.ByteSize() - over)
    alone = table(compress(proto, 0.6, then="int8"))["validation"]["quantized"]["undecomposed"]
    assert (alone["note"] == "int8 alone was not tried: the input model has more than 2 GiB.") == over
    assert (alone["bytes"] is None) == over


@pytest.mark.parametrize("then", ["int8", "fp16"])
def test_a_replay_gives_the_same_bytes(then, tmp_path):
    first = compress(cnn(), 0.6, then=then, calibration=FEEDS, recipe="activation")
    first.save_plan(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["then"] == then
    again = compress(cnn(), plan=tmp_path / "plan.json", calibration=FEEDS)
    assert again.proto.SerializeToString(deterministic=True) == first.proto.SerializeToString(
        deterministic=True
    )
    assert again.plan == first.plan
    # Without the key, the plan is that of the low-rank model.
    plain = compress(cnn(), plan=edited_plan(first, tmp_path, then=None), calibration=FEEDS)
    assert "DequantizeLinear" not in kinds(plain.proto)
    assert table(plain)["validation"]["quantized"] is None


def test_a_plan_without_quantization_has_no_such_key(tmp_path):
    compress(cnn(), 0.6).save_plan(tmp_path / "plan.json")
    assert "then" not in json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.parametrize("ratio", [0.3, 0.2])
@pytest.mark.parametrize("then", ["int8", "fp16"])
def test_the_budget_of_bytes_counts_what_is_left(ratio, then):
    proto = onnx.load(DIGITS)
    result = compress(proto, ratio, then=then, budget="bytes")
    size = result.proto.ByteSize()
    assert size <= ratio * proto.ByteSize()
    assert result.report.reached == pytest.approx(size / proto.ByteSize(), rel=1e-3)
    # The low-rank model alone would need a smaller ratio of parameters for the same bytes.
    alone = compress(proto, ratio, budget="bytes")
    assert result.report.totals.amount("params").after > alone.report.totals.amount("params").after


def test_a_ratio_that_quantization_alone_reaches_keeps_all_layers():
    result = compress(onnx.load(DIGITS), 0.5, then="int8", budget="bytes")
    assert all(choice.option is None for choice in result.plan.choices)
    assert "the output is the input model after --then int8" in result.report.warnings[0]
    assert "ConvInteger" in kinds(result.proto)


def test_align_int4_gives_whole_blocks():
    result = compress(matrices(), 0.7, then="int4", align="int4")
    ranks = [choice.option.j for choice in result.plan.choices if choice.option is not None]
    assert ranks
    assert all(rank % 32 == 0 for rank in ranks)


def test_external_data_goes_through(tmp_path):
    proto = matrices()
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=64)
    with compress(tmp_path / "in.onnx", 0.6, then="int8") as result:
        result.save(tmp_path / "out.onnx")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in files if name.startswith("out.onnx.")]
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    made = session.run(None, ROWS)[0]
    wanted = run(compress(matrices(), 0.6, then="int8").proto, **ROWS)
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-5)


def test_the_metadata_name_the_quantization():
    notes = {each.key: each.value for each in compress(cnn(), 0.6, then="int8").proto.metadata_props}
    assert json.loads(notes["onnx_lowrank.then"]) == {
        "kind": "int8",
        "method": "quantize_dynamic, weights unsigned",
    }
    assert "onnx_lowrank.layers" in notes
    assert not [key for key in notes if key.startswith("onnx.")]


def quantized():
    return compress(cnn(), 0.9, then="int8").proto


def old(version):
    return cnn(CNN.replace("17", str(version)))


@pytest.mark.parametrize(
    ("proto", "options", "message"),
    [
        (cnn, {"then": "int8", "budget": "latency"}, "times float layers, and --then int8 replaces them"),
        (cnn, {"then": "int16"}, r"--then is 'int16': choose one of int8, int4, fp16\."),
        (cnn, {"then": 8}, "then is '8' of type int: give a kind of quantization, such as int8"),
        (
            quantized,
            {"then": "int8"},
            r"is quantized already \(node '.*' is DynamicQuantizeLinear\): leave out",
        ),
        (
            cnn,
            {"then": "int4"},
            "packs the constant weights of MatMul, and model has none: choose --then int8",
        ),
        (
            lambda: old(12),
            {"then": "int8", "calibration": FEEDS},
            "model has opset 12, and scales per channel need 13: convert it",
        ),
        (
            lambda: old(9),
            {"then": "int8"},
            "model has opset 9, and dynamic quantization needs 11: convert it",
        ),
    ],
    ids=["budget", "kind", "type", "twice", "no MatMul", "static opset", "dynamic opset"],
)
def test_what_cannot_be_quantized_is_told_before_the_work(proto, options, message):
    stages = []

    class Noted:
        def stage(self, name, count=None):
            stages.append(name)
            from onnx_lowrank.progress import Silent

            return Silent().stage(name, count)

    proto = proto()
    with pytest.raises(InputError, match=message):
        compress(proto, 0.5, progress=Noted(), **options)
    assert set(stages) <= {"find layers"}


def test_a_plan_has_its_own_quantization(tmp_path):
    compress(cnn(), 0.6).save_plan(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"A plan has its own quantization: leave out --then\."):
        compress(cnn(), plan=tmp_path / "plan.json", then="int8")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(int8.KIND.__class__, "modules", (("no_such_module", "no-such-package"),))
    with pytest.raises(InputError, match=r"--then int8 needs the package no-such-package.*\[quantize\]"):
        compress(cnn(), 0.5, then="int8")


def test_a_failure_of_the_tool_is_one_sentence(monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such thing\nin two lines")

    monkeypatch.setattr(int8.Dynamic, "write", fail)
    with pytest.raises(
        InputError, match=r"quantize_dynamic cannot quantize the low-rank model of model \(no such"
    ):
        compress(cnn(), 0.5, then="int8")


def test_the_command_says_what_it_did(tmp_path, capfd):
    onnx.save(cnn(), tmp_path / "in.onnx")
    words = [str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--ratio", "0.6", "--then", "int8"]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    shown = " ".join(capfd.readouterr().err.split())
    assert "before int8, y: relative error" in shown
    assert "then int8: quantize_dynamic, weights unsigned, because there is no calibration" in shown
    assert "bounds are those of the factors before it" in shown
    assert ", int8 alone: 0." in shown.split(" layers rewritten")[0]
    assert "low-rank alone" in shown
    assert "low-rank, then int8" in shown
    assert "pre-processing" not in shown, "the tool's own advice is no help here"


def test_a_process_of_its_own_prints_nothing_of_the_tools(tmp_path):
    """One tool gives the root logger a handler when it is imported, unless it has one, as in these tests."""
    onnx.save(matrices(), tmp_path / "in.onnx")
    words = [tmp_path / "in.onnx", tmp_path / "out.onnx", "--ratio", "0.6", "--then", "int4", "--quiet"]
    ran = subprocess.run(
        [sys.executable, "-m", "onnx_lowrank", *words], capture_output=True, text=True, check=True
    )
    assert (ran.stdout, ran.stderr) == ("", "")


def test_the_tools_advice_stays_away_and_logging_stays_as_it_is(caplog):
    root = logging.getLogger()
    before = list(root.filters), list(root.handlers), root.level
    place = "/packages/onnxruntime/quantization/quantize.py"
    with kind.silent(), kind.silent():
        root.handle(logging.LogRecord("root", logging.WARNING, place, 1, "advice", (), None))
        logging.getLogger("mine").warning("kept")
        logging.warning("kept, too")
    assert [record.message for record in caplog.records] == ["kept", "kept, too"]
    assert (root.filters, root.handlers, root.level) == before


@pytest.mark.parametrize("then", ["int8", "fp16"])
def test_no_file_is_left_and_none_lies_elsewhere(then, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = []
    real = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *args, **given: made.append(args) or real(*args, **given))
    compress(cnn(), 0.6, then=then, calibration=FEEDS, recipe="activation")
    assert list(tmp_path.iterdir()) == []
    assert made == []


@pytest.mark.slow
def test_digits_keep_their_classes_in_8_bits():
    import evaluate_digits

    data = {"image": evaluate_digits.load().train_images[:300]}
    low = compress(DIGITS, 0.5, calibration=data, recipe="output")
    both = compress(DIGITS, 0.5, calibration=data, recipe="output", then="int8")
    scores = [evaluate_digits.top1(each.proto.SerializeToString()) for each in (low, both)]
    assert scores[1] >= scores[0] - 0.005
    assert both.proto.ByteSize() < 0.4 * low.proto.ByteSize()
    stored = {each.name: numpy_helper.to_array(each).dtype for each in both.proto.graph.initializer}
    assert {str(stored[name]) for name in stored if name.endswith("weight_quantized")} == {"int8"}
