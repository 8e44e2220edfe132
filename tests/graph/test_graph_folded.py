"""Small tensors that are computed from constants alone, and every reason to leave a tensor unknown."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.files.load import load
from onnx_lowrank.graph import folded as module
from onnx_lowrank.graph.folded import folded
from onnx_lowrank.graph.walk import Walk
from rewriting import model


def value(nodes, **weights):
    """The value of the shape s that a Reshape reads."""
    body = f"g (float[4,6] x, int64[2] i) => (float[a,b] y) {{ {nodes} y = Reshape (x, s) }}"
    loaded = load(model(body, **weights))
    walk = Walk(loaded.proto)
    (place,) = (place for place in walk.places() if walk.node(place).output[0] == "y")
    return folded(walk, loaded, walk.operand(place, 1))


KNOWN = {
    "literal": "s = Constant <value_ints = [6, 4]> ()",
    "tensor": "s = Constant <value = int64[2] {6, 4}> ()",
    "initializer": "",
    "identity": "s = Identity (n)",
    "computed": """a = Constant <value_ints = [3]> () b = Constant <value_ints = [2]> () c = Mul (a, b)
        d = Constant <value = int64[1] {4}> () s = Concat <axis = 0> (c, d)""",
    "read twice": "a = Constant <value_ints = [3, 2]> () s = Add (a, a)",
    "converted": "a = Constant <value_floats = [6.0, 4.0]> () s = Cast <to = 7> (a)",
}


@pytest.mark.parametrize("nodes", KNOWN.values(), ids=KNOWN)
def test_a_tensor_that_follows_from_constants_is_known(nodes):
    name = "n" if nodes == KNOWN["identity"] else "s"
    weights = {name: np.array([6, 4])} if nodes in (KNOWN["initializer"], KNOWN["identity"]) else {}
    found = value(nodes, **weights)
    assert found is not None
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, [6, 4])


UNKNOWN = {
    "an input": "s = Identity (i)",
    "a shape": "s = Shape (x)",
    "of an input in part": "a = Constant <value_ints = [1, 1]> () s = Mul (a, i)",
    "an operator that fails": "a = Constant <value_ints = [3]> () b = Constant <value_ints = [1, 1]> () "
    "c = Reshape (a, b) d = Constant <value_ints = [1, 2, 3, 4]> () s = Reshape (d, c)",
    "a large operand": "s = ReduceMax <keepdims = 0, axes = [0]> (n)",
    "a random one": "a = RandomNormal <shape = [2]> () s = Cast <to = 7> (a)",
}


@pytest.mark.parametrize("nodes", UNKNOWN.values(), ids=UNKNOWN)
def test_any_other_tensor_is_not(nodes):
    weights = {"n": np.ones((1000, 2), np.int64)} if "(n)" in nodes else {}
    assert value(nodes, **weights) is None


def test_a_long_computation_is_not_followed(monkeypatch):
    chain = "a0 = Constant <value_ints = [6, 4]> () " + " ".join(f"a{n + 1} = Abs (a{n})" for n in range(9))
    assert value(f"{chain} s = Abs (a9)") is not None
    monkeypatch.setattr(module, "_MOST_NODES", 8)
    assert value(f"{chain} s = Abs (a9)") is None
