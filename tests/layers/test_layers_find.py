"""Where weights hide, and why operators are left alone."""
# ruff: noqa: E501 - tables of models, one a line

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank.budgets.params import parameters as cost
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.graph.parameters import parameters
from rewriting import (
    DTYPES,
    assert_only_named_changes,
    assert_same,
    constants,
    found,
    full_rank,
    model,
    rewritten,
    tensors,
)

W = (8, 10)


def check(proto: onnx.ModelProto, *ids: str, tolerance: float = 1e-5, **feed: object) -> None:
    """The model has these layers, and at full rank it computes the same, with the parameters foretold."""
    seen = found(proto)
    assert set(seen.layers) == set(ids), seen.skipped
    result = rewritten(seen)
    assert_only_named_changes(proto, result.model.proto, list(seen.layers.values()), result.chains)
    assert_same(proto, result.model.proto, tolerance, **feed)
    change = sum(cost(layer, full_rank(layer)) - cost(layer) for layer in seen.layers.values())
    assert parameters(result.model) == parameters(seen.model) + change
    again = found(result.model.proto)
    assert_same(proto, rewritten(again).model.proto, 10 * tolerance, **feed)


VIEWS = {
    "identity": ("v = Identity (w)", (8, 10), {}),
    "transpose": ("v = Transpose (w)", (10, 8), {}),
    "transpose perm": ("v = Transpose <perm = [1, 0]> (w)", (10, 8), {}),
    "reshape": ("v = Reshape (w, s)", (80,), {"s": [8, 10]}),
    "reshape inferred": ("v = Reshape (w, s)", (4, 2, 10), {"s": [8, -1]}),
    "reshape copied": ("v = Reshape (w, s)", (8, 5, 2), {"s": [0, 10]}),
    "reshape by a view": ("t = Identity (s) v = Reshape (w, t)", (80,), {"s": [8, 10]}),
    "unsqueeze": ("u = Unsqueeze (w, s) v = Squeeze (u, s)", (8, 10), {"s": [0]}),
    "unsqueeze batch": ("v = Unsqueeze (w, s)", (8, 10), {"s": [0]}),
    "squeeze all": ("v = Squeeze (w)", (1, 8, 1, 10), {}),
    "squeeze": ("v = Squeeze (w, s)", (1, 8, 1, 10), {"s": [0, -2]}),
    "flatten": ("v = Flatten (w)", (8, 5, 2), {}),
    "flatten axis": ("v = Flatten <axis = -1> (w)", (4, 2, 10), {}),
    "chain": (
        "a = Identity (w) b = Transpose (a) c = Reshape (b, s) v = Identity (c)",
        (8, 10),
        {"s": [8, 10]},
    ),
    "joined slices": (
        "a = Slice (w, s, m) b = Slice (w, m, e) v = Concat <axis = 0> (b, a)",
        (8, 10),
        {"s": [0], "m": [3], "e": [8]},
    ),
    "joined slices, counted from the end": (
        "a = Slice (w, s, m) b = Slice (w, m, e) v = Concat <axis = -2> (b, a)",
        (8, 10),
        {"s": [-99], "m": [-3], "e": [2**62]},
    ),
    "joined slices of an axis": (
        "a = Slice (w, s, m, n) b = Slice (w, m, e, n, o) v = Concat <axis = 1> (b, a)",
        (8, 10),
        {"s": [0], "m": [3], "e": [10], "n": [-1], "o": [1]},
    ),
    "joined slices between views": (
        "t = Transpose (w) a = Slice (t, s, m) b = Slice (t, m, e) c = Slice (t, e, f) u = Concat <axis = 0> (b, c, a) v = Unsqueeze (u, s)",
        (10, 8),
        {"s": [0], "m": [3], "e": [5], "f": [8]},
    ),
    "two casts": ("a = Cast <to = 1> (w) b = Identity (a) v = Cast <to = 1> (b)", (8, 10), {}),
}


