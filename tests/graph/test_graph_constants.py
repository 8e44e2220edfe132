"""Shapes behind small computed tensors."""
# ruff: noqa: E501 - models as text

from __future__ import annotations

import tracemalloc

import onnx
import pytest
from onnx.parser import parse_model

from onnx_lowrank.graph import constants
from onnx_lowrank.graph.constants import infer_shapes

PADS = (
    "z = ConstantOfShape <value = int64[1] {0}> (four) p = Concat <axis = 0> (given, z) q = Reshape (p, pairs) "
    "r = Slice (q, last, least, first, back) s = Transpose <perm = [1, 0]> (r) t = Reshape (s, flat) "
    "u = Cast <to = 7> (t) y = Pad (x, u)"
)
PAD_WEIGHTS = (
    "int64[1] four = {4}, int64[4] given = {0, 0, 0, 1}, int64[2] pairs = {-1, 2}, int64[1] last = {-1}, "
    "int64[1] least = {-9223372036854775807}, int64[1] first = {0}, int64[1] back = {-1}, int64[1] flat = {-1}"
)
CASES = {
    "pads as torch exports them": ("float[2,3,5,5] x", PAD_WEIGHTS, PADS, [2, 3, 6, 5]),
    "shape to reshape": (
        "float[2,6,4] x",
        "int64 zero = {0}, int64[1] rest = {-1}, int64[1] axis = {0}",
        "s = Shape (x) n = Gather (s, zero) u = Unsqueeze (n, axis) t = Concat <axis = 0> (u, rest) y = Reshape (x, t)",
        [2, 24],
    ),
    "part of a shape": (
        "float[2,6,4] x",
        "int64[1] zero = {0}",
        "e = Shape <start = 1, end = -1> (x) y = Slice (x, zero, e, zero)",
        [2, 6, 4],
    ),
    "arithmetic": (
        "float[2,6,4] x",
        "int64[3] two = {1, 2, 1}, int64[3] one = {0, 1, 0}",
        "s = Shape (x) a = Div (s, two) b = Mul (a, two) c = Sub (b, one) d = Add (c, one) y = Expand (x, d)",
        [2, 6, 4],
    ),
    "one Shape behind another": (
        "float[2,6,4] x",
        "int64[1] i = {1}, int64[1] rest = {-1}",
        "s = Shape (x) n = Gather (s, i) t = Concat <axis = 0> (n, rest) h = Reshape (x, t) "
        "r = Shape (h) m = Gather (r, i) u = Concat <axis = 0> (m, rest) y = Reshape (h, u)",
        [8, 6],
    ),
}


def parsed(inputs: str, weights: str, nodes: str) -> onnx.ModelProto:
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => (float[] y) <{weights}> {{ {nodes} }}'
    proto = parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return proto


def shape_of(proto: onnx.ModelProto) -> list[int | None] | None:
    tensor = proto.graph.output[0].type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]


@pytest.mark.parametrize("name", CASES)
def test_shapes_are_known_behind_small_computed_tensors(name):
    *text, expected = CASES[name]
    proto = parsed(*text)
    before = proto.SerializeToString()
    assert shape_of(infer_shapes(proto)) == expected
    assert proto.SerializeToString() == before


def test_some_of_these_defeat_plain_inference():
    plain = {
        name: shape_of(onnx.shape_inference.infer_shapes(parsed(*text), data_prop=True))
        for name, (*text, _) in CASES.items()
    }
    assert plain["pads as torch exports them"] != CASES["pads as torch exports them"][-1]


@pytest.mark.parametrize("name", ["shape to reshape", "one Shape behind another"])
def test_what_depends_on_an_open_size_stays_unknown(name):
    inputs, *text, _ = CASES[name]
    found = shape_of(infer_shapes(parsed(inputs.replace("[2,6,4]", "[N,M,4]"), *text)))
    assert found is None or None in found


def test_nothing_large_is_made(monkeypatch):
    made = []
    evaluate = onnx.reference.ReferenceEvaluator
    monkeypatch.setattr(
        onnx.reference, "ReferenceEvaluator", lambda model: made.append(model) or evaluate(model)
    )
    proto = parsed(
        "float[1] x",
        "int64[2] n = {1000000, 1000000}, int64[1] small = {3}",
        "c = ConstantOfShape (n) d = ConstantOfShape (small) e = Add (c, d) y = Add (x, d)",
    )
    assert shape_of(infer_shapes(proto)) == [3]
    assert [model.graph.node[0].output[0] for model in made] == ["d"]


