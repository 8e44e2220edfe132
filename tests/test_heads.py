"""Smaller heads in whole models: planted ranks lose nothing, and no operator is added."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from attending import (
    BERT,
    BUILT,
    CONSTANT,
    GQA,
    HEADS,
    RANK,
    REPEATED,
    SIZE,
    D,
    bert,
    grouped,
    inputs,
    weights,
)
from calibrating import measured, seen
from narrowing import built, error, narrow
from onnx_lowrank import PlanError, compress
from onnx_lowrank.budgets.macs import macs
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.graph.parameters import parameters as counted
from onnx_lowrank.layers.found import find_layers
from rewriting import model

SCALED = """t9 = Shape (q) i9 = Constant <value_int = -1> () n9 = Gather (t9, i9) f9 = Cast <to = 1> (n9)
    r9 = Sqrt (f9) s1 = Div (s0, r9)"""
MODELS = {
    "constant": lambda: bert(CONSTANT),
    "built": lambda: bert(BUILT),
    "grouped": lambda: model(GQA, **grouped()),
    "repeated": lambda: model(REPEATED, **grouped()),
    "scaled": lambda: bert(text=BERT.replace("s1 = Div (s0, scale)", SCALED)),
    "gemm": lambda: bert(text=GEMM, rows=np.array([-1, D])),
}
# Gemm reads a matrix, so the values are cut from its rows.
GEMM = BERT.replace(
    "v0 = MatMul (x, wv) v1 = Add (bv, v0)",
    """x9 = Reshape (x, rows) v1 = Gemm <alpha = 0.5> (x9, wv, bv)
    t9 = Shape <start = 0, end = 2> (x) cut = Concat <axis = 0> (t9, heads, size)""",
).replace("(v1, vs)", "(v1, cut)")


def heads_of(proto):
    return {layer.id: layer.width_step for layer in seen(proto).layers if layer.partners}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recover", [True, False])
def test_planted_heads_shrink_to_their_rank_without_loss(name, recover):
    proto = MODELS[name]()
    widths = {layer: heads * RANK for layer, heads in heads_of(proto).items()}
    assert set(widths) == {"wo", "wq"}
    _, result = built(proto, widths, recover=recover)
    narrowed = result.rewritten.model.proto
    onnx.checker.check_model(narrowed, full_check=True)
    # The ridge of the refitted output layer keeps the error from zero.
    assert error(proto, narrowed) < 5e-3
    assert [n.op_type for n in narrowed.graph.node if n.op_type not in ("Constant", "Identity")] == [
        n.op_type for n in proto.graph.node if n.op_type not in ("Constant", "Identity")
    ]
    # Below their rank, heads lose.
    _, smaller = built(proto, heads_of(proto))
    assert error(proto, smaller.rewritten.model.proto) > 5e-2


@pytest.mark.parametrize("name", ["constant", "grouped"])
def test_queries_and_keys_alone_lose_nothing(name):
    proto = MODELS[name]()
    _, result = built(proto, {"wq": heads_of(proto)["wq"] * RANK})
    assert error(proto, result.rewritten.model.proto) < 1e-5


def test_stored_shapes_and_biases_are_narrow():
    proto = bert()
    _, result = built(proto, {"wo": HEADS * 4, "wq": HEADS * 5})
    stored = {t.name: numpy_helper.to_array(t) for t in result.rewritten.model.proto.graph.initializer}
    floats = sorted(value.shape for value in stored.values() if value.dtype == np.float32)
    assert floats == sorted([(), (12,), (15,), (15,), (D,), (D, 12), (12, D), (D, 15), (D, 15)])
    targets = sorted(
        value.tolist() for value in stored.values() if value.size > 1 and value.dtype == np.int64
    )
    assert targets == [[0, 0, 3, 4], [0, 0, 3, 5], [0, 0, 3, 5], [0, 0, 12]]


def test_a_target_that_stays_for_others_is_kept():
    proto = bert()
    _, result = built(proto, {"wo": HEADS * 4})
    targets = [
        numpy_helper.to_array(t).tolist()
        for t in result.rewritten.model.proto.graph.initializer
        if t.dims == [4]
    ]
    assert sorted(targets) == [[0, 0, 3, 4], [0, 0, 3, 8]]
    assert error(proto, result.rewritten.model.proto) < 5e-3


def test_a_concat_that_several_read_is_copied():
    shared = BUILT.replace("ks = Concat <axis = 0> (b, l, heads, size)", "").replace(
        "vs = Concat <axis = 0> (b, l, heads, size)", ""
    )
    text = BERT.replace("(k1, ks)", "(k1, qs)").replace("(v1, vs)", "(v1, qs)")
    proto = bert(shared, text=text)
    _, result = built(proto, {"wo": HEADS * 4, "wq": HEADS * 3})
    narrowed = result.rewritten.model.proto
    onnx.checker.check_model(narrowed, full_check=True)
    assert error(proto, narrowed) < 5e-3


def test_shapes_that_the_model_states_between_go():
    proto = onnx.shape_inference.infer_shapes(bert())
    between = {"v0", "v1", "v2", "v", "c0", "c1", "c", "q0", "q1", "q2", "q", "k0", "k1", "k2", "k"}
    assert between <= {value.name for value in proto.graph.value_info}
    _, result = built(proto, {"wo": HEADS * 4, "wq": HEADS * 3})
    narrowed = result.rewritten.model.proto
    assert not between & {value.name for value in narrowed.graph.value_info}
    onnx.checker.check_model(narrowed, full_check=True)


def test_float16_is_narrowed():
    proto = bert(dtype="float16")
    data = inputs(dtype=np.float16)
    _, result = built(proto, {"wo": HEADS * RANK, "wq": HEADS * RANK}, data=data)
    narrowed = result.rewritten.model.proto
    floats = {t.data_type for t in narrowed.graph.initializer} - {onnx.TensorProto.INT64}
    assert floats == {onnx.TensorProto.FLOAT16}
    assert error(proto, narrowed, **inputs(7, 9, seed=2, dtype=np.float16)) < 1e-2


def test_weights_in_constant_nodes_are_narrowed():
    proto = bert()
    for tensor in proto.graph.initializer:
        node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        place = next(n for n, other in enumerate(proto.graph.node) if tensor.name in other.input)
        proto.graph.node.insert(place, node)
    del proto.graph.initializer[:]
    _, result = built(proto, {"wo": HEADS * RANK, "wq": HEADS * RANK})
    onnx.checker.check_model(result.rewritten.model.proto, full_check=True)
    assert not result.rewritten.model.proto.graph.initializer
    assert error(proto, result.rewritten.model.proto) < 5e-3


@pytest.mark.parametrize("name", ["constant", "grouped"])
def test_a_plan_counts_what_the_model_has(name):
    proto = MODELS[name]()
    found = find_layers(seen(proto).model, {"x": (2, 6, D), "mask": (2, 1, 1, 6)}, (), ())
    heads = heads_of(proto)
    for widths in ({"wo": heads["wo"] * 3}, {"wq": heads["wq"] * 5}, {n: h * 2 for n, h in heads.items()}):
        _, result = built(proto, widths)
        narrowed = result.rewritten.model.proto
        layers = {layer.id: layer for layer in found.layers}
        saved = sum(
            parameters(layers[n]) - parameters(layers[n], narrow(width)) for n, width in widths.items()
        )
        assert counted(seen(proto).model) - counted(seen(narrowed).model) == saved
        fewer = sum(macs(layers[n]) - macs(layers[n], narrow(width)) for n, width in widths.items())
        assert total_macs(proto) - total_macs(narrowed) == fewer


def total_macs(proto):
    found = find_layers(seen(proto).model, {"x": (2, 6, D), "mask": (2, 1, 1, 6)}, (), ())
    return sum(scope.macs for scope in found.work) + sum(macs(layer) for layer in found.layers)


def compressed(proto, ratio, **options):
    return compress(proto, ratio, recipe="activation", calibration=inputs(), **options)


@pytest.mark.parametrize("name", ["constant", "grouped"])
@pytest.mark.parametrize("recover", [True, False])
def test_a_plan_narrows_planted_heads(name, recover):
    proto = MODELS[name]()
    result = compressed(proto, 0.6, recover=recover)
    chosen = {choice.layer: choice.option for choice in result.plan.choices if choice.option}
    assert {layer: option.lowering for layer, option in chosen.items()} == {
        "wo": Lowering.NARROW,
        "wq": Lowering.NARROW,
    }
    assert result.report.reached <= 0.6
    assert error(proto, result.model.proto) < 5e-3
    rows = {row.id: row for row in result.report.layers}
    option, layer = chosen["wo"], rows["wo"]
    share = 1 if name == "constant" else 2
    assert rows["wv"].reason == f"narrowed to {option.j // share} channels with wo"
    assert layer.full_rank == heads_of(proto)["wo"] * SIZE
    assert (rows["wv"].params.after, layer.params.after) == (D * option.j // share, D * option.j)


def test_macs_fall_with_the_products_of_attention():
    proto = bert()
    shapes = {"x": (2, 6, D), "mask": (2, 1, 1, 6)}
    result = compressed(proto, 0.7, budget="macs", input_shape=shapes)
    assert any(choice.option and choice.option.lowering == "narrow" for choice in result.plan.choices)
    total = result.report.totals.amount("macs")
    assert total.before == total_macs(proto)
    assert total.after == total_macs(result.model.proto) <= 0.7 * total.before
    assert all(choice.cost >= 0 for choice in result.plan.choices)


def test_no_other_plan_of_widths_has_less_error(tmp_path):
    """All pairs of widths are replayed: none within the budget has less error by the plan's own curves."""
    proto = model(GQA, **grouped(rank=5))
    result = compressed(proto, 0.7, recover=False, include=("wq", "wk", "wv", "wo"))
    total = counted(seen(proto).model)
    layers = {layer.id: layer for layer in seen(proto).layers}
    curves = curves_of(proto)
    best = min(
        sum(float(curves[n][w]) for n, w in (("wo", first), ("wq", second)))
        for first, second in product(range(4, 33, 4), repeat=2)
        if total
        - sum(
            parameters(layers[n]) - parameters(layers[n], narrow(w))
            for n, w in (("wo", first), ("wq", second))
            if w < 32
        )
        <= 0.7 * total
    )
    assert result.plan.solver.objective <= best * (1 + 1e-6)


