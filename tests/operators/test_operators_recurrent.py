"""LSTM, GRU and RNN: their input weight becomes a MatMul before a narrower copy of the node."""
# ruff: noqa: E501 - tables of models, one a line

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_lowrank import BudgetError, compress
from onnx_lowrank.budgets.macs import dearest_macs
from onnx_lowrank.budgets.params import parameters as cost
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.files.load import load
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.parameters import parameters
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.find import geometry, read
from onnx_lowrank.layers.found import find_layers
from onnx_lowrank.operators.geometry import patches
from onnx_lowrank.probe.excerpt import excerpts
from onnx_lowrank.probe.micro import micro
from onnx_lowrank.probe.override import Overridable
from onnx_lowrank.probe.segments import Substitute
from rewriting import (
    DTYPES,
    assert_only_named_changes,
    assert_same,
    constants,
    difference,
    draw,
    evaluate,
    feed_of,
    found,
    full_rank,
    model,
    rewritten,
    run,
    tensors,
)
from timing import PER_NODE, by_weights
from tiny import built, decaying

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
STEPS, BATCH, INPUTS, HIDDEN = 4, 2, 7, 5
LENGTHS = np.array([STEPS, 2], np.int32)
OPTIONAL = ("b", "lens", "h", "c", "p")
"""The operands behind X, W and R, in their order."""


def recurrent(
    op, direction="forward", with_=(), outputs="y yh", attributes="", opset=17, kind="float", layout=0,
    inputs=INPUTS,
):  # fmt: skip
    """A model of one recurrent node with some of the optional operands; an output called _ is left out."""
    d, gates, dtype = DIRECTIONS[direction], GATES[op], DTYPES[kind]
    state = (BATCH, d, HIDDEN) if layout else (d, BATCH, HIDDEN)
    shapes = {
        "w": (d, gates * HIDDEN, inputs), "r": (d, gates * HIDDEN, HIDDEN), "b": (d, 2 * gates * HIDDEN),
        "h": state, "c": state, "p": (d, 3 * HIDDEN),
    }  # fmt: skip
    rng = np.random.default_rng(5)
    arrays = {name: draw(rng, shape, dtype) for name, shape in shapes.items() if name in ("w", "r", *with_)}
    arrays |= {"lens": LENGTHS} if "lens" in with_ else {}
    names = ["x", "w", "r", *(name if name in with_ else "" for name in OPTIONAL)]
    while not names[-1]:
        names.pop()
    given = ["" if name == "_" else name for name in outputs.split()]
    x = (BATCH, STEPS, inputs) if layout else (STEPS, BATCH, inputs)
    heading = f"g ({kind}[{','.join(map(str, x))}] x) => ({', '.join(f'{kind}[] {o}' for o in given if o)})"
    extra = f", layout = {layout}" * bool(layout) + f", {attributes}" * bool(attributes)
    node = f'{op} <hidden_size = {HIDDEN}, direction = "{direction}"{extra}>'
    proto = model(f"{heading} {{ {', '.join(o for o in given if o)} = {node} (x) }}", opset, 10, **arrays)
    # The text cannot leave operands out.
    del proto.graph.node[0].input[:], proto.graph.node[0].output[:]
    proto.graph.node[0].input.extend(names)
    proto.graph.node[0].output.extend(given)
    del proto.graph.output[:]
    number = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(o, number, None) for o in given if o)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    del proto.graph.output[:]
    proto.graph.output.extend(inferred.graph.output)
    return proto


def total_macs(scopes, layers):
    return dearest_macs(scopes, layers)[0]


def check(proto, compute=run, tolerance=1e-6):
    """At full rank the model computes the same; nothing else has changed, and the cost is as foretold."""
    seen = found(proto)
    layer = seen.layer
    result = rewritten(seen)
    new = result.model.proto
    assert [node.op_type for node in new.graph.node] == ["MatMul", proto.graph.node[0].op_type]
    assert_only_named_changes(proto, new, [layer], result.chains)
    onnx.checker.check_model(new, full_check=True)
    feed = feed_of(proto)
    assert difference(compute(proto, feed), compute(new, feed)) < tolerance
    assert parameters(result.model) == parameters(seen.model) - cost(layer) + cost(layer, full_rank(layer))
    assert found(new).work == seen.work, "the recurrent weights multiply as before"
    options = [(seen.layer, full_rank(layer))]
    assert total_macs(seen.work, options) == total_macs(
        found(new).work, [(layer, None) for layer in found(new).layers.values()]
    )


