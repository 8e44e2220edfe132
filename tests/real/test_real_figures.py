"""The figures that docs/benchmarks.md states about real models; `tests/benchmarks` prints them."""

import subprocess
import sys
from pathlib import Path

import pytest

from onnx_lowrank.documents import recipes
from onnx_lowrank.request import DEFAULT_RECIPE

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_alds_reaches_the_known_optima_and_beats_the_reference_code(shared):
    model = shared / "models/resnet20_cifar10.onnx"
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_alds.py", model], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "268,336 weights" in run.stdout
    assert "WORSE" not in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("alds", 0.75), (DEFAULT_RECIPE, 0.85)])
def test_accuracy_near_half_the_parameters(shared, name, least):
    from bench_recipes import NEAR_HALF, score
    from scores import tasks

    (resnet20,) = tasks(("resnet20",))
    assert score(resnet20, recipes.load(name), NEAR_HALF) >= least
