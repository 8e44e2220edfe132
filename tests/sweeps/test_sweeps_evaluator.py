"""The user's function that scores models."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank import InputError
from onnx_lowrank.sweeps.evaluator import evaluator


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, which is not on the path."""
    text = "class Scores:\n    best = staticmethod(len)\nscore = len\nnumber = 3\n"
    (tmp_path / "mine_of_sweeps.py").write_text(text)
    (tmp_path / "broken_of_sweeps.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    yield "mine_of_sweeps"
    sys.modules.pop("mine_of_sweeps", None)


@pytest.mark.parametrize("name", ["score", "Scores.best"])
def test_a_function_of_the_current_folder(module: str, name: str) -> None:
    before = list(sys.path)
    found = evaluator(f"{module}:{name}")
    assert (found.name, found(Path("ab.onnx"))) == (f"{module}:{name}", 7.0)
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine_of_sweeps", "write it like mymodule:accuracy"),
        ("mine of sweeps:score", "write it like mymodule:accuracy"),
        ("mine_of_sweeps:none", "has no function 'none'"),
        ("mine_of_sweeps:number", "has no function 'number'"),
        ("mine_of_sweeps:Scores.none", "has no function 'Scores.none'"),
        ("nothing_of_this_name:score", r"cannot be imported \(ModuleNotFoundError"),
        ("broken_of_sweeps:score", r"cannot be imported \(ModuleNotFoundError"),
    ],
)
@pytest.mark.usefixtures("module")
def test_names_of_no_function(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluator(name)


def test_something_that_is_no_function() -> None:
    with pytest.raises(InputError, match="The evaluator is '3'"):
        evaluator(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("score", [1, 1.0, np.float64(1), np.float32(1), np.ones((1, 1)), np.int64(1)])
def test_numbers_of_all_kinds(score: object) -> None:
    assert evaluator(lambda model: score)(Path("a.onnx")) == 1.0  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("score", [True, float("inf"), np.float32("nan"), np.ones(2), 1j, "1", 10**400])
def test_scores_that_are_no_numbers(score: object) -> None:
    with pytest.raises(InputError, match="change it to return a finite number"):
        evaluator(lambda model: score)(Path("a.onnx"))  # type: ignore[arg-type, return-value]


def test_an_evaluator_that_exits_is_one_that_fails() -> None:
    with pytest.raises(InputError, match=r"failed on a\.onnx \(SystemExit, 3\)"):
        evaluator(lambda model: sys.exit(3))(Path("a.onnx"))