GROWING = {
    "Max of three": (
        "int64[3] p = {150, 1, 1}, int64[3] q = {1, 150, 1}, int64[3] r = {1, 1, 150}",
        "a = ConstantOfShape (p) b = ConstantOfShape (q) c = ConstantOfShape (r) g = Max (a, b, c)",
    ),
    "Max whose last operand is empty": (
        "int64[3] p = {1000, 1, 1}, int64[3] q = {1, 1000, 1}, int64[3] r = {1, 1, 0}",
        "a = ConstantOfShape (p) b = ConstantOfShape (q) c = ConstantOfShape (r) g = Max (a, b, c)",
    ),
    "Where": (
        "int64[3] p = {150, 1, 1}, int64[3] q = {1, 150, 1}, int64[3] r = {1, 1, 150}",
        "a = ConstantOfShape (p) b = ConstantOfShape (q) c = ConstantOfShape (r) d = Cast <to = 9> (a) g = Where (d, b, c)",
    ),
    "Add of operands of different rank": (
        "int64[2] p = {1000, 1}, int64[1] q = {1000}",
        "a = ConstantOfShape (p) b = ConstantOfShape (q) g = Add (a, b)",
    ),
    "Gather": (
        "int64[2] p = {1, 1000}, int64[1] q = {1000}",
        "a = ConstantOfShape (p) i = ConstantOfShape <value = int64[1] {0}> (q) g = Gather (a, i)",
    ),
    "Gather along the last axis": (
        "int64[2] p = {1000, 1}, int64[1] q = {1000}",
        "a = ConstantOfShape (p) i = ConstantOfShape <value = int64[1] {0}> (q) g = Gather <axis = -1> (a, i)",
    ),
    "Concat": (
        "int64[1] p = {1000}",
        f"a = ConstantOfShape (p) g = Concat <axis = 0> ({', '.join(['a'] * 1000)})",
    ),
    "ReduceProd over an empty axis": (
        "int64[2] p = {0, 1000000}",
        "a = ConstantOfShape (p) g = ReduceProd <axes = [0]> (a)",
    ),
}


@pytest.mark.parametrize("name", GROWING)
def test_nothing_larger_than_a_shape_is_computed(name):
    weights, nodes = GROWING[name]
    proto = parsed("float[1] x", weights, f"{nodes} y = Neg (g)")
    tracemalloc.start()
    try:
        inferred = infer_shapes(proto)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert inferred.graph.node[-2].op_type == proto.graph.node[-2].op_type


def test_small_results_of_operators_that_can_grow_are_computed():
    proto = parsed(
        "float[32,32] x",
        "int64[2] p = {32, 1}, int64[1] q = {32}",
        "a = ConstantOfShape (p) i = ConstantOfShape <value = int64[1] {0}> (q) b = Gather <axis = 1> (a, i) "
        "c = Max (a, b, b) d = Add (c, a) y = Add (x, d)",
    )
    assert [node.op_type for node in infer_shapes(proto).graph.node] == ["Constant"] * 5 + ["Add"]


def test_what_the_reference_cannot_compute_stays_unknown(monkeypatch):
    asked = []

    class Evaluator:
        def __init__(self, model):
            asked.append(model.graph.node[0].op_type)

        def run(self, *_):
            raise NotImplementedError

    proto = parsed(*CASES["pads as torch exports them"][:3])
    assert shape_of(infer_shapes(proto)) == [2, 3, 6, 5]
    monkeypatch.setattr(onnx.reference, "ReferenceEvaluator", Evaluator)
    found = shape_of(infer_shapes(proto))
    assert found is None or None in found
    # Each is asked once, however many rounds there are; the others' operands stay unknown.
    assert asked == ["ConstantOfShape"]


