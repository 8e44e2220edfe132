"""Decoders with a past: calibrated and compared with an empty past, with a past, and with both."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

import onnx_lowrank
from decoders import decoder
from onnx_lowrank import cli
from onnx_lowrank.errors import InputError

KEYS = ("past_key_values_0_key", "past_key_values_0_value")
KEYS_OUT = ("present_0_key", "present_0_value")


def data(number, length, past, seed=0):
    """Inputs of `length` tokens behind `past` others."""
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(0, 24, (number, length)),
        "attention_mask": np.ones((number, past + length), np.int64),
        "position_ids": np.tile(past + np.arange(length), (number, 1)),
        **{key: rng.standard_normal((number, 2, past, 8)).astype(np.float32) for key in KEYS},
    }


MIXED = [data(2, 6, past, seed) for seed, past in enumerate((0, 5, 0, 7, 1, 0, 3, 0, 2, 0))]


@pytest.mark.parametrize("recipe", ["activation", "auto"])
@pytest.mark.parametrize(
    "source", [data(40, 6, 0), data(40, 6, 5), data(40, 1, 9), MIXED], ids=["empty", "past", "token", "both"]
)
def test_a_decoder_is_calibrated(source, recipe):
    with onnx_lowrank.compress(decoder(), ratio=0.7, calibration=source, recipe=recipe) as result:
        outputs = result.report.validation.outputs
        assert result.report.calibration.unmeasured == ()
    assert {output.name for output in outputs} == {"logits", "present_0_key", "present_0_value"}
    assert all(0 <= output.relative < 0.3 for output in outputs)


@pytest.mark.parametrize("past", [0, 4])
def test_a_decoder_is_compared_on_given_inputs(past):
    with onnx_lowrank.compress(decoder(), ratio=0.7, inputs=data(3, 6, past)) as result:
        validation = result.report.validation
    assert validation.notes == ()
    assert f"past_key_values_0_value float32 3×2×{past}×8" in validation.inputs


@pytest.mark.parametrize(("past", "total", "needed"), [(0, 9, 6), (5, 9, 11), (5, 6, 11)])
@pytest.mark.parametrize("kind", ["calibration", "feeds", "inputs"])
def test_a_mask_that_does_not_fit_the_past(kind, past, total, needed):
    wrong = data(6, 6, past) | {"attention_mask": np.ones((6, total), np.int64)}
    given = (
        {"inputs": wrong} if kind == "inputs" else {"calibration": [wrong] * 6 if kind == "feeds" else wrong}
    )
    sentence = (
        rf"^The \w+ inputs do not fit each other \(the past has {past} positions and the input 6, "
        rf"so 'attention_mask' needs {needed}, not {total}\): correct them\.$"
    )
    with pytest.raises(InputError, match=sentence):
        onnx_lowrank.compress(decoder(), ratio=0.7, **given)


@pytest.mark.parametrize("kind", ["calibration", "inputs"])
def test_parts_of_a_past_that_do_not_fit_each_other(kind):
    wrong = data(6, 6, 5)
    wrong[KEYS[1]] = wrong[KEYS[1]][:, :, :3]
    with pytest.raises(InputError, match=rf"the past '{KEYS[0]}' has 5 positions, but '{KEYS[1]}' has 3"):
        onnx_lowrank.compress(decoder(), ratio=0.7, **{kind: wrong})


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command on the decoder; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    onnx.save(decoder(), "in.onnx")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["in.onnx", "out.onnx", "--ratio", "0.8", "--quiet", *arguments])
        return ended.value.code, *capsys.readouterr()

    return run


def test_a_past_of_length_0_is_a_shape(run):
    """The multiply-accumulates are those of the first call: six tokens, no past."""
    shapes = ("--input-shape", "input_ids=1,6", "--input-shape", "past_key_values_0_key=1,2,0,8")
    code, out, _ = run("--budget", "macs", *shapes, "--report", "-")
    report = json.loads(out)
    assert code == 0
    assert report["totals"]["macs"]["before"] == 6 * (32 * (32 + 16 + 16 + 32) + 32 * 24) + 2 * 4 * 6 * 6 * 8
    assert "past_key_values_0_value float32 1×2×0×8" in report["validation"]["inputs"]
    assert {output["note"] for output in report["validation"]["outputs"]} == {""}


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        (
            "1,0,3,8",
            "gives 'past_key_values_0_key' the shape 1×0×3×8, but the model says ?×2×?×8: "
            "give sizes for '?' only.",
        ),
        (
            "1,2,0,0",
            "gives 'past_key_values_0_key' the shape 1×2×0×0, but the model says ?×2×?×8: "
            "give sizes for '?' only.",
        ),
        ("0,2,3,8", "is (0, 2, 3, 8), but it must hold positive whole numbers, or 0 for an open dimension"),
    ],
)
def test_a_0_where_the_model_or_the_batch_has_none(run, shape, sentence):
    code, _, err = run("--input-shape", f"past_key_values_0_key={shape}")
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1


def test_the_scores_alone_choose_between_recipes():
    """The report shows the errors of the caches, but a trial's error is that of the logits."""
    with onnx_lowrank.compress(decoder(), ratio=0.6, calibration=data(40, 6, 0)) as result:
        trials = [trial for trial in result.report.trials if trial.outputs]
    for trial in trials:
        by_name = {output.name: output for output in trial.outputs}
        assert trial.error == by_name["logits"].centred
        assert trial.caches == set(KEYS_OUT) < by_name.keys()
