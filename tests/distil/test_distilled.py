"""`--distil`: the command and compress() with a training after the decomposition."""

from __future__ import annotations

import json
from io import StringIO
from itertools import count

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console

from onnx_lowrank import InputError, ValidationError, cli, compress
from onnx_lowrank.core.plan import Round
from onnx_lowrank.distil import distillation, learning
from onnx_lowrank.distil.schedule import replayed
from onnx_lowrank.documents import plans
from onnx_lowrank.report import terminal
from onnx_lowrank.stages import distilling
from rewriting import run
from tiny import built, cnn, decaying


def feeds(seed, count):
    """Inputs with a mean of their own in every sample and channel, so that outputs vary."""
    draws = np.random.default_rng(seed)
    mean, noise = draws.standard_normal((count, 8, 1, 1)), draws.standard_normal((count, 8, 6, 6))
    return {"x": (mean + noise).astype(np.float32)}


FEEDS, OTHERS = feeds(7, 200), feeds(8, 200)
RATIO = 0.12
OPTIONS = {"calibration": FEEDS, "recipe": "activation", "cache": False}


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """A short training of known rounds in place of one that takes its time."""
    rounds = [Round(60, 0.005), Round(60, 0.002), Round(60, 0.0005)]
    monkeypatch.setattr(learning.Learner, "schedule", lambda self, seconds: replayed(rounds))


def error(model, proto):
    wanted, got = (run(each, OTHERS)[0] for each in (proto, model))
    return np.linalg.norm(wanted - got) / np.linalg.norm(wanted - wanted.mean(0))


def test_the_trained_model_errs_less_on_inputs_that_it_never_saw():
    closed, made = compress(cnn(), RATIO, **OPTIONS), compress(cnn(), RATIO, distil=True, **OPTIONS)
    assert error(made.model.proto, cnn()) < 0.9 * error(closed.model.proto, cnn())
    done = made.report.validation.distilled
    assert done.is_kept
    assert done.alone == closed.report.validation.outputs
    assert done.loss[1] < done.loss[0]
    assert made.report.validation.outputs[0].relative < done.alone[0].relative


def test_only_numbers_change():
    closed, made = (compress(cnn(), RATIO, distil=distil, **OPTIONS).model.proto for distil in (False, True))
    for proto in (closed, made):
        del proto.metadata_props[:]
        for node in proto.graph.node:
            del node.metadata_props[:]
    for ours, theirs in zip(closed.graph.initializer, made.graph.initializer, strict=True):
        assert (ours.name, ours.dims, ours.data_type) == (theirs.name, theirs.dims, theirs.data_type)
        theirs.CopyFrom(ours)
    assert closed == made


def test_a_replayed_plan_gives_the_same_bytes(tmp_path):
    made = compress(cnn(), RATIO, distil=True, **OPTIONS)
    (tmp_path / "plan.json").write_text(plans.to_json(made.plan), encoding="utf-8")
    again = compress(cnn(), plan=tmp_path / "plan.json", calibration=FEEDS, cache=False)
    assert again.model.proto.SerializeToString() == made.model.proto.SerializeToString()
    assert again.plan == made.plan


MATRIX = """
<ir_version: 8, opset_import: ["": 17]>
matrix (float[N, 96] x) => (float[N, 64] y) { a = MatMul (x, v) b = Softmax (a) y = MatMul (b, w) }
"""


def test_the_new_factors_are_certified(monkeypatch):
    # Whatever is trained is taken.
    falling = count(0, -1)
    monkeypatch.setattr(distillation._Course, "judge", lambda self, tensors: (float(next(falling)), True))
    monkeypatch.setattr(distilling, "_is_worse", lambda *args: False)
    arrays = {"v": decaying(1, 96, 128), "w": decaying(2, 128, 64)}
    rows = {"x": np.random.default_rng(3).standard_normal((200, 96)).astype(np.float32)}
    made = compress(built(MATRIX, arrays), 0.1, distil=True, **OPTIONS | {"calibration": rows})
    assert made.report.validation.distilled.is_kept
    values = {t.name: numpy_helper.to_array(t).astype(float) for t in made.model.proto.graph.initializer}
    notes = {entry.key: json.loads(entry.value) for entry in made.model.proto.metadata_props}
    assert list(notes) == ["onnx_lowrank.run", "onnx_lowrank.layers"]
    for row in made.report.layers:
        weight = arrays[row.id].astype(float)
        lost = np.linalg.norm(weight - values[f"{row.id}_encoder"] @ values[f"{row.id}_decoder"], 2)
        lost /= np.linalg.norm(weight, 2)
        assert lost <= row.certificate.spectral[0] <= 1.001 * lost
        assert notes["onnx_lowrank.layers"][row.id]["spectral"] == list(row.certificate.spectral)


def test_a_model_that_errs_more_keeps_its_numbers(monkeypatch):
    rounds = [Round(5, 0.5)]
    monkeypatch.setattr(learning.Learner, "schedule", lambda self, seconds: replayed(rounds))
    closed, made = compress(cnn(), RATIO, **OPTIONS), compress(cnn(), RATIO, distil=True, **OPTIONS)
    assert made.model.proto.SerializeToString() == closed.model.proto.SerializeToString()
    assert not made.report.validation.distilled.is_kept
    assert made.plan == closed.plan
    assert "so the model is the one before" in text(made)


def text(made):
    shown = StringIO()
    terminal.show(made.report, Console(file=shown, width=200))
    return shown.getvalue()


