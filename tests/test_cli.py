import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lowrank import cli, display
from onnx_lowrank.commands import compress as command
from onnx_lowrank.documents import recipes
from onnx_lowrank.options import DEFAULTS
from tiny import CNN, DIGITS, built, cnn, decaying, files

HALF = ("in.onnx", "out.onnx", "--ratio", "0.5")
RUN = ("--quiet", *HALF)
STAGES = ("find layers", "spectra", "plan", "factorize", "validate")
CALIBRATED = (*HALF, "--calibration", "cal.npz")
CALIBRATED_STAGES = ("activations", "errors", "outputs", "recover", "compare", "validate")
RECIPES = {
    recipe.name: ("--calibration", "cal.npz") if recipe.calibrated else ()
    for recipe in recipes.load_all()
    if recipe.price is None
}


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def message(self):
        """What went wrong, where nothing else was printed."""
        assert self.out == ""
        assert self.err.startswith("onnx-lowrank: ")
        assert self.err.endswith((".\n", "?\n"))
        assert self.err.count("\n") == 1, "one line, so no traceback either"
        return self.err.removeprefix("onnx-lowrank: ").rstrip()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a model in it; temporary files go there, too, so that none is missed."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(work))
    onnx.save(cnn(), "in.onnx")
    np.savez("cal.npz", x=np.random.default_rng(5).standard_normal((60, 8, 6, 6), np.float32))
    return work


@pytest.fixture
def run(capsys):
    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        return Outcome(exit_.value.code, *capsys.readouterr())

    return run


def report_of(outcome):
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


# --- what is wrong is told in one sentence, and nothing is written ------------------------------------

