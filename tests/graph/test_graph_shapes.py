"""Positions and MACs against numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from decoders import decoder
from onnx_lowrank.budgets.macs import dearest_macs
from onnx_lowrank.core.layer import Positions
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import load
from onnx_lowrank.graph.shapes import assumed, examples, infer, open_inputs
from rewriting import found, model


def total(seen) -> int | None:
    return dearest_macs(seen.work, [(layer, None) for layer in seen.layers.values()])[0]


@pytest.mark.parametrize(
    ("inputs", "node", "w", "positions", "macs"),
    [
        ("float[2,4,6,7] x", "Conv (x, w)", (8, 4, 3, 3), Positions(2, (6, 7), (4, 5)), 2 * 20 * 8 * 36),
        (
            "float[2,4,9] x",
            "Conv <strides = [2]> (x, w)",
            (8, 4, 3),
            Positions(2, (9,), (4,)),
            2 * 4 * 8 * 12,
        ),
        (
            "float[1,4,6,6] x",
            "Conv <group = 2> (x, w)",
            (8, 2, 3, 3),
            Positions(1, (6, 6), (4, 4)),
            16 * 8 * 18,
        ),
        (
            "float[1,4,5,5] x",
            "ConvTranspose <strides = [2,2]> (x, w)",
            (4, 8, 3, 3),
            Positions(1, (5, 5), (11, 11)),
            25 * 4 * 8 * 9,
        ),
        ("float[5,8] x", "MatMul (x, w)", (8, 10), Positions(5), 400),
        ("float[2,3,5,8] x", "MatMul (x, w)", (8, 10), Positions(30), 2400),
        ("float[8] x", "MatMul (x, w)", (8, 10), Positions(1), 80),
        ("float[2,8,5] x", "MatMul (w, x)", (10, 8), Positions(10), 800),
        ("float[2,3,5,8] x", "MatMul (x, w)", (3, 8, 10), Positions(10), 2400),
        ("float[5,8] x", "MatMul (x, w)", (3, 8, 10), Positions(5), 1200),
        ("float[8,5] x", "Gemm <transA = 1> (x, w)", (8, 10), Positions(5), 400),
        ("float[8,5] x", "Gemm (w, x)", (10, 8), Positions(5), 400),
        ("int64[2,3] x", "Gather (w, x)", (9, 8), Positions(6), 0),
    ],
)
def test_positions_and_macs(inputs, node, w, positions, macs):
    seen = found(model(f"g ({inputs}) => (float[] y) {{ y = {node} }}", w=w))
    (use,) = seen.layer.uses
    assert use.positions == positions
    assert total(seen) == macs
    (without,) = found(seen.model.proto, exclude=("*",)).work
    assert without.macs == macs


def test_what_is_no_layer_counts():
    seen = found(
        model("g (float[5,8] x) => (float[] y) { t = Transpose (x) h = MatMul (x, t) y = MatMul (h, x) }")
    )
    assert total(seen) == 5 * 8 * 5 + 5 * 5 * 8


def test_a_shared_weight_counts_per_use():
    seen = found(model("g (float[5,8] x) => (float[] y) { h = MatMul (x, w) y = MatMul (h, w) }", w=(8, 8)))
    assert total(seen) == 2 * 5 * 64


def test_of_an_if_the_dearer_branch_counts():
    body = """g (bool b, float[4,8] x) => (float[] y) { k = MatMul (x, w)
        y = If (b) <then_branch = t () => (float[4,8] p) { h = MatMul (k, w) p = MatMul (h, w) },
                    else_branch = e () => (float[4,8] q) { q = MatMul (k, w) }> }"""
    assert total(found(model(body, w=(8, 8)))) == 4 * 64 * 3


def test_the_body_of_a_loop_counts_once():
    body = """g (int64 n, bool c, float[4,8] x) => (float[4,8] y) {
        y = Loop (n, c, x) <body = l (int64 i, bool a, float[4,8] h) => (bool z, float[4,8] k)
            { z = Identity (a) k = MatMul (h, w) }> }"""
    assert total(found(model(body, w=(8, 8)))) == 4 * 64


OPEN = "g (float[N,8] x, float[N,8] z) => (float[] y) { h = Add (x, z) y = MatMul (h, w) }"


def test_an_unknown_dimension_makes_macs_unknown():
    seen = found(model(OPEN, w=(8, 10)))
    assert seen.layer.uses[0].positions is None
    assert seen.layer.uses[0].rank == 2
    assert total(seen) is None


@pytest.mark.parametrize("shapes", [{"x": (7, 8)}, {"z": (7, 8)}, {"x": (7, 8), "z": (7, 8)}])
def test_a_symbol_is_shared_between_inputs(shapes):
    seen = found(model(OPEN, w=(8, 10)), shapes)
    assert seen.layer.uses[0].positions == Positions(7)
    assert total(seen) == 560


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"u": (1, 8)}, "names 'u'"),
        ({"w": (8, 10)}, "names 'w'"),
        ({"x": (7, 9)}, "7×9, but the model says \\?×8"),
        ({"x": (7,)}, "shape 7, but"),
        ({"x": (7, 8), "z": (6, 8)}, "'N' the sizes 7 and 6"),
    ],
)
def test_shapes_that_contradict_the_model(shapes, words):
    with pytest.raises(InputError, match=words):
        found(model(OPEN, w=(8, 10)), shapes)


def test_an_input_that_is_no_tensor_has_no_shape():
    proto = model(
        "g (seq(float[2,8]) s, int64 i) => (float[] y) { x = SequenceAt (s, i) y = MatMul (x, w) }", w=(8, 10)
    )
    with pytest.raises(InputError, match="no tensor"):
        found(proto, {"s": (2, 8)})


def test_an_input_without_a_rank_takes_any_shape():
    proto = model("g (float[] x) => (float[4,10] y) { y = MatMul (x, w) }", w=(8, 10))
    assert found(proto).layer.uses[0].rank is None
    assert found(proto, {"x": (4, 8)}).layer.uses[0].positions == Positions(4)
    assert found(proto).layer.slices == (1,)


def test_a_gemm_needs_no_shapes_to_be_sliced():
    proto = model("g (float[] x) => (float[4,10] y) { h = local.F (x) y = Gemm (h, w) }", w=(8, 10))
    assert found(proto).layer.slices == (1, 2, 4, 8)


def test_dead_ends_have_no_positions():
    proto = model("g (float[] x) => (float[4,10] y) { y = Conv (x, w) }", w=np.ones((8, 4, 3, 3), np.float32))
    assert found(proto).layer.uses[0].positions is None


# --- subgraphs and functions ------------------------------------------------------------------------------

FOLDED = "s = Shape (x) one = Constant <value = int64[1] {1}> () n = Gather (s, one) m = Add (n, one) "


def test_a_nameless_if_behind_folded_nodes_keeps_its_shapes():
    body = f"""g (bool b, float[4,8] x) => (float[4,8] y) {{ {FOLDED} h = MatMul (x, w)
        y = If (b) <then_branch = t () => (float[4,8] p) {{ k = MatMul (h, w) p = MatMul (k, w) }},
                    else_branch = e () => (float[4,8] q) {{ q = MatMul (h, w) }}> }}"""
    assert total(found(model(body, w=(8, 8)))) == 4 * 64 * 3


def test_nameless_ifs_behind_folded_nodes_do_not_take_each_others_shapes():
    branches = """<then_branch = t () => ({type} p{n}) {{ {node} p{n} = Relu (k{n}) }},
                   else_branch = e () => ({type} q{n}) {{ {node} q{n} = Identity (k{n}) }}>"""
    first = branches.format(n=1, type="float[2,8,6,6]", node="k1 = Conv (x, v)")
    second = branches.format(n=2, type="float[2,5,10]", node="k2 = MatMul (z, w)")
    # One node is folded between them: were it deleted, the second would take the first one's place.
    body = f"""g (bool b, float[2,4,8,8] x, float[2,5,8] z) => (float[2,8,6,6] y1, float[2,5,10] y2) {{
        s = Shape (x) t = Shape (z) y1 = If (b) {first} u = Shape (z) r = Shape (x) y2 = If (b) {second} }}"""
    seen = found(model(body, v=(8, 4, 3, 3), w=(8, 10)))
    ranks = {name: {use.rank for use in layer.uses} for name, layer in seen.layers.items()}
    assert ranks == {"v": {4}, "w": {3}}
    assert total(seen) == 2 * 36 * 8 * 36 + 10 * 80


FUNCTION = """<domain: "local", opset_import: ["" : 17]> {name} (a) => (c) {{ {nodes} }}"""


def called(calls: int, *, unknown: bool = False):
    """A main graph of one product that calls a function of the domain local so often."""
    applied = "".join(f"h{i + 1} = local.F (h{i})" for i in range(calls))
    body = f"g (float[4,8] x) => (float[4,8] y) {{ h0 = MatMul (x, w) {applied} y = Relu (h{calls}) }}"
    nodes = "c = MatMul (a, a)" if unknown else "c = Relu (a)"
    return found(model(body, functions=FUNCTION.format(name="F", nodes=nodes), w=(8, 8)))


def test_a_function_that_nothing_calls_does_not_matter():
    assert total(called(0, unknown=True)) == 256
    assert total(called(2)) == 256


def test_scopes_name_their_calls_and_what_is_unknown():
    main, function = called(3, unknown=True).work
    assert main.calls == ("local:F",) * 3
    assert (main.unknown, function.macs, function.unknown) == ("", None, "c")


LAYERS = 2 * 5 * 32 * (2 * 32 + 2 * 16 + 24)  # two samples of five tokens


@pytest.mark.parametrize(
    ("shapes", "total_length"),
    [
        ({"input_ids": (2, 5), "past_key_values_0_key": (2, 2, 3, 8)}, 8),
        ({"attention_mask": (2, 8), "past_key_values_0_value": (2, 2, 3, 8)}, 8),
        ({"attention_mask": (2, 8), "position_ids": (2, 5)}, 8),
        ({"input_ids": (2, 5), "past_key_values_0_key": (2, 2, 0, 8)}, 5),
    ],
)
def test_sums_of_symbols_are_solved(shapes, total_length):
    attention = 2 * 4 * 5 * total_length * 8 * 2  # both products, four heads
    assert total(found(decoder(), shapes)) == LAYERS + attention


def test_sums_that_nothing_tells_stay_open():
    loaded = load(decoder())
    assert open_inputs(loaded, infer(loaded, {"input_ids": (2, 5)})) == (
        "attention_mask",
        "past_key_values_0_key",
        "past_key_values_0_value",
    )


def test_a_product_of_more_than_64_bits_stays_open():
    proto = model("g (float[N,8] x, float[M,8] z) => (float[] y) { y = MatMul (x, w) }", w=(8, 10))
    proto.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "N * N * N"
    loaded = load(proto)
    assert open_inputs(loaded, infer(loaded, {"x": (2**21, 8)})) == ("z",)
    assert open_inputs(loaded, infer(loaded, {"x": (2**20, 8)})) == ()


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((None, 16), "1,16"),
        ((None, None), "1,16"),
        ((None, 1, 28, 28), "1,1,28,28"),
        ((None,) * 4, "1,3,224,224"),
        ((2, None, 80), "2,16,80"),
    ],
)
def test_an_example_of_a_shape_has_the_inputs_name_and_rank(shape, sizes):
    dims = ", ".join("?" if size is None else str(size) for size in shape)
    loaded = load(model(f"g (float[{dims}] x) => (float[] y) {{ y = Relu (x) }}"))
    assert examples(loaded, infer(loaded, {})) == f"--input-shape x={sizes}"


def test_an_example_leaves_out_inputs_that_follow_from_others():
    loaded = load(decoder())
    words = examples(loaded, infer(loaded, {})).replace("--input-shape ", "").split()
    given = {name: tuple(map(int, sizes.split(","))) for name, _, sizes in (w.partition("=") for w in words)}
    assert list(given) == ["input_ids", "attention_mask"]
    assert open_inputs(loaded, infer(loaded, given)) == ()


def test_an_example_of_many_inputs_names_the_first_ones():
    inputs = ", ".join(f"float[N{n}] x{n}" for n in range(5))
    loaded = load(model(f"g ({inputs}) => (float[] y) {{ y = Relu (x0) }}"))
    words = " ".join(f"--input-shape x{n}=1" for n in range(3))
    assert examples(loaded, infer(loaded, {})) == f"{words} …"


def test_open_dimensions_are_assumed_apart_from_each_other():
    proto = model("g (float[N,M,4] a, float[N,M,4] b, float[4] c) => (float[N,M,4] y) { y = Add (a, b) }")
    proto.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "M + P"
    opened = load(proto)
    sizes = assumed(opened, infer(opened, {}), {})
    assert sizes == {"a": (3, 5, 4), "b": (3, 12, 4)}
    given = {"a": (2, 9, 4)}
    sizes = assumed(opened, infer(opened, given), given)
    assert sizes == {"a": (2, 9, 4), "b": (2, 12, 4)}


def test_dimensions_beyond_any_size_are_not_assumed():
    proto = model("g (float[N,4] a, float[M,4] b) => (float[N,4] y) { y = Add (a, b) }")
    proto.graph.input[1].type.tensor_type.shape.dim[0].dim_param = " * ".join("abcdefghijklmnopqr")
    opened = load(proto)
    assert assumed(opened, infer(opened, {}), {}) == {"a": (3, 4)}


def test_open_dimensions_without_a_name_are_alike_on_one_axis():
    proto = model("g (float[N,M] a, float[N,M] b) => (float[N,M] y) { y = Add (a, b) }")
    for value in proto.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            dim.ClearField("dim_param")
    opened = load(proto)
    assert assumed(opened, infer(opened, {}), {}) == {"a": (3, 5), "b": (3, 5)}
