"""The package as a library: it leaves nothing in its process, and any number of calls run at once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import locale
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import threadpoolctl

from onnx_lowrank import InputError, compress
from tiny import CNN, built, cnn, decaying, weights

IMAGES = np.random.default_rng(5).standard_normal((20, 8, 6, 6), np.float32)
WORKS = {
    "data-free": {},
    "calibrated": {"calibration": {"x": IMAGES}},
    "workers": {"workers": 2},
}


@pytest.fixture(scope="module")
def doubles():
    """A model that onnx's reference implementation runs, as ONNX Runtime has no such convolutions."""
    text = CNN.replace("float[", "double[")
    return built(text, {name: array.astype(np.float64) for name, array in weights().items()})


def outcome(model, options):
    with compress(model, 0.5, cache=False, **options) as result:
        return result.proto.SerializeToString(deterministic=True), result.plan, result.report.to_json()


def state():
    """All that a call could leave in the process."""
    limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    root, own = logging.getLogger(), logging.getLogger("onnx_lowrank")
    umask = os.umask(0)
    os.umask(umask)
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "blocked signals": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "timers": signal.getitimer(signal.ITIMER_REAL),
        "warnings": list(warnings.filters),
        "logging": [(log.level, list(log.handlers), log.propagate, log.disabled) for log in (root, own)],
        "NumPy's errors": np.geterr(),
        "NumPy's random state": np.random.get_state()[1].tolist(),  # noqa: NPY002 - the global one
        "random state": random.getstate(),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "garbage": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "recursion": sys.getrecursionlimit(),
        "switches": sys.getswitchinterval(),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in limits},
        "mode of files": umask,
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.gettrace(), sys.getprofile()),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "threads": set(threading.enumerate()),
        "BLAS": sorted((lib["filepath"], lib["num_threads"]) for lib in threadpoolctl.threadpool_info()),
        "open files": len([*Path("/proc/self/fd").iterdir()]),
        "processes": _children(),
    }


def _children():
    return sorted(Path("/proc/thread-self/children").read_text().split())


@pytest.mark.skipif(not Path("/proc/thread-self/children").exists(), reason="the system has no such /proc")
@pytest.mark.parametrize("work", [*WORKS, "reference", "refused", "failed"])
def test_a_call_leaves_nothing_in_its_process(doubles, work, monkeypatch):
    def call():
        if work == "refused":
            with pytest.raises(InputError):
                compress(cnn(), 2.0)
        elif work == "failed":
            with monkeypatch.context() as patched:
                patched.setattr("onnx_lowrank.session.build", lambda *given: 1 // 0)
                with pytest.raises(ZeroDivisionError):
                    compress(cnn(), 0.5)
        else:
            outcome(doubles if work == "reference" else cnn(), WORKS.get(work, {}))

    call()  # Libraries that it imports may stay, with their threads.
    gc.collect()
    before = state()
    call()
    gc.collect()
    after = state()
    for name, value in before.items():
        assert after[name] == value, name


def test_calls_at_once_in_threads_give_the_bytes_of_calls_one_by_one(doubles):
    given = [(model, WORKS[work]) for model in (cnn(), doubles) for work in ("data-free", "calibrated")]
    wanted = [outcome(*each) for each in given]
    filters = list(warnings.filters)
    with ThreadPoolExecutor(len(given)) as pool:
        assert list(pool.map(outcome, *zip(*given, strict=True))) == wanted
    assert warnings.filters == filters


FORKED = """
import multiprocessing, os, sys
sys.path.insert(0, sys.argv[1])
from concurrent.futures import ProcessPoolExecutor
from test_library import WORKS, outcome
from tiny import cnn

def digest(work):
    return hash(outcome(cnn(), WORKS[work])[0])

def forked(work):
    child = os.fork()
    if not child:
        os._exit(0 if digest(work) == wanted[work] else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

if __name__ == "__main__":
    works = ["data-free", "calibrated"]
    wanted = {work: digest(work) for work in works}
    for work in works:
        assert forked(work) == 0, work
    for method in ("fork", "spawn"):
        with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
            assert list(pool.map(digest, works)) == list(wanted.values()), method
    print("same")
"""


def test_forked_and_spawned_processes_give_the_bytes_of_their_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FORKED)
    command = [sys.executable, "-W", "error", script, Path(__file__).parent]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONHASHSEED": "0"},
        timeout=600,
    )
    assert (ran.stdout, ran.stderr, ran.returncode) == ("same\n", "", 0)


