"""Smaller heads in ONNX Runtime's Attention, which computes queries, keys and values from one matrix."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from attending import HEADS, RANK, SIZE, D
from calibrating import run, seen
from fused import model
from narrowing import built, error
from onnx_lowrank import compress
from onnx_lowrank.core.layer import Between, Rows
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.graph.parameters import parameters as counted
from onnx_lowrank.layers import products
from onnx_lowrank.layers.found import find_layers
from packing import attended, weights

X = "float[B,L,24] x, int32[B,L] m"
NODES = (
    "c = com.microsoft.Attention <num_heads = 3ATTRIBUTES> (x, w, b, m) y0 = MatMul (c, wo) y = Add (y0, bo)"
)
SMALL = HEADS * RANK


def attention(attributes="", nodes=NODES, rank=RANK, dtype="float", **others):
    made = {name: value for name, value in weights(rank).items() if name in ("w", "b", "wo", "bo")} | others
    kind = np.float16 if dtype == "float16" else np.float32
    made = {name: value.astype(kind) for name, value in made.items()}
    text = nodes.replace("ATTRIBUTES", attributes)
    return model(X.replace("float[", f"{dtype}["), text, f"{dtype}[] y", **made)


def inputs(number=300, length=6, seed=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    ends = rng.integers(3, length + 1, (number, 1))
    mask = (np.arange(length) < ends).astype(np.int32)
    return {"x": rng.standard_normal((number, length, D)).astype(dtype), "m": mask}


def other(**options):
    return inputs(7, 9, seed=2, **options)


def node_of(proto):
    node = next(node for node in proto.graph.node if node.op_type == "Attention")
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def test_both_pairs_are_found():
    found = find_layers(seen(attention()).model, {}, (), ())
    ways = {
        layer.id: (layer.narrowing.between, [p.id for p in layer.partners], layer.narrowing.rows)
        for layer in found.layers
    }
    assert ways == {
        "w": (Between.SCORES, [], (Rows(0, D), Rows(D, D))),
        "wo": (Between.VALUES, ["w"], (Rows(2 * D, D),)),
    }
    assert {layer.narrowing.heads for layer in found.layers} == {HEADS}


@pytest.mark.parametrize(
    ("widths", "sizes"),
    [
        ({"w": SMALL, "wo": SMALL}, [SMALL, SMALL, SMALL]),
        ({"w": SMALL, "wo": SMALL + 3}, [SMALL, SMALL, SMALL + 3]),
        ({"w": SMALL}, [SMALL, SMALL, D]),
        ({"wo": SMALL}, [D, D, SMALL]),
    ],
)
@pytest.mark.parametrize("recover", [True, False])
def test_planted_heads_shrink_to_their_rank_without_loss(widths, sizes, recover):
    proto = attention()
    _, result = built(proto, widths, recover=recover, data=inputs())
    narrowed = result.rewritten.model.proto
    assert error(proto, narrowed, **other()) < 5e-3
    assert [node.op_type for node in narrowed.graph.node] == ["Attention", "MatMul", "Add"]
    assert node_of(narrowed)["qkv_hidden_sizes"] == sizes
    # Without narrow queries, the operator takes the scale from them as before.
    assert node_of(narrowed).get("scale", SIZE**-0.5) == pytest.approx(SIZE**-0.5)
    assert ("scale" in node_of(narrowed)) == ("w" in widths)


def test_a_narrow_model_computes_attention_at_its_sizes():
    """In float64, with the scale of the original heads."""
    proto = attention(rank=SIZE)
    _, result = built(proto, {"w": HEADS * 5, "wo": HEADS * 3}, data=inputs())
    narrowed = result.rewritten.model.proto
    values = {t.name: numpy_helper.to_array(t) for t in narrowed.graph.initializer}
    (behind,) = (value for value in values.values() if value.shape == (D,))
    feed = other()
    mask = np.where(feed["m"][:, None, None, :] > 0, 0.0, -10000.0)
    parts = values["w_narrow"], values["b_narrow"], values["wo_narrow"], behind
    wanted = attended(*parts, [15, 15, 9], SIZE**-0.5, feed["x"], mask)
    np.testing.assert_allclose(run(narrowed, **feed), wanted, rtol=1e-4, atol=1e-5)


def test_a_scale_that_is_stated_stays():
    proto = attention(", scale = 0.5")
    _, result = built(proto, {"w": SMALL, "wo": SMALL}, data=inputs())
    narrowed = result.rewritten.model.proto
    assert node_of(narrowed)["scale"] == 0.5
    assert error(proto, narrowed, **other()) < 5e-3


def test_no_bias():
    proto = attention(nodes=NODES.replace("w, b, m", "w, , m"))
    del proto.graph.initializer[[t.name for t in proto.graph.initializer].index("b")]
    _, result = built(proto, {"w": SMALL, "wo": SMALL}, data=inputs())
    assert error(proto, result.rewritten.model.proto, **other()) < 5e-3


def test_values_of_another_size():
    made = weights()
    wide = {"w": np.concatenate([made["w"], made["w"][:, -D:]], axis=1), "b": np.tile(made["b"], 2)[: 4 * D]}
    out = np.concatenate([made["wo"], made["wo"]])
    proto = attention(", qkv_hidden_sizes = [24, 24, 48]", rank=SIZE, **wide, wo=out)
    _, result = built(proto, {"w": SMALL, "wo": HEADS * 8}, data=inputs())
    narrowed = result.rewritten.model.proto
    assert node_of(narrowed)["qkv_hidden_sizes"] == [SMALL, SMALL, HEADS * 8]
    assert run(narrowed, **other()).shape == run(proto, **other()).shape


def test_float16_runs_on_the_cpu():
    proto = attention(dtype="float16")
    data = inputs(dtype=np.float16)
    _, result = built(proto, {"w": SMALL, "wo": SMALL}, data=data)
    narrowed = result.rewritten.model.proto
    assert {t.data_type for t in narrowed.graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert error(proto, narrowed, **other(dtype=np.float16)) < 1e-2


def test_a_plan_narrows_planted_heads():
    proto = attention()
    result = compress(proto, 0.6, recipe="activation", calibration=inputs())
    assert {c.option.lowering for c in result.plan.choices} == {Lowering.NARROW}
    assert result.report.totals.amount("params").after == counted(result.model)
    assert error(proto, result.model.proto, **other()) < 5e-3


ALONE = NODES.split("y0")[0] + "y = Identity (c)"


def work_of(proto, exclude=(), **shapes):
    found = find_layers(seen(proto).model, {"x": (2, 5, D), **shapes}, (), exclude)
    return sum(scope.macs for scope in found.work)


def test_the_products_of_attention_are_counted():
    products = 2 * 5 * 5 * (D + D)
    assert work_of(attention(nodes=ALONE), m=(2, 5)) == products
    # The matrix is no layer then, but is multiplied all the same.
    assert work_of(attention(nodes=ALONE), ("w",), m=(2, 5)) == products + 2 * 5 * D * 3 * D


def test_the_products_with_a_past_are_counted():
    text = "y, r = com.microsoft.Attention <num_heads = 3> (x, w, b, , past)"
    made = {name: value for name, value in weights().items() if name in ("w", "b")}
    proto = model("float[B,L,24] x, float[2,B,3,P,8] past", text, **made)
    assert work_of(proto, past=(2, 2, 3, 4, 8)) == 2 * 5 * 9 * (D + D)


KEPT = {
    "a past": (
        "c, r = com.microsoft.Attention <num_heads = 3> (x, w, b, , past)",
        set(),
        products.PAST,
    ),
    "a rotation": (
        "c = com.microsoft.Attention <num_heads = 3, do_rotary = 1> (x, w, b, m)",
        {"wo"},
        products.OTHER,
    ),
    "wrong sizes": (
        "c = com.microsoft.Attention <num_heads = 3, qkv_hidden_sizes = [9, 9]> (x, w, b)",
        set(),
        products.UNEQUAL,
    ),
    "no heads": ("c = com.microsoft.Attention <num_heads = 0> (x, w, b)", set(), products.UNEQUAL),
    "heads that do not fit": (
        "c = com.microsoft.Attention <num_heads = 5> (x, w, b)",
        set(),
        products.UNEQUAL,
    ),
    "a computed bias": (
        "h = Neg (b) c = com.microsoft.Attention <num_heads = 3> (x, w, h)",
        set(),
        products.BIAS,
    ),
    "another reader": (
        "c = com.microsoft.Attention <num_heads = 3> (x, w, b, m) z = Softmax (c)",
        {"w"},
        products.READ,
    ),
}


@pytest.mark.parametrize(("node", "pairs", "reason"), KEPT.values(), ids=KEPT)
def test_heads_stay_as_they_are_and_the_report_says_why(node, pairs, reason):
    made = {name: value for name, value in weights().items() if name in ("w", "b", "wo", "bo")}
    text = f"{node} y0 = MatMul (c, wo) y = Add (y0, bo)"
    proto = model(f"{X}, float[2,B,3,P,8] past", text, **made)
    found = find_layers(seen(proto).model, {}, (), ())
    assert {layer.id for layer in found.layers if layer.narrowing} == pairs
    listed = {(item.op, item.weight): item.reason for item in found.skipped}
    assert listed["Attention", "w"] == f"its heads stay: {reason}"


def test_attention_with_smaller_heads_is_not_listed():
    assert not find_layers(seen(attention()).model, {}, (), ()).skipped
