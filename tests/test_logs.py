"""What the package logs as a library: everything that it decides, to whoever wants to know."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import warnings
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from onnx_lowrank import compress
from onnx_lowrank.logs import DETAIL, first_names, printable, shown, without_warnings
from tiny import cnn

SHAPE = {"x": (2, 8, 6, 6)}


@pytest.fixture
def logged(caplog):
    """Runs something, and gives what was logged: text by the module's name."""

    def logged(level, **arguments):
        caplog.clear()
        with caplog.at_level(level, "onnx_lowrank"):
            compress(cnn(), **arguments)
        return [(record.name.removeprefix("onnx_lowrank."), record.getMessage()) for record in caplog.records]

    return logged


def matching(records, module, *parts):
    return [text for name, text in records if name == module and all(part in text for part in parts)]


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        ("request", ("asked for ratio 0.5 of params", "multiples of 1")),
        ("request", ("recipe 'schatten'", "folds encode/rows/cols/decode", "fitted to weights")),
        ("linalg.backend", ("linear algebra runs on ",)),
        ("material", ("'model': 2 layers, 1 operators skipped",)),
        ("material", ("skipped 1: --exclude fc names it", "('n.y')")),
        ("stages.score", ("spectra of 2 layers in ", " s")),
        ("stages.planning", ("rewrites 2 of 2 layers for ratio 0.5", "objective", "gap 0")),
        ("stages.build", ("factors of 'conv1'", "fitted to weights", "certificate 0.")),
        ("stages.build", ("factors of 'conv2'",)),
        ("stages.check", ("compared on ONNX Runtime", "2×8×6×6", "worst error 0.")),
    ],
)
def test_every_stage_says_what_it_decided(logged, module, parts):
    records = logged(logging.DEBUG, ratio=0.5, exclude=["fc"], input_shape=SHAPE)
    assert len(matching(records, module, *parts)) == 1, records


def test_layers_that_are_kept_are_told_with_the_reason(logged):
    records = logged(logging.DEBUG, ratio=0.9)
    result = compress(cnn(), 0.9)
    kept = [row for row in result.report.layers if row.option is None]
    assert kept
    (text,) = matching(records, "stages.planning", "kept ")
    assert text == f"kept {len(kept)}: {kept[0].reason} ({first_names([row.id for row in kept])})"


def test_the_comparison_is_told_in_one_clause(logged):
    (text,) = matching(logged(logging.DEBUG, ratio=0.5), "stages.check", "compared on ")
    assert text[-1].isdigit()


def test_files_for_an_engine_are_told(monkeypatch, caplog):
    monkeypatch.setattr("onnx_lowrank.engines.engine.serialized", lambda proto: None)
    with caplog.at_level(logging.DEBUG, "onnx_lowrank"), compress(cnn(), 0.5):
        told = [record.getMessage() for record in caplog.records]
    assert any(text.startswith("wrote 'model' with its data to ") for text in told)


@pytest.mark.parametrize(
    ("module", "parts", "count"),
    [
        ("session", ("calibration on ", "40 samples, 8 held out", "ONNX Runtime"), 1),
        ("stages.score", ("curves of activation errors in ",), 1),
        ("stages.effects", ("errors at the outputs",), 1),
        ("stages.search", ("recipe 'schatten' at ratio 0.5: output error 0.",), 1),
        ("stages.search", ("took recipe",), 1),
        ("stages.build", ("fitted to activations", "error 0."), None),
        ("stages.search", (", recovered: output error",), 1),
    ],
)
def test_a_search_says_what_it_tried(logged, module, parts, count):
    samples = np.random.default_rng(5).standard_normal((40, 8, 6, 6)).astype(np.float32)
    records = logged(logging.DEBUG, ratio=0.5, calibration={"x": samples})
    found = matching(records, module, *parts)
    assert found
    assert count is None or len(found) == count