@pytest.mark.parametrize("in_constant", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_a_weight_behind_views(name, in_constant):
    view, shape, numbers = VIEWS[name]
    more = {key: np.array(value, np.int64) for key, value in numbers.items()}
    body = f"g (float[3,8] x) => (float[] y) {{ {view} y = MatMul (x, v) }}"
    proto = model(body, w=shape, **more)
    if in_constant:
        held = list(proto.graph.initializer)
        del proto.graph.initializer[:]
        constants(proto.graph, *held)
    check(proto, "w")


def test_joined_slices_of_old_opsets():
    slices = "a = Slice <starts = [0], ends = [3]> (w) b = Slice <axes = [0], starts = [3], ends = [8]> (w)"
    body = f"g (float[3,8] x) => (float[] y) {{ {slices} v = Concat <axis = 0> (b, a) y = MatMul (x, v) }}"
    check(model(body, 9, w=W), "w")


@pytest.mark.parametrize("order", ["a, b, c", "c, b, a", "a, c, b"])
def test_one_weight_joined_in_two_orders_is_two_matrices(order):
    slices = "a = Slice (w, s, m) b = Slice (w, m, n) c = Slice (w, n, e)"
    joins = f"u = Concat <axis = 0> (a, b, c) v = Concat <axis = 0> ({order})"
    body = f"g (float[3,8] x) => (float[] y, float[] z) {{ {slices} {joins} y = MatMul (x, u) z = MatMul (x, v) }}"
    numbers = {name: np.array([value]) for name, value in {"s": 0, "m": 2, "n": 6, "e": 8}.items()}
    proto = model(body, w=W, **numbers)
    if order == "a, b, c":
        assert len(found(proto).layer.uses) == 2
        check(proto, "w")
    else:
        assert all("different matrices" in skipped.reason for skipped in found(proto).skipped)
        assert not found(proto).bindings


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
def test_a_cast_weight_keeps_its_stored_dtype(stored):
    dtype = np.dtype(getattr(ml_dtypes, stored, stored))
    w = np.random.default_rng(0).standard_normal(W).astype(dtype)
    proto = model("g (float[3,8] x) => (float[] y) { v = Cast <to = 1> (w) y = MatMul (x, v) }", w=w)
    assert found(proto).layer.dtype == stored
    check(proto, "w", tolerance={"float16": 5e-3, "bfloat16": 4e-2, "float64": 1e-6}[stored])


def test_value_floats():
    values = ", ".join(str(n / 8) for n in range(1, 65))
    body = f"v = Constant <value_floats = [{values}]> () s = Constant <value_ints = [8, 8]> ()"
    proto = model(f"g (float[3,8] x) => (float[] y) {{ {body} w = Reshape (v, s) y = MatMul (x, w) }}")
    check(proto, "v")


IF = """g (bool b, float[4,8] x) => (float[] y) {
    y = If (b) <then_branch = t () => (float[4,10] p) { %s p = MatMul (x, %s) },
                else_branch = e () => (float[4,10] q) { %s q = MatMul (x, %s) }> }"""


@pytest.mark.parametrize("branch", [True, False])
def test_captured_by_both_branches_is_one_layer(branch):
    check(model(IF % ("", "w", "", "w"), w=W), "w", b=np.array(branch))


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("in_constant", [True, False])
def test_the_same_name_in_both_branches_is_two_layers(branch, in_constant):
    proto = model(IF % ("", "w", "", "w"))
    for attribute, seed in zip(proto.graph.node[0].attribute, (1, 2), strict=True):
        w = np.random.default_rng(seed).standard_normal(W).astype(np.float32)
        if in_constant:
            constants(attribute.g, *tensors(w=w))
        else:
            attribute.g.initializer.extend(tensors(w=w))
    check(proto, "#0.then_branch/w", "#0.else_branch/w", b=np.array(branch))


def test_an_unread_tensor_of_the_same_name_elsewhere_stays():
    proto = model(IF % ("", "w", "", "v"), v=W)
    for attribute in proto.graph.node[0].attribute:
        attribute.g.initializer.extend(tensors(w=np.ones(W, np.float32) + np.eye(8, 10, dtype=np.float32)))
    seen = found(proto)
    assert set(seen.layers) == {"#0.then_branch/w", "v"}
    result = rewritten(seen)
    assert [t.name for t in result.model.proto.graph.node[0].attribute[1].g.initializer] == ["w"]


def test_an_inner_initializer_shadows_an_outer_name():
    proto = model(IF % ("", "w", "", "w"), w=W)
    proto.graph.node[0].attribute[0].g.initializer.extend(tensors(w=np.eye(8, 10, dtype=np.float32)))
    assert set(found(proto).layers) == {"w", "#0.then_branch/w"}
    for layer in found(proto).layers.values():
        assert len(layer.uses) == 1


def test_a_branch_that_returns_an_outer_weight_keeps_it():
    proto = model("g (bool b, float[4,8] x) => (float[] y) { y = MatMul (x, w) z = If (b) <then_branch = t () => (float[8,10] w) { }, else_branch = e () => (float[8,10] q) { q = Identity (w) }> }", w=W)  # fmt: skip
    assert "also returns" in found(proto).skipped[0].reason


@pytest.mark.parametrize("captured", [True, False])
def test_in_a_loop(captured):
    body = """g (int64 n, bool c, float[4,8] x) => (float[4,8] y) {
        y = Loop (n, c, x) <body = l (int64 i, bool a, float[4,8] h) => (bool z, float[4,8] k)
            { z = Identity (a) k = MatMul (h, w) }> }"""
    proto = model(body, **({"w": (8, 8)} if captured else {}))
    if not captured:
        proto.graph.node[0].attribute[0].g.initializer.extend(tensors(w=(8, 8)))
    check(proto, "w" if captured else "#0.body/w", n=np.array(3), c=np.array(True), tolerance=1e-4)


def test_in_a_scan():
    body = """g (float[4,8] x) => (float[] y) {
        y = Scan <num_scan_inputs = 1, body = s (float[8] h) => (float[10] k) { k = MatMul (h, w) }> (x) }"""
    check(model(body, w=W), "w")


FUNCTION = """<domain: "local", opset_import: ["" : 17]> f (a) => (b) { %s b = MatMul (a, w) }"""


def test_in_a_function_called_twice():
    body = "g (float[4,8] x) => (float[4,8] y) { h = local.f (x) y = local.f (h) }"
    proto = model(body, functions=FUNCTION % "")
    constants(proto.functions[0], *tensors(w=(8, 8)))
    check(proto, "local:f/w", tolerance=1e-4)


def test_in_a_nested_function():
    functions = """<domain: "local", opset_import: ["" : 17, "local" : 1]> f (a) => (b) { b = local.h (a) }
        <domain: "local", opset_import: ["" : 17]> h (a) => (b) { v = Identity (w) b = MatMul (a, v) }"""
    proto = model("g (float[4,8] x) => (float[4,10] y) { y = local.f (x) }", functions=functions)
    constants(proto.functions[1], *tensors(w=W))
    check(proto, "local:h/w")


def test_tied_embeddings_are_one_layer():
    body = """g (int64[3] i) => (float[] y) {
        e = Gather (w, i) t = Transpose (w) y = MatMul (e, t) }"""
    proto = model(body, w=(12, 8))
    layer = found(proto).layer
    assert [use.transposed for use in layer.uses] == [False, True]
    assert layer.slices == (1,)
    check(proto, "w", i=np.array([0, -1, 7]), tolerance=1e-4)


def test_tied_by_gemm_and_on_the_other_side():
    body = """g (float[4,8] x) => (float[] y, float[] z) {
        y = Gemm <transB = 1> (x, w) t = Transpose (x) z = MatMul (w, t) }"""
    check(model(body, w=(12, 8)), "w", tolerance=1e-4)


def test_shared_convolutions_of_different_stride():
    body = """g (float[1,8,6,6] x) => (float[] y, float[] z) {
        y = Conv <pads = [1,1,1,1]> (x, w) z = Conv <strides = [2,2]> (x, w) }"""
    proto = model(body, w=(10, 8, 3, 3))
    assert len(found(proto).layer.uses) == 2
    check(proto, "w")


def test_shared_transposed_convolutions_one_with_an_output_shape():
    body = """g (float[1,8,4,4] x) => (float[] y, float[] z) {
        y = ConvTranspose <output_shape = [6, 4]> (x, w) z = ConvTranspose <strides = [2,2]> (x, w) }"""
    check(model(body, w=(8, 10, 3, 1)), "w")


@pytest.mark.parametrize("ir", [3, 8])
def test_an_initializer_that_is_also_an_input(ir):
    proto = model("g (float[3,8] x, float[8,10] w, float[10] c) => (float[] y) { h = MatMul (x, w) y = Add (h, c) }", opset=13 if ir > 3 else 8, ir=ir, w=W, c=(10,))  # fmt: skip
    seen = found(proto)
    kept = rewritten(seen, {})
    assert kept.removed_inputs == ()
    assert kept.model.proto.graph == proto.graph
    result = rewritten(seen)
    assert result.removed_inputs == ("w",)
    assert [value.name for value in result.model.proto.graph.input] == ["x", "c"]
    check(proto, "w")


def test_ids_are_unique():
    proto = model(IF % ("", "w", "", "v"), v=W)
    proto.graph.node[0].attribute[0].g.initializer.extend(tensors(w=np.eye(8, 10, dtype=np.float32)))
    proto.graph.initializer[0].name = "#0.then_branch/w"
    proto.graph.node[0].attribute[1].g.node[0].input[1] = "#0.then_branch/w"
    assert set(found(proto).layers) == {"#0.then_branch/w", "#0.then_branch/w#2"}


X = "float[3,8] x"
HALVES = {"s": [0], "m": [4], "e": [8]}
REASONS = {
    "computed": (X, "v = Relu (x) t = Transpose (v) y = MatMul (x, t)", {}, "computed"),
    "constant of shape": (X, "v = ConstantOfShape (s) y = MatMul (x, v)", {"s": np.array([8, 9])}, "computed"),
    "other domain's constant": (X, "v = local.Constant () y = MatMul (x, v)", {}, "computed"),
    "vector": (X, "y = MatMul (x, w)", {"w": (8,)}, "vector"),
    "integers": ("int32[3,8] x", "y = MatMul (x, w)", {"w": np.ones(W, np.int32)}, "stored as INT32"),
    "cast to integers": ("int32[3,8] x", "v = Cast <to = 6> (w) y = MatMul (x, v)", {"w": W}, "cast to INT32"),
    "cast through integers": (X, "u = Cast <to = 6> (w) v = Cast <to = 1> (u) y = MatMul (x, v)", {"w": W}, "cast to INT32"),
    "quantized": (X, "v = DequantizeLinear (w, s) y = MatMul (x, v)", {"w": np.ones(W, np.int8), "s": np.float32(0.1)}, "before quantizing"),
    "quantized by the runtime's operator": (X, "v = com.microsoft.DequantizeLinear (w, s) y = MatMul (x, v)", {"w": np.ones(W, np.int16), "s": np.float32(0.1)}, "before quantizing"),
    "quantized in training": (X, "q = QuantizeLinear (w, s) v = DequantizeLinear (q, s) y = MatMul (x, v)", {"w": W, "s": np.float32(0.1)}, "before quantizing"),
    "a quantized table": ("int64[3] x", "q = Gather (w, x) y = DequantizeLinear (q, s)", {"w": np.ones(W, np.uint8), "s": np.float32(0.1)}, "UINT8: if it is quantized, compress before quantizing"),
    "not folded": (X, "v = Mul (w, w) y = MatMul (x, v)", {"w": W}, "computed from constants: constant-fold"),
    "drawn at random": (X, "v = RandomNormalLike (w) y = MatMul (x, v)", {"w": W}, "nothing to decompose"),
    "quantized activation": ("int8[3,8] x", "v = DequantizeLinear (x, s) t = Transpose (v) y = MatMul (v, t)", {"s": np.float32(0.1)}, "computed"),
    "empty": (X, "y = MatMul (x, w)", {"w": (8, 0)}, "empty"),
    "nan": (X, "y = MatMul (x, w)", {"w": np.full(W, np.nan, np.float32)}, "NaN or Inf"),
    "inf": (X, "y = MatMul (x, w)", {"w": np.full(W, -np.inf, np.float32)}, "NaN or Inf"),
    "small": (X, "y = MatMul (x, w)", {"w": (8, 1)}, "too small"),
    "depthwise": ("float[1,8,6,6] x", "y = Conv <group = 8> (x, w)", {"w": (8, 1, 3, 3)}, "depthwise"),
    "depthwise transposed": ("float[1,8,6,6] x", "y = ConvTranspose <group = 8> (x, w)", {"w": (8, 1, 3, 3)}, "depthwise"),
    "gather of another axis": ("int64[3] x", "y = Gather <axis = 1> (w, x)", {"w": W}, "two-dimensional table"),
    "gather of a cube": ("int64[3] x", "y = Gather (w, x)", {"w": (4, 4, 4)}, "two-dimensional table"),
    "gemm of a cube": (X, "y = Gemm (x, w)", {"w": (2, 8, 9)}, "matrix"),
    "also read": (X, "y = MatMul (x, w) z = Relu (w)", {"w": W}, "also read by Relu"),
    "read behind a view": (X, "y = MatMul (x, w) t = Transpose (w) z = Relu (t)", {"w": W}, "also read by Relu"),
    "read twice by one node": ("float[3,8] x", "y = MatMul (w, w)", {"w": (8, 8)}, "also read by MatMul"),
    "different kinds": ("float[1,8,6,6] x", "y = Conv (x, w) z = ConvTranspose (x, w)", {"w": (8, 8, 3, 3)}, "different kinds"),
    "different matrices": (X, "y = MatMul (x, w) v = Reshape (w, s) z = MatMul (x, v)", {"w": W, "s": np.array([1, 8, 10])}, "different matrices"),
    "a batch meets a vector": ("float[8] x", "y = MatMul (x, w)", {"w": (3, 8, 9)}, "rank above 1"),
    "computed view": (X, "s = Shape (x) v = Reshape (w, s) y = MatMul (x, v)", {"w": (24,)}, "views"),
    "slices of two weights": (X, "a = Slice (w, s, m) b = Slice (u, m, e) v = Concat <axis = 0> (b, a) y = MatMul (x, v)", {"w": W, "u": W} | HALVES, "computed"),
    "a slice beside a weight": (X, "a = Slice (w, s, m) v = Concat <axis = 0> (u, a) y = MatMul (x, v)", {"w": W, "u": (4, 10)} | HALVES, "computed"),
    "a slice twice": (X, "a = Slice (w, s, m) v = Concat <axis = 0> (a, a) y = MatMul (x, v)", {"w": W} | HALVES, "views"),
    "slices that leave a row out": ("float[3,7] x", "a = Slice (w, s, m) b = Slice (w, m, e) v = Concat <axis = 0> (b, a) y = MatMul (x, v)", {"w": W} | HALVES | {"e": [7]}, "views"),
    "slices with steps": (X, "a = Slice (w, s, e, s, t) b = Slice (w, u, e, s, t) v = Concat <axis = 0> (b, a) y = MatMul (x, v)", {"w": W, "t": [2], "u": [1]} | HALVES, "views"),
    "slices of two axes": (X, "a = Slice (w, n, p, q) b = Slice (w, m, e) v = Concat <axis = 0> (b, a) y = MatMul (x, v)", {"w": W, "n": [0, 0], "p": [4, 10], "q": [0, 1]} | HALVES, "views"),
    "slices of another axis": ("float[3,16] x", "a = Slice (w, s, m, t) b = Slice (w, m, e, t) v = Concat <axis = 0> (b, a) y = MatMul (x, v)", {"w": (8, 8), "t": [1]} | HALVES, "views"),
    "computed slices": (X, "z = Shape (x) a = Slice (w, s, m) n = Slice (z, t, u) b = Slice (w, m, n) v = Concat <axis = 0> (b, a) y = MatMul (x, v)", {"w": W, "t": [1], "u": [2]} | HALVES, "views"),
    "a slice also read": (X, "a = Slice (w, s, m) b = Slice (w, m, e) v = Concat <axis = 0> (b, a) y = MatMul (x, v) z = Relu (a)", {"w": W} | HALVES, "also read by Slice"),
    "recurrent": ("float[3,1,8] x", "y, h = GRU <hidden_size = 3> (x, w, r)", {"w": (1, 12, 8), "r": (1, 12, 4)}, "does not fit"),
    "several casts": (X, "u = Cast <to = 10> (w) v = Cast <to = 1> (u) y = MatMul (x, v)", {"w": W}, "several Casts"),
    "integer operator": ("int8[3,8] x", "y = MatMulInteger (x, w)", {"w": np.ones(W, np.int8)}, "before quantizing"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name):
    inputs, nodes, weights, words = REASONS[name]
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17, "local" : 1, "com.microsoft" : 1]> g ({inputs}) => (float[] y) {{ {nodes} }}'
    )
    proto.graph.initializer.extend(tensors(**weights))
    seen = found(proto)
    assert not seen.bindings
    assert words in seen.skipped[0].reason
    assert rewritten(seen).model.proto.graph == proto.graph


