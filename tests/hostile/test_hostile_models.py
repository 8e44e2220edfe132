"""Models that attack: the command refuses them with a sentence, or leaves alone what it cannot use."""

from __future__ import annotations

import json

import attacks_sizes  # noqa: F401 - it adds to the table
import attacks_structure  # noqa: F401
import numpy as np
import onnx
import pytest
from attacking import ATTACKS, ESCAPES, function_chain, matrices

from onnx_lowrank import compress
from tiny import cnn

REFUSED = {
    "a weight from ConstantOfShape": "computes constants of 17592186044416, most of them in the tensor 'v'",
    "a weight from ConstantOfShape of 8 GiB": "stores 258 elements, but computes constants of 2147483648",
    "a weight from Expand": "computes constants of 2147483648, most of them in the tensor 'v'",
    "a range without end": "computes constants of 17179869185, most of them in the tensor 'i'",
    "a weight that doubles": "computes constants of 562949953421056, most of them in the tensor 'd40'",
    "shapes that double": "most of them in the tensor 'd40'",
    "constants that double": "most of them in the tensor 'd40'",
    "tiles that double": "most of them in the tensor 'd40'",
    "a gather that doubles": "most of them in the tensor 'd40'",
    "strings that double": "most of them in the tensor 'd40'",
    "a sparse weight": "stores 0 elements, but computes constants of 1208925819614629174706176",
    "a sparse constant": "stores 256 elements, but computes constants of 4294967296",
    "functions that double": "has 3298534883328 nodes when its functions are expanded, over 1048576",
    "functions 3000 deep": "in calls that nest over 64 deep",
    "functions 10000 deep": "in calls that nest over 64 deep",
    "a function that calls itself": "has the function 'f', which calls itself",
    "two functions that call each other": "has the function 'f', which calls itself",
    "a function that calls itself in a body": "has the function 'f', which calls itself",
    "a function named like an operator": "has the function 'Relu', which calls itself",
    "a MatMul function that calls itself": "has the function 'MatMul', which calls itself",
    "a runtime operator that calls itself": "has the function 'Gelu', which calls itself",
    "two functions of one name": "has the function 'f' twice",
}
"""Attacks, and a part of the message with which they are refused."""


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_in_bounds(name, server, tmp_path):
    (tmp_path / "in.onnx").write_bytes(ATTACKS[name]().SerializeToString())
    run = server.run(tmp_path, "in.onnx", "out.onnx", "--ratio", "0.5", "--no-cache")
    assert not run.fault, run.err
    assert server.is_clean
    assert run.code == 0 or not (tmp_path / "out.onnx").exists()
    if name in REFUSED:
        assert run.code == 2
        assert REFUSED[name] in run.message


@pytest.mark.parametrize("name", ["escapes in names", "escapes in an operator"])
def test_no_output_moves_the_terminal(name, server, tmp_path):
    (tmp_path / "in.onnx").write_bytes(ATTACKS[name]().SerializeToString())
    results = ("--report", "report.json", "--save-plan", "plan.json")
    run = server.run(tmp_path, "in.onnx", "out.onnx", "--ratio", "0.95", "--no-cache", "-vv", *results)
    assert run.code == 0
    assert not run.fault
    for file in ("report.json", "plan.json"):
        text = (tmp_path / file).read_text("utf-8")
        assert all(char.isprintable() or char == "\n" for char in text)
        assert json.loads(text)


def test_escapes_in_arguments(server, tmp_path):
    onnx.save(cnn(), tmp_path / "in.onnx")
    for arguments in (
        [ESCAPES, "out.onnx", "--ratio", "0.5"],
        ["in.onnx", f"{ESCAPES}/out.onnx", "--ratio", "0.5"],
        ["in.onnx", "out.onnx", "--ratio", ESCAPES],
        ["in.onnx", "out.onnx", "--ratio", "0.5", "--include", ESCAPES],
        ["in.onnx", "out.onnx", "--ratio", "0.5", "--pass", ESCAPES],
    ):
        run = server.run(tmp_path, *arguments)
        assert run.code == 2
        assert not run.fault


def test_functions_that_are_no_attack_are_kept():
    assert compress(function_chain(50), 1.0, dry_run=True).report


def test_constants_that_are_no_attack_are_kept():
    """Each weight passes through many views, which are computed constants."""
    nodes = " ".join(f"v{n + 1} = Identity (v{n})" for n in range(12))
    proto = matrices(f"{nodes} z = MatMul (x, v12)", v0=np.ones((16, 16), np.float32))
    assert compress(proto, 1.0, dry_run=True).report