@pytest.mark.parametrize(
    ("module", "parts"),
    [
        ("request", ("asked for ratio 0.6 of latency",)),
        ("budgets.latency.measured", ("the model takes 0.004 ms", "3 kinds")),
        ("budgets.latency.stopwatch", ("0 chains are known",)),
        ("stages.settling", ("a plan of ", "of the time", "median of 1")),
        ("stages.settling", ("plans and took the one at 0.",)),
    ],
)
def test_a_plan_of_times_says_what_it_measured(logged, module, parts):
    records = logged(logging.DEBUG, ratio=0.6, budget="latency", align=1, input_shape=SHAPE)
    assert matching(records, module, *parts)


def test_details_come_at_a_level_of_their_own(logged):
    options = {"ratio": 0.6, "budget": "latency", "align": 1, "input_shape": SHAPE}
    known, all_of_it = logged(logging.DEBUG, **options), logged(DETAIL, **options)
    assert len(all_of_it) > len(known)
    assert matching(all_of_it, "budgets.latency.stopwatch", "encode k=1 j=", "of its time")
    assert matching(all_of_it, "stages.planning", "'conv2' of ", " options: ")
    assert matching(all_of_it, "material", "layer 'conv1': Conv of (1, 16, 8, 3, 3)")
    assert not matching(known, "material", "layer 'conv1'")


def test_a_library_shows_nothing_and_adds_a_handler_that_does_nothing():
    script = (
        "import logging, onnx, sys, onnx_lowrank\n"
        "onnx_lowrank.compress(onnx.load(sys.argv[1]), 0.5)\n"
        "root = logging.getLogger('onnx_lowrank')\n"
        "print([type(handler).__name__ for handler in root.handlers], root.level, logging.root.handlers)"
    )
    path = "models/digits.onnx"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("['NullHandler'] 0 []\n", "")


# --- how they are shown -------------------------------------------------------------------------------


def lines(verbosity, *arguments, level=logging.DEBUG):
    console = Console(file=StringIO(), width=40)
    with shown(console, verbosity):
        logging.getLogger("onnx_lowrank.some.stage").log(level, *arguments)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("verbosity", "level", "is_shown"),
    [
        (0, logging.DEBUG, False),
        (1, logging.DEBUG, True),
        (1, DETAIL, False),
        (2, DETAIL, True),
        (3, DETAIL, True),
    ],
)
def test_the_verbosity_decides(verbosity, level, is_shown):
    assert ("told" in lines(verbosity, "told", level=level)) == is_shown


def test_a_record_is_one_line_whatever_it_holds():
    text = lines(1, "%s is [bold]%s[/bold] :smile:", "\x1b[31mname\r\n", "long " * 30)
    assert text == f" [31mname   is [bold]{'long ' * 30}[/bold] :smile:\n"


def test_a_record_that_cannot_be_shown_ends_no_run(capsys):
    class Closed(Console):
        def print(self, *_, **__):
            raise OSError(32, "Broken pipe")

    with shown(Closed(), 1):
        logging.getLogger("onnx_lowrank.some.stage").debug("told")
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "expected"), [("näme→", "näme→"), ("a\x00b\tc\u2028", "a b c "), ("", "")])
def test_printable(text, expected):
    assert printable(text) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ""),
        (["a"], "'a'"),
        (["a", "b", "\x1b"], "'a', 'b', '\\x1b'"),
        (list("abcde"), "'a', 'b', 'c' and 2 more"),
    ],
)
def test_some(names, expected):
    assert first_names(names) == expected


def test_threads_restore_the_filters_of_warnings_in_the_right_order():
    before, entered, left = list(warnings.filters), threading.Event(), threading.Event()

    def other():
        with without_warnings():
            entered.set()
            left.wait()

    thread = threading.Thread(target=other)
    with without_warnings():
        thread.start()
        assert not entered.wait(0.1)
    left.set()
    thread.join()
    assert entered.is_set()
    assert warnings.filters == before