def test_operators_of_other_domains_are_not_taken_for_those_of_a_runtime():
    proto = model(
        "g (float[3,8] x) => (float[3,10] y) { a = local.LSTM (x) h = local.FusedMatMul (a) y = MatMul (x, w) }",
        w=W,
    )
    assert not found(proto).skipped


def test_a_weight_that_a_function_is_given():
    function = '<domain: "local", opset_import: ["" : 17]> Linear (a, b) => (c) { c = MatMul (a, b) }'
    proto = model("g (float[3,8] x) => (float[3,10] y) { y = local.Linear (x, w) }", functions=function, w=W)
    assert "inline the functions" in found(proto).reason


def test_a_weight_that_a_loop_carries():
    body = """g (float[3,8] x) => (float[3,8] y) {
      n = Constant <value_int = 2> ()
      c = Constant <value = bool {1}> ()
      y, v = Loop (n, c, x, w) <body = l (int64 i, bool p, float[3,8] h, float[8,8] u) => (bool o, float[3,8] z, float[8,8] u)
        { o = Identity (p) z = MatMul (h, u) }>
    }"""
    assert "a state that its loop never changes" in found(model(body, w=(8, 8))).reason


def test_a_returned_weight():
    proto = model("g (float[3,8] x) => (float[] y, float[8,10] w) { y = MatMul (x, w) }", w=W)
    assert "also returns" in found(proto).reason


