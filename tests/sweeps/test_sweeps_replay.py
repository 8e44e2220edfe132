"""The command that makes a point's model again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.sweeps import replay


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, []),
        ({"budget": "macs", "recipe": "svd", "workers": 2, "cache": "c", "time": True}, []),
        ({"calibration": Path("my data.npz")}, ["--calibration", "my data.npz"]),
        (
            {"calibration": "texts.txt", "tokenizer": "t.json"},
            ["--calibration", "texts.txt", "--tokenizer", "t.json"],
        ),
        ({"mean": (0.5, 0.25), "std": 0.5}, ["--mean", "0.5,0.25", "--std", "0.5"]),
        ({"include": "a*", "exclude": ["b", "c"]}, ["--include", "a*", "--exclude", "b", "--exclude", "c"]),
        ({"input_shape": {"x": (1, 3)}}, ["--input-shape", "x=1,3"]),
        (
            {"input_shape": [{"x": (1, 3)}, {"x": (2, 3)}]},
            ["--input-shape", "x=1,3", "--input-shape", "x=2,3"],
        ),
        ({"calibration_samples": 100, "memory": 0.5}, ["--calibration-samples", "100", "--memory", "0.5"]),
        ({"max_error": 0.1234567891, "memory": 1e-9}, ["--max-error", "0.1234567891", "--memory", "1e-09"]),
        ({"provider": "CPUExecutionProvider", "max_error": 0.1}, ["--max-error", "0.1"]),
    ],
)
def test_the_words_of_a_command(options: Any, words: list[str]) -> None:
    found = replay.command(Path("in.onnx"), "out.onnx", "a plan.json", options)
    assert shlex.split(found) == ["onnx-lowrank", "in.onnx", "out.onnx", "--plan", "a plan.json", *words]


@pytest.mark.parametrize("options", [{"calibration": {"x": np.zeros(3)}}, {"inputs": {"x": np.zeros(3)}}])
def test_arrays_have_no_command(options: Any) -> None:
    assert not replay.command("in.onnx", "out.onnx", "plan.json", options)


def test_a_model_in_memory_has_none() -> None:
    assert not replay.command(object(), "out.onnx", "plan.json", {})