WRONG = {
    "no arguments": ([], "IN.onnx is missing"),
    "no OUT": (
        ["in.onnx", "--ratio", "0.5"],
        "OUT.onnx is missing: name the file to write, or pass --dry-run",
    ),
    "too many files": (
        [*HALF, "more.onnx"],
        "'more.onnx' is one argument too many: name IN.onnx and OUT.onnx",
    ),
    "IN and OUT swapped": (
        ["small.onnx", "in.onnx", "--ratio", "0.5"],
        "small.onnx does not exist, but in.onnx does: name the input model first",
    ),
    "ratio without its option": (
        ["in.onnx", "out.onnx", "0.5"],
        "'0.5' is one argument too many: write it as --ratio 0.5",
    ),
    "ratio in per cent": (["in.onnx", "out.onnx", "--ratio", "50"], "at most 1: 0.5 keeps 50 %"),
    "ratio slightly too large": (["in.onnx", "out.onnx", "--ratio", "1.5"], "at most 1: 0.5 keeps half"),
    "IN on the web": (
        ["https://example.org/in.onnx", "out.onnx", "--ratio", "0.5"],
        "https:/example.org/in.onnx is no file: save it to one and name that",
    ),
    "option of another tool": ([*HALF, "--opset"], "no option --opset: -h lists all"),
    "no alignment": ([*HALF, "--align", "7.5"], "--align: '7.5' is neither auto nor a whole number"),
    "alignment of nothing": (
        [*HALF, "--align", "0"],
        "The alignment is '0', but it must be 'auto'",
    ),
    **{
        f"threads {value!r}": ([*HALF, "--threads", value], f"--threads: {value!r} is not a whole number")
        for value in ("many", "1.5", "", " 2", "9" * 30)
    },
    **{
        f"{value} threads": ([*HALF, "--threads", value], f"--threads is {value}: pass 1 to 1024, or 0")
        for value in ("-1", "1025")
    },
    "workers 'some'": ([*HALF, "--workers", "some"], "--workers: 'some' is not a whole number"),
    "no scheduler": ([*HALF, "--scheduler", "10.0.0.1:8786"], "--scheduler is '10.0.0.1:8786': give the"),
    "scheduler and workers": (
        [*HALF, "--scheduler", "tcp://10.0.0.1:8786", "--workers", "2"],
        "--scheduler and --workers contradict each other: leave one of them out.",
    ),
    "65 workers": ([*HALF, "--workers", "65"], "--workers is 65: pass 1 to 64, or 0"),
    "unknown budget": (
        [*HALF, "--budget", "speed"],
        "no budget 'speed': choose one of params, macs, latency, bytes",
    ),
    "latency with a plan": (
        ["in.onnx", "out.onnx", "--plan", "p.json", "--budget", "latency"],
        "leave out --pass, --budget and --align",
    ),
    "times of a dry run": (
        [*HALF, "--time", "--dry-run"],
        "--time times the finished model, and --dry-run makes none: leave one of them out.",
    ),
    **{
        f"{' '.join(options)} without times": ([*HALF, *options], message)
        for options, message in (
            (("--threads", "2"), "--threads would do nothing, as nothing is timed: pass --time or --budget"),
            (("--no-cache", "--threads", "2"), "--threads would do nothing, as nothing is timed"),
        )
    },
    "unknown option": ([*HALF, "--fast"], "no option --fast"),
    "misspelt option": ([*HALF, "--reprot"], "no option --reprot: did you mean --report?"),
    "option without value": (["in.onnx", "out.onnx", "--ratio"], "'--ratio' requires an argument"),
    "missing file": (["no.onnx", "out.onnx", "--ratio", "0.5"], "no.onnx does not exist"),
    "missing folder of IN": (["no/in.onnx", "out.onnx", "--ratio", "0.5"], "no/in.onnx does not exist"),
    "folder as IN": ([".", "out.onnx", "--ratio", "0.5"], ". is a folder"),
    "text as IN": (["text.txt", "out.onnx", "--ratio", "0.5"], "text.txt is no binary ONNX model"),
    "empty IN": (["empty.onnx", "out.onnx", "--ratio", "0.5"], "empty.onnx is empty"),
    "OUT is IN": (
        ["in.onnx", "in.onnx", "--ratio", "0.5"],
        "in.onnx is the input model, which is never changed",
    ),
    "OUT is IN, spelt otherwise": (["in.onnx", "sub/../in.onnx", "--ratio", "0.5"], "is the input model"),
    "OUT links to IN": (["in.onnx", "link.onnx", "--ratio", "0.5"], "link.onnx is the input model"),
    "IN links to OUT": (["link.onnx", "in.onnx", "--ratio", "0.5"], "in.onnx is the input model"),
    "plan over IN": ([*HALF, "--save-plan", "in.onnx"], "in.onnx is the input model"),
    "report over IN": (
        ["model.json", "out.onnx", "--ratio", "1", "--report", "model.json"],
        "is the input model",
    ),
    "plan is OUT": (
        [*HALF, "--save-plan", "out.onnx"],
        "out.onnx is named for two outputs: give each its own name.",
    ),
    "plan is the report": (
        [*HALF, "--save-plan", "r.json", "--report", "sub/../r.json"],
        "r.json is named for two outputs",
    ),
    "one report twice": ([*HALF, "--report", "r.json", "--report", "./r.json"], "named for two outputs"),
    "plan and report on stdout": ([*HALF, "--save-plan", "-", "--report", "-"], "- is named for two outputs"),
    "OUT in no folder": (["in.onnx", "no/out.onnx", "--ratio", "0.5"], "there is no folder no: create it"),
    "OUT is a folder": (["in.onnx", "sub", "--ratio", "0.5"], "sub is a folder"),
    "OUT below a file": (
        ["in.onnx", "text.txt/out.onnx", "--ratio", "0.5"],
        "text.txt/out.onnx cannot be written",
    ),
    "plan in no folder": ([*HALF, "--save-plan", "no/p.json"], "there is no folder no"),
    "report in no folder": ([*HALF, "--report", "no/r.json"], "there is no folder no"),
    "report is a folder": ([*HALF, "--report", "sub.json"], "sub.json is a folder"),
    "report as XML": (
        [*HALF, "--report", "r.xml"],
        "--report: 'r.xml' is neither a .json nor a .html file nor -: name a .html, .nodes.json or .json",
    ),
    "report without suffix": ([*HALF, "--report", "report"], "--report: 'report' is neither a .json nor"),
    "no ratio": (["in.onnx", "out.onnx"], "exactly one of these: a ratio, such as --ratio 0.5; a plan"),
    "ratio and plan": (
        [*HALF, "--plan", "p.json"],
        "exactly one of these: a ratio, such as --ratio 0.5; a plan",
    ),
    **{
        f"ratio {value}": (
            ["in.onnx", "out.onnx", "--ratio", value],
            f"The ratio is {float(value)}, but it must be",
        )
        for value in ("0", "1.5", "-1", "nan", "inf", "-inf")
    },
    **{
        f"ratio {value}": (
            ["in.onnx", "out.onnx", "--ratio", value],
            f"--ratio: {value!r} is too large or too",
        )
        for value in ("1e-400", "-1e-400", "1e400")
    },
    "ratio half": (
        ["in.onnx", "out.onnx", "--ratio", "half"],
        "--ratio: 'half' is not a number: write it like 0.5",
    ),
    "ratio empty": (["in.onnx", "out.onnx", "--ratio", ""], "--ratio: '' is not a number"),
    "ratio in percent": (["in.onnx", "out.onnx", "--ratio", "50%"], "--ratio: '50%' is not a number"),
    "max-error nan": ([*HALF, "--max-error", "nan"], "largest accepted error is nan"),
    "max-error negative": ([*HALF, "--max-error", "-1"], "largest accepted error is -1.0"),
    "max-error text": ([*HALF, "--max-error", "small"], "--max-error: 'small' is not a number"),
    "unknown recipe": ([*HALF, "--pass", "magic"], "no recipe 'magic': name a .toml file or one of "),
    "recipe with an unknown key": ([*HALF, "--pass", "key.toml"], "unknown key 'colour'"),
    "recipe with a bad value": (
        [*HALF, "--pass", "value.toml"],
        "power is 0, but it must be a number above 0",
    ),
    "recipe that is no TOML": ([*HALF, "--pass", "broken.toml"], "is not valid TOML"),
    "recipe that is missing": ([*HALF, "--pass", "no.toml"], "no.toml"),
    "recipe with a plan": (["in.onnx", "out.onnx", "--plan", "p.json", "--pass", "svd"], "leave out --pass"),
    "budget with a plan": (
        ["in.onnx", "out.onnx", "--plan", "p.json", "--budget", "macs"],
        "leave out --pass, --budget and --align",
    ),
    "missing plan": (["in.onnx", "out.onnx", "--plan", "p.json"], "The plan p.json cannot be read"),
    "folder as plan": (["in.onnx", "out.onnx", "--plan", "sub"], "The plan sub cannot be read"),
    "model as plan": (["in.onnx", "out.onnx", "--plan", "in.onnx"], "The plan in.onnx"),
    "unknown device": ([*HALF, "--device", "tpu"], "There is no device 'tpu': choose auto, cpu or cuda"),
    "unknown provider": ([*HALF, "--provider", "MagicExecutionProvider"], "one of"),
    "include of nothing": ([*HALF, "--include", "conv9*"], "is named 'conv9*'"),
    "exclude of nothing": ([*HALF, "--exclude", "fc", "--exclude", "head.*"], "is named 'head.*'"),
    **{
        f"input shape {value!r}": (
            [*HALF, "--input-shape", value],
            f"--input-shape: {value!r} is no name with a shape: write it like",
        )
        for value in (
            "x",
            "x=",
            "=1,2",
            "x=1,",
            "x=1,00",
            "x=1,08",
            "x=1,-8",
            "x=a",
            "x=1.5",
            "x=²",
            "x=1x2",
            f"x={10**30}",
        )
    },
    "input shape of no input": (
        [*HALF, "--input-shape", "z=1,8,6,6"],
        "names 'z', but the model's inputs are x: name one of them.",
    ),
    "input shape of another rank": ([*HALF, "--input-shape", "x=1,8"], "the shape 1×8, but the model says"),
    "input shape that contradicts": ([*HALF, "--input-shape", "x=1,9,6,6"], "the shape 1×9×6×6, but"),
    "missing inputs": ([*HALF, "--inputs", "no.npz"], "The inputs no.npz cannot be read"),
    "inputs that are no archive": ([*HALF, "--inputs", "in.onnx"], "in.onnx is not an .npz archive"),
    "inputs without a tokenizer": (
        [*HALF, "--inputs", "text.txt"],
        "text.txt is a text, so its tokenizer",
    ),
    "inputs of another name": ([*HALF, "--inputs", "name.npz"], "no input 'z': name one of x."),
    "inputs of another shape": ([*HALF, "--inputs", "shape.npz"], "shape N×8×6×6 in the model"),
    "inputs of another dtype": ([*HALF, "--inputs", "dtype.npz"], "is float32 in the model, but float64"),
    **{
        f"calibration samples {value!r}": (
            [*CALIBRATED, "--calibration-samples", value],
            f"--calibration-samples: {value!r} is not a whole number: write it like 500",
        )
        for value in ("many", "1.5", "1e3", "", " 5", "0x10", "٣", "9" * 5000)
    },
    **{
        f"{value} calibration samples": ([*CALIBRATED, "--calibration-samples", value], f"is {value}: pass 1")
        for value in ("0", "-3")
    },
    **{
        f"{value} calibration samples of no model": (
            ["no.onnx", "out.onnx", *CALIBRATED[2:], "--calibration-samples", value],
            f"--calibration-samples is {value}: pass 1 or more.",
        )
        for value in ("0", "-3")
    },
    **{
        f"{option} of an empty path": (
            ["no.onnx", "out.onnx", "--ratio", "0.5", option, ""],
            f"{option}: the path is empty: name a file or leave the option out",
        )
        for option in ("--calibration", "--inputs")
    },
    "calibration samples alone": ([*HALF, "--calibration-samples", "5"], "limits what --calibration reads"),
    "no recovery alone": ([*HALF, "--no-recover"], "--calibration"),
    "auto alone": ([*HALF, "--pass", "auto"], "--pass auto chooses by held-out calibration inputs"),
    **{
        f"recipe {recipe} alone": (
            [*HALF, "--pass", recipe],
            f"The recipe {recipe!r} needs calibration inputs",
        )
        for recipe, options in RECIPES.items()
        if options
    },
    **{
        f"{target} alone": (["in.onnx", "out.onnx", target, "0.9"], "pass some with --calibration")
        for target in ("--target-error", "--target-agreement")
    },
    **{
        f"{target} with a ratio": ([*CALIBRATED, target, "0.9"], "Give exactly one of these: a ratio")
        for target in ("--target-error", "--target-agreement")
    },
    **{
        f"{target} with a plan": (
            ["in.onnx", "out.onnx", "--plan", "p.json", "--calibration", "cal.npz", target, "0.9"],
            "Give exactly one of these: a ratio",
        )
        for target in ("--target-error", "--target-agreement")
    },
    **{
        f"target agreement {value}": (
            ["in.onnx", "out.onnx", "--calibration", "cal.npz", "--target-agreement", value],
            f"The target agreement is {float(value)}, but it must be above 0 and at most 1",
        )
        for value in ("0", "1.01", "-1", "nan", "inf")
    },
    **{
        f"target error {value}": (
            ["in.onnx", "out.onnx", "--calibration", "cal.npz", "--target-error", value],
            f"The target error is {float(value)}, but it must be 0 or more",
        )
        for value in ("-1", "nan", "-inf")
    },
    **{
        f"{target} text": (["in.onnx", "out.onnx", target, "5%"], f"{target}: '5%' is not a number")
        for target in ("--target-error", "--target-agreement")
    },
    "missing calibration": ([*HALF, "--calibration", "no.npz"], "no.npz does not exist"),
    "empty calibration folder": ([*HALF, "--calibration", "sub"], "sub"),
    "calibration that is no archive": ([*HALF, "--calibration", "in.onnx"], "in.onnx is damaged, or neither"),
    "a text without a tokenizer": (
        [*HALF, "--calibration", "text.txt"],
        "text.txt is a text, so its tokenizer is needed, too: pass the model's --tokenizer tokenizer.json.",
    ),
    "a text for floats": (
        [*HALF, "--calibration", "text.txt", "--tokenizer", "model.json"],
        "but not exactly one of the inputs 'x' can take its tokens",
    ),
    "a tokenizer without a text": (
        [*CALIBRATED, "--tokenizer", "model.json"],
        "--tokenizer is for texts, but cal.npz is of another kind: leave --tokenizer out.",
    ),
    **{
        f"{option} without data": (
            [*HALF, option, value],
            f"{option} is for {what}, but none of --calibration, --inputs and --check is given: "
            f"leave {option} out.",
        )
        for option, value, what in (
            ("--tokenizer", "t.json", "texts"),
            ("--mean", "0.5", "folders of images"),
            ("--std", "0.5,1", "folders of images"),
        )
    },
    "a mean without images": ([*CALIBRATED, "--mean", "0.5"], "--mean is for folders of images, but cal.npz"),
    **{
        f"a mean {value!r}": (
            [*CALIBRATED, "--mean", value],
            f"--mean: {value!r} is no number for each channel: write it like 0.485,0.456,0.406.",
        )
        for value in ("", "x", "0.5,", "0.5;0.5")
    },
    "a mean of nothing": ([*CALIBRATED, "--mean", "nan"], "--mean has the value 'nan': give one number for"),
    "a std of 0": ([*CALIBRATED, "--std", "1,0,1"], "--std has the value 0: give values above 0"),
    "images for 8 channels": ([*HALF, "--calibration", "photos"], "N×8×6×6 has no axis of 1 or 3 channels"),
    "an empty path of a tokenizer": ([*CALIBRATED, "--tokenizer", ""], "--tokenizer: the path is empty"),
    "calibration of another name": ([*HALF, "--calibration", "name.npz"], "'z'"),
    "calibration of another shape": ([*HALF, "--calibration", "shape.npz"], "shape.npz"),
    "calibration with NaN": ([*HALF, "--calibration", "nan.npz"], "NaN"),
}


