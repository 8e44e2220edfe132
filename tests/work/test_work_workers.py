"""The whole command with worker processes: what comes out is what threads give."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import active_children

import numpy as np
import onnx
import pytest

from onnx_lowrank import InputError, compress
from onnx_lowrank.documents import plans
from tiny import cnn

X = np.random.default_rng(0).standard_normal((40, 8, 6, 6)).astype(np.float32)


def content(**options):
    with compress(cnn(), 0.5, device="cpu", **options) as result:
        return (
            result.proto.SerializeToString(deterministic=True),
            plans.to_json(result.plan),
            result.report.layers,
            result.report.trials,
        )


@pytest.mark.parametrize("options", [{}, {"calibration": X}], ids=["weights", "calibrated"])
def test_processes_make_the_model_that_threads_make(options):
    before = active_children()
    assert content(workers=2, **options) == content(**options)
    assert active_children() == before


def test_an_error_leaves_no_process(monkeypatch):
    def fail(*args, **more):
        raise InputError("It stops here.")

    before = active_children()
    monkeypatch.setattr("onnx_lowrank.validation.validate", fail)
    with pytest.raises(InputError, match="It stops here"):
        compress(cnn(), 0.5, device="cpu", workers=1)
    assert active_children() == before


def test_the_command_takes_workers(tmp_path):
    source = tmp_path / "in.onnx"
    onnx.save(cnn(), source)
    outputs = []
    for more in ([], ["--workers", "1"]):
        out = tmp_path / f"out{len(more)}.onnx"
        command = [sys.executable, "-m", "onnx_lowrank", str(source), str(out), "--ratio", "0.5", *more]
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]


def test_a_script_without_a_guard_is_told_of_it(tmp_path):
    """A worker process imports the script, which would start workers of its own."""
    onnx.save(cnn(), tmp_path / "in.onnx")
    script = tmp_path / "script.py"
    script.write_text("import onnx_lowrank\nonnx_lowrank.compress('in.onnx', 0.5, workers=1, device='cpu')\n")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "guard the call with `if __name__" in done.stderr.splitlines()[-1]