def test_the_report_tells_what_was_trained():
    made = compress(cnn(), RATIO, distil=True, **OPTIONS)
    shown = text(made)
    assert "before distillation, y: " in shown
    assert "180 steps" in shown
    table = json.loads(made.report.to_json())["validation"]["distilled"]
    assert table["losses"] == {"y": ["divergence", "relative error"]}
    assert table["steps"] == 180
    assert table["changes"] == ["mixed", "noisy"] or table["changes"] == ["noisy", "mixed"]


def test_quantization_follows():
    made = compress(cnn(), RATIO, distil=True, then="int8", **OPTIONS)
    validation = made.report.validation
    assert validation.quantized is not None
    assert validation.distilled is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distil": True, "calibration": None}, "without labels: pass some with --calibration"),
        ({"minutes": 3.0}, "--minutes 3 bounds a distillation: pass --distil"),
        ({"distil": True, "minutes": 0.0}, "--minutes is 0, but it must be above 0"),
        ({"distil": True, "dry_run": True}, "--dry-run makes no model that could be distilled"),
        ({"distil": "yes"}, "distil is 'yes': give True or False"),
        ({"distil": True, "minutes": "3"}, "minutes is '3' of type str"),
    ],
)
def test_wrong_options_are_refused(options, message):
    given = {"calibration": FEEDS, **options}
    with pytest.raises(InputError, match=message):
        compress(cnn(), RATIO, **given)


def test_a_model_without_a_gradient_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr("onnx_lowrank.session._Job.calibrated", lambda *args: pytest.fail("work began"))
    text = """
    <ir_version: 8, opset_import: ["": 17]>
    m (float[N, 64] x) => (int64[N, 1] y) { a = MatMul (x, w) y = ArgMax <axis = 1> (a) }
    """
    inputs = {"x": np.ones((40, 64), np.float32)}
    with pytest.raises(InputError, match="No output of model has a gradient"):
        compress(
            built(text, {"w": decaying(1, 64, 48)}),
            0.5,
            calibration=inputs,
            distil=True,
        )


def test_a_plan_with_a_training_takes_no_second_one(tmp_path):
    made = compress(cnn(), RATIO, distil=True, **OPTIONS)
    with pytest.raises(InputError, match="repeated: leave out --distil"):
        compress(cnn(), plan=made.plan, distil=True, calibration=FEEDS)


def test_the_command(tmp_path):
    onnx.save(cnn(), tmp_path / "in.onnx")
    np.savez(tmp_path / "x.npz", **FEEDS)
    words = [str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--ratio", str(RATIO), "--no-cache"]
    words += ["--calibration", str(tmp_path / "x.npz"), "--pass", "activation", "--distil", "--minutes", "1"]
    words += ["--save-plan", str(tmp_path / "plan.json")]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    assert json.loads((tmp_path / "plan.json").read_text())["training"]["rounds"][0] == [60, 0.005, False]


FIXED = """
<ir_version: 8, opset_import: ["": 17]>
fixed (KIND[4, 64] x) => (KIND[4, 32] y) { a = MatMul (x, v) b = Tanh (a) y = MatMul (b, w) }
"""


@pytest.mark.parametrize(("kind", "dtype"), [("float", np.float32), ("double", np.float64)])
def test_a_fixed_number_of_samples_and_other_floats(kind, dtype):
    arrays = {"v": decaying(1, 64, 48).astype(dtype), "w": decaying(2, 48, 32).astype(dtype)}
    rows = {"x": np.random.default_rng(3).standard_normal((80, 64)).astype(dtype)}
    proto = built(FIXED.replace("KIND", kind), arrays)
    made = compress(proto, 0.3, distil=True, **OPTIONS | {"calibration": rows})
    assert made.report.validation.distilled.steps == 180


LISTED = """
<ir_version: 8, opset_import: ["": 17]>
listed (float[N, 64] x) => (float[N, 32] y, seq(float[N, 32]) z, int64[2, K] places) {
  a = MatMul (x, v)
  b = Relu (a)
  y = MatMul (b, w)
  z = SequenceConstruct (y)
  places = NonZero (y)
}
"""


def test_outputs_that_are_no_floats_do_not_count():
    arrays = {"v": decaying(1, 64, 48), "w": decaying(2, 48, 32)}
    rows = {"x": np.random.default_rng(3).standard_normal((80, 64)).astype(np.float32)}
    made = compress(built(LISTED, arrays), 0.3, distil=True, **OPTIONS | {"calibration": rows})
    assert list(made.report.validation.distilled.losses) == ["y"]


def test_an_interrupt_before_the_first_round_keeps_the_model(monkeypatch):
    def interrupted(self, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(learning.Learner, "schedule", interrupted)
    closed, made = compress(cnn(), RATIO, **OPTIONS), compress(cnn(), RATIO, distil=True, **OPTIONS)
    assert made.model.proto.SerializeToString() == closed.model.proto.SerializeToString()


def test_the_bound_on_the_error_is_judged_after_the_training():
    closed, made = compress(cnn(), RATIO, **OPTIONS), compress(cnn(), RATIO, distil=True, **OPTIONS)
    between = (closed.report.validation.worst + made.report.validation.worst) / 2
    compress(cnn(), RATIO, distil=True, max_error=between, **OPTIONS)
    with pytest.raises(ValidationError):
        compress(cnn(), RATIO, max_error=between, **OPTIONS)


def test_a_replay_on_other_inputs_says_so():
    made = compress(cnn(), RATIO, distil=True, **OPTIONS)
    again = compress(cnn(), plan=made.plan, calibration=OTHERS, cache=False)
    notes = again.report.validation.notes
    assert not again.report.validation.distilled.is_kept or any("other inputs" in note for note in notes)
