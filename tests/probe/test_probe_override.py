"""Models whose layers take other weights with each feed, against models that hold those weights."""
# ruff: noqa: E501 - tables of models, one a line

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper

from onnx_lowrank.engines.reference import Reference
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import load
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.shapes import infer
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import find, read
from onnx_lowrank.probe.override import Overridable
from onnx_lowrank.probe.segments import Segments, Substitute
from rewriting import DTYPES, Found, constants, difference, evaluate, feed_of, found, model, run, tensors

C = np.linspace(-1, 2, 6).astype(np.float32)
"""A bias."""
NORM = {
    "s": np.linspace(0.5, 1.5, 6, dtype=np.float32),
    "b": np.linspace(-1, 1, 6, dtype=np.float32),
    "m": np.linspace(0, 2, 6, dtype=np.float32),
    "v": np.linspace(0.5, 2, 6, dtype=np.float32),
}
BN = "y = BatchNormalization (h, s, b, m, v)"
IMAGE, ROWS, COLUMNS = "float[2,4,6,6] x", "float[5,8] x", "float[8,5] x"
KERNEL, RIGHT, LEFT = (6, 4, 3, 3), (8, 6), (6, 8)
HALF = np.random.default_rng(5).standard_normal(RIGHT).astype(np.float16)

# inputs, nodes, weights: one layer that reads x, whose weight is w
ALONE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "conv": (IMAGE, "y = Conv (x, w)", {"w": KERNEL}),
    "conv, bias": (IMAGE, "y = Conv <strides = [2,1]> (x, w, c)", {"w": KERNEL, "c": C}),
    "conv, groups": (IMAGE, "y = Conv <group = 2> (x, w, c)", {"w": (6, 2, 3, 3), "c": C}),
    "conv, one axis": ("float[2,4,9] x", "y = Conv (x, w)", {"w": (6, 4, 3)}),
    "conv transposed": (IMAGE, "y = ConvTranspose (x, w, c)", {"w": (4, 6, 3, 3), "c": C}),
    "conv transposed, groups": (IMAGE, "y = ConvTranspose <group = 2> (x, w)", {"w": (4, 3, 3, 3)}),
    "conv, norm": (IMAGE, f"h = Conv (x, w) {BN}", {"w": KERNEL} | NORM),
    "conv, bias, norm": (IMAGE, f"h = Conv (x, w, c) {BN}", {"w": KERNEL, "c": C} | NORM),
    "conv transposed, groups, norm": (IMAGE, f"h = ConvTranspose <group = 2> (x, w) {BN}", {"w": (4, 3, 3, 3)} | NORM),
    "gemm": (ROWS, "y = Gemm (x, w)", {"w": RIGHT}),
    "gemm, bias": (ROWS, "y = Gemm <alpha = 0.5, beta = -2.0> (x, w, c)", {"w": RIGHT, "c": C}),
    "gemm, bias of two axes": (ROWS, "y = Gemm (x, w, c)", {"w": RIGHT, "c": C[None]}),
    "gemm, transposed": (COLUMNS, "y = Gemm <transA = 1, transB = 1> (x, w, c)", {"w": LEFT, "c": C}),
    "gemm, left": (COLUMNS, "y = Gemm <beta = 0.5> (w, x, c)", {"w": LEFT, "c": C[:, None]}),
    "gemm, left, transposed": (ROWS, "y = Gemm <transA = 1, transB = 1> (w, x)", {"w": RIGHT}),
    "gemm, norm": (ROWS, f"h = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, c) {BN}", {"w": LEFT, "c": C} | NORM),
    "matmul": (ROWS, "y = MatMul (x, w)", {"w": RIGHT}),
    "matmul, left": (COLUMNS, "y = MatMul (w, x)", {"w": LEFT}),
    "matmul, batch": ("float[3,5,8] x", "y = MatMul (x, w)", {"w": (3, 8, 6)}),
    "matmul, bias": (ROWS, "h = MatMul (x, w) y = Add (c, h)", {"w": RIGHT, "c": C}),
    "matmul, left, bias": (COLUMNS, "h = MatMul (w, x) y = Add (h, c)", {"w": LEFT, "c": C[:, None]}),
    "behind Transpose": (ROWS, "t = Transpose (w) y = MatMul (x, t)", {"w": LEFT}),
    "behind Transpose, batch": ("float[3,5,8] x", "t = Transpose <perm = [1,2,0]> (w) y = MatMul (x, t)", {"w": (6, 3, 8)}),
    "behind Transpose, conv": (IMAGE, f"t = Transpose <perm = [3,2,0,1]> (w) h = Conv (x, t) {BN}", {"w": (3, 3, 4, 6)} | NORM),
    "behind Reshape": (ROWS, "t = Reshape (w, n) y = MatMul (x, t)", {"w": (4, 12), "n": np.array([8, 6])}),
    "behind Unsqueeze": ("float[2,4,9] x", "t = Unsqueeze (w, n) y = Conv (x, t, c)", {"w": (6, 4), "n": np.array([2]), "c": C}),
    "behind Squeeze": (ROWS, "t = Squeeze (w, n) y = Gemm (x, t, c)", {"w": (8, 1, 6), "n": np.array([1]), "c": C}),
    "behind Flatten": (ROWS, "t = Flatten (w) y = MatMul (x, t)", {"w": (8, 2, 3)}),
    "behind joined Slices": (ROWS, "u = Slice (w, n, m) v = Slice (w, m, o) t = Concat <axis = 0> (v, u) y = Gemm <transB = 1> (x, t, c)", {"w": LEFT, "n": np.array([0]), "m": np.array([2]), "o": np.array([6]), "c": C}),
    "behind several": (ROWS, "r = Reshape (w, n) i = Identity (r) t = Transpose (i) y = Gemm <transB = 1> (x, t, c)", {"w": (3, 16), "n": np.array([8, 6]), "c": C}),
    "behind Cast": (ROWS, "t = Cast <to = 1> (w) y = Gemm (x, t, c)", {"w": HALF, "c": C}),
    "behind Cast and Transpose": (ROWS, "u = Transpose (w) t = Cast <to = 1> (u) y = MatMul (x, t)", {"w": HALF.T.copy()}),
}  # fmt: skip


