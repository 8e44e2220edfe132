"""Heads of attention between layers: which pairs are found, and the reason for every other."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import packing
from attending import BERT, BUILT, CONSTANT, GQA, REPEATED, SIZE, bert, grouped
from onnx_lowrank.core.layer import Between, Rows
from onnx_lowrank.files.load import load
from onnx_lowrank.layers import products
from onnx_lowrank.layers.found import find_layers
from packing import packed
from rewriting import model

BOTH = {"wo": (Between.VALUES, ["wv"]), "wq": (Between.SCORES, ["wk"])}


def pairs(proto, **shapes):
    """By layer, what lies between it and its partners, and their ids."""
    found = find_layers(load(proto), shapes, (), ())
    return {
        layer.id: (layer.narrowing.between, [partner.id for partner in layer.partners])
        for layer in found.layers
        if layer.narrowing is not None
    }


def reasons(proto):
    """Why heads stay as they are, by the name of the node of attention."""
    found = find_layers(load(proto), {}, (), ())
    parted = {item.name: item.reason.partition("; its heads stay: ") for item in found.skipped}
    return {name: reason for name, (_, _, reason) in parted.items() if reason}


@pytest.mark.parametrize("shapes", [CONSTANT, BUILT], ids=["constant", "built"])
def test_bert_has_both_pairs(shapes):
    proto = bert(shapes)
    assert pairs(proto) == BOTH
    assert reasons(proto) == {}
    (values, scores) = (
        binding.hidden
        for binding in sorted(
            (b for b in find_layers(load(proto), {}, (), ()).bindings if b.hidden), key=lambda b: b.layer.id
        )
    )
    assert scores.ignores_shift
    assert (values.shared, scores.shared) == (1, 1)
    assert len(values.sizes) == len(scores.sizes) == 2
    assert values.pins == scores.pins == ()


def test_heads_that_share_keys_and_values():
    proto = model(GQA, **grouped())
    assert pairs(proto) == BOTH
    found = find_layers(load(proto), {}, (), ())
    layers = {layer.id: layer for layer in found.layers}
    assert {binding.hidden.shared for binding in found.bindings if binding.hidden} == {2}
    for name, partner in (("wo", "wv"), ("wq", "wk")):
        layer = layers[name]
        assert (layer.width, layer.width_step) == (32, 4)
        less, own = layer.at_width(20)
        assert (less.id, less.f, less.c) == (partner, 10, 24)
        assert (own.f, own.c) == ((20, 24) if name == "wq" else (24, 20))


def test_heads_that_are_repeated_as_pytorch_writes_it():
    proto = model(REPEATED, **grouped())
    assert pairs(proto) == BOTH
    hidden = {b.layer.id: b.hidden for b in find_layers(load(proto), {}, (), ()).bindings if b.hidden}
    assert {name: (len(between.sizes), between.pins) for name, between in hidden.items()} == {
        "wo": (2, ()),
        "wq": (2, ()),
    }


def test_a_target_that_two_layers_share_follows_neither():
    body = REPEATED.replace("v5 = Expand (v4, vw)", "v5 = Expand (v4, kw)")
    assert set(pairs(model(body, **grouped()))) == set()


def test_attention_counts_the_macs_of_its_products():
    proto = bert()
    found = find_layers(load(proto), {"x": (2, 6, 24), "mask": (2, 1, 1, 6)}, (), ())
    macs = {layer.id: layer.beside.macs for layer in found.layers if layer.narrowing}
    # Each of the 24 numbers of the width is multiplied for 2 · 6 · 6 pairs of positions.
    assert macs == {"wo": 24 * 72, "wq": 24 * 72}


FOUND = {
    "dropout": ("c0 = MatMul (p, v)", "p1 = Dropout (p) c0 = MatMul (p1, v)"),
    "scaled queries": ("s0 = MatMul (q, k)", "q9 = Mul (scale, q) s0 = MatMul (q9, k)"),
    "scaled by a computed number": (
        "s0 = MatMul (q, k)",
        "n = ReduceSum <keepdims = 0> (mask) q9 = Mul (q, n) s0 = MatMul (q9, k)",
    ),
    "squeezed": ("c = Reshape", "u = Unsqueeze (c1, zeros) c9 = Squeeze (u, zeros) c = Reshape"),
    "cast": ("c0 = MatMul (p, v)", "v8 = Cast <to = 11> (v) v9 = Cast <to = 1> (v8) c0 = MatMul (p, v9)"),
}


@pytest.mark.parametrize(("old", "new"), FOUND.values(), ids=FOUND)
def test_operators_that_may_lie_between(old, new):
    assert BERT.count(old) == 1
    proto = bert(
        text=BERT.replace(old, new).replace("(c1, back)", "(c9, back)" if "c9" in new else "(c1, back)")
    )
    assert pairs(proto) == BOTH


SCALED = """t9 = Shape (q) i9 = Constant <value_int = -1> () n9 = Gather (t9, i9) f9 = Cast <to = 1> (n9)
    r9 = Sqrt (f9) s1 = Div (s0, r9)"""


def test_a_scale_that_the_model_computes_from_a_head_is_pinned():
    proto = bert(text=BERT.replace("s1 = Div (s0, scale)", SCALED))
    assert pairs(proto) == BOTH
    (pin,) = (
        pin
        for binding in find_layers(load(proto), {}, (), ()).bindings
        if binding.hidden
        for pin in binding.hidden.pins
    )
    assert (pin.value, pin.shape) == (SIZE, ())


def test_a_scale_that_a_branch_computes_from_a_head_keeps_the_heads():
    """A pin belongs to the main graph; a branch has node numbers of its own."""
    then, other = (f"{{ c9 = Cast <to = 1> (n9) {result} = Sqrt (c9) }}" for result in ("r8", "r9"))
    scale = f"""t9 = Shape (q) i9 = Constant <value_int = -1> () n9 = Gather (t9, i9)
        f9 = If (yes) <then_branch = a () => (float r8) {then}, else_branch = b () => (float r9) {other}>
        s1 = Div (s0, f9)"""
    proto = bert(text=BERT.replace("s1 = Div (s0, scale)", scale), yes=np.array(True))
    onnx.checker.check_model(proto)
    assert set(pairs(proto)) == {"wo"}
    assert list(reasons(proto).values()) == [products.COMPUTED]


def test_no_elements_tell_no_heads():
    assert not pairs(bert(), x=(2, 0, 24), mask=(2, 1, 1, 0))


ROTATED = "q8 = Mul (q, cos) q9 = Add (q8, q) s0 = MatMul (q9, k)"
NORMED = "q9 = LayerNormalization <axis = -1> (q, eight) s0 = MatMul (q9, k)"
LEFT = {
    "rotated queries": ("s0 = MatMul (q, k)", ROTATED, "wq", products.OTHER),
    "normed queries": ("s0 = MatMul (q, k)", NORMED, "wq", products.OTHER),
    "joined": (
        "v = Transpose <perm = [0, 2, 1, 3]> (v2)",
        "v9 = Transpose <perm = [0, 2, 1, 3]> (v2) v = Concat <axis = 0> (v9)",
        "wo",
        products.JOINED,
    ),
    "another reader": (
        "c0 = MatMul (p, v)",
        "c0 = MatMul (p, v) r = Softmax (v)",
        "wo",
        products.READ,
    ),
    "a gate": ("c = Reshape (c1, back)", "c9 = Reshape (c1, back) c = Mul (c9, x)", "wo", products.OTHER),
    "a norm behind": (
        "c = Reshape (c1, back)",
        "c9 = Reshape (c1, back) c = LayerNormalization <axis = -1> (c9, bo)",
        "wo",
        products.OTHER,
    ),
    "a computed size": (
        "c = Reshape (c1, back)",
        "t9 = Shape (x) c = Reshape (c1, t9)",
        "wo",
        products.COMPUTED,
    ),
    "whole shape": (
        "c0 = MatMul (p, v)",
        "t9 = Shape (v) z9 = ConstantOfShape (t9) c0 = MatMul (p, v)",
        "wo",
        products.COMPUTED,
    ),
    "a cut": (
        "v0 = MatMul (x, wv)",
        "v8 = MatMul (x, wide) v0 = Slice (v8, zero, end, last)",
        "wo",
        products.CUT,
    ),
    "a shared bias": ("q1 = Add (bq, q0)", "q1 = Add (bk, q0)", "wq", products.BIAS),
    "a bias of one head": (
        "s0 = MatMul (q, k)",
        "q9 = Add (q, eight) s0 = MatMul (q9, k)",
        "wq",
        products.OTHER,
    ),
    "a number that is added": (
        "v1 = Add (bv, v0)",
        "v9 = Add (bv, v0) v8 = Add (v9, row) v1 = Identity (v8)",
        "wo",
        products.OTHER,
    ),
    "no layer": ("v0 = MatMul (x, wv)", "v0 = Identity (x)", "wo", products.NO_LAYER),
}


@pytest.mark.parametrize(("old", "new", "missing", "reason"), LEFT.values(), ids=LEFT)
def test_what_keeps_heads_as_they_are(old, new, missing, reason):
    assert BERT.count(old) == 1
    extra = {
        "eight": np.ones(SIZE, np.float32),
        "cos": np.linspace(0, 1, SIZE, dtype=np.float32),
        "row": np.ones((1, 1, 1), np.float32),
        "wide": np.ones((24, 48), np.float32),
        "zero": np.array([0]),
        "end": np.array([24]),
        "last": np.array([-1]),
    }
    proto = bert(text=BERT.replace(old, new), **extra)
    found = pairs(proto)
    assert missing not in found
    assert set(BOTH) - set(found) == {missing}
    assert list(reasons(proto).values()) == [reason]


def test_an_output_of_the_model_keeps_its_size():
    text = BERT.replace("(float[B,L,24] y)", "(float[B,L,24] y, float[B,3,L,8] v)")
    proto = bert(text=text)
    assert set(pairs(proto)) == {"wq"}
    assert list(reasons(proto).values()) == [products.READ]


def test_a_past_from_an_input_keeps_the_heads():
    text = BERT.replace("float[B,1,1,L] mask)", "float[B,1,1,1] mask, float[B,3,8,P] past)")
    text = text.replace("s0 = MatMul (q, k)", "k9 = Concat <axis = 3> (past, k) s0 = MatMul (q, k9)")
    text = text.replace(
        "c0 = MatMul",
        "t9 = Transpose <perm = [0, 1, 3, 2]> (past) v9 = Concat <axis = 2> (t9, v) c0 = MatMul",
    )
    text = text.replace("(p, v)", "(p, v9)")
    proto = bert(text=text)
    assert pairs(proto) == {}
    assert set(reasons(proto).values()) == {products.JOINED}


def test_an_opset_without_last_axis_and_a_mask_by_where_do_not_ignore_shifts():
    text = BERT.replace("s2 = Add (s1, mask)", "b9 = Cast <to = 9> (mask) s2 = Where (b9, s1, mask)")
    proto = bert(text=text)
    assert pairs(proto) == BOTH
    hidden = {b.layer.id: b.hidden for b in find_layers(load(proto), {}, (), ()).bindings if b.hidden}
    assert not hidden["wq"].ignores_shift


def test_unknown_sizes_are_asked_for():
    proto = bert()
    del proto.graph.input[0].type.tensor_type.shape.dim[:]
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    assert pairs(proto) == {}
    assert set(reasons(proto).values()) == {products.UNKNOWN}


def test_a_transposition_that_is_none_is_left():
    proto = bert()
    node = next(node for node in proto.graph.node if node.output[0] == "c1")
    node.attribute[0].CopyFrom(onnx.helper.make_attribute("perm", [0, 2, 1, 9]))
    assert "wo" not in pairs(proto)


@pytest.mark.parametrize(("layer", "missing"), [("wv", "wo"), ("wo", "wo"), ("wk", "wq"), ("wq", "wq")])
def test_an_excluded_layer_keeps_the_heads_of_its_partner(layer, missing):
    found = find_layers(load(bert()), {}, (), (layer,))
    assert {each.id for each in found.layers if each.narrowing} == set(BOTH) - {missing}
    reasons = [item.reason for item in found.skipped if "its heads stay" in item.reason]
    assert [reason.partition(": ")[2].partition("; its heads stay: ")[2] for reason in reasons] == [
        products.NO_LAYER
    ]


SPLIT, ATTENDED = "f = Split <axis = -1> (t)", "s0 = MatMul (q, k)"
TAKEN = {name: f"{name} = Gather <axis = 0> (t, i{n})" for n, name in enumerate(("q", "k0", "v"))}
CUT_LEFT = {
    "a Slice of the features": (
        packing.EQUAL.replace(
            "f = Split <axis = -1> (t)", "f = Split <axis = -1> (t) g = Slice (t, n0, n1, last)"
        ),
        {"wo": products.READ, "w": products.READ},
    ),
    "another reader of one part": (
        packing.VIT.replace("s0 = MatMul", "z = Softmax (k0) s0 = MatMul"),
        {"wo": products.BOUND, "w": products.READ},
    ),
    "a norm of the queries": (
        packing.VIT.replace(
            "s0 = MatMul (q, k)", "n = LayerNormalization <axis = -1> (q, eight) s0 = MatMul (n, k)"
        ),
        {"wo": products.BOUND, "w": products.OTHER},
    ),
    "a part that nothing reads": (
        packing.VIT.replace("[2, 0, 3, 1, 4]> (t2)", "[2, 0, 3, 1, 4]> (t2) g = Gather <axis = 0> (t, i2)"),
        {"wo": products.BOUND, "w": products.BOUND},
    ),
    "several parts at once": (
        packing.VIT.replace(
            "v = Gather <axis = 0> (t, i2)", "v9 = Gather <axis = 0> (t, n2) v = Squeeze (v9, zeros)"
        ).replace(
            "q = Gather <axis = 0> (t, i0)", "q9 = Gather <axis = 0> (t, pick) q = Gather <axis = 0> (q9, i0)"
        ),
        {"wo": products.BOUND, "w": products.CUT},
    ),
    "a part that is cut again": (
        packing.EQUAL.replace(
            "a, e, f = Split <axis = -1> (t)", "h, f = Split <axis = -1> (t, uneven)"
        ).replace("q0 = Reshape (a, heads)", "a, e = Split <axis = -1> (h) q0 = Reshape (a, heads)"),
        {"w": products.CUT},
    ),
    "features of a head that are apart": (
        packing.VIT.replace("[2, 0, 3, 1, 4]", "[3, 0, 2, 1, 4]").replace("parts)", "apart)"),
        {"wo": products.MIXED, "w": products.MIXED},
    ),
    "a computed Split": (
        packing.NANO.replace("(t, sizes)", "(t, sums)").replace("a, e", "sums = Add (sizes, pick) a, e"),
        {"wo": products.CUT, "w": products.CUT},
    ),
    "a bias that others read": (
        packing.NANO.replace("y0 = MatMul (c, wo)", "z = Neg (b) y0 = MatMul (c, wo)"),
        {"wo": products.BIAS, "w": products.BIAS},
    ),
}


@pytest.mark.parametrize(("text", "missing"), CUT_LEFT.values(), ids=CUT_LEFT)
def test_what_keeps_the_heads_of_a_packed_matrix(text, missing):
    extra = {
        "last": np.array([-1]),
        "eight": np.ones(SIZE, np.float32),
        "pick": np.array([0, 0, 0]),
        "uneven": np.array([48, 24]),
        "apart": np.array([0, 0, 3, 3, SIZE]),
    }
    proto = packed("", text=text, **extra)
    assert set(pairs(proto)) == {"w", "wo"} - set(missing)
    assert set(reasons(proto).values()) == set(missing.values())


def test_keys_and_values_of_one_matrix():
    proto = packed("", text=packing.CROSS)
    assert pairs(proto) == {"wo": (Between.VALUES, ["wkv"]), "wq": (Between.SCORES, ["wkv"])}
    rows = {
        layer.id: layer.narrowing.rows
        for layer in find_layers(load(proto), {}, (), ()).layers
        if layer.narrowing
    }
    assert rows == {"wo": (Rows(24, 24),), "wq": (Rows(0, 24),)}
