"""A look at a model before any ratio."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console

from onnx_lowrank import InputError, cli, compress
from onnx_lowrank.inspection import inspect
from onnx_lowrank.report import inspection
from tiny import cnn, weights


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "cnn.onnx"
    onnx.save(cnn(), path)
    return path


def text(seen: inspection.Inspection, width: int = 80) -> str:
    out = StringIO()
    inspection.show(seen, Console(file=out, width=width))
    return out.getvalue()


def test_ranks_hold_the_energy_that_they_claim(source: Path) -> None:
    rows = {row.id: row for row in inspect(source).layers}
    for name, weight in weights().items():
        sigma = np.linalg.svd(weight.reshape(len(weight), -1).astype(np.float64), compute_uv=False)
        for share, rank in zip(inspection.SHARES, rows[name].ranks, strict=True):
            held = np.cumsum(sigma**2) / np.sum(sigma**2)
            assert held[rank - 1] >= share
            assert rank == 1 or held[rank - 2] < share
        assert rows[name].full_rank == len(sigma)


def test_larger_ranks_than_those_that_pay_have_more_parameters(source: Path) -> None:
    for row in inspect(source).layers:
        _, f, *rest = row.shape
        size = f + int(np.prod(rest))
        assert row.pays * size < row.params <= (row.pays + 1) * size


def test_the_smallest_ratio_is_that_of_the_error(source: Path) -> None:
    seen = inspect(source)
    with compress(source, seen.least) as result:
        assert result.report.reached <= seen.least
    with pytest.raises(InputError, match="ratio"):
        compress(source, 0.0)
    assert seen.total == result.report.totals.amount("params").before


def test_a_weight_of_zeros_has_rank_one(tmp_path: Path) -> None:
    onnx.save(cnn(conv2=np.zeros((16, 16, 3, 3), np.float32)), tmp_path / "zero.onnx")
    (row,) = (row for row in inspect(tmp_path / "zero.onnx").layers if row.id == "conv2")
    assert all(1 <= rank <= row.full_rank for rank in row.ranks)


def test_options_choose_layers_and_shapes(source: Path) -> None:
    seen = inspect(source, include="conv*", input_shape={"x": (2, 8, 6, 6)})
    assert [row.id for row in seen.layers] == ["conv1", "conv2"]
    assert [row.macs for row in seen.layers] == [2 * 36 * 16 * 8 * 9, 2 * 36 * 16 * 16 * 9]
    assert any("fc" in (item.weight or "") or "n.y" in item.name for item in seen.skipped)


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_has_the_largest_layers_first_and_fits(source: Path, width: int) -> None:
    lines = text(inspect(source), width).splitlines()
    assert lines[0].startswith("cnn: 3 layers can be decomposed, with 3.52k of 3.52k float parameters")
    assert [line.split()[0] for line in lines[4:7]] == ["conv2", "conv1", "fc"]
    assert max(map(len, lines)) <= width


def test_a_model_without_layers(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu (x) }'
    )
    onnx.save(proto, tmp_path / "relu.onnx")
    assert "relu: 0 layers can be decomposed, with 0 of 0 float parameters" in text(
        inspect(tmp_path / "relu.onnx")
    )


def test_the_command(source: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", str(source), "-q", "--exclude", "fc"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert "2 layers can be decomposed" in out


def test_the_command_with_a_file_that_is_no_model(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", str(tmp_path / "text.onnx"), "-q"])
    assert ended.value.code == 2
    assert "text.onnx" in capsys.readouterr().err.replace("\n", "")
