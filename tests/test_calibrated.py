"""The whole command with calibration data, through compress() and the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from calibrating import run
from onnx_lowrank import BudgetError, InputError, cli, compress
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.documents import plans
from onnx_lowrank.stages.search import AUTO
from rewriting import DTYPES, model
from tiny import CNN, DIGITS, cnn, files

CALIBRATED = ("output", "activation", "pca")
RECOVERING = ("output", "activation")


def images(seed, number=40):
    """Inputs of `cnn` whose channels differ in size and in mean."""
    rng = np.random.default_rng(seed)
    scale = np.linspace(0.1, 2, 8)[:, None, None]
    return (rng.standard_normal((number, 8, 6, 6)) * scale + scale).astype(np.float32)


ONE = CNN.replace("N,", "1,")
X = images(1)
HELD = X[4::5]


def relative(before, after, x=HELD):
    wanted = run(before, x=x)
    return np.linalg.norm(run(after, x=x) - wanted) / np.linalg.norm(wanted)


def centred(before, after, x=HELD):
    """The same, without what is constant."""
    wanted = run(before, x=x)
    return np.linalg.norm(run(after, x=x) - wanted) / np.linalg.norm(wanted - wanted.mean(axis=0))


def content(result):
    return result.proto.SerializeToString(deterministic=True)


@pytest.fixture(scope="module")
def results():
    """One model by every recipe at one ratio, with the same inputs."""
    names = (*CALIBRATED, "schatten", "auto")
    return {name: compress(cnn(ONE), 0.5, recipe=name, calibration=X, budget="params") for name in names}


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# --- what it gains ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "ratio", "share"),
    [
        ("output", 0.3, 0.35),
        ("output", 0.5, 0.45),
        ("output", 0.7, 0.2),
        ("activation", 0.3, 0.9),
        ("activation", 0.5, 0.25),
        ("activation", 0.7, 0.3),
    ],
)
def test_on_new_inputs_it_beats_the_default_without_data(recipe, ratio, share):
    ours, theirs = compress(cnn(), ratio, recipe=recipe, calibration=X), compress(cnn(), ratio)
    for result in (ours, theirs):
        assert result.report.reached <= ratio
    assert 0 < relative(cnn(), ours.proto, images(2)) < share * relative(cnn(), theirs.proto, images(2))


# --- auto ---------------------------------------------------------------------------------------------


def test_auto_is_no_worse_on_held_out_inputs_than_any_recipe_that_it_tried(results):
    auto = results["auto"]
    trials = auto.report.trials
    *first, last = trials
    assert [(trial.recipe, trial.recovered) for trial in first] == [(name, False) for name in AUTO]
    recovering = [trial for trial in first if trial.recipe in RECOVERING]
    assert last.recovered
    assert last.recipe == min(recovering, key=lambda trial: trial.error).recipe
    (chosen,) = (trial for trial in trials if trial.chosen)
    assert chosen.error == min(trial.error for trial in trials)
    assert auto.report.recipe == auto.plan.recipe == chosen.recipe
    assert content(auto) == content(results[chosen.recipe])


@pytest.mark.parametrize("name", [*CALIBRATED, "schatten"])
def test_the_error_of_a_trial_is_that_of_all_held_out_inputs(results, name):
    (trial,) = (trial for trial in results[name].report.trials if trial.chosen)
    before, after = cnn(ONE), results[name].proto
    wanted, given = (np.concatenate([run(p, x=x[None]) for x in HELD]) for p in (before, after))
    varying = np.linalg.norm(wanted - wanted.mean(axis=0))
    assert trial.error == pytest.approx(np.linalg.norm(given - wanted) / varying, rel=1e-5)
    assert trial.agreement == (given.argmax(1) == wanted.argmax(1)).mean()


def test_a_recipe_that_does_not_reach_the_ratio_is_told_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr("onnx_lowrank.request.AUTO", ("pca", "schatten"))
    result = compress(cnn(ONE), 0.06, calibration=X)
    first, second = result.report.trials
    assert (first.outputs, first.chosen, second.chosen) == ((), False, True)
    assert first.note.startswith("The ratio 0.06 of params cannot be reached")


def test_where_nothing_reaches_the_ratio_the_smallest_is_told():
    with pytest.raises(BudgetError) as caught:
        compress(cnn(), 0.001, calibration=X)
    assert 0.001 < caught.value.smallest_ratio < 0.2


# --- targets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"), [("target_error", 0.1), ("target_error", 0.02), ("target_agreement", 0.99)]
)
def test_the_ratio_found_holds_the_target_and_the_next_smaller_one_does_not(kind, value):
    result = compress(cnn(), recipe="activation", calibration=X, **{kind: value})
    wanted, given = run(cnn(), x=HELD), run(result.proto, x=HELD)
    agreement = (wanted.argmax(1) == given.argmax(1)).mean()
    held = centred(cnn(), result.proto) <= value if kind == "target_error" else agreement >= value
    assert held
    (chosen,) = (trial for trial in result.report.trials if trial.chosen)
    assert chosen.ratio == result.plan.ratio == result.report.asked
    assert result.report.reached <= chosen.ratio < 1
    smaller = [trial for trial in result.report.trials if trial.ratio < chosen.ratio]
    told = [
        float(found[1])
        for t in smaller
        if (found := re.search(r": raise it to ([0-9.]+), the smallest", t.note))
    ]
    assert max([*told, *(trial.ratio for trial in smaller)]) >= chosen.ratio * (1 - 1 / 128)
    for trial in smaller:
        assert not trial.outputs or (
            trial.error > value if kind == "target_error" else trial.agreement < value
        )
    assert getattr(result.report, kind) == value
    again = compress(cnn(), chosen.ratio, recipe="activation", calibration=X)
    assert content(again) == content(result)


def test_a_target_without_error_gives_the_model_back():
    result = compress(cnn(), calibration=X, recipe="schatten", target_error=0)
    assert result.proto == cnn()


# --- recovery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [*CALIBRATED, "auto"])
def test_no_recover(recipe):
    result = compress(cnn(), 0.5, recipe=recipe, calibration=X, recover=False)
    fits = [row.fit for row in result.report.layers if row.fit]
    assert fits
    assert not any(fit.recovered for fit in fits)
    assert not result.plan.recover


def test_recovery_is_told_layer_by_layer(results):
    kept = [name for name in RECOVERING if results[name].plan.recover]
    assert kept
    for name in RECOVERING:
        # Held-out inputs may turn the recovery of a whole model down.
        trials = results[name].report.trials
        assert [trial.recovered for trial in trials] == [False, True]
        assert trials[1].chosen == (trials[1].error < trials[0].error) == (name in kept)
    for name in kept:
        result = results[name]
        fits = {row.id: row.fit for row in result.report.layers if row.option}
        assert fits["conv2"].recovered
        assert all(fit.fit is Fit.ACTIVATIONS and 0 < fit.error < 1 for fit in fits.values())
    assert not results["pca"].plan.recover
    assert all(row.fit.fit is Fit.WEIGHTS for row in results["schatten"].report.layers if row.fit)


# --- the same inputs give the same results --------------------------------------------------------------

SCRIPT = """
import hashlib, os, sys
sys.path[:0] = sys.argv[2:]
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])
import numpy as np
from onnx_lowrank import compress
from tiny import cnn
from test_calibrated import X
result = compress(cnn(), 0.4, calibration=X)
print(hashlib.sha256(result.proto.SerializeToString(deterministic=True)).hexdigest())
print(hashlib.sha256(repr(result.report.trials).encode()).hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot bind a process to cores")
def test_the_bytes_do_not_depend_on_the_number_of_threads():
    here = Path(__file__).parent
    folders = [str(here), str(here.parent / "models")]
    printed = set()
    for cores, threads in ((1, "1"), (64, "3")):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [sys.executable, "-c", SCRIPT, str(cores), *folders]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.add(done.stdout)
    assert len(printed) == 1


@pytest.mark.parametrize("name", [*CALIBRATED, "auto"])
def test_runs_do_not_differ(results, name):
    again = compress(cnn(ONE), 0.5, recipe=name, calibration=X.copy())
    assert content(again) == content(results[name])
    assert again.plan == results[name].plan
    assert again.report.trials == results[name].report.trials


# --- plans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CALIBRATED, "schatten"])
def test_a_plan_is_replayed_with_the_same_inputs(results, name, tmp_path):
    results[name].save_plan(tmp_path / "plan.json")
    again = compress(cnn(ONE), plan=tmp_path / "plan.json", calibration=X)
    assert content(again) == content(results[name])
    assert again.plan == results[name].plan
    assert not again.report.trials


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_plan_of_activations_needs_inputs(results, name):
    with pytest.raises(InputError, match="fitted to calibration inputs: pass them with --calibration"):
        compress(cnn(ONE), plan=results[name].plan)


def test_a_plan_of_weights_does_not(results):
    again = compress(cnn(ONE), plan=results["schatten"].plan)
    assert content(again) == content(results["schatten"])


def test_an_edited_plan_is_fitted_anew(results):
    plan = results["activation"].plan
    index = next(n for n, choice in enumerate(plan.choices) if choice.option and choice.option.j > 1)
    choice = plan.choices[index]
    fewer = replace(choice, option=replace(choice.option, j=choice.option.j - 1))
    edited = replace(plan, choices=(*plan.choices[:index], fewer, *plan.choices[index + 1 :]))
    again = compress(cnn(ONE), plan=edited, calibration=X)
    assert again.report.layers[index].option.j == choice.option.j - 1
    assert again.report.layers[index].error is None
    assert again.report.layers[index].fit.fit is Fit.ACTIVATIONS
    assert again.plan.solver is None
    assert (
        again.report.totals.amount("params").after
        < results["activation"].report.totals.amount("params").after
    )
    assert not plans.is_edited(again.plan)


def test_a_plan_is_replayed_without_recovery(results):
    again = compress(cnn(ONE), plan=results["activation"].plan, calibration=X, recover=False)
    assert not any(row.fit.recovered for row in again.report.layers if row.fit)
    alone = compress(cnn(ONE), 0.5, recipe="activation", calibration=X, recover=False)
    assert content(again) == content(alone)


# --- dry runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CALIBRATED, "schatten", "auto"])
def test_a_dry_run_makes_the_same_plan(results, name):
    dry = compress(cnn(ONE), 0.5, recipe=name, calibration=X, dry_run=True)
    trials, wanted = results[name].report.trials, dry.plan
    if wanted.recover and not next(trial for trial in trials if trial.chosen).recovered:
        # Held-out inputs turned recovery down, which a dry run cannot know.
        plain, recovered = trials
        assert plain.error <= recovered.error
        wanted = plans.sealed(replace(wanted, recover=False))
    assert results[name].plan == wanted
    assert dry.proto == cnn(ONE)
    assert dry.report.validation is None
    assert dry.report.calibration == results[name].report.calibration


def test_a_dry_run_of_one_recipe_builds_nothing(monkeypatch):
    monkeypatch.setattr("onnx_lowrank.session.build", None)
    monkeypatch.setattr("onnx_lowrank.stages.search.build", None)
    result = compress(cnn(), 0.5, recipe="activation", calibration=X, dry_run=True)
    assert any(row.option for row in result.report.layers)


# --- budgets and dtypes -------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("recipe", [*CALIBRATED, "auto"])
def test_budgets(recipe, budget):
    result = compress(cnn(ONE), 0.4, recipe=recipe, budget=budget, calibration=X)
    totals = result.report.totals
    counted = totals.amount("params") if budget == "params" else totals.amount("macs")
    assert counted.after <= 0.4 * counted.before
    assert result.report.reached == counted.after / counted.before


def test_macs_follow_from_the_shapes_of_the_inputs():
    text = CNN.replace("N, 8, 6, 6", "N, 8, H, W")
    result = compress(cnn(text), 0.5, recipe="activation", budget="macs", calibration=X)
    assert result.report.totals.amount("macs").after <= 0.5 * result.report.totals.amount("macs").before


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_dtypes_keep_theirs(dtype):
    stored = np.float16 if dtype == "float16" else np.float64
    rng = np.random.default_rng(0)
    weights = {
        name: (rng.standard_normal((16, 16)) * 0.9 ** np.arange(16)).astype(stored) for name in ("w1", "w2")
    }
    text = f"g ({dtype}[N,16] x) => ({dtype}[] y) {{ a = MatMul (x, w1) b = Relu (a) y = MatMul (b, w2) }}"
    proto = model(text, **weights)
    x = rng.standard_normal((60, 16)).astype(stored)
    result = compress(proto, 0.7, recipe="activation", calibration=x)
    assert {numpy_helper.to_array(t).dtype for t in result.proto.graph.initializer} == {np.dtype(stored)}
    assert 0 < relative(proto, result.proto, x) < 0.5


# --- data as people have it ---------------------------------------------------------------------------


class Reader:
    """As ONNX Runtime's CalibrationDataReader."""

    def __init__(self, feeds):
        self.feeds = iter(feeds)

    def get_next(self):
        return next(self.feeds, None)


def sources(folder, x):
    """The same samples in every form, one at a time where they are feeds."""
    np.savez(folder / "x.npz", x=x)
    np.save(folder / "x.npy", x)
    (folder / "archives").mkdir()
    for number, sample in enumerate(x):
        np.savez(folder / "archives" / f"{number}.npz", x=sample[None])
        test = folder / "tests" / f"test_data_set_{number}"
        test.mkdir(parents=True)
        onnx.save_tensor(numpy_helper.from_array(sample[None]), test / "input_0.pb")
    feeds = [{"x": sample[None]} for sample in x]
    return {
        "npz": folder / "x.npz",
        "npy": str(folder / "x.npy"),
        "mapping": {"x": x},
        "array": x,
        "archives": folder / "archives",
        "tests": folder / "tests",
        "list": feeds,
        "generator": (feed for feed in feeds),
        "reader": Reader(feeds),
    }


def test_the_form_of_the_data_hardly_matters(tmp_path):
    made = {
        name: compress(cnn(), 0.5, recipe="activation", calibration=source, recover=False)
        for name, source in sources(tmp_path, X).items()
    }
    tables, feeds = ("npz", "npy", "mapping", "array"), ("archives", "tests", "list", "generator", "reader")
    for names in (tables, feeds):
        assert len({content(made[name]) for name in names}) == 1
    for result in made.values():
        assert (result.report.calibration.samples, result.report.calibration.held) == (40, 8)
        assert result.report.trials[0].error == pytest.approx(made["npz"].report.trials[0].error, rel=1e-3)


@pytest.mark.parametrize("number", [1, 4, 5, 7])
@pytest.mark.parametrize("recipe", [*CALIBRATED, "auto"])
def test_few_samples_work_and_are_warned_of(recipe, number):
    result = compress(cnn(ONE), 0.5, recipe=recipe, calibration=X[:number])
    assert result.report.reached <= 0.5
    assert 0 < result.report.validation.worst < 1
    assert result.report.calibration.held == number // 5
    assert any(f"{number} sample" in warning and "weak" in warning for warning in result.report.warnings)
    assert all(np.isfinite(trial.error) for trial in result.report.trials)


def test_only_so_many_samples_are_used():
    result = compress(cnn(), 0.5, recipe="activation", calibration=X, calibration_samples=10)
    assert (result.report.calibration.samples, result.report.calibration.held) == (10, 2)
    assert content(result) == content(compress(cnn(), 0.5, recipe="activation", calibration=X[::4]))


def test_inputs_that_do_not_vary_are_warned_of():
    result = compress(cnn(), 0.5, recipe="activation", calibration=np.repeat(X[:1], 40, axis=0))
    assert any("All 40 samples are the same" in warning for warning in result.report.warnings)


def poked(value):
    x = X.copy()
    x[3, 1, 2, 0] = value
    return x


GARBAGE = {
    "name": ({"z": X}, "no input 'z': name the arrays 'x'"),
    "too many names": ({"x": X, "z": X}, "no input 'z'"),
    "shape": (X[:, :7], "has the shape"),
    "rank": (X[0, 0], "has the shape"),
    "dtype": (X.astype(np.int32), "is float32 in the model, but int32 was given"),
    "bytes": ((X * 9).astype(np.uint8), "apply the model's own preprocessing first"),
    "text": (np.full((5, 8, 6, 6), "a"), "is float32 in the model"),
    "NaN": (poked(np.nan), "sample 3 of the input 'x' has NaN or Inf"),
    "Inf": (poked(-np.inf), "sample 3 of the input 'x' has NaN or Inf"),
    "overflow": (X.astype(np.float64) * 1e40, "NaN or Inf (as float32)"),
    "empty": (X[:0], "is empty: give samples"),
}


@pytest.mark.parametrize("case", GARBAGE)
@pytest.mark.parametrize("by", ["arrays", "feeds", "file", "command"])
def test_garbage_is_one_clear_error(tmp_path, capsys, case, by):
    given, words = GARBAGE[case]
    given = given if isinstance(given, dict) else {"x": given}
    if by == "feeds":
        given = [given]
        words = words.replace("sample 3 of ", "").replace("is empty: give samples", "is empty")
    elif by != "arrays":
        np.savez(tmp_path / "x.npz", **given)
        given = tmp_path / "x.npz"
    if by != "command":
        with pytest.raises(InputError) as caught:
            compress(cnn(), 0.5, calibration=given)
        assert words in str(caught.value)
        return
    onnx.save(cnn(), tmp_path / "in.onnx")
    arguments = [
        tmp_path / "in.onnx",
        tmp_path / "out.onnx",
        "--ratio",
        0.5,
        "--calibration",
        given,
        "--quiet",
    ]
    with pytest.raises(SystemExit) as left:
        cli.main(list(map(str, arguments)))
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert sorted(files(tmp_path)) == ["in.onnx", "x.npz"]


NO_DATA = {
    "missing file": "nosuch.npz",
    "missing path": Path("nosuch"),
    "number": 7,
    "no feeds": [],
    "spent iterator": iter(()),
    "feeds of numbers": [3],
    "feeds of text": [{"x": "abc"}],
    "None": {"x": None},
    "no arrays": {},
    "object": object(),
}


@pytest.mark.parametrize("source", NO_DATA.values(), ids=NO_DATA)
def test_what_is_no_data_is_an_input_error(source):
    with pytest.raises(InputError):
        compress(cnn(), 0.5, calibration=source)


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(InputError, match=r"^calibration is an empty text: give a path, arrays by name"):
        compress("nosuch.onnx", 0.5, calibration="")


@pytest.mark.parametrize("name", ["x.npz", "x.npy"])
@pytest.mark.parametrize("written", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY\x01\x00", b"hello"])
def test_a_file_that_is_no_data_is_an_input_error(tmp_path, name, written):
    (tmp_path / name).write_bytes(written)
    with pytest.raises(InputError):
        compress(cnn(), 0.5, calibration=tmp_path / name)


def test_inputs_on_which_the_model_overflows_are_an_input_error():
    with pytest.raises(InputError, match="NaN, Inf or numbers whose squares overflow"):
        compress(cnn(), 0.5, recipe="activation", calibration=X * np.float32(1e37))


def test_inputs_on_which_the_model_fails_are_an_input_error():
    text = (
        "g (float[N,8] x, int64[N] i) => (float[] y) { h = Gather (w, i) a = MatMul (h, v) y = Add (a, x) }"
    )
    proto = model(text, w=(10, 8), v=(8, 8))
    data = {"x": np.ones((6, 8), np.float32), "i": np.full(6, 10)}
    with pytest.raises(InputError, match=r"fails on the calibration inputs .*: give inputs that it takes"):
        compress(proto, 0.7, recipe="activation", calibration=data)


# --- layers of which nothing is known -----------------------------------------------------------------

BRANCHES = """g (bool k, float[N,8] x) => (float[] y) { h = MatMul (x, w0) y = If (k) <
    then_branch = t () => (float[] p) { p = MatMul (h, w1) },
    else_branch = e () => (float[] q) { q = MatMul (h, w2) }> }"""


@pytest.mark.parametrize("recipe", [*CALIBRATED, "auto"])
def test_layers_that_were_not_measured_are_kept_and_told_with_the_reason(recipe):
    proto = model(BRANCHES, w0=(8, 8), w1=(8, 8), w2=(8, 8))
    data = {"k": np.array(True), "x": np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)}
    plan = compress(proto, 0.7, recipe=recipe, calibration=data, input_shape={"x": (1, 8)}).report
    ((layer, reason),) = plan.calibration.unmeasured
    assert layer.endswith("w2")
    assert reason == "it does not run on the calibration inputs: give inputs that reach it"
    for row in plan.layers:
        if plan.recipe == "schatten":
            continue
        if row.id == layer:
            assert row.option is None
            assert row.reason == f"its effect is unknown: {reason}"
        elif row.option:
            assert row.fit.fit is Fit.ACTIVATIONS
    rows = json.loads(plan.to_json())
    assert layer in json.dumps(rows["calibration"])


# --- what is shown, and what is left behind -----------------------------------------------------------


def test_the_models_are_compared_on_held_out_inputs():
    result = compress(cnn(), 0.5, recipe="activation", calibration=X)
    assert result.report.validation.inputs == "8 held-out calibration inputs"
    assert result.report.validation.worst == pytest.approx(relative(cnn(), result.proto), rel=1e-4)


def test_a_model_that_only_the_reference_implementation_runs_is_calibrated_slowly():
    proto = model(
        """g (double[N,4,5,5] x) => (double[N,8] y) {
            a = Conv (x, w) b = Relu (a) c = Flatten (b) y = MatMul (c, v) }""",
        w=np.random.default_rng(0).standard_normal((8, 4, 3, 3)),
        v=np.random.default_rng(1).standard_normal((72, 8)),
    )
    x = np.random.default_rng(2).standard_normal((20, 4, 5, 5))
    result = compress(proto, 0.6, recipe="activation", calibration=x)
    assert result.report.reached <= 0.6
    assert result.report.validation.inputs == "4 held-out calibration inputs"
    assert any("onnx ReferenceEvaluator calibrates it slowly" in text for text in result.report.warnings)
    (chosen,) = (trial for trial in result.report.trials if trial.chosen)
    assert 0 < chosen.error < 1


def test_inputs_go_before_calibration_in_the_comparison():
    own = images(9, 3)
    result = compress(cnn(), 0.5, recipe="activation", calibration=X, inputs={"x": own})
    assert result.report.validation.worst == pytest.approx(relative(cnn(), result.proto, own), rel=1e-4)


def test_nothing_is_changed():
    proto, x = cnn(), X.copy()
    before = proto.SerializeToString(deterministic=True)
    compress(proto, 0.5, calibration={"x": x})
    assert proto.SerializeToString(deterministic=True) == before
    np.testing.assert_array_equal(x, X)


@pytest.mark.parametrize("given", [{"ratio": 0.5}, {"target_error": 0.2}])
def test_a_model_with_its_data_outside_leaves_no_file_behind(tmp_path, temporary, given):
    folder = tmp_path / "input"
    folder.mkdir()
    onnx.save(cnn(), folder / "in.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    before = files(folder)
    with compress(folder / "in.onnx", calibration=X, **given) as result:
        result.save(tmp_path / "out.onnx")
        assert centred(cnn(), onnx.load(tmp_path / "out.onnx")) == pytest.approx(
            next(trial.error for trial in result.report.trials if trial.chosen), rel=1e-4
        )
        assert len(list(temporary.iterdir())) == 1, "the chosen model's tensors, and no loser's"
    assert not files(temporary)
    assert files(folder) == before


@pytest.mark.parametrize(
    "given",
    [{"ratio": 0.001}, {"ratio": 0.5, "max_error": 0}, {"ratio": 0.5, "calibration": X * np.float32(1e37)}],
)
def test_an_error_leaves_no_file_behind(tmp_path, temporary, given):
    folder = tmp_path / "input"
    folder.mkdir()
    onnx.save(cnn(), folder / "in.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(Exception, match=r"\.$"):
        compress(folder / "in.onnx", **{"calibration": iter([{"x": X}]), **given})
    assert not files(temporary)


def test_a_calibrated_run_of_the_command(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", image=np.random.default_rng(0).random((12, 1, 8, 8), np.float32))
    arguments = [
        DIGITS, tmp_path / "out.onnx", "--ratio", 0.5, "--calibration", tmp_path / "x.npz",
        "--calibration-samples", 6, "--pass", "activation", "--no-recover",
        "--report", tmp_path / "report.json", "--save-plan", tmp_path / "plan.json",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        cli.main(list(map(str, arguments)))
    assert left.value.code == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["calibration"]["samples"] == 6
    plan = plans.read(tmp_path / "plan.json")
    assert (plan.measure, plan.factors, plan.recover) == ("activation", Fit.ACTIVATIONS, False)
    again = compress(DIGITS, plan=plan, calibration=tmp_path / "x.npz", calibration_samples=6)
    assert content(again) == onnx.load(tmp_path / "out.onnx").SerializeToString(deterministic=True)


@pytest.mark.parametrize("recipe", ["output", "auto"])
def test_a_branch_that_never_runs_is_not_taken_for_free(recipe):
    """A calibrated measure keeps it; if weights decide, both branches are cut, and a warning tells of it."""
    text = """
    <ir_version: 8, opset_import: ["": 17]>
    branches (float[N,24] x, bool flag) => (float[N,24] y) {
      y = If (flag) <
        then_branch = a () => (float[N,24] u) { u = MatMul (x, w) },
        else_branch = b () => (float[N,24] v) { v = MatMul (x, v0) }
      >
    }"""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(text)
    for name in ("w", "v0"):
        values = rng.standard_normal((24, 24), np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    feeds = [{"x": rng.standard_normal((4, 24), np.float32), "flag": np.array(True)} for _ in range(40)]
    result = compress(proto, 0.6, recipe=recipe, calibration=feeds)
    ranks = {choice.layer: choice.option.j if choice.option else 24 for choice in result.plan.choices}
    told = [w for w in result.report.warnings if "Calibration tells nothing" in w]
    if recipe == "output":
        assert ranks == {"w": 2, "v0": 24}
        assert not told
    else:
        assert result.report.recipe == "schatten"
        assert max(ranks.values()) < 24, "both are cut, as if both mattered"
        assert "nothing of 1 of the rewritten layers" in told[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "double"])
def test_recovery_works_in_every_type(dtype):
    """ONNX Runtime has no MatMul of bfloat16, so ONNX's reference evaluator runs that model."""
    code = TensorProto.DataType.Value(dtype.upper())
    body = f"""g (float[N,16] x) => (float[N,6] y) {{ c = Cast <to = {code}> (x)
        a = MatMul (c, w1) r = Relu (a) b = MatMul (r, w2) y = Cast <to = 1> (b) }}"""
    rng = np.random.default_rng(3)
    weights = {n: rng.standard_normal(shape) / 2 for n, shape in {"w1": (16, 24), "w2": (24, 6)}.items()}
    proto = model(body, **{name: weight.astype(DTYPES[dtype]) for name, weight in weights.items()})
    data = {"x": rng.standard_normal((50, 16)).astype(np.float32)}
    result = compress(proto, 0.7, recipe="activation", calibration=data, device="cpu")
    assert any(trial.recovered for trial in result.report.trials)
    assert result.report.validation.worst < 0.5