def single(name: str, opset: int = 17) -> ModelProto:
    inputs, body, weights = ALONE[name]
    return model(f"g ({inputs}) => (float[] y) {{ {body} }}", opset, **weights)


def drawn(binding: Binding, seed: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(binding.layer.shape)


def overridable(seen: Found) -> Overridable:
    return Overridable(seen.model, seen.walk, seen.bindings)


def substituted(seen: Found, substitute: Substitute, feed: Any, compute: Any) -> list[np.ndarray]:
    """What a model of one layer gives with a substitute in a segment, and with what stands behind that."""
    segments = Segments(seen.model, seen.walk, seen.bindings)
    name = segments.leaving(0)
    (given,) = compute(segments.segment(1, [name], {}, substitute).model.proto, feed)
    (bias,) = [onnx.numpy_helper.to_array(t) for t in seen.model.proto.graph.initializer if t.name == "c"] or [0]  # fmt: skip
    return [given if name == "y" else given + bias]


BIASED = [name for name, (_, _, weights) in ALONE.items() if weights.keys() & {"c", "s"}]


@pytest.mark.parametrize("name", ALONE)
def test_the_defaults_are_what_the_model_computes(name):
    proto = single(name)
    seen = found(proto)
    opened = overridable(seen)
    onnx.checker.check_model(opened.model.proto, full_check=True)
    feed = feed_of(proto)
    assert difference(run(proto, feed), run(opened.model.proto, feed)) < 1e-6
    assert not opened.reasons


@pytest.mark.parametrize("name", ALONE)
def test_the_inputs_are_the_models_and_the_optional_ones(name):
    seen = found(single(name))
    opened = overridable(seen)
    (pair,) = opened.inputs.values()
    own = bias(seen.model, seen.walk, seen.bindings[0])
    assert (pair[1] is None) == (own is None)
    assert [v.name for v in opened.model.proto.graph.input] == ["x", *filter(None, pair)]
    kept = {tensor.name for tensor in opened.model.proto.graph.initializer}
    assert kept >= set(filter(None, pair))
    assert pair[0] == "w"


@pytest.mark.parametrize(
    ("name", "with_bias"), [*((name, False) for name in ALONE), *((name, True) for name in BIASED)]
)
def test_a_fed_substitute_acts_as_one_in_a_segment(name, with_bias):
    proto = single(name)
    seen = found(proto)
    (binding,) = seen.bindings
    numbers = np.linspace(3, -1, seen.layer.f) if with_bias else None
    substitute = Substitute(drawn(binding), numbers)
    opened = overridable(seen)
    feed = feed_of(proto)
    given = run(opened.model.proto, feed | opened.feeds(binding, substitute))
    # What is stored in half precision is fed in it, and the segment has it in the Cast's type.
    assert difference(substituted(seen, substitute, feed, run), given) < (1e-3 if "Cast" in name else 1e-6)


@pytest.mark.parametrize("name", ALONE)
def test_what_is_fed_reads_as_the_substitute(name):
    seen = found(single(name))
    (binding,) = seen.bindings
    fed = overridable(seen).feeds(binding, Substitute(drawn(binding)))
    assert list(fed) == ["w"]
    source = binding.stored.source
    assert fed["w"].shape == tuple(source.tensor.dims)
    held = replace(source, tensor=inline("w", fed["w"]))
    again = read(seen.model, seen.walk, replace(binding, stored=replace(binding.stored, source=held)))
    assert np.array_equal(again, drawn(binding).astype(again.dtype))


@pytest.mark.parametrize("dtype", ["float16", "double", "bfloat16"])
@pytest.mark.parametrize("name", ["gemm, bias", "gemm, norm", "matmul, bias", "behind Transpose"])
def test_other_types(name, dtype):
    inputs, body, weights = ALONE[name]
    text = f"g ({inputs.replace('float', dtype)}) => ({dtype}[] y) {{ {body} }}"
    kind = DTYPES[dtype]
    rng = np.random.default_rng(2)
    arrays = {n: np.asarray(rng.standard_normal(w) if isinstance(w, tuple) else w, kind) for n, w in weights.items()}  # fmt: skip
    proto = model(text, **arrays)
    seen = found(proto)
    (binding,) = seen.bindings
    opened = overridable(seen)
    substitute = Substitute(drawn(binding), np.linspace(1, 2, 6) if "bias" in name else None)
    fed = opened.feeds(binding, substitute)
    assert {array.dtype for array in fed.values()} == {kind}
    feed = feed_of(proto)
    with Reference().open(opened.model) as evaluated:
        given, plain = evaluated(feed | fed), evaluated(feed)
    tolerance = 10 * float(ml_dtypes.finfo(kind).eps)
    assert difference(substituted(seen, substitute, feed, evaluate), given.values()) < tolerance
    assert difference(evaluate(proto, feed), plain.values()) < tolerance


def test_a_substitute_beyond_the_range_of_the_type_becomes_infinite():
    seen = found(single("behind Cast"))
    (binding,) = seen.bindings
    fed = overridable(seen).feeds(binding, Substitute(np.full(binding.layer.shape, 1e6)))
    assert np.isposinf(fed["w"]).all()


@pytest.mark.parametrize("name", ["conv", "gemm", "matmul", "matmul, left", "behind Transpose"])
def test_a_bias_that_cannot_change_is_refused(name):
    seen = found(single(name))
    (binding,) = seen.bindings
    with pytest.raises(InputError, match="'w' has no bias that can be changed"):
        overridable(seen).feeds(binding, Substitute(drawn(binding), np.zeros(6)))


@pytest.mark.parametrize("name", ALONE)
def test_the_model_is_not_changed(name):
    proto = single(name)
    before = proto.SerializeToString(deterministic=True)
    seen = found(proto)
    opened = overridable(seen)
    opened.feeds(seen.bindings[0], Substitute(drawn(seen.bindings[0])))
    assert proto.SerializeToString(deterministic=True) == before


# --- where weights live ---------------------------------------------------------------------------

IF = """g (float[5,8] x, bool k) => (float[5,6] y) {{
  i = If (k) <
    then_branch = t () => (float[5,6] o) {{ {then} o = MatMul (x, {w}) }},
    else_branch = e () => (float[5,6] o) {{ {other} o = MatMul (x, {v}) }}
  >
  y = Identity (i)
}}"""
LOOP = """g (float[5,6] x, int64 n) => (float[5,6] y) {
  t = Constant <value_int = 1> ()
  always = Cast <to = 9> (t)
  y = Loop (n, always, x) <body = b (int64 i, bool c, float[5,6] p) => (bool d, float[5,6] q) {
    d = Identity (c)
    a = MatMul (p, w)
    q = Add (a, r)
  }>
}"""
SCAN = """g (float[4,5,6] x) => (float[4,5,6] y) {
  y = Scan <num_scan_inputs = 1, body = b (float[5,6] p) => (float[5,6] q) {
    t = Transpose (w)
    q = Gemm (p, t, r)
  }> (x)
}"""


def bodies(proto: ModelProto) -> list[Any]:
    return [a.g for node in proto.graph.node for a in node.attribute if a.HasField("g")]


def assert_overridden(proto: ModelProto, **feed: Any) -> Overridable:
    """Every layer computes a substitute as the model does with that in the place of its weight."""
    seen = found(proto)
    opened = overridable(seen)
    assert set(opened.inputs) == set(seen.layers)
    feed = feed_of(proto) | feed
    assert difference(run(proto, feed), run(opened.model.proto, feed)) < 1e-6
    for number, binding in enumerate(seen.bindings):
        fed = opened.feeds(binding, Substitute(drawn(binding, number)))
        changed = ModelProto()
        changed.CopyFrom(opened.model.proto)
        for tensor in changed.graph.initializer:
            if tensor.name in fed:
                tensor.CopyFrom(inline(tensor.name, fed[tensor.name]))
        again = found(changed)
        texts = [read(again.model, again.walk, other) for other in again.bindings]
        assert any(np.array_equal(drawn(binding, number).astype(np.float32), text) for text in texts)
        given = run(opened.model.proto, feed | fed)
        assert difference(run(changed, feed), given) < 1e-6
    return opened


@pytest.mark.parametrize("way", ["initializer", "constant"])
@pytest.mark.parametrize("names", [("w", "v"), ("w", "w")])
def test_weights_in_the_branches_of_an_if(names, way):
    """Two branches may use one name for two weights."""
    w, v = names
    proto = model(IF.format(then="", other="", w=w, v=v))
    for number, (body, name) in enumerate(zip(bodies(proto), names, strict=True)):
        weight = np.random.default_rng(number).standard_normal(RIGHT).astype(np.float32)
        if way == "initializer":
            body.initializer.append(inline(name, weight))
        else:
            constants(body, inline(name, weight))
    seen = found(proto)
    opened = overridable(seen)
    assert len({weight for weight, _ in opened.inputs.values()}) == 2
    assert not any(body.initializer or len(body.node) > 1 for body in bodies(opened.model.proto))
    x = feed_of(proto)["x"]
    for branch, binding in zip((True, False), seen.bindings, strict=True):
        feed = {"x": x, "k": np.array(branch)}
        fed = opened.feeds(binding, Substitute(drawn(binding)))
        (given,) = run(opened.model.proto, feed | fed)
        wanted = x @ drawn(binding)[0].T.astype(np.float32)
        assert difference([wanted], [given]) < 1e-6
        assert difference(run(proto, feed), run(opened.model.proto, feed)) < 1e-6
        other = {"x": x, "k": np.array(not branch)}
        assert np.array_equal(run(opened.model.proto, other)[0], run(opened.model.proto, other | fed)[0])


@pytest.mark.parametrize("way", ["captured", "initializer", "constant", "outer constant"])
@pytest.mark.parametrize("text", [LOOP, SCAN])
def test_weights_in_bodies_that_run_several_times(text, way):
    proto = model(text)
    weights = tensors(w=(6, 6), r=(6,))
    match way:
        case "captured":
            proto.graph.initializer.extend(weights)
        case "initializer":
            bodies(proto)[0].initializer.extend(weights)
        case "constant":
            constants(bodies(proto)[0], *weights)
        case "outer constant":
            constants(proto.graph, *weights)
    opened = assert_overridden(proto, **({"n": np.array(3)} if text is LOOP else {}))
    ((_, own),) = opened.inputs.values()
    assert own is not None


def test_constants_of_several_layers_stand_in_one_scope():
    proto = model("g (float[5,8] x) => (float[5,6] y) { a = MatMul (x, u) b = Relu (a) c = MatMul (b, v) y = MatMul (c, w) }")  # fmt: skip
    constants(proto.graph, *tensors(u=(8, 7), v=(7, 7), w=(7, 6)))
    opened = assert_overridden(proto)
    assert [node.op_type for node in opened.model.proto.graph.node] == ["MatMul", "Relu", "MatMul", "MatMul"]


@pytest.mark.parametrize(
    "nodes",
    [
        "a = MatMul (x, w) y = MatMul (a, w)",
        "t = Transpose (w) a = MatMul (x, w) y = MatMul (a, t)",
        "t = Transpose (w) a = Gemm <transB = 1> (x, t) y = MatMul (a, w)",
        "t = Transpose (w) a = MatMul (x, t) y = MatMul (a, w)",
    ],
)
@pytest.mark.parametrize("constant", [False, True])
def test_all_uses_of_a_shared_weight_change(nodes, constant):
    proto = model(f"g (float[5,6] x) => (float[5,6] y) {{ {nodes} }}")
    (constants if constant else lambda graph, *w: graph.initializer.extend(w))(proto.graph, *tensors(w=(6, 6)))  # fmt: skip
    assert_overridden(proto)


def test_a_weight_shared_with_a_body():
    body = "g (float[5,6] x, bool k) => (float[5,6] y) { a = MatMul (x, w) y = If (k) <then_branch = t () => (float[5,6] o) { o = MatMul (a, w) }, else_branch = e () => (float[5,6] o) { o = Identity (a) }> }"  # fmt: skip
    assert_overridden(model(body, w=(6, 6)), k=np.array(True))


def test_functions_and_large_weights_are_left_out(monkeypatch):
    monkeypatch.setattr("onnx_lowrank.probe.override.LARGEST", 4 * 40 * 9 - 1)
    function = '<domain: "local", opset_import: ["": 17]> f (p) => (q) { w = Constant <value = float[2,2] {1.0, 2.0, 3.0, 5.0}> () q = MatMul (p, w) }'  # fmt: skip
    body = "g (int64[5] i, float[5,8] x) => (float[5,9] y) { e = Gather (table, i) a = MatMul (x, w) y = Add (e, a) }"  # fmt: skip
    seen = found(model(body, table=(40, 9), w=(8, 9)))
    opened = overridable(seen)
    assert list(opened.inputs) == ["w"]
    assert list(opened.reasons) == ["table"]
    assert "too large to be fed" in opened.reasons["table"]

    wide = function.replace("float[2,2] {1.0, 2.0, 3.0, 5.0}", "float[8,8] {" + ", ".join(f"{n}.5" for n in range(64)) + "}")  # fmt: skip
    inside = found(model("g (float[5,8] x) => (float[5,8] y) { y = local.f (x) }", functions=wide))
    opened = overridable(inside)
    assert not opened.inputs
    (reason,) = opened.reasons.values()
    assert reason == "its weight is in the function 'local:f', which takes it from no input: inline it first"
    assert [value.name for value in opened.model.proto.graph.input] == ["x"]


def test_bodies_of_other_operators_are_left_out():
    proto = model("g (float[5,8] x) => (float[5,6] y) { a = MatMul (x, w) y = Identity (a) }", w=(8, 6))
    inner = helper.make_graph([helper.make_node("MatMul", ["x", "u"], ["q"])], "body", [], [helper.make_tensor_value_info("q", 1, None)], tensors(u=(8, 6)))  # fmt: skip
    proto.graph.node.append(helper.make_node("Map", ["x"], ["z"], "map", domain="other", body=inner))
    proto.opset_import.add(domain="other", version=1)
    opened = overridable(found(proto))
    assert list(opened.inputs) == ["w"]
    assert list(opened.reasons.values()) == ["its weight is in a body of Map 'map': move it out of there first"]  # fmt: skip


# --- the copy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir", [3, 4, 8])
def test_only_overridden_initializers_are_inputs(ir):
    body = "g (float[5,8] x) => (float[5,6] y) { t = Reshape (x, n) a = MatMul (t, w) r = Mul (a, k) y = MatMul (r, u) }"  # fmt: skip
    proto = model(body, ir=ir, w=(8, 7), u=(7, 6), n=np.array([5, 8]), k=(7,))
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    seen = found(proto)
    opened = Overridable(seen.model, seen.walk, seen.bindings[:1])
    assert [value.name for value in opened.model.proto.graph.input] == ["x", "w"]
    assert opened.model.proto.ir_version == max(ir, 4)
    feed = feed_of(proto)
    fed = opened.feeds(seen.bindings[0], Substitute(drawn(seen.bindings[0])))
    plain = run(proto, feed)
    assert difference(plain, run(opened.model.proto, feed)) < 1e-6
    assert difference(plain, run(opened.model.proto, feed | fed)) > 0.1


def test_new_names_collide_with_none():
    body = "g (float[5,8] x) => (float[5,6] y, float[6] z) { [n] h = MatMul (x, w) [add] y = Add (h, c) z = Neg (add_bias) }"  # fmt: skip
    proto = model(body, c=C, add_bias=C)
    constants(proto.graph, *tensors(w=RIGHT))
    opened = overridable(found(proto))
    assert opened.inputs == {"w": ("w_2", "add_bias_2")}
    assert difference(run(proto, feed_of(proto)), run(opened.model.proto, feed_of(proto))) < 1e-6


def test_weights_in_data_files_stay_there(tmp_path):
    proto = model("g (float[5,8] x) => (float[5,6] y) { a = MatMul (x, w) y = Gemm (a, u, c) }", w=(8, 64), u=(64, 6), c=C)  # fmt: skip
    stored = ModelProto()
    stored.CopyFrom(proto)
    onnx.save(stored, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=64, location="m.data")
    loaded = load(tmp_path / "m.onnx")
    walk = Walk(loaded.proto)
    bindings, _ = find(loaded, walk, infer(loaded, {}))
    opened = Overridable(loaded, walk, bindings)
    stored = {tensor.name: tensor for tensor in opened.model.proto.graph.initializer}
    assert all(stored[name].data_location == onnx.TensorProto.EXTERNAL for name in ("w", "u"))
    feed = feed_of(proto)
    with runtime("CPUExecutionProvider").open(opened.model) as given:
        assert difference(run(proto, feed), given(feed).values()) < 1e-6
        fed = opened.feeds(bindings[0], Substitute(drawn(bindings[0])))
        assert difference(run(proto, feed), given(feed | fed).values()) > 0.1


def test_a_folded_norm_leaves_an_identity():
    seen = found(single("conv, norm"))
    opened = overridable(seen)
    assert [node.op_type for node in opened.model.proto.graph.node] == ["Conv", "Identity"]
    (norm,) = [node for node in opened.model.proto.graph.node if node.op_type == "Identity"]
    assert (list(norm.input), list(norm.output), len(norm.attribute)) == (["h"], ["y"], 0)


@pytest.mark.parametrize("seed", range(100))
def test_many_random_matrices(seed):
    rng = np.random.default_rng(seed)
    f, c, rows = (int(n) for n in rng.integers(5, 12, 3))
    trans_a, trans_b, left = (int(n) for n in rng.integers(0, 2, 3))
    shape = (c, f)[:: -1 if left ^ (trans_a if left else trans_b) else 1]
    x = (rows, c)[:: -1 if left ^ (trans_b if left else trans_a) else 1]
    attributes = f"<transA = {trans_a}, transB = {trans_b}, alpha = {rng.uniform(0.5, 2):.3f}>"
    perm = [int(n) for n in rng.permutation(3)]
    cube = tuple(np.array((*shape, 1))[np.argsort(perm)].tolist())
    nodes = f"t = Transpose <perm = {perm}> (w) r = Reshape (t, n) y = Gemm {attributes} ({'r, x' if left else 'x, r'})"  # fmt: skip
    proto = model(f"g (float[{x[0]},{x[1]}] x) => (float[] y) {{ {nodes} }}", w=cube, n=np.array(shape))
    seen = found(proto)
    (binding,) = seen.bindings
    substitute = Substitute(drawn(binding, seed))
    opened = overridable(seen)
    feed = feed_of(proto)
    given = run(opened.model.proto, feed | opened.feeds(binding, substitute))
    assert difference(substituted(seen, substitute, feed, run), given) < 1e-6