def test_an_index_out_of_range_is_asked_for_and_stays_unknown(monkeypatch):
    asked = []
    evaluate = onnx.reference.ReferenceEvaluator
    monkeypatch.setattr(
        onnx.reference, "ReferenceEvaluator", lambda model: asked.append(model) or evaluate(model)
    )
    proto = parsed(
        "float[2,6] x", "int64[2] a = {1, 12}, int64[1] i = {7}", "t = Gather (a, i) y = Reshape (x, t)"
    )
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=False)
    assert shape_of(inferred) in (None, [None])
    found = shape_of(infer_shapes(proto))
    assert found is None or None in found
    assert [model.graph.node[0].op_type for model in asked] == ["Gather"]


# --- subgraphs ----------------------------------------------------------------------------------------

DOUBLE = "s = Shape (x) two = Constant <value = int64[1] {2}> () d = Mul (s, two)"


def branched(before: str, then: str, other: str, condition: str = "bool c, ") -> onnx.ModelProto:
    text = (
        f'<ir_version: 8, opset_import: ["" : 17]> g ({condition}float[4] x) => (float[] y) {{ {before} '
        f"y = If (c) <then_branch = t () => (float[] p) {{ {then} }}, "
        f"else_branch = e () => (float[] q) {{ {other} }}> }}"
    )
    proto = parse_model(text)
    for graph in (proto.graph, *(a.g for a in proto.graph.node[-1].attribute)):
        graph.output[0].type.tensor_type.ClearField("shape")
    return proto


def inner(proto: onnx.ModelProto) -> dict[str, list[int | None] | None]:
    """Shapes of the outputs of both branches of the last node."""
    return {a.g.output[0].name: shape_of(onnx.ModelProto(graph=a.g)) for a in proto.graph.node[-1].attribute}


def test_folding_keeps_every_node_in_its_place():
    proto = branched(DOUBLE, "p = Expand (x, d)", "q = Identity (x)")
    found = infer_shapes(proto)
    assert [list(node.output) for node in found.graph.node] == [
        list(node.output) for node in proto.graph.node
    ]
    assert [node.op_type for node in found.graph.node] == ["Constant", "Constant", "Constant", "If"]


def test_small_tensors_inside_branches_and_from_around_them_are_known():
    proto = branched(
        DOUBLE, "r = Concat <axis = 0> (two, d) p = ConstantOfShape (r)", "q = ConstantOfShape (d)"
    )
    before = proto.SerializeToString()
    assert inner(infer_shapes(proto)) == {"p": [2, 8], "q": [8]}
    assert proto.SerializeToString() == before


def test_a_value_hidden_by_a_branch_is_not_taken_from_around_it():
    proto = branched(
        "two = Constant <value = int64[1] {2}> ()",
        "two = Cast <to = 7> (x) p = ConstantOfShape (two)",
        "q = Identity (x)",
    )
    known = constants._Folder(proto)
    known.fold(proto.graph)
    (then, _) = (a.g for a in proto.graph.node[-1].attribute)
    assert [node.op_type for node in then.node] == ["Cast", "ConstantOfShape"]
    assert not then.initializer


@pytest.mark.parametrize(("size", "shape"), [(4, [1, 4]), (3, [4])])
def test_an_if_whose_condition_follows_from_shapes_has_the_shape_of_its_branch(size, shape):
    before = (
        f"s = Shape (x) n = Constant <value = int64[1] {{{size}}}> () c = Equal (s, n) "
        "axis = Constant <value = int64[1] {0}> ()"
    )
    proto = branched(before, "p = Unsqueeze (x, axis)", "q = Identity (x)", condition="")
    assert shape_of(onnx.shape_inference.infer_shapes(proto, data_prop=True)) is None
    assert shape_of(infer_shapes(proto)) == shape


def test_a_captured_value_reaches_the_operators_of_a_branch():
    proto = branched(
        "axis = Constant <value = int64[1] {0}> ()", "p = Unsqueeze (x, axis)", "q = Identity (x)"
    )
    assert inner(infer_shapes(proto))["p"] == [1, 4]


def test_all_that_is_put_in_is_bounded(monkeypatch):
    monkeypatch.setattr(constants, "_MOST", 1)
    inputs, *text, _ = CASES["one Shape behind another"]
    found = infer_shapes(parsed(inputs, *text))
    assert sum(node.op_type == "Constant" for node in found.graph.node) == 0
