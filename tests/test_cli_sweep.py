"""The command `onnx-lowrank sweep`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from onnx_lowrank import cli
from tiny import cnn, files


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(cnn(), tmp_path / "cnn.onnx")
    monkeypatch.chdir(tmp_path)
    return Path("cnn.onnx")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.usefixtures("source")
def test_a_table_of_the_points_and_their_files(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "sweep", "cnn.onnx", "points", "--ratios", "0.8,0.6")
    assert (code, out) == (0, "")
    assert "factorize (params-0.6, 2/2)" in err
    assert "2 models, with their plans and reports, are in points." in err
    names = {name for name in files(Path("points")) if not name.startswith(".")}
    suffixes = (".onnx", ".plan.json", ".report.json")
    assert names == {f"params-{r}{s}" for r in ("0.8", "0.6") for s in suffixes} | {"sweep.json"}


@pytest.mark.usefixtures("source")
def test_a_range_has_points_at_equal_steps(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--ratios", "0.9..0.5", "--points", "3", "--quiet", "--pass", "svd", "--budget", "bytes")
    assert run(capsys, "sweep", "cnn.onnx", "points", *options) == (0, "", "")
    table = json.loads(Path("points/sweep.json").read_text())
    assert [(point["asked"], point["recipe"], point["budget"]) for point in table["points"]] == [
        (ratio, "svd", "bytes") for ratio in (0.9, 0.7, 0.5)
    ]


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep"], "IN.onnx is missing: onnx-lowrank sweep IN.onnx FOLDER tries many ratios."),
        (["swep", "cnn.onnx", "points"], "There is no command 'swep': pass sweep, or name a model file."),
        (["sweep", "cnn.onnx"], "FOLDER is missing: onnx-lowrank sweep IN.onnx FOLDER tries many ratios."),
        (["sweep", "none.onnx", "points"], "none.onnx does not exist: check the path."),
        (["sweep", "cnn.onnx", "points", "--ratios", "half"], "write it like 0.9,0.7,0.5 or like 0.9..0.2"),
        (["sweep", "cnn.onnx", "points", "--ratios", "0.9..0.2..0.1"], "is no list of ratios"),
        (["sweep", "cnn.onnx", "points", "--ratios", "2"], "give some above 0 and at most 1"),
        (["sweep", "cnn.onnx", "points", "--ratios", "0.5", "--points", "3"], "leave it out of a list"),
        (["sweep", "cnn.onnx", "points", "--ratio", "0.5"], "There is no option --ratio: did you mean"),
        (["sweep", "cnn.onnx", "points", "--evaluate", "nothing:here"], "cannot be imported"),
        (["sweep", "cnn.onnx", "points", "--budget", "weight"], "weight"),
        (["sweep", "cnn.onnx", "cnn.onnx"], "is a file: name a folder for the points."),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("scores", [[], [1.0], [1.0, 0.5]], ids=["original", "first point", "second point"])
def test_a_page_has_the_points_before_an_evaluator_that_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, scores: list[float]
) -> None:
    left = iter(scores)
    monkeypatch.setitem(sys.modules, "scores_of_pages", SimpleNamespace(score=lambda model: next(left)))
    options = ("--ratios", "0.9,0.7,0.5", "--pass", "svd", "--evaluate", "scores_of_pages:score")
    code, _, err = run(capsys, "sweep", "cnn.onnx", "points", *options, "-q", "--report", "page.html")
    assert (code, "failed on" in err) == (2, True)
    assert Path("page.html").exists() == bool(scores)
    if scores:
        table = json.loads(Path("points/sweep.json").read_text())
        assert [point["score"] for point in table["points"]] == [*scores[1:], None]
        assert all(point["name"] in Path("page.html").read_text() for point in table["points"])


@pytest.mark.usefixtures("source")
def test_the_command_of_a_point_makes_its_model_again(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--ratios", "0.7", "--exclude", "fc", "--input-shape", "x=2,8,6,6", "-q")
    Path("cnn.onnx").rename("my cnn.onnx")
    assert run(capsys, "sweep", "my cnn.onnx", "my points", *options) == (0, "", "")
    (point,) = json.loads(Path("my points/sweep.json").read_text())["points"]
    words = shlex.split(point["command"])
    assert words[:3] == ["onnx-lowrank", "my cnn.onnx", "params-0.7.onnx"]
    assert run(capsys, *words[1:], "-q") == (0, "", "")
    assert Path("params-0.7.onnx").read_bytes() == Path("my points/params-0.7.onnx").read_bytes()


def test_its_help_has_its_own_options_first(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "sweep", "-h")
    assert code == 0
    assert out.index("--ratios") < out.index("--evaluate") < out.index("--calibration")
    assert "--target-error" not in out


def test_the_help_of_the_program_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "onnx-lowrank sweep IN.onnx FOLDER" in run(capsys, "-h")[1]


@pytest.mark.usefixtures("source")
def test_compress_has_a_name_too(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("compress",)):
        assert run(capsys, *words, "cnn.onnx", "out.onnx", "--ratio", "0.7", "-q") == (0, "", "")
        made = Path("out.onnx").read_bytes()
        Path("out.onnx").unlink()
        assert onnx.load_from_string(made).graph.node
