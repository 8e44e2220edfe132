"""What the taps of a model show, in every place where a layer can stand."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from onnx_lowrank.files.load import load
from onnx_lowrank.files.save import save
from onnx_lowrank.graph.shapes import infer
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.find import read
from onnx_lowrank.probe.instrument import Tap, instrument
from rewriting import constants, draw, found, model, tensors

RNG = np.random.default_rng(11)
W = RNG.standard_normal((6, 6)).astype(np.float32)
X = RNG.standard_normal((3, 6)).astype(np.float32)


def run(proto, **feed):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def tapped(proto, *, results=True):
    seen = found(proto)
    before = proto.SerializeToString(deterministic=True)
    done = instrument(seen.model, seen.walk, seen.bindings, seen.bindings if results else ())
    assert proto.SerializeToString(deterministic=True) == before
    return seen, done


def one(taps):
    """The tap of the only use of the only layer."""
    ((tap,),) = taps.values()
    return tap


def body(nodes, name="then", inputs="", outputs="float[] out"):
    graph = onnx.parser.parse_graph(f"{name} ({inputs}) => ({outputs}) {{ {nodes} }}")
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    return graph


def holding(text, node, bodies, opset=17, **weights):
    """A model of one node that holds bodies, parsed apart, since text cannot leave shapes open."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {text}')
    (holder,) = (n for n in proto.graph.node if n.op_type == node)
    for attribute, graph in bodies.items():
        holder.attribute.add(name=attribute, type=onnx.AttributeProto.GRAPH).g.CopyFrom(graph)
    proto.graph.initializer.extend(tensors(**weights))
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    return proto


