"""Signals and time end a run that would not end by itself."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx.parser
import onnxruntime
import pytest

from onnx_lowrank.engines import interrupting
from onnx_lowrank.engines.interrupting import interruptible
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model, load

_X = {"x": np.ones((1, 4), np.float32)}


def _counting(turns: int) -> Model:
    """A model that repeats a Relu."""
    text = f"""<ir_version: 9, opset_import: ["" : 18]>
    g (float[1,4] x) => (float[1,4] y) <int64 n = {{{turns}}}, bool go = {{1}}> {{
        y = Loop(n, go, x) <body = b (int64 i, bool on, float[1,4] s) => (bool still, float[1,4] t) {{
            still = Identity(on)
            t = Relu(s)
        }}>
    }}"""
    return load(onnx.parser.parse_model(text))


def _run(model: Model) -> np.ndarray:
    with runtime("CPUExecutionProvider").open(model) as run:
        return run(_X)["y"]


def test_a_run_that_ends_returns_its_outputs():
    np.testing.assert_array_equal(_run(_counting(3)), _X["x"])


SCRIPT = """
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs this in the background
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.files.load import load
import numpy as np
with runtime("CPUExecutionProvider").open(load(sys.argv[1])) as run:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        run({"x": np.ones((1, 4), np.float32)})
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_a_signal_ends_an_endless_run(tmp_path):
    onnx.save(_counting(2**62).proto, tmp_path / "counting.onnx")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "counting.onnx")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "interrupted\n"


def test_an_endless_run_ends_after_the_longest_time(monkeypatch):
    monkeypatch.setattr(interrupting, "_LONGEST", 0.05)
    with pytest.raises(InputError, match=r"did not end within 0\.05 seconds on one batch of inputs: give"):
        _run(_counting(2**62))


def test_the_time_of_other_threads_is_bounded_too(monkeypatch):
    monkeypatch.setattr(interrupting, "_LONGEST", 0.05)
    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match="did not end"):
        pool.submit(_run, _counting(2**62)).result()


def test_calls_of_several_threads_run_at_once():
    both = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool, interruptible(onnxruntime.RunOptions) as ending:
        calls = [pool.submit(ending, lambda _: [both.wait()]) for _ in range(2)]
        assert sorted(call.result()[0] for call in calls) == [0, 1]


def test_the_errors_of_a_call_come_through():
    def fail(_):
        raise ValueError("the inputs are wrong")

    with interruptible(onnxruntime.RunOptions) as ending, pytest.raises(ValueError, match="inputs are wrong"):
        ending(fail)
