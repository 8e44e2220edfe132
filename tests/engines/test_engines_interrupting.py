"""Signals and time end a run that would not end by itself."""

import signal
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


def test_a_signal_ends_an_endless_run():
    main = threading.main_thread().ident
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        _run(_counting(2**62))
    timer.join()


def test_an_endless_run_ends_after_the_longest_time(monkeypatch):
    monkeypatch.setattr(interrupting, "_LONGEST", 0.05)
    with pytest.raises(InputError, match=r"did not end within 0\.05 seconds on one batch of inputs: give"):
        _run(_counting(2**62))


def test_other_threads_make_their_calls_themselves():
    idents = []
    with ThreadPoolExecutor(1) as pool, interruptible(onnxruntime.RunOptions) as ending:
        caller = pool.submit(threading.get_ident).result()
        pool.submit(ending, lambda _: idents.append(threading.get_ident()) or []).result()
        ending(lambda _: idents.append(threading.get_ident()) or [])
    assert idents[0] == caller
    assert idents[1] not in (caller, threading.get_ident())


def test_the_errors_of_a_call_come_through():
    def fail(_):
        raise ValueError("the inputs are wrong")

    with interruptible(onnxruntime.RunOptions) as ending, pytest.raises(ValueError, match="inputs are wrong"):
        ending(fail)