def test_a_weight_that_training_updates():
    proto = model("g (float[3,8] x) => (float[] y) { y = MatMul (x, w) }", w=W)
    assert found(proto).bindings
    proto.training_info.add().update_binding.add(key="w", value="v")
    assert "also returns" in found(proto).reason


def test_too_many_views():
    chain = "".join(f"v{n + 1} = Identity (v{n}) " for n in range(40))
    proto = model(
        f"g (float[3,8] x) => (float[3,10] y) {{ v0 = Identity (w) {chain} y = MatMul (x, v40) }}", w=W
    )
    assert "too many views" in found(proto).reason


def test_attributes_from_the_caller():
    function = """<domain: "local", opset_import: ["" : 17]> f <alpha> (a) => (b)
        { w = Constant <value_float = 1.0> () b = Gemm <alpha : float = @alpha> (a, w) }"""
    proto = model("g (float[3,8] x) => (float[3,8] y) { y = local.f <alpha = 1.0> (x) }", functions=function)
    assert "inline the functions" in found(proto).reason


def test_unknown_element_types():
    proto = model("g (float[3,8] x) => (float[3,10] y) { y = MatMul (x, w) }")
    proto.graph.initializer.add(name="w", dims=W, data_type=TensorProto.UNDEFINED)
    assert "UNDEFINED" in found(proto).reason


