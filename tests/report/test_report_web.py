"""The data of the page, and its text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import InputError, cli, compress
from onnx_lowrank.documents import report_schema as schema
from onnx_lowrank.documents import reports, sweeps
from onnx_lowrank.report import as_json
from onnx_lowrank.report.report import Report
from onnx_lowrank.report.web import data, render
from onnx_lowrank.sweeps import page
from onnx_lowrank.sweeps.run import sweep
from tiny import cnn

BAD = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked=1">&amp;'
SCRIPT = re.compile(r"<script([^>]*)>(.*?)</script>", re.DOTALL)


@pytest.fixture(scope="module")
def made() -> Report:
    with compress(cnn(), 0.6) as result:
        return result.report


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    onnx.save(cnn(), folder / "cnn.onnx")
    sweep(folder / "cnn.onnx", folder / "points", [0.8, 0.5, 0.001], evaluate=lambda path: len(path) / 1000)
    return folder / "points"


def points(folder: Path) -> tuple[sweeps.Sweep, dict[str, schema.Report]]:
    found = sweeps.read(folder / "sweep.json")
    return found, {p.name: reports.read(folder / p.report) for p in found.points if p.is_made}


def data_of(text: str) -> dict:
    return json.loads(next(body for kind, body in SCRIPT.findall(text) if "json" in kind))


def test_a_run_has_one_point_and_a_row_for_every_layer(made: Report) -> None:
    table = data.of_run(as_json.as_table(made), "onnx-lowrank a b")
    (point,) = table["points"]
    assert (table["kind"], table["command"], point["budget"]) == ("run", "onnx-lowrank a b", "params")
    assert point["reached"] == made.reached
    assert point["error"] == max(
        o.relative if o.centred is None else o.centred for o in made.validation.outputs
    )
    assert [layer["id"] for layer in table["layers"]] == [row.id for row in made.layers]
    for row, layer in zip(point["detail"]["rows"], made.layers, strict=True):
        assert row["params"] == layer.params.after
        assert ("option" in row) == (layer.option is not None)
        if layer.option is not None:
            assert row["option"][2] == layer.option.j
            assert row["bound"] == max(layer.certificate.spectral)
            assert table["pool"][row["curve"]]["errors"] == list(layer.detail.curve.errors)
    json.dumps(table, allow_nan=False)


def test_a_quantized_run_is_judged_after_the_quantization() -> None:
    inputs = np.random.default_rng(7).standard_normal((40, 8, 6, 6)).astype(np.float32)
    made = compress(cnn(), 0.6, then="int8", calibration={"x": inputs}, recipe="activation").report
    table = as_json.as_table(made)
    (point,) = data.of_run(table, "")["points"]
    (output,) = made.validation.outputs
    assert (point["error"], point["agreement"]) == (output.centred, output.agreement)
    (trial,) = (trial for trial in made.trials if trial.chosen)
    assert point["error"] != trial.error
    assert point["detail"]["then"] == "int8"
    trials = tuple(replace_point(each, caches=("y",)) for each in table.trials)
    (point,) = data.of_run(replace_point(table, trials=trials), "")["points"]
    assert point["error"] is None


def test_the_points_of_a_sweep_share_what_does_not_differ(swept: Path) -> None:
    table = data.of_sweep(*points(swept), "")
    first, second, failed = table["points"]
    assert [p["name"] for p in table["points"]] == ["params-0.8", "params-0.5", "params-0.001"]
    assert "cannot be reached" in failed["note"]
    assert failed["detail"] is None
    assert first["score"] is not None
    assert first["files"]["plan"] == "params-0.8.plan.json"
    pairs = zip(first["detail"]["rows"], second["detail"]["rows"], strict=True)
    assert any(one.get("alternatives", 0) == other.get("alternatives", 1) for one, other in pairs)


def test_points_that_others_beat_lose_their_details_first(
    swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, known = points(swept)
    worse = [replace_point(p, error=9.0) if p.name == "params-0.8" else p for p in found.points]
    monkeypatch.setattr(data, "_ROOM", 10)
    table = data.of_sweep(sweeps.Sweep(**{**fields(found), "points": tuple(worse)}), known, "")
    assert [bool(p["detail"]) for p in table["points"]] == [False, True, False]


def fields(struct: object) -> dict:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def replace_point(point: Any, **values: object) -> Any:
    return type(point)(**{**fields(point), **values})


def test_no_name_of_a_model_leaves_its_place(made: Report) -> None:
    layers = tuple(replace(row, name=BAD, nodes=(BAD,)) for row in made.layers)
    text = replace(made, model=BAD, layers=layers, warnings=(BAD,)).to_html(BAD)
    assert BAD not in text
    assert "<img" not in text.split("<script")[0]
    table = data_of(text)
    assert {table["model"], table["command"], table["layers"][0]["name"]} == {BAD}
    assert len(SCRIPT.findall(text)) == 3


def test_the_policy_allows_these_scripts_alone_and_no_connection(made: Report) -> None:
    text = made.to_html()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    scripts = [body for kind, body in SCRIPT.findall(text) if not kind]
    digests = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in scripts]
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    assert not re.search(r'<(script|link|img)[^>]*(src|href)=(?!"data:)', text.replace(scripts[0], ""))


def test_a_missing_library_is_told_before_the_work_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(cnn(), tmp_path / "in.onnx")
    monkeypatch.setattr(render, "_LIBRARIES", ("jinja2", "no_such_library"))
    monkeypatch.chdir(tmp_path)
    for arguments in (["in.onnx", "out.onnx", "--ratio", "0.5"], ["sweep", "in.onnx", "points"]):
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments, "--report", "r.html"])
        assert ended.value.code == 2
        assert capsys.readouterr().err == (
            "onnx-lowrank: A page needs no_such_library, which is not installed: run `pip install "
            '"onnx-lowrank[report]"`.\n'
        )
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_the_command_writes_a_page_that_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swept: Path
) -> None:
    onnx.save(cnn(), tmp_path / "my model.onnx")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(["-q", "my model.onnx", "out.onnx", "--ratio", "0.6", "--report", "r.html"])
    assert not ended.value.code
    shown = data_of(Path("r.html").read_text(encoding="utf-8"))["command"]
    assert shown == "onnx-lowrank -q 'my model.onnx' out.onnx --ratio 0.6 --report r.html"
    with pytest.raises(SystemExit):
        cli.main(["sweep", "-q", "my model.onnx", "points", "--ratios", "0.8,0.6", "--report", "s.html"])
    table = data_of(Path("s.html").read_text(encoding="utf-8"))
    assert table["command"].startswith("onnx-lowrank sweep -q")
    assert [p["name"] for p in table["points"]] == ["params-0.8", "params-0.6"]


def test_a_sweep_without_a_model_has_no_page(tmp_path: Path) -> None:
    onnx.save(cnn(), tmp_path / "cnn.onnx")
    sweep(tmp_path / "cnn.onnx", tmp_path / "points", [0.001])
    with pytest.raises(InputError, match=r"No point of .* has a model, so there is no page"):
        page.write(tmp_path / "points", tmp_path / "page.html")


def test_node_data_hold_one_error_of_every_rewritten_layer(made: Report) -> None:
    table = json.loads(made.to_node_data())
    rewritten = [row for row in made.layers if row.option is not None]
    assert table["name"] == "schatten error of layers"
    assert {node: entry["value"] for node, entry in table["results"].items()} == {
        node: float(f"{row.error:.4g}") for row in rewritten for node in row.nodes
    }
    assert [stop["stop"] for stop in table["gradient"]] == [0, 0.5, 1]


def test_node_data_prefer_held_out_errors_and_fall_back_to_bounds(made: Report) -> None:
    x = np.random.default_rng(0).standard_normal((40, 8, 6, 6)).astype(np.float32)
    with compress(cnn(), 0.7, recipe="activation", calibration={"x": x}) as result:
        assert json.loads(result.report.to_node_data())["name"] == "held-out error of layers"
    unknown = replace(made, layers=tuple(replace(row, error=None, fit=None) for row in made.layers))
    table = json.loads(unknown.to_node_data())
    assert table["name"] == "certified bound of layers"
    assert len(table["results"]) == sum(row.option is not None for row in made.layers)