def curves_of(proto):
    """The errors of all widths of both layers."""
    from onnx_lowrank.linalg.backend import resolve
    from onnx_lowrank.stages.fit import width_item
    from onnx_lowrank.work.narrowing import width_errors

    found = seen(proto)
    with measured(found, inputs()) as calibration:
        return {
            b.layer.id: width_errors(
                width_item(found.model, found.walk, b, calibration.statistics), resolve("cpu")
            ).relative
            for b in found.bindings
            if b.layer.partners
        }


@pytest.mark.parametrize("recover", [True, False])
def test_a_plan_is_replayed_to_the_same_bytes(tmp_path, recover):
    proto = bert()
    first = compressed(proto, 0.6, recover=recover)
    first.save_plan(tmp_path / "plan.json")
    again = compress(proto, plan=tmp_path / "plan.json", calibration=inputs())
    assert again.model.proto.SerializeToString() == first.model.proto.SerializeToString()
    assert again.plan == first.plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wo": {"j": 10}}, "cannot keep j = 10 channels in 3 heads: choose a multiple of 3"),
        ({"wo": {"j": 24}}, "cannot keep j = 24 channels: choose a number between 3 and 21"),
        ({"wq": {"j": 2}}, "cannot keep j = 2 channels: choose a number between 3 and 21"),
        (
            {"wk": {"fold": "encode", "k": 1, "j": 4}},
            "narrows 'wq' and decomposes 'wk', which gets narrower with it",
        ),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path, changes, message):
    proto = bert()
    compressed(proto, 0.6).save_plan(tmp_path / "plan.json")
    table = json.loads((tmp_path / "plan.json").read_text())
    for row in table["layers"]:
        row.update(changes.get(row["id"], {}))
    (tmp_path / "plan.json").write_text(json.dumps(table))
    with pytest.raises(PlanError, match=message):
        compress(proto, plan=tmp_path / "plan.json", calibration=inputs())


