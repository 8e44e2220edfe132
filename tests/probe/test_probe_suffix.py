"""The part of a model behind a cut gives what the whole model gives."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.probe.suffix import Cuts, behind
from rewriting import found, model

ENGINE = runtime("CPUExecutionProvider")
FLOAT = onnx.TensorProto.FLOAT
SIZES = {"w0": (6, 6), "w1": (6, 6), "w2": (6, 6)}
BODIES = {
    "chain": "g (float[N,6] x) => (float[N,6] y) { a = MatMul (x, w0) b = MatMul (a, w1) "
    "y = MatMul (b, w2) }",
    "skip": "g (float[N,6] x) => (float[N,6] y) { a = MatMul (x, w0) r = Relu (a) b = MatMul (r, w1) "
    "s = Add (a, b) c = MatMul (s, w2) y = Add (c, r) }",
    "input": "g (float[N,6] x) => (float[N,6] y) { a = MatMul (x, w0) b = MatMul (a, w1) c = MatMul (x, w2) "
    "y = Add (b, c) }",
    "early": "g (float[N,6] x) => (float[N,6] e, float[N,6] y) { e = MatMul (x, w0) b = MatMul (e, w1) "
    "y = MatMul (b, w2) }",
    "view": "g (float[N,6] x) => (float[N,6] y) { v = Transpose (w2) a = MatMul (x, w0) b = MatMul (a, w1) "
    "y = MatMul (b, v) }",
    "several": "g (float[N,6] x) => (float[N,6] y) { a = MatMul (x, w0) l, r = Split <axis = 1> (a) "
    "s = Concat <axis = 1> (r, l) b = MatMul (s, w1) c = MatMul (b, w2) d = Concat <axis = 1> (l, l) "
    "y = Add (c, d) }",
    "body": "g (float[N,6] x, bool k) => (float[N,6] y) { a = MatMul (x, w0) b = MatMul (a, w1) "
    "y = If (k) <then_branch = t () => (float[N,6] o) { o = MatMul (b, w2) }, "
    "else_branch = e () => (float[N,6] p) { p = Add (a, b) }> }",
}


def feed(rows=5):
    return {"x": np.random.default_rng(3).standard_normal((rows, 6)).astype(np.float32)}


def made(name):
    return model(BODIES[name], **SIZES)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("name", BODIES)
def test_a_suffix_gives_the_outputs_of_the_model(name, layer):
    proto = made(name)
    seen = found(proto)
    cuts = Cuts(seen.model, seen.walk)
    binding = next(b for b in seen.bindings if b.layer.id == f"w{layer}")
    cut = cuts.before([binding])
    given = feed() | ({"k": np.array(True)} if name == "body" else {})
    with ENGINE.open(cuts.returning(cut.crossing)) as run:
        whole = run(given)
    crossing = {tensor: whole[tensor] for tensor in cut.crossing}
    suffix = behind(seen.model, cut, dict.fromkeys(crossing, FLOAT))
    assert suffix is not None
    taken = {value.name for value in suffix.proto.graph.input}
    assert len(suffix.proto.graph.node) < len(proto.graph.node)
    with ENGINE.open(suffix) as run:
        given_back = run({n: array for n, array in (given | crossing).items() if n in taken})
    assert "y" in given_back
    for output, array in given_back.items():
        np.testing.assert_allclose(array, whole[output], rtol=1e-5, atol=1e-6)


def test_what_crosses_a_cut():
    seen = found(made("skip"))
    cuts = Cuts(seen.model, seen.walk)
    assert [cuts.before([b]).crossing for b in seen.bindings] == [(), ("a", "r"), ("r", "s")]


def test_the_first_of_some_layers_counts():
    seen = found(made("skip"))
    cuts = Cuts(seen.model, seen.walk)
    assert cuts.before(seen.bindings[1:]) == cuts.before(seen.bindings[1:2])
    assert cuts.before(seen.bindings).crossing == ()


def test_outputs_before_the_cut_are_left_out():
    seen = found(made("early"))
    cuts = Cuts(seen.model, seen.walk)
    suffix = behind(seen.model, cuts.before(seen.bindings[2:]), {"b": FLOAT})
    assert [output.name for output in suffix.proto.graph.output] == ["y"]
    assert [tensor.name for tensor in suffix.proto.graph.initializer] == ["w2"]


def test_no_output_behind_the_cut():
    body = "g (float[N,6] x) => (float[N,6] y) { y = MatMul (x, w0) b = MatMul (y, w1) }"
    seen = found(model(body, w0=(6, 6), w1=(6, 6)))
    cuts = Cuts(seen.model, seen.walk)
    assert behind(seen.model, cuts.before(seen.bindings[1:]), {"y": FLOAT}) is None