@pytest.mark.parametrize(
    ("selection", "ids"),
    [
        ({}, {"w", "v"}),
        ({"include": ("w",)}, {"w"}),
        ({"include": ("sec*",)}, {"v"}),
        ({"exclude": ("first",)}, {"v"}),
        ({"include": ("*",), "exclude": ("?",)}, set()),
    ],
)
def test_selection_by_id_or_node(selection, ids):
    proto = model("g (float[3,8] x) => (float[] y) { h = MatMul (x, w) y = MatMul (h, v) }", w=W, v=(10, 8))
    proto.graph.node[0].name, proto.graph.node[1].name = "first", "second"
    seen = found(proto, **selection)
    assert set(seen.layers) == ids
    assert len(seen.skipped) == 2 - len(ids)
    assert all("include" in s.reason or "exclude" in s.reason for s in seen.skipped)


@pytest.mark.parametrize("pattern", ["fc.weight", "fc", "f?", "*c", "fc.*", "node", "n*"])
def test_layers_go_by_their_weight_their_module_and_their_node(pattern):
    proto = model("g (float[3,8] x) => (float[3,10] y) { [node] y = MatMul (x, w) }", w=W)
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = "fc.weight"
    assert not found(proto, exclude=[pattern]).bindings
    assert found(proto, include=[pattern]).bindings


