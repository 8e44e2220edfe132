"""A saved plan in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import cli, compress
from tiny import cnn


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    with compress(cnn(), 0.6, dry_run=True) as result:
        result.save_plan(path)
    return path


def explained(path: Path, capsys: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", str(path)])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    return str(out)


def test_every_layer_is_there_with_its_option_or_its_reason(plan: Path, capsys: Any) -> None:
    text, table = explained(plan, capsys), json.loads(plan.read_text())
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    for layer in table["layers"]:
        if layer["fold"] is not None:
            error = rows[layer["id"]][-1]
            assert rows[layer["id"]][:4] == [
                layer["fold"],
                str(layer["k"]),
                str(layer["j"]),
                f"{layer['cost']:,}",
            ]
            assert float(error) == pytest.approx(layer["error"], rel=5e-3)
        else:
            assert layer["id"] in text
            assert layer["reason"][:20] in text
    assert "for 0.6 of params, by recipe schatten" in text
    assert "proven optimal" in text
    assert "Factors are fitted to the weights." in text


def test_an_edited_plan_proves_nothing(plan: Path, capsys: Any) -> None:
    table = json.loads(plan.read_text())
    chosen = next(layer for layer in table["layers"] if layer["fold"] is not None)
    chosen["j"] += 1
    plan.write_text(json.dumps(table))
    text = explained(plan, capsys)
    assert "It was edited" in text
    assert "proven optimal" not in text


def test_a_plan_with_recovery_says_what_a_replay_needs(tmp_path: Path, capsys: Any) -> None:
    onnx.save(cnn(), tmp_path / "cnn.onnx")
    data = {"x": np.random.default_rng(0).standard_normal((40, 8, 6, 6)).astype(np.float32)}
    with compress(tmp_path / "cnn.onnx", 0.6, recipe="activation", calibration=data, dry_run=True) as result:
        result.save_plan(tmp_path / "plan.json")
    text = " ".join(explained(tmp_path / "plan.json", capsys).split())
    assert "outputs of the layers on calibration inputs, and every layer makes up for the errors" in text
    assert "a replay needs --calibration with the same inputs" in text


def test_a_file_that_is_no_plan(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        cli.main(["explain", str(tmp_path / "plan.json")])
    assert ended.value.code == 2
    assert "is wrong" in capsys.readouterr().err.replace("\n", " ")


def test_a_quantization_that_follows_is_named(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "plan.json"
    with compress(cnn(), 0.6, then="int8", dry_run=True) as result:
        result.save_plan(path)
    assert "The model is then quantized (int8)." in explained(path, capsys)
