"""What shells and programs get from the command: completion, lines of JSON, help without colours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnx_lowrank import cli, commands
from onnx_lowrank.completion import SHELLS, script
from tiny import cnn

RATIO = ("--ratio", "0.5")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: Any) -> str:
    monkeypatch.chdir(tmp_path)
    onnx.save(cnn(), "in.onnx")
    return "in.onnx"


def ran(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(str(ended.value.code)), *capsys.readouterr()


def completed(capsys: Any, monkeypatch: Any, line: str) -> list[str]:
    """The completions of a command line of bash whose last word is typed in part."""
    monkeypatch.setenv("_ONNX_LOWRANK_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    code, out, err = ran(capsys)
    assert (code, err) == (0, "")
    return out.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("onnx-lowrank sw", ["file,sw", "plain,sweep"]),
        ("onnx-lowrank --rati", ["plain,--ratio"]),
        ("onnx-lowrank sweep --rati", ["plain,--ratios"]),
        ("onnx-lowrank sweep in", ["file,in"]),
        ("onnx-lowrank compare a.onnx --ti", ["plain,--time"]),
        ("onnx-lowrank in.onnx out.onnx --budget la", ["plain,latency"]),
        ("onnx-lowrank in.onnx out.onnx --then int", ["plain,int8", "plain,int4"]),
        ("onnx-lowrank in.onnx out.onnx --lowering g", ["plain,group-free"]),
        ("onnx-lowrank in.onnx out.onnx --target c", ["plain,cpu", "plain,cuda", "plain,coreml"]),
        ("onnx-lowrank sweep in.onnx folder --engine op", ["plain,openvino"]),
        ("onnx-lowrank compare a.onnx b.onnx --engine on", ["plain,onnxruntime"]),
        ("onnx-lowrank in.onnx out.onnx --pass svd-", ["plain,svd-energy", "plain,svd-llm"]),
        ("onnx-lowrank in.onnx out.onnx --completion f", ["plain,fish"]),
    ],
)
def test_words_are_completed(capsys: Any, monkeypatch: Any, line: str, expected: list[str]) -> None:
    assert completed(capsys, monkeypatch, line) == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script_that_it_accepts(capsys: Any, shell: str) -> None:
    code, out, _ = ran(capsys, "--completion", shell)
    assert (code, out) == (0, script(shell).rstrip("\n") + "\n")
    assert f"_ONNX_LOWRANK_COMPLETE={shell}_complete" in out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=out, text=True, check=True)


def test_progress_comes_as_lines_of_json(capsys: Any, source: str) -> None:
    code, out, err = ran(capsys, source, "out.onnx", *RATIO, "--json")
    assert (code, out) == (0, "")
    events = [json.loads(line) for line in err.splitlines()]
    names = [event["name"] for event in events if event["event"] == "stage"]
    assert names == ["find layers", "spectra", "plan", "factorize", "validate"]
    assert events[2] == {"event": "stage", "name": "spectra", "total": 3}
    assert [e["name"] for e in events if e["event"] == "step" and e["share"] == 1] == names


@pytest.mark.parametrize("where", ["first", "last"])
def test_an_error_is_a_line_of_json_too(capsys: Any, source: str, where: str) -> None:
    arguments = (source, "out.onnx", "--ratio", "2")
    code, _, err = ran(capsys, *(("--json", *arguments) if where == "first" else (*arguments, "--json")))
    event = json.loads(err.splitlines()[-1])
    assert (event["event"], event["code"], code) == ("error", 2, 2)
    assert event["message"].startswith("The ratio is 2.0")


def test_an_error_of_the_words_is_a_line_of_json_too(capsys: Any, source: str) -> None:
    _, _, err = ran(capsys, source, "out.onnx", "--ratio", "half", "--json")
    assert json.loads(err)["message"].startswith("--ratio: 'half' is not a number")


def test_decisions_are_lines_of_json_too(capsys: Any, source: str) -> None:
    _, _, err = ran(capsys, "inspect", source, "--json", "-v")
    logged = [event for event in map(json.loads, err.splitlines()) if event["event"] == "log"]
    assert {event["level"] for event in logged} == {"debug"}
    assert any("3 layers" in event["message"] for event in logged)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["help"], "There is no command 'help': pass -h."),
        (
            ["optimize", "in.onnx", "out.onnx"],
            "There is no command 'optimize': leave it out, or name one of compare, compress,",
        ),
        (["sweep", "in.onnx"], "FOLDER is missing: onnx-lowrank sweep IN.onnx FOLDER tries many ratios."),
        (
            ["compare", "in.onnx"],
            "B.onnx is missing: onnx-lowrank compare A.onnx B.onnx compares two models.",
        ),
        (["sweep", "in.onnx", "in.onnx", "-q"], "in.onnx is a file: name a folder for the points."),
    ],
)
def test_mistakes_about_commands_are_answered(
    capsys: Any, source: str, words: list[str], message: str
) -> None:
    code, out, err = ran(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("name", commands.names())
def test_every_help_has_examples_and_exit_codes(capsys: Any, name: str) -> None:
    code, out, _ = ran(capsys, name, "-h")
    assert code == 0
    assert "Examples:\n" in out
    assert "  3    the ratio cannot be reached" in out
    assert max(map(len, out.splitlines())) <= 80 + 20


@pytest.mark.parametrize("name", ["inspect", "compare"])
def test_a_help_speaks_of_its_own_command(capsys: Any, name: str) -> None:
    _, out, _ = ran(capsys, name, "-h")
    assert "--calibration" not in out.partition("Examples:")[0]
    assert "Decompose" not in out


@pytest.mark.parametrize("is_set", [True, False])
def test_no_color_leaves_colours_out(source: str, is_set: bool) -> None:
    words = [sys.executable, "-m", "onnx_lowrank", source, "out.onnx", "--ratio", "2"]
    colours = {"NO_COLOR": "1"} if is_set else {}
    environment = {n: v for n, v in os.environ.items() if n != "NO_COLOR"} | colours
    environment |= {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    ended = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert ("\x1b[31m" in ended.stderr) != is_set