VARIANTS = {
    "plain": {},
    "with biases": {"with_": ("b",)},
    "with lengths": {"with_": ("lens",)},
    "with a state": {"with_": ("h",)},
    "with biases and a state": {"with_": ("b", "h")},
    "with all": {"with_": ("b", "lens", "h")},
    "sequence alone": {"outputs": "y"},
    "last state alone": {"outputs": "_ yh"},
    "clipped": {"attributes": "clip = 0.25"},
}
OWN = {
    "LSTM": {
        "all outputs": {"outputs": "y yh yc"},
        "last cell alone": {"outputs": "_ _ yc"},
        "both states": {"with_": ("b", "h", "c"), "outputs": "y yh yc"},
        "a cell alone": {"with_": ("c",)},
        "peepholes": {"with_": ("p",)},
        "all operands": {"with_": OPTIONAL, "outputs": "_ yh yc"},
        "coupled": {"attributes": "input_forget = 1"},
    },
    "GRU": {
        "reset behind": {"attributes": "linear_before_reset = 1", "with_": ("b",)},
        "reset before": {"attributes": "linear_before_reset = 0", "with_": ("b",)},
    },
    "RNN": {},
}
ACTIVATIONS = {
    "LSTM": ["HardSigmoid", "Tanh", "Softsign"],
    "GRU": ["Sigmoid", "Softsign"],
    "RNN": ["Relu"],
}
CASES = [(op, name) for op in GATES for name in (*VARIANTS, *OWN[op])]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("op", "name"), CASES)
def test_full_rank_is_exact(op, name, direction):
    check(recurrent(op, direction, **(VARIANTS | OWN[op])[name]))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", GATES)
def test_full_rank_is_exact_with_other_activations(op, direction):
    names = ", ".join(f'"{name}"' for name in ACTIVATIONS[op] * DIRECTIONS[direction])
    check(recurrent(op, direction, ("b",), attributes=f"activations = [{names}]"))


@pytest.mark.parametrize("opset", [7, 14, 22])
@pytest.mark.parametrize("op", GATES)
def test_full_rank_is_exact_in_every_opset(op, opset):
    check(recurrent(op, "bidirectional", ("b", "lens", "h"), opset=opset))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", GATES)
def test_full_rank_is_exact_where_the_batch_is_first(op, direction):
    """ONNX Runtime has no such kernels."""
    check(recurrent(op, direction, ("b", "h"), layout=1), evaluate)


@pytest.mark.parametrize(
    ("kind", "compute", "tolerance"),
    [("float16", run, 1e-2), ("double", evaluate, 1e-14), ("bfloat16", evaluate, 1e-1)],
)
@pytest.mark.parametrize("op", GATES)
def test_full_rank_is_exact_in_every_dtype(op, kind, compute, tolerance):
    check(recurrent(op, "bidirectional", ("b",), opset=22, kind=kind), compute, tolerance)


@pytest.mark.parametrize("op", GATES)
def test_factors_of_the_weights_rank_are_exact(op):
    proto = recurrent(op, "bidirectional")
    left, right = (
        draw(np.random.default_rng(1), (2, GATES[op] * HIDDEN, 2)),
        draw(np.random.default_rng(2), (2, INPUTS)),
    )
    proto.graph.initializer[0].CopyFrom(inline("w", left @ right))
    result = rewritten(found(proto), {"w": Option(Fold.ENCODE, 1, 2)})
    shapes = {tensor.name: list(tensor.dims) for tensor in result.model.proto.graph.initializer}
    assert shapes["w_encoder"] == [INPUTS, 2], "one for both directions"
    assert shapes["w_decoder"] == [2, GATES[op] * HIDDEN, 2]
    assert_same(proto, result.model.proto)


def test_the_last_node_keeps_the_nodes_name_notes_and_attributes():
    proto = recurrent("LSTM", "reverse", OPTIONAL, "y yh yc", "clip = 2.0, input_forget = 0")
    node = proto.graph.node[0]
    node.name, node.doc_string = "rnn", "a note"
    node.metadata_props.add(key="origin", value="test")
    encoder, decoder = rewritten(found(proto)).model.proto.graph.node
    assert (encoder.op_type, encoder.name) == ("MatMul", "rnn/encoder")
    assert list(decoder.input) == [encoder.output[0], "w_decoder", *node.input[2:]]
    for field in ("op_type", "name", "doc_string", "attribute", "output"):
        assert getattr(decoder, field) == getattr(node, field)
    assert [entry.key for entry in decoder.metadata_props if not entry.key.startswith("onnx_lowrank.")] == [
        "origin"
    ]