def test_a_forked_process_that_exits_leaves_the_result_of_its_parent(tmp_path):
    """Its clean-up at exit is that of the parent, too."""
    model = tmp_path / "in.onnx"
    onnx.save(cnn(), model, save_as_external_data=True, location="in.data", size_threshold=0)
    script = f"""
import atexit, os
from onnx_lowrank import compress
result = compress({str(model)!r}, 0.5, cache=False)
child = os.fork()
if not child:
    atexit._run_exitfuncs()
    os._exit(0)  # ONNX Runtime's own end fails in a forked process.
assert os.waitpid(child, 0)[1] == 0
result.save({str(tmp_path / "out.onnx")!r})
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ran.stderr, ran.returncode) == ("", 0)
    onnx.checker.check_model(str(tmp_path / "out.onnx"))


class Cell(io.TextIOBase):
    """The output of a notebook's cell: it has neither a buffer nor a descriptor."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)


@pytest.mark.parametrize("work", ["data-free", "workers"])
def test_a_call_in_a_notebook(work):
    """The loop of events runs in the main thread; the output is no terminal."""

    async def cell():
        here = outcome(cnn(), WORKS[work])
        return here, await asyncio.to_thread(outcome, cnn(), WORKS[work])

    printed = Cell()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        here, there = asyncio.run(cell())
        assert printed.text == ""
        with compress(cnn(), 0.5, cache=False) as result:
            result.report.table()
    assert here == there == outcome(cnn(), WORKS[work])
    assert "2 of 3 layers rewritten" in printed.text


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    wanted = outcome(cnn(), WORKS["calibrated"])
    now = iter(range(2**40, 0, -(2**20)))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    for options in ({"cache": False}, {"cache": tmp_path}, {"cache": tmp_path}):
        with compress(cnn(), 0.5, calibration={"x": IMAGES}, **options) as result:
            assert result.proto.SerializeToString(deterministic=True) == wanted[0]


GROWN = """
import gc, sys, tracemalloc
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_library import chained, outcome
import numpy as np

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

model, size = chained()
options = {"calibration": {"x": np.random.default_rng(0).standard_normal((64, 256), np.float32)}}
for _ in range(5):
    outcome(model, options)
before = resident()
for _ in range(50):
    outcome(model, options)
grown = resident() - before
tracemalloc.start()
outcome(model, options)
gc.collect()
first = tracemalloc.get_traced_memory()[0]
for _ in range(5):
    outcome(model, options)
gc.collect()
print(grown / size, (tracemalloc.get_traced_memory()[0] - first) / 5)
"""


def chained():
    """A model of two matrices, and the bytes of both."""
    text = """<ir_version: 8, opset_import: ["": 17]> chain (float[N, 256] x) => (float[N, 256] y) {
        a = MatMul (x, v)
        b = Relu (a)
        y = MatMul (b, w)
    }"""
    arrays = {"v": decaying(1, 256, 512), "w": decaying(2, 512, 256)}
    return built(text, arrays), sum(array.nbytes for array in arrays.values())


@pytest.mark.faults
def test_the_memory_of_50_calls_is_returned():
    """A call keeps less than a third of its weights, so it keeps no copy of them, and no objects."""
    ran = subprocess.run(
        [sys.executable, "-c", GROWN, Path(__file__).parent], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    grown, objects = map(float, ran.stdout.split())
    assert grown < 50 / 3
    assert objects < 2**14