# --- operators of other domains ---------------------------------------------------------------------


def foreign(body, functions="", **weights):
    return found(model(f"g (float[3,8] x) => (float[3,8] y) {{ {body} }}", functions=functions, **weights))


def test_an_unknown_operator_with_a_matrix_is_listed_by_domain_and_name():
    (skipped,) = foreign("y = local.Mystery (x, w)", w=(8, 8)).skipped
    assert skipped.op == "Mystery"
    assert skipped.reason == "the operator local.Mystery is not known here: its weight stays as it is"


@pytest.mark.parametrize("shape", [(8,), (1, 8), (8, 1), (1,)])
def test_an_unknown_operator_with_a_vector_is_not(shape):
    assert foreign("y = local.Norm (x, w)", w=shape).skipped == ()


@pytest.mark.parametrize(
    ("value", "is_listed"),
    [([0.5] * 256, True), (np.ones((16, 16), np.float32), True), ([0.5] * 8, False), ([1] * 256, False)],
)
def test_an_unknown_operator_with_many_floats_in_an_attribute_is_listed(value, is_listed):
    proto = model("g (float[3,8] x) => (float[3,8] y) { y = local.Regressor (x) }")
    held = numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
    proto.graph.node[0].attribute.append(helper.make_attribute("coefficients", held))
    assert [skipped.op for skipped in found(proto).skipped] == ["Regressor"] * is_listed


def test_an_unknown_operator_with_a_long_vector_is_listed():
    assert [skipped.op for skipped in foreign("y = local.Norm (x, w)", w=(256,)).skipped] == ["Norm"]


def test_a_call_of_the_models_own_function_is_none():
    text = '<domain: "local", opset_import: ["" : 17]> f (a, b) => (c) { c = Identity (a) }'
    assert foreign("y = local.f (x, w)", text, w=(8, 8)).skipped == ()


@pytest.mark.parametrize("kind", DTYPES)
def test_matrices_become_no_convolution_of_a_type_that_the_runtime_lacks(kind):
    proto = model(
        f"g ({kind}[5,8] x) => ({kind}[5,6] y) {{ y = MatMul (x, w) }}", w=np.ones((8, 6), DTYPES[kind])
    )
    lowerings = found(proto).layer.lowerings(2)
    assert (Lowering.CONV in lowerings) == (kind in ("float", "float16"))