def test_the_certificate_bounds_what_queries_become():
    """The queries' weight becomes the product of the stored one with the map that the keys take in."""
    proto = bert(**weights(rank=SIZE))
    _, result = built(proto, {"wq": HEADS * 5})
    old = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer}
    stored = {t.name: numpy_helper.to_array(t) for t in result.rewritten.model.proto.graph.initializer}
    queries, keys = (stored[f"w{x}_narrow"].astype(np.float64) for x in "qk")
    given = np.zeros((D, HEADS * SIZE))
    for head in range(HEADS):
        small, whole = slice(head * 5, head * 5 + 5), slice(head * SIZE, (head + 1) * SIZE)
        taken = np.linalg.lstsq(old["wk"][:, whole], keys[:, small], rcond=None)[0]
        given[:, whole] = queries[:, small] @ taken.T
    certificate = result.certificates["wq"]
    for order, bounds in ((2, certificate.spectral), ("fro", certificate.frobenius)):
        lost = np.linalg.norm(old["wq"] - given, order) / np.linalg.norm(old["wq"], order)
        assert bounds[0] == pytest.approx(lost, rel=1e-4)


def test_processes_narrow_heads_like_threads():
    proto = bert()
    alone = compressed(proto, 0.6, recover=False)
    apart = compressed(proto, 0.6, recover=False, workers=2)
    assert apart.model.proto.SerializeToString() == alone.model.proto.SerializeToString()
