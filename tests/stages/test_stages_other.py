"""`--check`: the errors on inputs of another kind, beside those on familiar ones."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from rich.console import Console

from onnx_lowrank import InputError, cli, compress
from onnx_lowrank.core.outcome import Other, OutputError, Validation
from onnx_lowrank.stages.reporting import _output_warnings
from onnx_lowrank.stages.search import ANY
from tiny import built

TEXT = """
<ir_version: 8, opset_import: ["": 17]>
plain (float[N, 16] x) => (float[N, 12] y) {
  y = MatMul (x, w)
}
"""
RNG = np.random.default_rng(0)
PLAIN = built(TEXT, {"w": RNG.standard_normal((16, 12)).astype(np.float32)})
BASIS = np.linalg.qr(RNG.standard_normal((16, 16)))[0]


def kind(first, seed, number=40):
    """Inputs of one kind: they vary in four of sixteen directions only."""
    rows = np.random.default_rng(seed).standard_normal((number, 4))
    return {"x": (rows @ BASIS[first : first + 4]).astype(np.float32)}


ONE, OTHER = kind(0, 1), kind(4, 2)
RATIO = 0.6  # rank 4


def outputs(proto, feed):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0].astype(np.float64)


def shown(report, width=100):
    file = io.StringIO()
    report.table(Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("recipe", ["activation", "auto"])
def test_a_fit_to_one_kind_ruins_another_and_the_report_says_so(recipe):
    with compress(PLAIN, RATIO, calibration=ONE, check=OTHER, recipe=recipe) as result:
        y, z = outputs(PLAIN, OTHER), outputs(result.proto, OTHER)
        report = result.report
    other = report.validation.other
    (error,) = other.outputs
    assert error.relative == pytest.approx(np.linalg.norm(y - z) / np.linalg.norm(y), rel=1e-9)
    assert error.relative > 0.5
    assert (other.source, other.kind) == ("arrays: 40 samples", "held-out")
    assert other.familiar == report.validation.outputs
    assert other.familiar[0].relative < 0.1
    warning = next(warning for warning in report.warnings if "much more than" in warning)
    assert warning.startswith(
        f"The relative error of 'y' is {error.relative:.3g} on the check data, much more"
    )
    text = shown(report)
    assert "Check on arrays: 40 samples\n" in text
    assert any(
        line.split()[:1] == ["output"] and line.split()[-2:] == ["held-out", "check"]
        for line in text.splitlines()
    )
    written = json.loads(report.to_json())["validation"]["other"]
    assert written["outputs"][0]["relative"] == error.relative
    assert (written["kind"], written["familiar"][0]["name"]) == ("held-out", "y")


def test_inputs_of_the_same_kind_give_no_warning():
    with compress(PLAIN, 0.5, calibration=kind(0, 1, 400), check=kind(0, 3), recipe="activation") as result:
        assert result.report.validation.other is not None
        assert not any("check data" in warning for warning in result.report.warnings)


def test_without_calibration_it_stands_beside_the_inputs_or_alone():
    with compress(PLAIN, RATIO, inputs=ONE, check=OTHER) as result:
        beside = result.report.validation
    assert (beside.other.kind, beside.other.familiar) == ("inputs", beside.outputs)
    with compress(PLAIN, RATIO, check=OTHER) as result:
        alone, text = result.report.validation, shown(result.report)
        y, z = outputs(PLAIN, OTHER), outputs(result.proto, OTHER)
    assert (alone.other.kind, alone.other.familiar) == ("", ())
    assert alone.other.outputs[0].relative == pytest.approx(
        np.linalg.norm(y - z) / np.linalg.norm(y), rel=1e-9
    )
    assert "made from the graph" in alone.inputs
    assert any(line.split() == ["output", "figure", "check"] for line in text.splitlines())


def test_with_inputs_and_calibration_the_held_out_samples_are_the_familiar_ones():
    with compress(PLAIN, RATIO, inputs=OTHER, calibration=ONE, check=OTHER, recipe="activation") as result:
        validation = result.report.validation
    assert validation.inputs.startswith("given: ")
    assert validation.other.kind == "held-out"
    assert validation.other.familiar[0].relative < 0.1
    assert validation.other.outputs[0].relative == pytest.approx(validation.outputs[0].relative, rel=1e-9)


def test_without_check_nothing_of_it_is_shown():
    with compress(PLAIN, RATIO, calibration=ONE, recipe="activation") as result:
        assert result.report.validation.other is None
        assert "Check on" not in shown(result.report)


# --- the rule of the warning ------------------------------------------------------------------------------


def warned(here, there, kind="held-out", **output):
    other = Other("data", (replace(here, **output),), () if there is None else (there,), kind)
    familiar = () if there is None else (there,)
    validation = Validation("engine", "inputs", familiar, (), other=other)
    return [w for w in _output_warnings(validation, True, ANY, calibrated=True) if "much more" in w]


def error(relative, noise=0.0):
    return OutputError("y", relative, relative, None, noise=noise)


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        (error(0.21), error(0.1), True),
        (error(0.2), error(0.1), False),  # twice is not more than twice
        (error(0.21, 0.06), error(0.1), False),  # within two standard errors
        (error(0.21, 0.04), error(0.1, 0.04), False),  # of both together
        (error(0.21, 0.03), error(0.1, 0.03), True),
        (error(0.21, None), error(0.1, None), True),  # noise that is unknown excuses nothing
        (error(9e-4), error(1e-5), False),  # rounding
        (error(2e-3), error(1e-5), True),
        (error(float("inf")), error(0.1), True),
    ],
)
def test_an_error_is_much_larger_beyond_twice_and_beyond_the_noise(here, there, expected):
    assert bool(warned(here, there)) == expected
    assert not warned(here, there, is_exact=True)


def test_inputs_to_compare_with_are_named():
    for kind_, words in (
        ("held-out", "held-out calibration"),
        ("calibration", "the calibration"),
        ("inputs", "--inputs"),
    ):
        assert words in warned(error(0.3), error(0.1), kind_)[0]


def test_without_familiar_inputs_a_large_error_is_told():
    other = Other("data", (error(0.7),))
    validation = Validation("engine", "inputs", (error(0.01),), (), other=other)
    told = list(_output_warnings(validation, False, ANY, calibrated=False))
    assert len(told) == 1
    assert told[0].startswith(
        "On the check data: The largest relative error of an output is 0.7: choose a larger"
    )


# --- the table ---------------------------------------------------------------------------------------------


def test_the_table_shows_judged_outputs_and_the_worst_of_the_others():
    logits = OutputError("logits", 0.1, 1.0, 0.9)
    pasts = [error(0.01 * n) for n in range(6)]
    pasts = [replace(past, name=f"present.{n}") for n, past in enumerate(pasts)]
    every = (pasts[0], logits, *pasts[1:])
    with compress(PLAIN, RATIO) as result:
        validation = replace(result.report.validation, other=Other("texts", every, every, "held-out"))
        report = replace(result.report, validation=validation)
    for width in (50, 100):
        text = shown(report, width)
        table = text[text.index("Check on texts") :]
        names = [line.split()[0] for line in table.splitlines() if line.startswith(("logits", "present"))]
        assert names == ["logits", "present.3", "present.4", "present.5"]
        assert "3 more outputs are in --report." in table
        agreement = next(line for line in table.splitlines() if "agreement" in line)
        assert agreement.split() == ["agreement", "90.0%", "90.0%"]


# --- the command, and its mistakes -------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    onnx.save(PLAIN, "in.onnx")
    np.savez("one.npz", **ONE)
    np.savez("other.npz", **OTHER)
    np.savez("name.npz", z=OTHER["x"])
    np.savez("shape.npz", x=OTHER["x"][:, :5])
    np.savez("empty.npz", x=OTHER["x"][:0])
    np.savez("nan.npz", x=np.full((4, 16), np.nan, np.float32))
    (tmp_path / "text.txt").write_text("words\n")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["in.onnx", "out.onnx", "--ratio", str(RATIO), "--quiet", *arguments])
        return ended.value.code, *capsys.readouterr()

    return run


def test_the_command(run):
    code, out, err = run("--calibration", "one.npz", "--check", "other.npz", "--report", "-")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["validation"]["other"]["source"] == "other.npz: 40 samples"
    assert any("check data" in warning for warning in report["warnings"])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("name.npz", "name.npz: the model has no input 'z': name the arrays 'x'."),
        (
            "shape.npz",
            "the input 'x' has the shape N×16 in the model, but 40×5 was given: reshape it, samples",
        ),
        ("empty.npz", "empty.npz: the input 'x' is empty: give samples, not the shape 0×16."),
        ("nan.npz", "sample 0 of the input 'x' has NaN or Inf (as float32): correct it or leave it out."),
        ("no.npz", "The check data no.npz does not exist: pass an .npz or .npy file, a text, or a folder."),
        ("text.txt", "text.txt is a text, so its tokenizer is needed, too: pass the model's --tokenizer"),
        ("", "--check: the path is empty"),
    ],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_mistake_is_one_sentence(run, given, sentence, calibrated, tmp_path):
    more = ("--calibration", "one.npz") if calibrated else ()
    code, _, err = run("--check", given, *more)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out.onnx").exists()


def test_a_dry_run_refuses_it(run):
    code, _, err = run("--check", "other.npz", "--dry-run")
    assert code == 2
    assert "--check judges the finished model, and --dry-run makes none: leave one of them out." in err


@pytest.mark.parametrize(
    ("check", "sentence"),
    [
        (True, "check is 'True' of type bool: give a path, arrays by name, or feeds"),
        (3, "The check data is of the type int: pass a path, arrays by name, or feeds"),
        ([], "The check data gives no feeds"),
    ],
)
def test_a_mistake_in_python(check, sentence):
    with pytest.raises(InputError, match=sentence):
        compress(PLAIN, RATIO, check=check)


def test_inputs_on_which_the_model_fails_are_told_before_the_work(monkeypatch):
    monkeypatch.setattr("onnx_lowrank.session.build", None)
    text = TEXT.replace("float[N, 16] x", "float[N, 16] x, int64[N] at").replace(
        "MatMul (x, w)", "Gather <axis = 0> (p, at)\n p = MatMul (x, w)"
    )
    text = text.replace(
        "y = Gather <axis = 0> (p, at)\n p = MatMul (x, w)", "p = MatMul (x, w)\n y = Gather (p, at)"
    )
    proto = built(text, {"w": RNG.standard_normal((16, 12)).astype(np.float32)})
    with pytest.raises(InputError, match=r"^The input model fails on the check inputs \(.*\): check them\.$"):
        compress(proto, RATIO, check={"x": ONE["x"], "at": np.full(40, 99)})