@pytest.fixture
def cluttered(folder):
    """Things that a mistaken command can name."""
    (folder / "sub").mkdir()
    (folder / "sub.json").mkdir()
    (folder / "photos").mkdir()
    (folder / "photos" / "a.png").touch()
    (folder / "text.txt").write_text("I am no model.\n")
    (folder / "empty.onnx").touch()
    (folder / "link.onnx").symlink_to("in.onnx")
    onnx.save(cnn(), "model.json", format="protobuf")
    recipe = 'summary = "s"\nfolds = ["encode"]\ngroups = "divisors"\naggregate = "sum"\n'
    (folder / "key.toml").write_text(recipe + 'colour = "red"\n')
    (folder / "value.toml").write_text(recipe + "power = 0\n")
    (folder / "broken.toml").write_text("summary = \n")
    np.savez("name.npz", z=np.ones((1, 8, 6, 6), np.float32))
    np.savez("shape.npz", x=np.ones((1, 8, 6), np.float32))
    np.savez("dtype.npz", x=np.ones((1, 8, 6, 6)))
    np.savez("nan.npz", x=np.full((9, 8, 6, 6), np.nan, np.float32))
    return folder


@pytest.mark.parametrize(("arguments", "text"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_command_or_input_is_one_sentence_and_exit_code_2(run, cluttered, arguments, text):
    before = files(cluttered)
    outcome = run("--quiet", *arguments)
    assert text in outcome.message
    assert outcome.code == 2
    assert files(cluttered) == before


@pytest.mark.parametrize("cut", [1, 4, 100, 0.25, 0.5, 0.75, -1000, -100, -20, -2, -1])
def test_a_truncated_file_is_told(run, folder, cut):
    data = DIGITS.read_bytes()
    end = int(len(data) * cut) if isinstance(cut, float) else cut
    Path("cut.onnx").write_bytes(data[:end])
    before = files(folder)
    outcome = run("--quiet", "cut.onnx", "out.onnx", "--ratio", "0.5")
    assert "cut.onnx" in outcome.message
    assert outcome.code == 2
    assert files(folder) == before


@pytest.mark.parametrize(("flags", "shown"), [((), False), (("-v",), False), (("-vv",), True)])
def test_an_error_of_the_user_shows_a_traceback_to_the_very_curious_only(run, folder, flags, shown):
    Path("in.onnx").write_bytes(b"no model")
    outcome = run(*HALF, *flags)
    assert ("Traceback" in outcome.err) == shown
    assert outcome.code == 2


def test_an_internal_error_exits_with_1_and_tells_how_to_report_it(run, folder, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(command, "compress", broken)
    outcome = run(*RUN)
    assert outcome.message.startswith("Internal error (RuntimeError: first line second line): run again with")
    assert outcome.code == 1
    verbose = run(*RUN, "-v").err
    assert "Traceback" in verbose
    assert "second line): report it.\n" in verbose


def test_control_characters_in_a_traceback_do_not_reach_the_terminal(run, folder, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("\x1b[2Jname\x07")

    monkeypatch.setattr(command, "compress", broken)
    outcome = run(*RUN, "-v")
    assert "RuntimeError:  [2Jname" in outcome.err
    assert not {"\x1b", "\x07"} & set(outcome.err)


def test_control_characters_in_names_do_not_reach_the_terminal(run, folder):
    outcome = run("--quiet", "\x1b[2Jno\n:smile:[red].onnx", "out.onnx", "--ratio", "0.5")
    assert "\x1b" not in outcome.message
    assert ":smile:[red].onnx does not exist" in outcome.message


def test_an_absent_onnx_runtime_names_both_extras(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    outcome = run(*RUN)
    assert "onnx-lowrank[cpu] or onnx-lowrank[gpu]" in outcome.message
    assert outcome.code == 2
    assert not Path("out.onnx").exists()
    assert run("--quiet", "in.onnx", "--ratio", "0.5", "--dry-run").code == 0, "a plan needs no runtime"


def test_cuda_without_cupy_names_the_extra(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    outcome = run(*RUN, "--device", "cuda")
    assert "CuPy is not installed" in outcome.message
    assert "onnx-lowrank[gpu]" in outcome.message
    assert outcome.code == 2


# --- ratios that cannot be reached --------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_ratio_out_of_reach_tells_the_smallest_which_then_works(run, folder, recipe):
    before = files(folder)
    options = ("--pass", recipe, *RECIPES[recipe])
    outcome = run("--quiet", "in.onnx", "out.onnx", "--ratio", "0.001", *options)
    found = re.fullmatch(
        r"The ratio 0\.001 of params cannot be reached for in\.onnx: raise it to ([0-9.]+), "
        rf"the smallest with recipe {recipe!r}, or choose another recipe\.",
        outcome.message,
    )
    assert found is not None, outcome.message
    assert outcome.code == 3
    assert files(folder) == before
    smallest = float(found[1])
    assert 0.001 < smallest < 0.5
    again = run("--quiet", "in.onnx", "out.onnx", "--ratio", smallest, *options, "--report", "-")
    assert smallest - 0.001 < report_of(again)["ratio"]["reached"] <= smallest


def test_a_model_without_layers_reaches_ratio_1_only(run, folder):
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu (x) }'
        ),
        "relu.onnx",
    )
    outcome = run("--quiet", "relu.onnx", "out.onnx", "--ratio", "0.5")
    assert "relu.onnx has no layer that can be decomposed" in outcome.message
    assert "the smallest ratio that can be reached is 1" in outcome.message
    assert outcome.code == 3
    assert not Path("out.onnx").exists()
    report = report_of(run("-q", "relu.onnx", "out.onnx", "--ratio", "1", "--report", "-"))
    assert report["layers"] == []
    assert Path("out.onnx").exists()


# --- weights that are no use --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_layer_with_nan_or_inf_is_skipped_and_the_others_compress(run, folder, value):
    weight = decaying(2, 16, 16, 3, 3)
    weight[3, 2, 1, 0] = value
    onnx.save(cnn(conv2=weight), "in.onnx")
    report = report_of(run(*RUN[:-1], "0.8", "--report", "-"))
    assert [(s["weight"], "NaN or Inf" in s["reason"]) for s in report["skipped"]] == [("conv2", True)]
    assert {row["id"]: row["fold"] is not None for row in report["layers"]}["conv1"]
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load("out.onnx").graph.initializer}
    np.testing.assert_array_equal(stored["conv2"], weight)


def test_a_zero_weight_goes_first_and_without_error(run, folder):
    onnx.save(cnn(conv2=np.zeros((16, 16, 3, 3), np.float32)), "in.onnx")
    report = report_of(run(*RUN, "--report", "-"))
    rows = {row["id"]: row for row in report["layers"]}
    assert rows["conv2"]["j"] == 1
    assert rows["conv2"]["error"] == 0
    assert rows["conv2"]["certificate"] == {"spectral": [0.0], "frobenius": [0.0]}
    assert rows["conv1"]["fold"] is None, "the zero weight alone reaches the ratio"
    assert report["validation"]["worst"] == 0


# --- validation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [None, b"precious"])
def test_a_result_that_is_too_far_off_exits_with_4_and_writes_nothing(run, folder, existing):
    if existing:
        Path("out.onnx").write_bytes(existing)
    before = files(folder)
    outcome = run(*RUN, "--max-error", "1e-9", "--save-plan", "p.json", "--report", "r.json")
    assert "The relative error of 'y' is" in outcome.message
    assert "above --max-error 1e-09" in outcome.message
    assert outcome.code == 4
    assert files(folder) == before


def test_a_result_within_the_bound_is_written(run, folder):
    assert run(*RUN, "--max-error", "10").code == 0
    assert Path("out.onnx").exists()


def test_given_inputs_are_what_the_models_are_compared_on(run, folder):
    np.savez("x.npz", x=np.zeros((3, 8, 6, 6), np.float32))
    report = report_of(run(*RUN, "--inputs", "x.npz", "--report", "-"))
    assert report["validation"]["inputs"] == "given: x float32 3×8×6×6"
    assert report["validation"]["worst"] == 0


# --- interrupts ---------------------------------------------------------------------------------------

INTERRUPT_MESSAGE = "\nonnx-lowrank: Interrupted; no file is half-written.\n"
INTERRUPTED = """
import os, signal, sys
from contextlib import contextmanager
from onnx_lowrank import cli, display

class Interrupting:
    @contextmanager
    def stage(self, name, total=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
        yield lambda done=None: None

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs this in the background
display.Silent = Interrupting
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        *((stage, ()) for stage in STAGES),
        *((stage, ("--calibration", "cal.npz")) for stage in (*STAGES, *CALIBRATED_STAGES)),
    ],
)
def test_an_interrupt_at_any_stage_leaves_nothing_behind(run, folder, monkeypatch, stage, options):
    onnx.save(cnn(), "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    before = files(folder)

    class Interrupting(display.Silent):
        def stage(self, name, total=None):
            if name.split(" (")[0] == stage:
                raise KeyboardInterrupt
            return super().stage(name, total)

    monkeypatch.setattr(display, "Silent", Interrupting)
    outcome = run("-q", "big.onnx", "out.onnx", "--ratio", "0.5", *options)
    assert outcome == Outcome(130, "", INTERRUPT_MESSAGE)
    assert files(folder) == before


@pytest.mark.parametrize("calls", [0, 1])
def test_an_interrupt_while_files_are_written_leaves_no_half_file(run, folder, monkeypatch, calls):
    onnx.save(cnn(), "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    Path("out.onnx").write_bytes(b"old model")
    Path("out.onnx.data").write_bytes(b"old data")
    before = files(folder)
    count = itertools.count()

    def interrupted(file):
        if next(count) == calls:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    assert run("-q", "big.onnx", "out.onnx", "--ratio", "0.5").code == 130
    assert files(folder) == before


@pytest.mark.parametrize("stage", ["spectra", "factorize"])
def test_a_real_signal_exits_with_130(folder, stage):
    before = files(folder)
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, stage, *RUN], capture_output=True, text=True, check=False
    )
    assert process.stderr == INTERRUPT_MESSAGE
    assert process.returncode == 128 + signal.SIGINT
    assert files(folder) == before


TERMINATED = """
import os, shutil, signal, sys
from contextlib import contextmanager
from onnx_lowrank import cli, display

rmtree = shutil.rmtree

def rmtree_cut_short(*args, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    rmtree(*args, **options)

class Terminating:
    @contextmanager
    def stage(self, name, total=None):
        if name.split(" (")[0] == sys.argv[1]:
            shutil.rmtree = rmtree_cut_short
            os.kill(os.getpid(), signal.SIGTERM)
        yield lambda done=None: None

display.Silent = Terminating
cli.main(sys.argv[2:])
"""
TERMINATED_MESSAGE = INTERRUPT_MESSAGE.lstrip()


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where a command of its own has its temporary files."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    return path


def left(temporary):
    return files(temporary).keys() - {".ses"}  # ONNX Runtime's own, written when it is imported.


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("find layers", ()),
        ("factorize", ()),
        ("validate", ()),
        ("activations", ("--calibration", "cal.npz")),
        ("outputs", ("--calibration", "cal.npz")),
        ("recover", ("--calibration", "cal.npz")),
        ("compare", ("--calibration", "cal.npz")),
    ],
)
def test_a_termination_and_one_more_during_the_clean_up_leave_nothing_behind(
    folder, temporary, stage, options
):
    onnx.save(cnn(), "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    before = files(folder)
    process = subprocess.run(
        [sys.executable, "-c", TERMINATED, stage, "-q", "big.onnx", *RUN[2:], *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stderr == TERMINATED_MESSAGE
    assert (process.returncode, process.stdout) == (128 + signal.SIGTERM, "")
    assert files(folder) == before
    assert not left(temporary)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_beside_the_command_is_no_traceback(number, when, monkeypatch, capsys):
    def interrupted(*given):
        signal.raise_signal(number)
        return 0

    if when == "before":
        monkeypatch.setattr(cli.completion, "completions", interrupted)
    else:
        monkeypatch.setattr(cli, "_run", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main(["in.onnx", "out.onnx"])
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == "onnx-lowrank: Interrupted; no file is half-written.\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_termination_from_outside_leaves_no_temporary_file(folder, temporary):
    """The command has seconds of work left when its folder of activations appears."""
    np.savez("images.npz", image=np.random.default_rng(6).random((2000, 1, 8, 8), np.float32))
    before = files(folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "onnx_lowrank", DIGITS, *RUN[2:], "--quiet", "--calibration", "images.npz"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not any(path.is_dir() and any(path.iterdir()) for path in temporary.glob("onnx-lowrank-*")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.terminate()
        assert process.communicate(timeout=60) == ("", TERMINATED_MESSAGE)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert not left(temporary)
    assert files(folder) == before


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN, lambda number, frame: None])
def test_the_handler_of_whoever_calls_the_command_stays(run, folder, monkeypatch, handler):
    seen = []
    monkeypatch.setattr(
        command, "check_outputs", lambda *paths: seen.append(signal.getsignal(signal.SIGTERM))
    )
    old = signal.signal(signal.SIGTERM, handler)
    try:
        assert run(*RUN, "--ratio", "2").code == 2
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, old)
    assert len(seen) == 1
    assert (seen[0] is handler) == (handler is not signal.SIG_DFL)


def test_the_command_runs_in_any_thread(run, folder):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, *RUN).result() == Outcome(0, "", "")


# --- what the options promise -------------------------------------------------------------------------


def test_one_run_writes_the_model_only_and_prints_to_stderr_only(run, folder):
    before = files(folder)
    outcome = run(*HALF)
    assert outcome.code == 0
    assert outcome.out == ""
    for stage in STAGES:
        assert stage in outcome.err
    assert "conv1" in outcome.err
    assert files(folder).keys() - before.keys() == {"out.onnx"}
    assert files(folder)["in.onnx"] == before["in.onnx"]


def test_quiet_prints_nothing(run, folder):
    assert run(*RUN) == Outcome(0, "", "")


def test_a_report_on_stdout_is_json_and_nothing_else(run, folder):
    outcome = run(*HALF, "--report", "-")
    report = json.loads(outcome.out)
    assert report["ratio"]["reached"] <= report["ratio"]["asked"] == 0.5
    assert "validate" in outcome.err
    assert not Path("-").exists()


def test_a_plan_on_stdout_is_the_plan_file(run, folder):
    on_stdout = run(*RUN, "--save-plan", "-").out
    assert run(*RUN, "--save-plan", "p.json").code == 0
    assert Path("p.json").read_text(encoding="utf-8") == on_stdout
    assert not Path("-").exists()


def test_a_report_file_says_the_same_as_stdout(run, folder):
    on_stdout = run(*RUN, "--report", "-").out
    assert run(*RUN, "--report", "r.json").code == 0
    assert Path("r.json").read_text(encoding="utf-8") == on_stdout


def test_every_report_is_written(run, folder):
    assert run(*RUN, "--report", "r.json", "--report", "r.nodes.json", "--report", "again.json").code == 0
    assert Path("r.json").read_bytes() == Path("again.json").read_bytes()
    assert set(json.loads(Path("r.nodes.json").read_text(encoding="utf-8"))) != set(
        json.loads(Path("r.json").read_text(encoding="utf-8"))
    )


def test_a_dry_run_needs_no_out_and_writes_nothing(run, folder):
    before = files(folder)
    without = run("in.onnx", "--ratio", "0.5", "--dry-run", "--report", "-")
    with_out = run(*HALF, "--dry-run", "--report", "-")
    report = report_of(without)
    assert report == report_of(with_out)
    assert report["validation"] is None
    assert report["totals"]["bytes"]["after"] is None
    assert any(row["fold"] for row in report["layers"])
    assert files(folder) == before


def test_a_dry_run_plans_what_the_real_run_does(run, folder):
    assert run("-q", "in.onnx", "--ratio", "0.5", "--dry-run", "--save-plan", "dry.json").code == 0
    assert run(*RUN, "--save-plan", "real.json").code == 0
    assert Path("dry.json").read_bytes() == Path("real.json").read_bytes()


def test_list_passes_gives_every_recipe_one_line_in_a_pipe(run):
    outcome = run("--list-passes")
    assert (outcome.code, outcome.err) == (0, "")
    auto, *lines = outcome.out.splitlines()
    assert auto.split()[0] == "auto"
    assert auto.endswith("on held-out calibration inputs (the default with --calibration).")
    assert [line.split()[0] for line in lines] == [recipe.name for recipe in recipes.load_all()]
    for line, recipe in zip(lines, recipes.load_all(), strict=True):
        assert recipe.summary in line
        assert line == line.rstrip()
        assert line.endswith(" (the default)") == (recipe.name == "schatten")


def test_list_passes_wraps_to_the_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("onnx_lowrank.commands.compress.sys.stdout.isatty", lambda: True)
    lines = run("--list-passes").out.splitlines()
    assert len(lines) > len(recipes.load_all())
    assert max(map(len, lines)) < 80


def test_the_help_fits_80_columns_and_names_everything(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    outcome = run("-h")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome == run("--help")
    assert max(map(len, outcome.out.splitlines())) < 80
    for option in command.command.params:
        assert (
            option.human_readable_name == "help"
            or (option.opts[0] in outcome.out)
            or option.metavar in outcome.out
        )
    for code in (
        "0    done",
        "1    internal",
        "2    wrong",
        "3    the ratio",
        "4    validation",
        "130  interrupted",
        "143  terminated",
    ):
        assert f"    {code}" in outcome.out


def test_every_option_is_an_argument_of_compress():
    arguments = {"model", "ratio", *DEFAULTS}
    own = {"source", "out", "save_plan", "report", "quiet", "verbose", "list_passes", "version", "help"}
    own |= {"no_cache", "as_json", "completion"}  # The first is `cache=False`.
    assert {option.name for option in command.command.params} - own <= arguments


@pytest.mark.parametrize("command", [["--version"], ["--list-passes"]])
def test_the_module_runs_as_the_command(run, command):
    process = subprocess.run(
        [sys.executable, "-m", "onnx_lowrank", *command], capture_output=True, text=True, check=True
    )
    assert process.stdout == run(*command).out
    assert process.stderr == ""


def test_a_saved_plan_replays_to_the_same_bytes(run, folder):
    first = report_of(run(*RUN, "--save-plan", "p.json", "--report", "-"))
    again = run("-q", "in.onnx", "again.onnx", "--plan", "p.json", "--save-plan", "q.json", "--report", "-")
    second = report_of(again)
    assert Path("again.onnx").read_bytes() == Path("out.onnx").read_bytes()
    assert Path("q.json").read_bytes() == Path("p.json").read_bytes()
    for one, other in zip(first["layers"], second["layers"], strict=True):
        # A replay chooses among nothing, so its report has nothing to tell of that.
        assert (other.pop("curve"), other.pop("alternatives")) == (None, [])
        assert one.pop("curve")["errors"]
        assert one.pop("alternatives") or one["fold"] is None
    assert second == first
    assert second["solver"]["gap"] == 0


def test_an_edited_plan_is_what_happens(run, folder):
    assert run(*RUN, "--save-plan", "p.json").code == 0
    plan = json.loads(Path("p.json").read_text())
    for row in plan["layers"]:
        row.update(fold=None, k=None, j=None)
    plan["layers"][1].update(fold="cols", k=2, j=5)
    Path("p.json").write_text(json.dumps(plan))
    report = report_of(
        run("-q", "in.onnx", "new.onnx", "--plan", "p.json", "--save-plan", "q.json", "--report", "-")
    )
    assert report["solver"] is None, "nothing is proven of it"
    rows = {row["id"]: row for row in report["layers"]}
    assert [rows["conv2"][key] for key in ("fold", "k", "j", "error")] == ["cols", 2, 5, None]
    assert rows["conv1"]["reason"] == "the replayed plan keeps it"
    factors = 5 * (2 * 16 * 3 + 16 * 3)
    assert rows["conv2"]["params"] == {"before": 2304, "after": factors, "ratio": factors / 2304}
    assert any("above the 0.5" in warning for warning in report["warnings"])
    saved = json.loads(Path("q.json").read_text())["layers"][1]
    option = {"id": "conv2", "fold": "cols", "k": 2, "j": 5, "lowering": "native"}
    assert saved == {**option, "cost": factors, "error": None, "reason": ""}
    again = report_of(run("-q", "in.onnx", "newer.onnx", "--plan", "q.json", "--report", "-"))
    assert again == report


ILLEGAL = {
    "fold": ({"fold": "rows"}, "'fc' has no fold rows: choose one of encode"),
    "k": ({"k": 3}, "cannot be cut into k = 3 slices: choose one of 1, 2, 4, 8, 16"),
    "k of 0": ({"k": 0}, "cannot be cut into k = 0 slices"),
    "j too large": ({"j": 5}, "cannot have rank j = 5: choose one between 1 and 4"),
    "j of 0": ({"j": 0}, "cannot have rank j = 0"),
    "lowering of one slice": ({"lowering": "conv"}, "cannot be lowered as conv: choose one of native"),
    "unknown layer": ({"id": "head"}, "names the layer 'head', which the model does not have"),
    "layer twice": ({"id": "conv1"}, "names the layer 'conv1' twice"),
}


@pytest.mark.parametrize(("edit", "text"), ILLEGAL.values(), ids=ILLEGAL.keys())
def test_an_illegal_edit_is_told(run, folder, edit, text):
    assert run("-q", "in.onnx", "--dry-run", "--ratio", "0.5", "--save-plan", "p.json").code == 0
    plan = json.loads(Path("p.json").read_text())
    assert plan["layers"][2]["id"] == "fc"
    plan["layers"][2].update({"fold": "encode", "k": 1, "j": 1} | edit)
    Path("p.json").write_text(json.dumps(plan))
    before = files(folder)
    outcome = run("-q", "in.onnx", "out.onnx", "--plan", "p.json")
    assert text in outcome.message
    assert outcome.code == 2
    assert files(folder) == before


def test_a_plan_of_another_model_or_other_layers_is_told(run, folder):
    assert run("-q", "in.onnx", "--dry-run", "--ratio", "0.5", "--save-plan", "p.json").code == 0
    outcome = run("-q", "in.onnx", "out.onnx", "--plan", "p.json", "--exclude", "conv1")
    assert "names the layer 'conv1', which the model does not have: use the same --include" in outcome.message
    assert outcome.code == 2
    onnx.save(cnn(fc=decaying(9, 4, 16)), "in.onnx")
    outcome = run("-q", "in.onnx", "out.onnx", "--plan", "p.json")
    assert "The plan was made for another model" in outcome.message
    assert outcome.code == 2
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        (["--include", "conv1"], ["conv1"]),
        (["--include", "n.c"], ["conv2"]),
        (["--include", "conv[12]"], ["conv1", "conv2"]),
        (["--include", "conv1", "--include", "n.c"], ["conv1", "conv2"]),
        (["--exclude", "conv1"], ["conv2", "fc"]),
        (["--exclude", "n.[ac]"], ["fc"]),
        (["--exclude", "conv1", "--exclude", "fc"], ["conv2"]),
        (["--include", "conv*", "--exclude", "n.a"], ["conv2"]),
        (["--exclude", "*"], []),
    ],
)
def test_include_and_exclude_choose_by_layer_and_by_node(run, folder, options, layers):
    report = report_of(run("-q", "in.onnx", "--ratio", "1", "--dry-run", "--report", "-", *options))
    assert [row["id"] for row in report["layers"]] == layers
    assert {s["weight"] for s in report["skipped"]} == {"conv1", "conv2", "fc"} - set(layers)


def test_layers_that_are_left_out_leave_as_they_came(run, folder):
    assert run("-q", "in.onnx", "out.onnx", "--ratio", "0.8", "--exclude", "conv1").code == 0
    before = {tensor.name: tensor for tensor in onnx.load("in.onnx").graph.initializer}
    after = {tensor.name: tensor for tensor in onnx.load("out.onnx").graph.initializer}
    assert after["conv1"] == before["conv1"]
    assert "conv2" not in after


def multiplications(proto):
    """MACs of a model of Conv, Gemm and MatMul, counted from its inferred shapes."""
    proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    graph = proto.graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes = {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    total = 0
    for node in graph.node:
        if node.op_type == "Conv":
            batch, _, *space = shapes[node.output[0]]
            total += batch * int(np.prod(space)) * int(np.prod(weights[node.input[1]]))
        elif node.op_type in ("Gemm", "MatMul"):
            total += shapes[node.output[0]][0] * int(np.prod(weights[node.input[1]]))
    return total


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_a_budget_of_macs_is_kept_to_the_last_one(run, folder, ratio):
    onnx.save(cnn(CNN.replace("N,", "2,")), "in.onnx")
    options = ("--budget", "macs", "--include", "conv*", "--report", "-")
    report = report_of(run("-q", "in.onnx", "out.onnx", "--ratio", ratio, *options))
    before, after = (multiplications(onnx.load(name)) for name in ("in.onnx", "out.onnx"))
    assert before == 2 * (36 * 16 * 8 * 9 + 36 * 16 * 16 * 9 + 4 * 16)
    assert (report["totals"]["macs"]["before"], report["totals"]["macs"]["after"]) == (before, after)
    assert ratio - 0.05 < after / before <= ratio
    assert report["ratio"] == {"budget": "macs", "asked": ratio, "reached": after / before}


def test_an_input_shape_makes_macs_known(run, folder):
    report = report_of(run(*RUN, "--budget", "macs", "--input-shape", "x=2,8,6,6", "--report", "-"))
    assert report["totals"]["macs"]["before"] == 2 * (36 * 16 * 8 * 9 + 36 * 16 * 16 * 9 + 4 * 16)
    assert report["validation"]["inputs"].endswith("x float32 2×8×6×6")


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_parameters_of_the_file_are_those_of_the_report(run, folder, ratio, recipe):
    options = ("--pass", recipe, *RECIPES[recipe], "--report", "-")
    report = report_of(run("-q", "in.onnx", "out.onnx", "--ratio", ratio, *options))
    counts = [
        sum(
            int(np.prod(tensor.dims)) for tensor in onnx.load(name).graph.initializer if tensor.data_type == 1
        )
        for name in ("in.onnx", "out.onnx")
    ]
    assert counts[0] == 16 * 8 * 9 + 16 * 16 * 9 + 4 * 16
    assert [report["totals"]["params"][key] for key in ("before", "after")] == counts
    assert counts[1] <= ratio * counts[0]


# --- the same inputs give the same bytes --------------------------------------------------------------

ON_CPUS = """
import os, sys
if hasattr(os, "sched_setaffinity") and sys.argv[1] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from onnx_lowrank.cli import main
main(sys.argv[2:])
"""


def test_bytes_do_not_depend_on_threads_or_cpus(folder):
    results = []
    for cpus, threads in (("all", None), ("all", "1"), ("one", "2")):
        environment = dict(os.environ)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment.pop(name, None)
            if threads:
                environment[name] = threads
        arguments = (DIGITS, "out.onnx", "--ratio", "0.5", "--save-plan", "p.json", "-q")
        subprocess.run([sys.executable, "-c", ON_CPUS, cpus, *arguments], env=environment, check=True)
        results.append((Path("out.onnx").read_bytes(), Path("p.json").read_bytes()))
    assert results[0] == results[1] == results[2]


def test_ratio_1_gives_the_input_model_back_and_says_so(run, folder):
    outcome = run("in.onnx", "out.onnx", "--ratio", "1")
    assert onnx.load("out.onnx") == onnx.load("in.onnx")
    assert "Warning: No layer is rewritten, the output is the input model." in outcome.err


DECIDED = "'in.onnx': 3 layers, 0 operators skipped"


@pytest.mark.parametrize("flag", ["-v", "-qv", "-vq", "--verbose"])
def test_verbose_says_what_was_decided_however_it_is_written(run, folder, flag):
    outcome = run(*HALF, flag, "--report", "-")
    assert outcome.code == 0
    assert json.loads(outcome.out)
    lines = outcome.err.splitlines()
    assert DECIDED in lines
    assert any(line.startswith("recipe 'schatten' rewrites 2 of 3 layers for ratio 0.5") for line in lines)
    assert ("MACs" in outcome.err) == ("q" not in flag), "the table"
    assert "onnx_lowrank." not in outcome.err


@pytest.mark.parametrize("flags", [["-vv"], ["-v", "-v"], ["--verbose", "--verbose"], ["-vvv"]])
def test_twice_verbose_says_more_with_times_and_modules(run, folder, flags):
    outcome = run(*RUN, *flags)
    lines = outcome.err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d\d\d onnx_lowrank\.[a-z_.]+: .", line) for line in lines)
    told = [line.split(": ", 1) for line in lines]
    assert any((module.split()[1], text) == ("onnx_lowrank.material", DECIDED) for module, text in told)
    assert any(text.startswith("'conv2' of ") and "encode k=" in text for _, text in told)


def test_nothing_is_told_unasked_nor_after_a_run_that_was(run, folder, capsys):
    level = logging.getLogger("onnx_lowrank").level
    assert run(*RUN, "-vv").err
    assert run(*RUN) == Outcome(0, "", "")
    assert run(*RUN, "-vv", "--ratio", "0.001").code == 3
    logging.getLogger("onnx_lowrank.session").debug("more")
    assert capsys.readouterr().err == ""
    assert logging.getLogger("onnx_lowrank").level == level


def test_names_in_what_is_told_are_made_printable(run, folder):
    model = cnn()
    model.graph.node[0].name = model.graph.initializer[0].name = "\x1b[2J[red]\nname"
    model.graph.node[0].input[1] = model.graph.initializer[0].name
    onnx.save(model, "in.onnx")
    outcome = run(*RUN, "-vv")
    assert "\\x1b[2J[red]\\nname" in outcome.err
    assert "\x1b" not in outcome.err


def test_a_dry_run_does_not_mind_where_out_would_go(run, folder):
    assert run("in.onnx", "missing/out.onnx", "--ratio", "0.5", "--dry-run", "-q").code == 0
    assert run("in.onnx", "in.onnx", "--ratio", "0.5", "--dry-run", "-q").code == 0


COMMAND = (sys.executable, "-m", "onnx_lowrank")
PRINTING = [["--list-passes"], ["--help"], ["--version"], [*RUN, "--report", "-"], [*RUN, "--save-plan", "-"]]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_full_stdout_is_told_before_anything_is_written(folder, arguments):
    before = files(folder)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.stderr.startswith("onnx-lowrank: The standard output cannot be written (No space left")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 2
    assert files(folder) == before


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_reader_who_stops_early_is_no_error(folder, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("out.onnx").exists() == ("out.onnx" in arguments)


def test_no_small_file_is_left_where_the_model_cannot_be_written(run, folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = files(folder)
    monkeypatch.setattr("onnx_lowrank.files.save.write_whole", full)
    outcome = run(*RUN, "--save-plan", "p.json", "--report", "r.json")
    assert "No space left" in outcome.message
    assert outcome.code == 2
    assert files(folder) == before


# --- calibration --------------------------------------------------------------------------------------


def test_calibration_tries_several_recipes_and_keeps_the_best(run, folder):
    report = report_of(run("-q", *CALIBRATED, "--report", "-"))
    assert report["calibration"]["source"].startswith("cal.npz: 60 samples")
    assert (report["calibration"]["samples"], report["calibration"]["held"]) == (60, 12)
    assert len(report["trials"]) > 1
    best = min(report["trials"], key=lambda trial: trial["error"])
    assert [trial for trial in report["trials"] if trial["chosen"]] == [best]
    assert report["recipe"]["name"] == best["recipe"]
    assert {trial["ratio"] for trial in report["trials"]} == {0.5}
    for row in report["layers"]:
        assert row["fit"] is not None or row["fold"] is None
    assert report == report_of(run("-q", *CALIBRATED, "--pass", "auto", "--report", "-"))


def test_a_calibrated_run_shows_its_stages_and_its_comparison(run, folder):
    outcome = run(*CALIBRATED)
    assert (outcome.code, outcome.out) == (0, "")
    for text in (*CALIBRATED_STAGES, "Calibration on cal.npz", "output error: ", "held-out", "→ "):
        assert text in outcome.err
    assert run(*CALIBRATED, "--quiet") == Outcome(0, "", "")


@pytest.mark.parametrize("options", [(), ("--no-recover",)])
def test_no_recover_fits_every_layer_on_its_own(run, folder, options):
    report = report_of(run("-q", *CALIBRATED, "--pass", "activation", *options, "--report", "-"))
    fits = [row["fit"] for row in report["layers"] if row["fit"]]
    assert all(fit["factors"] == "activations" for fit in fits)
    assert all(0 < fit["error"] < 1 for fit in fits)
    (chosen,) = (trial for trial in report["trials"] if trial["chosen"])
    assert any(fit["recovered"] for fit in fits) == chosen["recovered"]
    assert any(trial["recovered"] for trial in report["trials"]) == (not options)


@pytest.mark.parametrize(("asked", "used"), [(5, 5), (40, 40), (1000, 60)])
def test_calibration_samples_are_no_more_than_asked_for(run, folder, asked, used):
    options = ("--calibration-samples", asked, "--pass", "activation", "--report", "-")
    report = report_of(run("-q", *CALIBRATED, *options))
    assert report["calibration"]["samples"] == used
    assert any("are weak" in warning for warning in report["warnings"]) == (used < 32)


@pytest.mark.parametrize("error", [0.02, 0.1, 0.4])
def test_a_target_error_is_held_by_the_smallest_model_that_was_tried(run, folder, error):
    options = ("--calibration", "cal.npz", "--pass", "activation", "--target-error", error, "--report", "-")
    report = report_of(run("-q", "in.onnx", "out.onnx", *options))
    (chosen,) = [trial for trial in report["trials"] if trial["chosen"]]
    assert chosen["error"] <= error
    assert len({trial["ratio"] for trial in report["trials"]}) > 2
    measured = [trial for trial in report["trials"] if trial["error"] is not None]
    assert all(trial["error"] > error for trial in measured if trial["ratio"] < chosen["ratio"])
    assert report["ratio"]["reached"] <= chosen["ratio"] == report["ratio"]["asked"]


MLP = """
<ir_version: 8, opset_import: ["": 17]>
mlp (float[N, 24] x) => (float[N, 8] y) { a = MatMul (x, w1) b = Relu (a) y = MatMul (b, w2) }
"""


def test_a_target_agreement_is_held_by_the_smallest_model_that_was_tried(run, folder):
    onnx.save(built(MLP, {"w1": decaying(1, 24, 32), "w2": decaying(2, 32, 8)}), "in.onnx")
    np.savez("cal.npz", x=np.random.default_rng(6).standard_normal((300, 24), np.float32))
    options = ("--calibration", "cal.npz", "--pass", "activation", "--target-agreement", "0.9")
    report = report_of(run("-q", "in.onnx", "out.onnx", *options, "--report", "-"))
    (chosen,) = [trial for trial in report["trials"] if trial["chosen"]]
    assert chosen["agreement"] >= 0.9
    smaller = [trial for trial in report["trials"] if trial["ratio"] < chosen["ratio"] and trial["outputs"]]
    assert smaller
    assert all(trial["agreement"] < 0.9 for trial in smaller)


def test_an_embedding_is_judged_by_its_nearest_neighbours(run, folder):
    text = MLP.replace("y = MatMul (b, w2)", "c = MatMul (b, w2) y = LpNormalization <axis = 1, p = 2> (c)")
    onnx.save(built(text, {"w1": decaying(1, 24, 32), "w2": decaying(2, 32, 8)}), "in.onnx")
    np.savez("cal.npz", x=np.random.default_rng(6).standard_normal((300, 24), np.float32))
    options = ("--calibration", "cal.npz", "--pass", "activation", "--target-agreement", "0.8")
    outcome = run("in.onnx", "out.onnx", *options, "--report", "r.json")
    report = json.loads(Path("r.json").read_text())
    (chosen,) = [trial for trial in report["trials"] if trial["chosen"]]
    (output,) = report["validation"]["outputs"]
    assert output["agreement"] is None
    assert 0.8 <= output["neighbours"] == chosen["agreement"] < 1
    assert 0.8 < output["cosine"] < 1
    assert output["relative"] ** 2 == pytest.approx(2 - 2 * output["cosine"], rel=1e-5), "rows have norm 1"
    smaller = [trial for trial in report["trials"] if trial["ratio"] < chosen["ratio"] and trial["outputs"]]
    assert smaller
    assert all(trial["agreement"] < 0.8 for trial in smaller)
    shown = f"cosine {output['cosine']:.3f}, nearest neighbour kept {output['neighbours']:.1%}"
    assert shown in " ".join(outcome.err.split())


def test_the_same_calibration_data_gives_the_same_bytes(run, folder):
    results = []
    for _ in range(2):
        outcome = run("-q", *CALIBRATED, "--save-plan", "p.json", "--report", "-")
        results.append((outcome, Path("out.onnx").read_bytes(), Path("p.json").read_bytes()))
    assert results[0] == results[1]


def test_a_calibrated_plan_replays_to_the_same_bytes_with_the_same_data(run, folder):
    assert run("-q", *CALIBRATED, "--pass", "activation", "--save-plan", "p.json").code == 0
    saved = json.loads(Path("p.json").read_text())
    assert saved["factors"] == "activations"
    again = ("-q", "in.onnx", "again.onnx", "--plan", "p.json")
    outcome = run(*again)
    assert outcome.message == (
        "The plan's factors are fitted to calibration inputs: pass them with --calibration."
    )
    assert outcome.code == 2
    assert run(*again, "--calibration", "cal.npz").code == 0
    assert Path("again.onnx").read_bytes() == Path("out.onnx").read_bytes()


# --- times, which are recorded ones -------------------------------------------------------------------

TIMED = (
    "--quiet",
    "in.onnx",
    "out.onnx",
    "--budget",
    "latency",
    "--align",
    "1",
    "--input-shape",
    "x=2,8,6,6",
)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "all threads"),
        (("--threads", "0"), "all threads"),
        (("--threads", "1"), "1 thread"),
        (("--threads", "2", "--no-cache"), "2 threads"),
    ],
)
def test_a_latency_budget_with_its_options(folder, run, options, words):
    report = report_of(run(*TIMED, "--ratio", "0.6", "--report", "-", *options))
    assert report["timing"]["engine"] == f"ONNX Runtime CPUExecutionProvider, {words}"
    assert report["ratio"]["budget"] == "latency"
    assert report["ratio"]["reached"] <= 0.6
    assert Path("out.onnx").is_file()


@pytest.mark.parametrize("options", [(), ("--time",)])
def test_times_come_with_the_option_only(folder, run, options):
    report = report_of(run(*RUN, "--report", "-", *options))
    assert (report["timing"] is None) == (report["totals"]["time"] is None) == (not options)
    outcome = run(*HALF, *options)
    assert ("interleaved runs" in outcome.err) == bool(options)
    assert ("\ntime" in outcome.err) == bool(options)


@pytest.mark.parametrize("cache", [True, False])
def test_no_cache_and_threads_go_to_compress(folder, run, monkeypatch, cache):
    seen = {}

    def compress(source, **options):
        seen.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "compress", compress)
    assert run(*HALF, "--threads", "3", *([] if cache else ["--no-cache"])).code == 130
    assert (seen["threads"], seen["cache"]) == (3, cache)


@pytest.mark.parametrize("ratio", ["0.001", "0.01"])
def test_a_time_that_cannot_be_reached_is_exit_code_3(folder, run, ratio):
    outcome = run(*TIMED, "--ratio", ratio)
    assert outcome.code == 3
    assert outcome.message.startswith(
        f"The ratio {ratio} of latency cannot be reached for in.onnx on ONNX Runtime CPUExecutionProvider, "
        "all threads: the fastest that was measured is 0."
    )
    assert not Path("out.onnx").exists()


def test_a_plan_of_times_is_replayed_to_the_byte(folder, run):
    assert run(*TIMED, "--ratio", "0.6", "--save-plan", "plan.json").code == 0
    before = Path("out.onnx").read_bytes()
    replay = ("--quiet", "in.onnx", "again.onnx", "--plan", "plan.json", "--input-shape", "x=2,8,6,6")
    assert run(*replay).code == 0
    assert Path("again.onnx").read_bytes() == before


def test_a_dry_run_of_times_writes_nothing(folder, run):
    before = files(folder)
    report = report_of(run(*TIMED, "--ratio", "0.6", "--dry-run", "--report", "-"))
    assert report["timing"]["after"] is None
    assert report["timing"]["layers"] == []
    assert report["totals"]["time"]["after"] == report["timing"]["predicted"]
    assert files(folder) == before


def test_the_table_of_times_is_on_stderr(folder, run):
    outcome = run(*TIMED[1:], "--ratio", "0.6")
    assert outcome.code == 0
    assert outcome.out == ""
    assert "time alone" in outcome.err
    assert "predicted time" in outcome.err