MAIN = {
    "computed": ("h = Relu (x) y0 = MatMul (h, w) y = Relu (y0)", lambda x: np.maximum(x, 0)),
    "graph input": ("y0 = MatMul (x, w) y = Relu (y0)", lambda x: x),
    "result is an output": ("h = Relu (x) y = MatMul (h, w)", lambda x: np.maximum(x, 0)),
    "left": ("h = Relu (x) t = Transpose (h) k = MatMul (w, t) y = Relu (k)", lambda x: np.maximum(x, 0).T),
    "gemm": ("h = Relu (x) y0 = Gemm (h, w) y = Relu (y0)", lambda x: np.maximum(x, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", MAIN)
def test_main_graph(name):
    nodes, expected = MAIN[name]
    proto = model(f"g (float[3,6] x) => (float[] y) {{ {nodes} }}", w=W)
    _, done = tapped(proto)
    shown = run(done.model.proto, x=X)
    assert not done.reasons
    np.testing.assert_array_equal(shown[one(done.inputs).name], expected(X))
    product = W @ expected(X) if name == "left" else expected(X) @ W
    np.testing.assert_allclose(shown[one(done.outputs).name], product, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(shown["y"], run(proto, x=X)["y"])


def test_nothing_else_changes():
    proto = model("g (float[3,6] x) => (float[] y) { h = Relu (x) k = MatMul (h, w) y = Relu (k) }", w=W)
    _, done = tapped(proto)
    copy = onnx.ModelProto()
    copy.CopyFrom(done.model.proto)
    assert [output.name for output in copy.graph.output] == ["y", "h", "k"]
    del copy.graph.output[1:]
    assert copy == proto
    assert done.model.path is None


def test_a_tensor_is_tapped_once_for_all_that_read_it():
    proto = model(
        "g (float[3,6] x) => (float[] a, float[] b) { h = Relu (x) a = MatMul (h, v) b = MatMul (h, w) }",
        v=W, w=W.T,
    )  # fmt: skip
    seen, done = tapped(proto, results=False)
    assert [done.inputs[layer] for layer in seen.layers] == [(Tap("h"),), (Tap("h"),)]
    assert [output.name for output in done.model.proto.graph.output] == ["a", "b", "h"]


def test_shared_weight_has_a_tap_for_each_use():
    proto = model("g (float[3,6] x) => (float[] y) { h = MatMul (x, w) y = MatMul (h, w) }", w=W)
    _, done = tapped(proto)
    (inputs,), (outputs,) = done.inputs.values(), done.outputs.values()
    shown = run(done.model.proto, x=X)
    assert [tap.name for tap in outputs] == ["h", "y"]
    np.testing.assert_array_equal(shown[inputs[0].name], X)
    assert inputs[1].name == "h"


def test_the_result_of_a_folded_batchnorm_is_that_behind_it():
    proto = model(
        "g (float[1,4,5,5] x) => (float[] y)"
        "{ h = Conv (x, w) n = BatchNormalization (h, s, b, m, v) y = Relu (n) }",
        w=(8, 4, 3, 3), s=(8,), b=(8,), m=(8,), v=np.full(8, 2, np.float32),
    )  # fmt: skip
    _, done = tapped(proto)
    assert one(done.outputs) == Tap("n")


def test_the_result_of_a_gather():
    proto = model("g (int64[3] i) => (float[] y) { e = Gather (w, i) y = Relu (e) }", w=draw(RNG, (9, 6)))
    seen = found(proto)
    done = instrument(seen.model, seen.walk, (), seen.bindings)
    assert one(done.outputs) == Tap("e")
    assert done.inputs == {}


def test_names_do_not_collide():
    proto = model(
        "g (float[3,6] x) => (float[] y, float[] x_tap) { x_tap = Neg (x) x_tap_2 = Neg (x_tap) k = MatMul (x, w) y = Add (k, x_tap_2) }",  # noqa: E501
        w=W,
    )
    _, done = tapped(proto)
    shown = run(done.model.proto, x=X)
    assert one(done.inputs) == Tap("x_tap_3")
    np.testing.assert_array_equal(shown["x_tap_3"], X)
    np.testing.assert_array_equal(shown["x_tap"], -X)


@pytest.mark.parametrize(("element", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_element_types(element, dtype):
    proto = model(
        f"g ({element}[3,6] x) => ({element}[] y) {{ h = Relu (x) k = MatMul (h, w) y = Relu (k) }}",
        w=W.astype(dtype),
    )
    _, done = tapped(proto)
    shown = run(done.model.proto, x=X.astype(dtype))
    assert {shown[one(taps).name].dtype for taps in (done.inputs, done.outputs)} == {np.dtype(dtype)}


def test_a_cast_weight_computes_in_the_type_that_it_is_cast_to():
    proto = model(
        "g (float[3,6] x) => (float[] y) { c = Cast <to = 1> (w) y = MatMul (x, c) }", w=W.astype(np.float16)
    )
    _, done = tapped(proto)
    assert run(done.model.proto, x=X)[one(done.inputs).name].dtype == np.float32


IF = "g (bool c, float[3,6] x) => (float[] y) { y = If (c) }"
BRANCHES = {
    "own tensor": "h = Relu (x) out = MatMul (h, w)",
    "captured tensor": "out = MatMul (x, w)",
    "used further": "h = Relu (x) k = MatMul (h, w) out = Relu (k)",
}


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("branch", ["then_branch", "else_branch"])
def test_if(name, branch):
    other = "else_branch" if branch == "then_branch" else "then_branch"
    bodies = {branch: body(BRANCHES[name]), other: body("out = Neg (x)", "other")}
    proto = holding(IF, "If", bodies, w=W)
    _, done = tapped(proto)
    assert not done.reasons
    activation = np.maximum(X, 0) if "h =" in BRANCHES[name] else X
    for taken in (True, False):
        chosen = np.array(taken == (branch == "then_branch"))
        shown = run(done.model.proto, x=X, c=np.array(taken))
        read_, given = shown[one(done.inputs).name], shown[one(done.outputs).name]
        if chosen:
            np.testing.assert_array_equal(read_, activation)
            np.testing.assert_allclose(given, activation @ W, rtol=1e-5, atol=1e-6)
        else:
            assert read_.size == given.size == 0
        np.testing.assert_array_equal(shown["y"], run(proto, x=X, c=np.array(taken))["y"])


def test_layers_in_both_branches():
    bodies = {"then_branch": body("out = MatMul (x, v)"), "else_branch": body("out = MatMul (x, w)", "other")}
    proto = holding(IF, "If", bodies, v=W, w=W.T)
    seen, done = tapped(proto)
    shown = run(done.model.proto, x=X, c=np.array(True))
    rows = [[shown[tap.name].size for tap in (*done.inputs[n], *done.outputs[n])] for n in seen.layers]
    assert sorted(rows) == [[0, 0], [18, 18]]


def test_weights_inside_a_branch():
    then = body("out = MatMul (x, w)")
    constants(then, *tensors(w=W))
    proto = holding(IF, "If", {"then_branch": then, "else_branch": body("out = Neg (x)", "other")})
    _, done = tapped(proto)
    np.testing.assert_array_equal(run(done.model.proto, x=X, c=np.array(True))[one(done.inputs).name], X)


LOOP = "g (int64 n, float[3,6] x) => (float[] y) { y = Loop (n, , x) }"
LOOP_INPUTS = "int64 i, bool keep, float[3,6] h"


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_loop(iterations):
    inner = body(
        "again = Identity (keep) out = MatMul (h, w)", "body", LOOP_INPUTS, "bool again, float[3,6] out"
    )
    proto = holding(LOOP, "Loop", {"body": inner}, w=W / 3)
    _, done = tapped(proto)
    shown = run(done.model.proto, x=X, n=np.array(iterations))
    states = [X]
    for _ in range(iterations):
        states.append(states[-1] @ (W / 3))
    assert one(done.inputs).depth == one(done.outputs).depth == 1
    for tap, expected in ((one(done.inputs), states[:-1]), (one(done.outputs), states[1:])):
        assert len(shown[tap.name]) == iterations
        np.testing.assert_allclose(shown[tap.name].reshape(-1, 3, 6), np.reshape(expected, (-1, 3, 6)), rtol=1e-4, atol=1e-5)  # fmt: skip  # noqa: E501
    np.testing.assert_array_equal(shown["y"], run(proto, x=X, n=np.array(iterations))["y"])


def test_loop_with_outputs_left_out():
    inner = body(
        "again = Identity (keep) out = Relu (h) s = MatMul (h, w)", "body", LOOP_INPUTS,
        "bool again, float[3,6] out, float[3,6] s",
    )  # fmt: skip
    proto = holding(LOOP, "Loop", {"body": inner}, w=W)
    _, done = tapped(proto)
    shown = run(done.model.proto, x=X, n=np.array(2))
    np.testing.assert_array_equal(shown[one(done.inputs).name], [X, np.maximum(X, 0)])
    np.testing.assert_array_equal(shown["y"], np.maximum(X, 0))


def test_loop_reads_an_outer_tensor_as_often_as_it_runs():
    inner = body(
        "again = Identity (keep) k = MatMul (x, w) out = Add (h, k)", "body", LOOP_INPUTS,
        "bool again, float[3,6] out",
    )  # fmt: skip
    _, done = tapped(holding(LOOP, "Loop", {"body": inner}, w=W))
    shown = run(done.model.proto, x=X, n=np.array(3))
    np.testing.assert_array_equal(shown[one(done.inputs).name], [X, X, X])


@pytest.mark.parametrize("axes", [None, 1])
def test_scan(axes):
    inner = body(
        "next = Add (s, e) k = MatMul (next, w) out = Relu (k)", "body", "float[6] s, float[6] e",
        "float[6] next, float[6] out",
    )  # fmt: skip
    proto = holding(
        "g (float[6] s, float[3,6] x) => (float[] z, float[] y) { z, y = Scan <num_scan_inputs = 1> (s, x) }",
        "Scan", {"body": inner}, w=W,
    )  # fmt: skip
    if axes is not None:
        proto.graph.node[0].attribute.extend(
            onnx.helper.make_attribute(f"scan_output_{name}", [axes]) for name in ("axes", "directions")
        )
    _, done = tapped(proto)
    start = np.ones(6, np.float32)
    shown = run(done.model.proto, x=X, s=start)
    states = start + np.cumsum(X, axis=0)
    assert one(done.inputs).depth == one(done.outputs).depth == 1
    np.testing.assert_allclose(shown[one(done.inputs).name], states, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shown[one(done.outputs).name], states @ W, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(shown["y"], run(proto, x=X, s=start)["y"])


def nested(outer, inner):
    """A layer in a body of `inner` in a body of `outer`."""
    names = {"If": ("then_branch", "else_branch"), "Loop": ("body",)}

    def graph(kind, nodes, name):
        if kind == "Loop":
            nodes = f"again_{name} = Identity (keep_{name}) " + nodes
            return body(
                nodes, name, f"int64 i_{name}, bool keep_{name}, float[3,6] h_{name}",
                f"bool again_{name}, float[3,6] out_{name}",
            )  # fmt: skip
        return body(nodes, name, "", f"float[3,6] out_{name}")

    calls = {"If": "If (c)", "Loop": "Loop (n, , x)"}
    deepest = graph(inner, "r = Relu (x) k = MatMul (r, w) out_b = Neg (k)", "b")
    middle = graph(outer, f"out_a = {calls[inner]}", "a")
    (holder,) = (node for node in middle.node if node.op_type == inner)
    holder.attribute.add(name=names[inner][0], type=onnx.AttributeProto.GRAPH).g.CopyFrom(deepest)
    if inner == "If":
        other = graph("If", "out_o = Neg (x)", "o")
        holder.attribute.add(name="else_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(other)
    bodies = {names[outer][0]: middle}
    if outer == "If":
        bodies["else_branch"] = graph("If", "out_p = Neg (x)", "p")
    text = f"g (bool c, int64 n, float[3,6] x) => (float[] y) {{ y = {calls[outer]} }}"
    return holding(text, outer, bodies, w=W)


@pytest.mark.parametrize("outer", ["If", "Loop"])
@pytest.mark.parametrize("inner", ["If", "Loop"])
def test_nested_bodies(outer, inner):
    proto = nested(outer, inner)
    _, done = tapped(proto)
    assert not done.reasons
    depth = (outer == "Loop") + (inner == "Loop")
    tap = one(done.inputs)
    assert tap.depth == depth
    shown = run(done.model.proto, x=X, c=np.array(True), n=np.array(2))
    np.testing.assert_array_equal(shown[tap.name], np.broadcast_to(np.maximum(X, 0), (*[2] * depth, 3, 6)))
    if "If" in (outer, inner):
        assert run(done.model.proto, x=X, c=np.array(False), n=np.array(2))[tap.name].size == 0


def test_a_layer_in_a_function_is_listed():
    proto = model(
        "g (float[3,6] x) => (float[3,6] y) { a = MatMul (x, v) y = local.f (a) }", v=W,
        functions="<domain: \"local\", opset_import: [\"\": 17]> f (a) => (b) { b = MatMul (a, w) }",
    )  # fmt: skip
    constants(proto.functions[0], *tensors(w=W.T))
    seen, done = tapped(proto)
    (reason,) = done.reasons.values()
    assert "function 'local:f'" in reason
    assert len(seen.layers) == 2
    assert done.inputs.keys() == done.outputs.keys() == {"v"}


def test_a_layer_in_the_body_of_another_operator_is_listed():
    inner = body("out = MatMul (e, w)", "body", "float[3,6] e")
    proto = holding(
        "g (float[3,6] x) => (float[3,6] y) { s = SequenceConstruct (x) t = SequenceMap (s) i = Constant <value_int = 0> () y = SequenceAt (t, i) }",  # noqa: E501
        "SequenceMap", {"body": inner}, w=W,
    )  # fmt: skip
    _, done = tapped(proto)
    (reason,) = done.reasons.values()
    assert "SequenceMap" in reason
    assert done.inputs == done.outputs == {}


def test_external_weights_stay_where_they_are(tmp_path):
    proto = model("g (float[3,6] x) => (float[] y) { h = Relu (x) y = MatMul (h, w) }", w=W)
    source = tmp_path / "m.onnx"
    kept = onnx.ModelProto()
    kept.CopyFrom(proto)
    onnx.save_model(kept, source, save_as_external_data=True, size_threshold=0)
    loaded = load(source)
    walk = Walk(loaded.proto)
    seen = found(proto)
    done = instrument(loaded, walk, seen.bindings)
    assert not done.model.proto.graph.initializer[0].raw_data
    assert done.model.files == loaded.files
    save(done.model, tmp_path / "copy.onnx")
    copy = load(tmp_path / "copy.onnx")
    assert infer(copy, {})["", "h"] == (3, 6)
    np.testing.assert_array_equal(read(seen.model, seen.walk, seen.bindings[0])[0].T, W)
    session = onnxruntime.InferenceSession(str(tmp_path / "copy.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(["h"], {"x": X})[0], np.maximum(X, 0))
