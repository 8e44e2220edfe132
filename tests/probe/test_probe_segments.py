"""Where the main graph is cut, what the segments hold, and how a layer is substituted in them."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import load
from onnx_lowrank.files.save import save
from onnx_lowrank.layers.find import canonical_weight
from onnx_lowrank.operators import registry
from onnx_lowrank.probe.segments import Segments, Substitute
from rewriting import Found, constants, difference, evaluate, found, model, tensors

FLOAT = TensorProto.FLOAT

RESIDUAL = """g (float[N,8] x, float[N,8] z) => (float[N,3] y) {
  o = Relu (z)
  a = MatMul (x, w1)
  unused = Neg (a)
  r = Relu (a)
  c = MatMul (r, w2)
  s = Add (c, a)
  side = Add (s, o)
  e = MatMul (side, w3)
  y = Relu (e)
}"""
WEIGHTS = {"w1": (8, 8), "w2": (8, 8), "w3": (8, 3)}


def segments_of(seen: Found) -> Segments:
    return Segments(seen.model, seen.walk, seen.bindings)


def residual() -> Segments:
    return segments_of(found(model(RESIDUAL, **WEIGHTS)))


def nodes(segment: Any) -> list[str]:
    return [node.output[0] for node in segment.model.proto.graph.node]


def test_what_crosses_the_cuts():
    segments = residual()
    assert [segments.cut(i) for i in range(4)] == [("x", "o"), ("o", "a", "r"), ("side",), ()]
    assert [segments.made(i) for i in range(4)] == [("o",), ("a", "r"), ("side",), ()]
    assert [segments.entering(i) for i in range(3)] == ["x", "r", "side"]
    assert [segments.leaving(i) for i in range(3)] == ["a", "c", "e"]


@pytest.mark.parametrize(
    ("index", "before", "substituted", "after"),
    [
        (0, (), False, set()),
        (1, (), False, set()),
        (1, (), True, {"a", "r"}),
        (2, (), False, set()),
        (2, (), True, {"side"}),
        (2, ("a",), False, {"side"}),
        (2, ("r",), False, {"side"}),
        (3, ("side",), True, set()),
    ],
)
def test_what_depends_on_a_substitute(index, before, substituted, after):
    assert residual().changed(index, before, substituted) == after


def test_what_is_handed_on_stays_changed():
    body = """g (float[N,8] x) => (float[N,3] y) {
      a = MatMul (x, w1)
      c = MatMul (x, w2)
      e = MatMul (c, w3)
      s = Add (e, a)
      y = MatMul (s, w4)
    }"""
    segments = segments_of(found(model(body, w1=(8, 3), w2=(8, 8), w3=(8, 3), w4=(3, 3))))
    assert [segments.changed(i, before, i == 1) for i, before in ((1, ""), (2, "a"), (3, "a"))] == [
        {"a"},
        {"a"},
        {"s"},
    ]


def test_what_only_later_nodes_need_does_not_cross():
    segments = segments_of(found(model(RESIDUAL, **WEIGHTS), exclude=("w3",)))
    assert [segments.cut(i) for i in range(3)] == [("x",), ("a", "r"), ()]
    assert [segments.beside(i) for i in range(2)] == [None, "a"]  # which alone makes it cross


@pytest.mark.parametrize(
    ("index", "wanted", "inputs", "held"),
    [
        (0, ["o"], ("z",), ["o"]),
        (1, ["a"], ("x",), ["a"]),
        (1, ["r"], ("x",), ["a", "r"]),
        (1, ["r", "a", "r"], ("x",), ["a", "r"]),
        (2, ["c"], ("r",), ["c"]),
        (2, ["side"], ("o", "a", "r"), ["c", "s", "side"]),
        (3, ["e"], ("side",), ["e"]),
    ],
)
def test_a_segment_holds_what_its_outputs_need(index, wanted, inputs, held):
    segment = residual().segment(index, wanted, dict.fromkeys("oars", FLOAT) | {"side": FLOAT})
    proto = segment.model.proto
    assert (segment.inputs, nodes(segment)) == (inputs, held)
    assert segment.outputs == tuple(dict.fromkeys(wanted))
    assert [value.name for value in proto.graph.input] == list(inputs)
    assert [value.name for value in proto.graph.output] == list(segment.outputs)
    read = {name for node in proto.graph.node for name in node.input}
    assert {tensor.name for tensor in proto.graph.initializer} == read & WEIGHTS.keys()


def test_layers_with_several_uses_or_in_bodies_are_no_cuts():
    body = """g (float[N,8] x, bool k) => (float[N,3] y) {
      a = MatMul (x, v)
      c = MatMul (a, v)
      i = If (k) <
        then_branch = yes () => (float[N,8] p) { p = MatMul (c, u) },
        else_branch = no () => (float[N,8] o) { o = Relu (a) }
      >
      y = MatMul (i, w1)
    }"""
    seen = found(model(body, v=(8, 8), u=(8, 8), w1=(8, 3)))
    assert len(seen.bindings) == 3
    segments = segments_of(seen)
    assert [binding.layer.id for binding in segments.bindings] == ["w1"]
    segment = segments.segment(0, ["i"], {})
    assert segment.inputs == ("x", "k")
    assert {tensor.name for tensor in segment.model.proto.graph.initializer} == {"u", "v"}


def test_cuts_stand_in_node_order_whatever_the_order_of_the_layers():
    seen = found(model(RESIDUAL, **WEIGHTS))
    segments = Segments(seen.model, seen.walk, seen.bindings[::-1])
    assert [binding.layer.id for binding in segments.bindings] == ["w1", "w2", "w3"]


def test_a_folded_batchnorm_stands_behind_its_layer():
    body = """g (float[1,4,3,3] x) => (float[1,8,3,3] y) {
      a = Conv (x, w1)
      c = Conv (x, w2)
      n = BatchNormalization (a, k, k, k, k)
      y = Add (n, c)
    }"""
    segments = segments_of(found(model(body, w1=(8, 4, 1, 1), w2=(8, 4, 1, 1), k=np.ones(8, np.float32))))
    assert [segments.leaving(i) for i in range(2)] == ["n", "c"]
    assert nodes(segments.segment(1, ["n"], {"x": FLOAT})) == ["a", "n"]
    replaced = segments.segment(1, ["n"], {"x": FLOAT}, Substitute(np.ones((1, 8, 4, 1, 1))))
    assert [node.op_type for node in replaced.model.proto.graph.node] == ["Conv"]
    assert nodes(replaced) == ["n"]


def test_what_follows_from_constants_is_copied_rather_than_handed_on():
    body = """g (float[N,8] x) => (float[N,3] y) {
      t = Identity (u)
      k = Mul (t, t)
      one = Constant <value = float {1.5}> ()
      noise = RandomNormalLike (k)
      a = MatMul (x, w1)
      c = MatMul (a, w2)
      d = Mul (c, k)
      e = Add (d, noise)
      f = Mul (e, one)
      y = MatMul (f, w3)
    }"""
    segments = segments_of(found(model(body, u=(8,), **WEIGHTS)))
    assert [segments.cut(i) for i in range(4)] == [("x", "noise"), ("noise", "a"), ("f",), ()]
    segment = segments.segment(2, ["f"], {"a": FLOAT, "noise": FLOAT})
    assert segment.inputs == ("noise", "a")
    assert nodes(segment) == ["t", "k", "one", "c", "d", "e", "f"]
    assert {tensor.name for tensor in segment.model.proto.graph.initializer} == {"u", "w2"}


def test_a_segment_keeps_functions_domains_and_shapes_of_inputs():
    body = "g (float[N,8] x) => (float[N,3] y) { r = local.twice (x) y = MatMul (r, w1) }"
    twice = '<opset_import: ["" : 17], domain: "local"> twice (p) => (s) { s = Add (p, p) }'
    proto = model(body, functions=twice, ir=8, w1=(8, 3))
    segment = segments_of(found(proto)).segment(0, ["r"], {}).model.proto
    assert list(segment.functions) == list(proto.functions)
    assert list(segment.opset_import) == list(proto.opset_import)
    assert segment.graph.input[0] == proto.graph.input[0]


def test_weights_that_are_inputs_too_are_none_of_a_segment():
    proto = model("g (float[N,8] x, float[8,3] w1) => (float[N,3] y) { y = MatMul (x, w1) }", ir=3, w1=(8, 3))
    segment = segments_of(found(proto)).segment(1, ["y"], {"x": FLOAT})
    assert segment.inputs == ("x",)
    assert segment.model.proto.ir_version == 4


@pytest.mark.parametrize("index", [1, 2, 3])
def test_weights_in_data_files_are_referred_to(index, tmp_path):
    proto = model(RESIDUAL, **WEIGHTS)
    expected = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    loaded = load(tmp_path / "m.onnx")
    seen = found(tmp_path / "m.onnx")
    segments = Segments(loaded, seen.walk, seen.bindings)
    segment = segments.segment(index, [segments.leaving(index - 1)], dict.fromkeys(["x", "r", "side"], FLOAT))
    (tensor,) = segment.model.proto.graph.initializer
    assert tensor.name == f"w{index}"
    assert tensor.data_location == TensorProto.EXTERNAL
    assert not tensor.raw_data
    assert segment.model.files == loaded.files
    save(segment.model, tmp_path / "segment.onnx")
    saved = onnx.load(tmp_path / "segment.onnx")
    assert np.array_equal(numpy_helper.to_array(saved.graph.initializer[0]), expected[f"w{index}"])


def test_a_segment_without_data_files_names_none(tmp_path):
    onnx.save(model(RESIDUAL, **WEIGHTS), tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    segments = segments_of(found(tmp_path / "m.onnx"))
    assert segments.segment(0, ["o"], {}).model.files == {}


def test_the_model_is_not_changed():
    seen = found(model(RESIDUAL, **WEIGHTS))
    before = seen.model.proto.SerializeToString(deterministic=True)
    segments = segments_of(seen)
    substitute = Substitute(np.ones((1, 8, 8)), np.ones(8))
    segments.segment(1, ["r"], {"x": FLOAT}, substitute).model.proto.graph.node[0].name = "other"
    assert seen.model.proto.SerializeToString(deterministic=True) == before


# --- layouts --------------------------------------------------------------------------------------


def node_of(op: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, ["x", "w"], ["y"], **attributes)


CONVOLUTIONS = [
    (op, 1, (groups * a, b, *kernel), {"group": groups})
    for op in ("Conv", "ConvTranspose")
    for groups in (1, 2, 3)
    for a, b in ((2, 5), (5, 2), (4, 4), (1, 3))
    for kernel in ((3,), (1, 1), (3, 2), (5, 1), (2, 3, 4))
]
MATRICES = [
    ("Gemm", operand, shape, {f"trans{'AB'[operand]}": flipped})
    for operand in (0, 1)
    for flipped in (0, 1)
    for shape in ((2, 5), (5, 2), (4, 4))
]
MATRICES += [
    ("MatMul", operand, shape, {})
    for operand in (0, 1)
    for shape in ((2, 5), (4, 4), (1, 2, 5), (3, 2, 5), (2, 3, 4, 5), (1, 1, 6, 2))
]
MATRICES += [("Gather", 0, shape, {}) for shape in ((9, 4), (4, 9), (3, 3))]


@pytest.mark.parametrize(("op", "operand", "shape", "attributes"), CONVOLUTIONS + MATRICES)
def test_laid_out_is_the_inverse_of_the_canonical_form(op, operand, shape, attributes):
    node, weight = node_of(op, **attributes), np.arange(prod(shape)).reshape(shape)
    canonical = canonical_weight(node, operand, weight)
    assert not isinstance(canonical, str)
    restored = registry.family(node).laid_out(node, operand, canonical.copy(), shape)
    assert np.array_equal(restored, weight)


# --- substitutes ----------------------------------------------------------------------------------

# What a layer gives for a canonical weight w (g, f / g, c / g) and a bias b (f,), on its input x.
Case = tuple[str, str, tuple[int, ...], tuple[int, ...], Any]
CASES: dict[str, Case] = {
    "MatMul": ("float[3,8] x", "MatMul (x, w)", (8, 6), (3, 8), lambda w, b, x: x @ w[0].T + b),
    "MatMul of a vector": ("float[8] x", "MatMul (x, w)", (8, 6), (8,), lambda w, b, x: w[0] @ x + b),
    "MatMul, left": ("float[8,5] x", "MatMul (w, x)", (6, 8), (8, 5), lambda w, b, x: w[0] @ x + b[:, None]),
    "MatMul, left, of a batch": (
        "float[2,8,5] x", "MatMul (w, x)", (6, 8), (2, 8, 5), lambda w, b, x: w[0] @ x + b[:, None],
    ),
    "MatMul, left, of a vector": ("float[8] x", "MatMul (w, x)", (6, 8), (8,), lambda w, b, x: w[0] @ x + b),
    "MatMul of batches": (
        "float[2,5,8] x", "MatMul (x, w)", (2, 8, 6), (2, 5, 8),
        lambda w, b, x: x @ w.swapaxes(1, 2) + b.reshape(2, 1, 6),
    ),
    "MatMul of batches, left": (
        "float[2,8,5] x", "MatMul (w, x)", (2, 6, 8), (2, 8, 5), lambda w, b, x: w @ x + b.reshape(2, 6, 1),
    ),
    "Gemm": (
        "float[3,8] x", "Gemm <alpha = 0.5, beta = 3.0> (x, w, old)", (8, 6), (3, 8),
        lambda w, b, x: 0.5 * x @ w[0].T + b,
    ),
    "Gemm without bias": ("float[3,8] x", "Gemm (x, w)", (8, 6), (3, 8), lambda w, b, x: x @ w[0].T + b),
    "Gemm, transposed": (
        "float[8,3] x", "Gemm <transA = 1, transB = 1> (x, w)", (6, 8), (8, 3),
        lambda w, b, x: x.T @ w[0].T + b,
    ),
    "Gemm, left": (
        "float[8,3] x", "Gemm <beta = 2.0> (w, x, column)", (6, 8), (8, 3),
        lambda w, b, x: w[0] @ x + b[:, None],
    ),
    "Gemm, left, transposed": (
        "float[3,8] x", "Gemm <transA = 1, transB = 1> (w, x)", (8, 6), (3, 8),
        lambda w, b, x: w[0] @ x.T + b[:, None],
    ),
    "Conv": (
        "float[2,8,5,5] x", "Conv (x, w, old)", (6, 8, 1, 1), (2, 8, 5, 5),
        lambda w, b, x: np.einsum("fc,nchw->nfhw", w[0, ..., 0, 0], x) + b[:, None, None],
    ),
    "grouped Conv": (
        "float[2,8,5] x", "Conv <group = 2> (x, w)", (6, 4, 1), (2, 8, 5),
        lambda w, b, x: np.einsum("gfc,ngcl->ngfl", w[..., 0], x.reshape(2, 2, 4, 5)).reshape(2, 6, 5)
        + b[:, None],
    ),
    "ConvTranspose": (
        "float[2,8,5] x", "ConvTranspose <group = 2> (x, w, old)", (8, 3, 1), (2, 8, 5),
        lambda w, b, x: np.einsum("gfc,ngcl->ngfl", w[..., 0], x.reshape(2, 2, 4, 5)).reshape(2, 6, 5)
        + b[:, None],
    ),
    "Gather": ("int64[4] x", "Gather (w, x)", (9, 6), (4,), lambda w, b, x: w[0].T[x] + b),
}  # fmt: skip


def substituted(name: str, views: str, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """What the segment of a substituted layer gives, and what it should give."""
    inputs, node, shape, fed, formula = CASES[name]
    rng = np.random.default_rng(11)
    stored = rng.standard_normal(shape).astype(np.float32)
    proto = model(
        f"g ({inputs}) => (float[] y) {{ {node} }}".replace("{ ", "{ y = "),
        old=(6,), column=(6, 1), **({} if views else {"w": stored}),
    )  # fmt: skip
    if views == "Constant":
        constants(proto.graph, *tensors(w=stored))
    elif views == "Transpose":
        proto.graph.initializer.extend(tensors(turned=stored.transpose()))
        proto.graph.node.insert(0, helper.make_node("Transpose", ["turned"], ["w"]))
    seen = found(proto)
    x = rng.integers(9, size=fed) if name == "Gather" else rng.standard_normal(fed).astype(np.float32)
    weight = rng.standard_normal(seen.layer.shape)
    numbers = rng.standard_normal(seen.layer.f)
    segment = segments_of(seen).segment(1, ["y"], {"x": FLOAT}, Substitute(weight, numbers if bias else None))
    assert "w" not in {i.name for i in segment.model.proto.graph.initializer}
    (got,) = evaluate(segment.model.proto, {"x": x})
    own = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    kept = own["old"] * (3 if name == "Gemm" else 1) if "old" in node else np.zeros(seen.layer.f)
    kept = 2 * own["column"].ravel() if "column" in node else kept
    return got, formula(weight, numbers if bias else kept, x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("views", ["", "Constant", "Transpose"])
@pytest.mark.parametrize("name", CASES)
def test_a_substituted_layer_computes_its_substitute(name, views, bias):
    got, wanted = substituted(name, views, bias)
    assert difference([wanted], [got]) < 1e-6


def test_new_names_collide_with_nothing():
    body = "g (float[N,8] x) => (float[N,3] y) { y_weight = MatMul (x, w1) y = MatMul (y_weight, w2) }"
    segments = segments_of(found(model(body, w1=(8, 8), w2=(8, 3))))
    substitute = Substitute(np.ones((1, 3, 8)), np.ones(3))
    graph = segments.segment(2, ["y"], {"y_weight": FLOAT}, substitute).model.proto.graph
    names = [value.name for value in (*graph.input, *graph.initializer)]
    names += [name for node in graph.node for name in node.output]
    assert len(set(names)) == len(names) == 5


def test_a_bias_on_rows_needs_a_known_rank():
    proto = model("g (float[] x) => (float[] y) { y = MatMul (w1, x) }", w1=(6, 8))
    del proto.graph.input[0].type.tensor_type.shape.dim[:]
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    segments = segments_of(found(proto))
    with pytest.raises(InputError, match="--input-shape"):
        segments.segment(1, ["y"], {}, Substitute(np.ones((1, 6, 8)), np.ones(6)))


@pytest.mark.parametrize(
    ("body", "beside", "rectified"),
    [
        ("a = MatMul (x, w)\n y = Relu (a)", None, True),
        ("a = MatMul (x, w)\n s = Add (a, b)\n y = Relu (s)", None, True),
        ("a = MatMul (x, w)\n s = Add (x, a)\n y = Relu (s)", "x", True),
        ("a = MatMul (x, w)\n c = Add (b, a)\n s = Add (c, x)\n y = Relu (s)", "x", True),
        ("a = MatMul (x, w)\n y = Add (x, a)", "x", False),
        ("a = MatMul (x, w)\n y = Add (a, a)", None, False),
        ("a = MatMul (x, w)\n s = Sub (x, a)\n y = Relu (s)", None, False),
        ("a = MatMul (x, w)\n s = Add (x, a)\n t = Add (x, s)\n y = Relu (t)", "x", False),
        ("a = MatMul (x, w)\n r = Relu (a)\n y = Add (r, a)", None, False),
        ("y = MatMul (x, w)\n r = Relu (y)", None, False),
        ("a = MatMul (x, w)\n e = Exp (x)\n y = Add (e, a)", None, False),
    ],
)
def test_what_happens_to_a_result(body, beside, rectified):
    text = f"g (float[N,8] x) => (float[N,8] y) {{\n {body} }}"
    segments = segments_of(found(model(text, w=(8, 8), b=(8,))))
    assert (segments.beside(0), segments.rectified(0)) == (beside, rectified)
