"""A run loads only the modules that it needs: most of the time of a small run is their import."""

import subprocess
import sys

import numpy as np
import onnx
import pytest

from tiny import cnn

RUN = """
import gc
import sys
from onnx.parser import parse_model
from onnx.helper import make_tensor
import numpy as np
import onnx_lowrank

text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,16] x) => (float[N,16] y) { y = MatMul(x, w) }'
model = parse_model(text)
w = np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32)
model.graph.initializer.append(make_tensor("w", 1, w.shape, w))
assert gc.isenabled()
onnx_lowrank.compress(model, 0.5, **OPTIONS)
print(*sys.modules, sep="\\n")
"""

LATE = {
    "onnx_lowrank.calibrate.measurement": {"calibration": "DATA", "recipe": "activation"},
    "onnx_lowrank.stages.recover": {"calibration": "DATA", "recipe": "activation"},
    "onnx_lowrank.calibrate.sensitivity": {"calibration": "DATA", "recipe": "output"},
    "onnx_lowrank.calibrate.data": {"inputs": "DATA"},
    "onnx_lowrank.work.kept": {"cache": "FOLDER"},
    "onnx_lowrank.budgets.latency.stopwatch": {"time": True, "cache": False},
}
"""Modules that only some runs need, each with the options of such a run."""

NEVER = ("distributed", "numpy.f2py", "onnx.reference", "onnx_lowrank.toolchains", "scipy.optimize")
"""Modules that no run of this model needs."""


def loaded(options, folder=""):
    text = RUN.replace("OPTIONS", repr(options)).replace("'DATA'", "{'x': np.ones((40, 16), np.float32)}")
    text = text.replace("'FOLDER'", repr(str(folder)))
    ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return set(ran.stdout.split("\n"))


def test_a_run_without_data_and_times_loads_little():
    assert not loaded({}) & {*LATE, *NEVER}


@pytest.mark.slow
@pytest.mark.parametrize("module", LATE)
def test_the_runs_that_need_a_module_load_it(module, tmp_path):
    assert module in loaded(LATE[module], tmp_path)


def test_a_run_in_the_development_mode_of_python_warns_of_nothing(tmp_path):
    """Neither of a file that stays open, nor of a text in the encoding of the system."""
    onnx.save(cnn(), tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((40, 8, 6, 6)).astype(np.float32))
    mode = "-X dev -X warn_default_encoding -W error -m onnx_lowrank"
    options = "in.onnx out.onnx --ratio 0.5 --calibration x.npz --pass activation --cache kept -q"
    command = [sys.executable, *mode.split(), *options.split()]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