# --- which weights are layers -------------------------------------------------------------------------


def test_a_layer_is_one_matrix_of_all_gates_and_directions():
    layer = found(recurrent("GRU", "bidirectional")).layer
    assert (layer.op, layer.shape) == ("GRU", (1, 2 * 3 * HIDDEN, INPUTS))
    assert layer.slices == (1,)
    (use,) = layer.uses
    assert (use.is_linear, use.inputs_first, use.transposed) == (False, False, False)


def refused(proto):
    seen = found(proto)
    assert rewritten(seen).model.proto.graph == proto.graph
    return seen.reason


def test_one_input_is_too_small():
    assert "too small" in refused(recurrent("LSTM", inputs=1))


def test_a_computed_weight():
    proto = model(
        "g (float[4,2,7] x, float[1,5,7] v) => (float[] y) { w = Relu (v) y = RNN <hidden_size = 5> (x, w, r) }",
        r=(1, 5, 5),
    )
    assert "computed" in refused(proto)


def test_a_quantized_weight():
    body = "g (float[4,2,7] x) => (float[] y) { w = DequantizeLinear (q, s) y = RNN <hidden_size = 5> (x, w, r) }"
    proto = model(body, q=np.ones((1, 5, 7), np.int8), s=np.float32(1), r=(1, 5, 5))
    assert "before quantizing" in refused(proto)


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ((15, 7), ""),
        ((2, 15, 7), ""),
        ((1, 15, 7), 'direction = "bidirectional"'),
        ((1, 14, 7), ""),
        ((1, 15, 7), "hidden_size = 4"),
    ],
)
def test_a_weight_that_does_not_fit_its_node(shape, attributes):
    brackets = f"<{attributes}>" * bool(attributes)
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[4,2,7] x) => (float[] y) {{ y = GRU {brackets} (x, w, r) }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(tensors(w=shape, r=(1, 15, 5)))
    assert "does not fit" in refused(proto)


def test_the_hidden_size_may_be_left_out():
    proto = model("g (float[4,2,7] x) => (float[] y) { y = GRU (x, w, r) }", w=(1, 15, 7), r=(1, 15, 5))
    assert found(proto).layer.f == 15


def test_a_node_without_outputs_lacks_them():
    proto = recurrent("RNN", outputs="y")
    proto.graph.node[0].output[0] = ""
    proto.graph.output[0].name = "x"
    assert "lacks" in found(proto).reason


def test_nodes_of_one_kind_share_their_factors():
    """A weight read forwards and backwards, and by nodes of other recurrent weights."""
    nodes = 'a = LSTM <hidden_size = 5> (x, w, r) b = LSTM <hidden_size = 5, direction = "reverse"> (x, w, s) y = Add (a, b)'
    proto = model(
        f"g (float[4,2,7] x) => (float[] y) {{ {nodes} }}", w=(1, 20, 7), r=(1, 20, 5), s=(1, 20, 5)
    )
    seen = found(proto)
    assert len(seen.layer.uses) == 2
    new = rewritten(seen).model.proto
    assert [node.op_type for node in new.graph.node] == ["MatMul", "LSTM", "MatMul", "LSTM", "Add"]
    assert_same(proto, new)


@pytest.mark.parametrize(
    "second",
    [
        "RNN <hidden_size = 20> (x, w, s)",
        'v = Reshape (w, n) z = LSTM <hidden_size = 5, direction = "bidirectional"> (x, v, t)',
        "t = Squeeze (w, i) u = Transpose (t) z = MatMul (x, u)",
    ],
    ids=["another operator", "two directions", "a matrix"],
)
def test_nodes_of_different_kinds_do_not(second):
    second = second if "z = " in second else f"z = {second}"
    numbers = {"n": np.array([2, 20, 7]), "i": np.array([0])}
    first = "LSTM <hidden_size = 10> (x, w, r)" if "bi" in second else "LSTM <hidden_size = 5> (x, w, r)"
    rows = 40 if "bi" in second else 20
    shapes = {"w": (1, rows, 7), "r": (1, rows, rows // 4), "s": (1, 20, 20), "t": (2, 20, 5)}
    proto = model(
        f"g (float[4,2,7] x) => (float[] y, float[] z) {{ y = {first} {second} }}", **shapes, **numbers
    )
    reasons = [skipped.reason for skipped in found(proto).skipped]
    assert len(reasons) == 2
    assert all("different kinds" in reason for reason in reasons)


# PyTorch stores the gates of an LSTM in another order, and a matrix for each direction.
HIDING = {
    "a constant": ("", (1, 20, 7), {}),
    "a transposed matrix": ("t = Transpose (w) v = Unsqueeze (t, z)", (7, 20), {"z": [0]}),
    "two axes turned": ("v = Transpose <perm = [0, 2, 1]> (w)", (1, 7, 20), {}),
    "gates in another order": (
        "i = Slice (w, z, a, z, u) f = Slice (w, a, b, z, u) g = Slice (w, b, c, z, u) o = Slice (w, c, d, z, u)"
        " j = Concat <axis = 0> (i, o, f, g) v = Unsqueeze (j, z)",
        (20, 7),
        {"z": [0], "a": [5], "b": [10], "c": [15], "d": [20], "u": [1]},
    ),
    "half precision": ("v = Cast <to = 1> (w)", (1, 20, 7), {}),
}
BRANCHES = """g (bool k, float[4,2,7] x) => (float[] y) {{
    y = If (k) <then_branch = t () => (float[4,1,2,5] p) {{ {} p = LSTM <hidden_size = 5> (x, {}, r) }},
                else_branch = e () => (float[4,1,2,5] q) {{ {} q = LSTM <hidden_size = 5, direction = "reverse"> (x, {}, r) }}> }}"""


def hidden(name, text, in_constant, **arrays):
    view, shape, numbers = HIDING[name]
    read_by = "v" if view else "w"
    dtype = np.float16 if name == "half precision" else np.float32
    more = {key: np.array(value) for key, value in numbers.items()}
    proto = model(text(view, read_by), w=draw(np.random.default_rng(5), shape, dtype), **arrays, **more)
    if in_constant:
        held = list(proto.graph.initializer)
        del proto.graph.initializer[:]
        constants(proto.graph, *held)
    return proto


def tolerance(name):
    return 5e-3 if name == "half precision" else 1e-5


@pytest.mark.parametrize("in_constant", [False, True])
@pytest.mark.parametrize("name", HIDING)
def test_where_a_weight_hides(name, in_constant):
    def text(view, read_by):
        return f"g (float[4,2,7] x) => (float[] y) {{ {view} y = LSTM <hidden_size = 5> (x, {read_by}, r) }}"

    proto = hidden(name, text, in_constant, r=(1, 20, 5))
    seen = found(proto)
    result = rewritten(seen)
    assert_only_named_changes(proto, result.model.proto, [seen.layer], result.chains)
    assert_same(proto, result.model.proto, tolerance(name))
    assert {node.op_type for node in result.model.proto.graph.node} <= {"Constant", "Cast", "MatMul", "LSTM"}


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("name", HIDING)
def test_a_weight_of_both_branches(name, branch):
    proto = hidden(
        name, lambda view, read_by: BRANCHES.format(view, read_by, view, read_by), False, r=(1, 20, 5)
    )
    seen = found(proto)
    assert len(seen.layer.uses) == 2
    assert_same(proto, rewritten(seen).model.proto, tolerance(name), k=np.array(branch))


@pytest.mark.parametrize("branch", [True, False])
def test_a_weight_of_one_branch(branch):
    proto = model(BRANCHES.format("", "w", "", "v"), v=(1, 20, 7), r=(1, 20, 5))
    proto.graph.node[0].attribute[0].g.initializer.extend(tensors(w=(1, 20, 7)))
    seen = found(proto)
    assert set(seen.layers) == {"#0.then_branch/w", "v"}
    assert_same(proto, rewritten(seen).model.proto, k=np.array(branch))


# --- what it costs, and what it reads -----------------------------------------------------------------


@pytest.mark.parametrize("layout", [0, 1])
def test_macs(layout):
    """Both weights multiply in every step; a rank j puts one vector of size j between."""
    proto = recurrent("GRU", "bidirectional", ("b", "lens", "h"), layout=layout)
    (seen, spared) = (found(proto), found(proto, exclude=("w",)))
    positions, (d, gates) = STEPS * BATCH, (2, 3)
    own, beside = d * gates * HIDDEN * INPUTS, d * gates * HIDDEN * HIDDEN
    assert seen.layer.uses[0].positions.batch == BATCH
    assert total_macs(seen.work, [(seen.layer, None)]) == positions * (own + beside)
    assert total_macs(spared.work, []) == positions * (own + beside)
    for j in (1, 3):
        option = Option(Fold.ENCODE, 1, j)
        expected = positions * (j * (INPUTS + d * gates * HIDDEN) + beside)
        assert total_macs(seen.work, [(seen.layer, option)]) == expected
        again = found(rewritten(seen, {"w": option}).model.proto)
        assert total_macs(again.work, [(layer, None) for layer in again.layers.values()]) == expected


def test_macs_of_an_open_sequence_are_unknown():
    body = "g (float[N,2,7] x) => (float[] y) { y = RNN <hidden_size = 5> (x, w, r) }"
    proto = model(body, w=(1, 5, 7), r=(1, 5, 5))
    seen = found(proto)
    assert total_macs(seen.work, [(seen.layer, None)]) is None
    assert total_macs(found(proto, exclude=("w",)).work, []) is None
    fixed = found(proto, {"x": (3, 2, 7)})
    assert total_macs(fixed.work, [(fixed.layer, None)]) == 6 * 5 * (7 + 5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_vectors_times_the_weight_are_what_the_node_adds_to_its_states(direction):
    """Without recurrent weights and with an activation that changes nothing, an RNN is the product."""
    proto = recurrent("RNN", direction, outputs="y")
    d = DIRECTIONS[direction]
    proto.graph.initializer[1].CopyFrom(inline("r", np.zeros((d, HIDDEN, HIDDEN), np.float32)))
    for name, value in (
        ("activations", ["Affine"] * d),
        ("activation_alpha", [1.0] * d),
        ("activation_beta", [0.0] * d),
    ):
        proto.graph.node[0].attribute.append(onnx.helper.make_attribute(name, value))
    seen = found(proto)
    (binding,) = seen.bindings
    x = feed_of(proto)["x"]
    rows = np.concatenate(list(patches(geometry(seen.walk, binding, 0), x)))
    products = np.einsum("gfp,rgp->rgf", read(seen.model, seen.walk, binding), rows)
    (y,) = run(proto, {"x": x})
    np.testing.assert_allclose(
        products.reshape(STEPS, BATCH, d, HIDDEN).swapaxes(1, 2), y, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", HIDING)
def test_another_weight_can_be_fed(name):
    def text(view, read_by):
        return f"g (float[4,2,7] x) => (float[] y) {{ {view} y = LSTM <hidden_size = 5> (x, {read_by}, r) }}"

    proto = hidden(name, text, False, r=(1, 20, 5))
    seen = found(proto)
    (binding,) = seen.bindings
    opened = Overridable(seen.model, seen.walk, seen.bindings)
    assert opened.inputs["w"] == ("w", None)
    other = draw(np.random.default_rng(9), seen.layer.shape)
    feed = feed_of(proto)
    fed = run(opened.model.proto, feed | opened.feeds(binding, Substitute(other)))
    plain = model(
        "g (float[4,2,7] x) => (float[] y) { y = LSTM <hidden_size = 5> (x, w, r) }", w=other, r=(1, 20, 5)
    )
    plain.graph.initializer[1].CopyFrom(next(t for t in proto.graph.initializer if t.name == "r"))
    assert difference(run(plain, feed), fed) < tolerance(name)


# --- on its own ---------------------------------------------------------------------------------------


def alone(proto):
    """A layer's node and its chain, each in a model of its own."""
    seen = found(proto)
    result = rewritten(seen)
    (binding,) = seen.bindings
    (chain,) = result.chains[binding.layer.id]
    return excerpts(seen.model, seen.walk, result.model, Walk(result.model.proto), binding, chain)


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("with_", [(), ("b", "p"), ("lens",), ("h", "c"), OPTIONAL], ids=str)
def test_a_layer_runs_alone_with_its_constants(with_, layout):
    pair = alone(recurrent("LSTM", "bidirectional", with_, "_ yh yc", layout=layout))
    feed = feed_of(pair[0])
    fixes = any(name in with_ for name in ("lens", "h", "c"))
    model_shape = (BATCH, STEPS) if layout else (STEPS, BATCH)
    assert feed["x"].shape == (*(model_shape if fixes else ((1, 3) if layout else (3, 1))), INPUTS)
    assert [value.name for value in pair[0].graph.output] == ["yh"]
    compute = evaluate if layout else run
    assert difference(compute(pair[0], feed), compute(pair[1], feed)) < 1e-6


STREAMING = """g (float[4,2,7] x, float[1,2,5] s) => (float[] y, float[] z) {
    y, z = GRU <hidden_size = 5> (x, w, r, "", "", s) }"""


def streaming():
    proto = model(STREAMING.replace('"", "", s', "s, s, s"), w=(1, 15, 7), r=(1, 15, 5))
    proto.graph.node[0].input[3] = proto.graph.node[0].input[4] = ""
    return proto


def test_a_layer_with_a_computed_state_does_not_run_alone():
    assert alone(streaming()) is None
    check(streaming())


def test_a_layer_with_a_state_of_unknown_size_does_not_run_alone():
    proto = recurrent("RNN", with_=("h",))
    del proto.graph.input[0].type.tensor_type.shape.dim[0]
    proto.graph.input[0].type.tensor_type.shape.dim.insert(0, onnx.TensorShapeProto.Dimension(dim_param="N"))
    del proto.graph.output[:]
    proto.graph.output.add(name="yh").type.tensor_type.elem_type = 1
    assert alone(proto) is None


@pytest.mark.parametrize("with_", [(), ("b",), ("lens", "h"), OPTIONAL], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", GATES)
def test_a_layer_is_timed_with_all_that_takes_time(op, direction, with_):
    with_ = tuple(name for name in with_ if op == "LSTM" or name not in "cp")
    proto = recurrent(op, direction, with_)
    seen = found(proto)
    small = micro(seen.walk, seen.bindings[0], 0)
    (node,) = small.structure.graph.node
    given = [name for name in ("b", "lens", "h", "c", "p") if name in with_ and name != "lens"]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    dims = {tensor.name: tuple(tensor.dims) for tensor in small.structure.graph.initializer}
    assert [dims[name] for name in node.input[1:] if name] == [shapes[name] for name in ("w", "r", *given)]
    assert small.shape == (STEPS, BATCH, INPUTS)
    (dense,) = run(small.dense().proto, small.feed())
    assert dense.shape == (STEPS, DIRECTIONS[direction], BATCH, HIDDEN)
    options = [Option(Fold.ENCODE, 1, j) for j in (1, 4)]
    chains = small.chains()
    assert len({small.key, *map(chains.digest, options)}) == 3
    for option, chain in chains.decomposed(options):
        assert [n.op_type for n in chain.proto.graph.node] == ["MatMul", op]
        (result,) = run(chain.proto, small.feed())
        assert result.shape == dense.shape, option


def test_layers_that_are_alike_are_timed_once():
    keys = [
        micro(seen.walk, seen.bindings[0], 0).key
        for proto in (
            recurrent("LSTM", with_=("b",)),
            recurrent("LSTM", with_=("b", "lens"), outputs="_ yh yc"),
            recurrent("LSTM"),
            recurrent("LSTM", "reverse", ("b",)),
            recurrent("LSTM", with_=("b",), layout=1),
        )
        for seen in [found(proto)]
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_an_open_sequence_is_not_timed():
    proto = model(
        "g (float[N,2,7] x) => (float[] y) { y = RNN <hidden_size = 5> (x, w, r) }", w=(1, 5, 7), r=(1, 5, 5)
    )
    seen = found(proto)
    assert micro(seen.walk, seen.bindings[0], 0) is None


def test_a_layer_of_a_function_that_nothing_calls_is_not_timed():
    """It reads a sequence of known size, and never."""
    function = (
        '<domain: "local", opset_import: ["" : 17]> f (a) => (b) { b = RNN <hidden_size = 5> (a, w, r) }'
    )
    proto = model("g (float[4,2,7] x) => (float[4,2,7] y) { y = Relu (x) }", functions=function)
    constants(proto.functions[0], *tensors(w=(1, 5, 7), r=(1, 5, 5)))
    seen = find_layers(load(proto), {}, (), ())
    (binding,) = seen.bindings
    assert binding.layer.uses[0].evaluations.dense == 0
    assert micro(seen.walk, binding, 0) is None


# --- the whole command --------------------------------------------------------------------------------

CLASSIFIER = """
<ir_version: 8, opset_import: ["": 17]>
classifier (float[N, 6, 24] x) => (float[N, 4] y) {
  o = Transpose <perm = [1, 0, 2]> (x)
  a, ah, ac = LSTM <hidden_size = 9, direction = "bidirectional"> (o, w1, r1, b1)
  t = Transpose <perm = [0, 2, 1, 3]> (a)
  b = Reshape (t, s)
  c, ch = GRU <hidden_size = 16> (b, w2, r2)
  d = Squeeze (ch, z)
  y = Gemm <transB = 1> (d, fc)
}
"""
SHAPE = {"x": (1, 6, 24)}


def classifier():
    """Two recurrent layers and a matrix: spectra that decay, states that stay small."""
    rng = np.random.default_rng(3)
    return built(
        CLASSIFIER,
        {
            "w1": decaying(1, 72, 24).reshape(2, 36, 24),
            "r1": np.float32(0.2) * draw(rng, (2, 36, 9)),
            "b1": np.float32(0.2) * draw(rng, (2, 72)),
            "w2": decaying(2, 48, 18)[None],
            "r2": np.float32(0.2) * draw(rng, (1, 48, 16)),
            "s": np.array([6, -1, 18]),
            "z": np.array([0]),
            "fc": decaying(3, 4, 16),
        },
    )


def sequences(seed, number=40):
    """Inputs whose features differ in size."""
    scale = np.linspace(0.02, 2, 24) ** 2
    return (np.random.default_rng(seed).standard_normal((number, 6, 24)) * scale).astype(np.float32)


def recurrent_options(result):
    return {row.id: row.option for row in result.report.layers if row.id in ("w1", "w2")}


@pytest.mark.parametrize("recipe", ["schatten", "alds", "svd", "l-rank"])
def test_data_free(recipe):
    result = compress(classifier(), 0.7, recipe=recipe, input_shape=SHAPE)
    assert result.report.totals.amount("params").ratio <= 0.7
    assert result.report.validation.engine == "ONNX Runtime CPUExecutionProvider"
    assert all(recurrent_options(result).values())
    assert not result.report.skipped
    again = compress(classifier(), plan=result.plan, input_shape=SHAPE)
    assert again.proto == result.proto


def test_macs_as_the_budget():
    """The recurrent weights count, and cannot be saved."""
    options = {"budget": "macs", "input_shape": SHAPE}
    macs = compress(classifier(), 0.75, **options).report.totals.amount("macs")
    beside = 6 * (72 * 9 + 48 * 16)
    assert macs.before == beside + 6 * (72 * 24 + 48 * 18) + 4 * 16
    assert macs.ratio <= 0.75
    with pytest.raises(BudgetError):
        compress(classifier(), beside / macs.before, **options)


@pytest.mark.parametrize("ratio", [0.9, 0.75])
def test_latency_as_the_budget(ratio):
    result = compress(classifier(), ratio, budget="latency", align=1, input_shape=SHAPE)
    time = result.report.totals.amount("time")
    assert (time.before, time.after) == (by_weights(classifier()), by_weights(result.proto))
    assert result.report.reached == time.ratio <= ratio
    timed = result.report.timing.layers
    assert timed.keys() >= {"w1"}
    for layer, taken in timed.items():
        j = recurrent_options(result)[layer].j
        (f, c) = {"w1": (72, 24), "w2": (48, 18)}[layer]
        assert taken.before - taken.after == f * c - j * (f + c) - PER_NODE


@pytest.fixture(scope="module")
def calibrated():
    return {
        recipe: compress(classifier(), 0.7, recipe=recipe, calibration=sequences(1))
        for recipe in ("schatten", "activation", "output", "auto")
    }


def on_new_sequences(result):
    x = {"x": sequences(2)}
    return difference(run(classifier(), x), run(result.proto, x))


@pytest.mark.parametrize("recipe", ["activation", "output", "auto"])
def test_calibrated(calibrated, recipe):
    """Features that are small count little: factors fitted to activations know, weights do not."""
    result = calibrated[recipe]
    assert result.report.totals.amount("params").ratio <= 0.7
    assert all(recurrent_options(result).values())
    assert on_new_sequences(result) < 0.6 * on_new_sequences(calibrated["schatten"])


def test_recurrent_layers_are_fitted_and_not_recovered(calibrated):
    fits = {row.id: row.fit for row in calibrated["activation"].report.layers}
    assert {fits[layer].fit for layer in ("w1", "w2")} == {Fit.ACTIVATIONS}
    assert not any(fits[layer].recovered for layer in ("w1", "w2"))
