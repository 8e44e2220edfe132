"""Smaller heads where one matrix computes queries, keys and values."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from attending import HEADS, RANK, SIZE, D, inputs
from calibrating import measured, run, seen
from narrowing import built, error, narrow
from onnx_lowrank import PlanError, compress
from onnx_lowrank.budgets.macs import macs
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.graph.parameters import parameters as counted
from onnx_lowrank.layers.found import find_layers
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.stages.fit import width_item
from onnx_lowrank.work.narrowing import width_errors
from packing import BOUND, CROSS, FORMS, attended, packed

FREE = [name for name in FORMS if name not in BOUND]
BOTH = {"w": HEADS * RANK, "wo": HEADS * RANK}
SHAPES = {"x": (2, 6, D), "mask": (2, 1, 1, 6)}


def compressed(proto, ratio=0.6, **options):
    return compress(proto, ratio, recipe="activation", calibration=inputs(), **options)


def stored(proto):
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("recover", [True, False])
def test_planted_heads_shrink_to_their_rank_without_loss(name, recover):
    proto = packed(name)
    _, result = built(proto, BOTH, recover=recover)
    narrowed = result.rewritten.model.proto
    onnx.checker.check_model(narrowed, full_check=True)
    assert error(proto, narrowed) < 5e-3
    # What a size of the input gave is a constant now.
    gone = ["Gather", "Unsqueeze"] if name == "sized" else []
    kinds = [sorted(node.op_type for node in each.graph.node) for each in (proto, narrowed)]
    assert kinds[0] == sorted(kinds[1] + gone)
    # Below their rank, heads lose.
    _, smaller = built(proto, {"w": HEADS, "wo": HEADS})
    assert error(proto, smaller.rewritten.model.proto) > 5e-2


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("layer", ["w", "wo"])
def test_a_split_lets_parts_shrink_alone(name, layer):
    proto = packed(name)
    _, result = built(proto, {layer: HEADS * RANK})
    narrowed = result.rewritten.model.proto
    onnx.checker.check_model(narrowed, full_check=True)
    assert error(proto, narrowed) < 5e-3
    small = HEADS * RANK
    widths = {"w": [small, small, D], "wo": [D, D, small]}[layer]
    sizes = [value.tolist() for value in stored(narrowed).values() if value.shape == (3,) and value.all()]
    assert sizes == [widths]
    assert ("num_outputs" in str(narrowed)) is False
    weight = next(value for name, value in stored(narrowed).items() if name in ("w", "w_narrow"))
    assert weight.shape == (D, sum(widths))


@pytest.mark.parametrize("name", FORMS)
def test_a_narrow_model_computes_attention_at_its_sizes(name):
    """Every stored number is right: the scale, the sizes of the parts, and those of the heads."""
    proto = packed(name, rank=SIZE)
    heads = (5, 5) if name in BOUND else (5, 3)
    _, result = built(proto, {"w": HEADS * heads[0], "wo": HEADS * heads[1]})
    narrowed = result.rewritten.model.proto
    values = stored(narrowed)
    sizes = [HEADS * heads[0], HEADS * heads[0], HEADS * heads[1]]
    assert values["w_narrow"].shape == (D, sum(sizes))
    out, behind = (
        values["wo_narrow"],
        next(v for n, v in values.items() if n.startswith(("bo", "y0", "node"))),
    )
    feed = inputs(5, 7, seed=9)
    wanted = attended(
        values["w_narrow"], values["b_narrow"], out, behind, sizes, SIZE**-0.5, feed["x"], feed["mask"]
    )
    np.testing.assert_allclose(run(narrowed, **feed), wanted, rtol=1e-4, atol=1e-5)


def test_num_outputs_gives_way_to_sizes():
    proto = packed("equal", opset=18)
    split = next(node for node in proto.graph.node if node.op_type == "Split")
    split.attribute.append(onnx.helper.make_attribute("num_outputs", 3))
    _, result = built(proto, BOTH)
    narrowed = result.rewritten.model.proto
    onnx.checker.check_model(narrowed, full_check=True)
    assert error(proto, narrowed) < 5e-3


def test_an_old_split_has_its_sizes_in_an_attribute():
    proto = packed("equal", opset=12)
    _, result = built(proto, {"wo": HEADS * RANK})
    narrowed = result.rewritten.model.proto
    onnx.checker.check_model(narrowed, full_check=True)
    split = next(node for node in narrowed.graph.node if node.op_type == "Split")
    (sizes,) = (list(a.ints) for a in split.attribute if a.name == "split")
    assert sizes == [D, D, HEADS * RANK]
    assert error(proto, narrowed) < 5e-3


@pytest.mark.parametrize("recover", [True, False])
def test_keys_and_values_of_one_matrix(recover):
    proto = packed("", text=CROSS)
    _, result = built(proto, {"wq": HEADS * RANK, "wo": HEADS * 4}, recover=recover)
    narrowed = result.rewritten.model.proto
    onnx.checker.check_model(narrowed, full_check=True)
    assert stored(narrowed)["wkv_narrow"].shape == (D, HEADS * (RANK + 4))
    assert error(proto, narrowed) < 5e-3
    chosen = compressed(proto, 0.6, recover=recover)
    assert chosen.report.totals.amount("params").after == counted(chosen.model)
    assert error(proto, chosen.model.proto) < 5e-3


def test_a_narrow_model_gets_narrower():
    first = compressed(packed("nano", rank=6), 0.9).model.proto
    again = compressed(first, 0.8)
    assert any(c.option and c.option.lowering is Lowering.NARROW for c in again.plan.choices)
    onnx.checker.check_model(again.model.proto, full_check=True)
    assert again.report.reached <= 0.8


@pytest.mark.parametrize("name", FORMS)
def test_the_whole_width_is_exact(name):
    """At full width, both factors of every way give the weight, and the projections are the identity."""
    found = seen(packed(name, rank=SIZE))
    with measured(found, inputs()) as calibration:
        for binding in found.bindings:
            item = width_item(found.model, found.walk, binding, calibration.statistics)
            made = width_errors(item, resolve("cpu"))
            assert made.relative[-1] == 0
            assert len(made.relative) == binding.layer.width + 1
            if binding.layer.packs_own:
                weight = item.weight.read().astype(np.float64)
                values = np.random.default_rng(0).standard_normal(3 * D)
                np.testing.assert_allclose(made.way.given(values, D), values, atol=1e-7)
                assert weight.shape == (1, 3 * D, D)


@pytest.mark.parametrize("name", FORMS)
def test_a_plan_narrows_planted_heads(name):
    proto = packed(name)
    result = compressed(proto)
    chosen = {choice.layer: choice for choice in result.plan.choices}
    assert {c.option.lowering for c in chosen.values()} == {Lowering.NARROW}
    assert result.report.reached <= 0.6
    assert error(proto, result.model.proto) < 5e-3
    assert result.report.totals.amount("params").after == counted(result.model)
    sizes = [layer.size for layer in seen(result.model.proto).layers]
    assert [row.params.after for row in result.report.layers] == sizes
    assert [choice.cost for choice in result.plan.choices] == sizes


@pytest.mark.parametrize("name", FORMS)
def test_a_plan_counts_what_the_model_has(name):
    proto = packed(name)
    found = find_layers(seen(proto).model, SHAPES, (), ())
    layers = {layer.id: layer for layer in found.layers}
    for widths in ({"w": HEADS * 2, "wo": HEADS * 2}, *([] if name in BOUND else [{"w": 9}, {"wo": 15}])):
        _, result = built(proto, widths)
        narrowed = result.rewritten.model.proto
        saved = sum(parameters(layers[n]) - parameters(layers[n], narrow(w)) for n, w in widths.items())
        assert counted(seen(proto).model) - counted(seen(narrowed).model) == saved
        fewer = sum(macs(layers[n]) - macs(layers[n], narrow(w)) for n, w in widths.items())
        assert total_macs(proto) - total_macs(narrowed) == fewer


def total_macs(proto):
    found = find_layers(seen(proto).model, SHAPES, (), ())
    return sum(scope.macs for scope in found.work) + sum(macs(layer) for layer in found.layers)


@pytest.mark.parametrize("name", ["vit", "nano"])
def test_no_other_plan_of_widths_has_less_error(name):
    proto = packed(name, rank=5)
    result = compressed(proto, 0.7, recover=False)
    layers = {layer.id: layer for layer in seen(proto).layers}
    found = seen(proto)
    with measured(found, inputs()) as calibration:
        items = {
            b.layer.id: width_item(found.model, found.walk, b, calibration.statistics) for b in found.bindings
        }
        curves = {layer: width_errors(item, resolve("cpu")).relative for layer, item in items.items()}
    widths = [(n, n) for n in range(3, 25, 3)] if name == "vit" else product(range(3, 25, 3), repeat=2)
    total = counted(found.model)
    best = min(
        sum(float(curves[n][w]) for n, w in (("w", first), ("wo", second)))
        for first, second in widths
        if total
        - sum(
            parameters(layers[n]) - parameters(layers[n], narrow(w))
            for n, w in (("w", first), ("wo", second))
            if w < D
        )
        <= 0.7 * total
    )
    assert result.plan.solver.objective <= best * (1 + 1e-6)


@pytest.mark.parametrize("name", ["vit", "gpt"])
@pytest.mark.parametrize("recover", [True, False])
def test_a_plan_is_replayed_to_the_same_bytes(tmp_path, name, recover):
    proto = packed(name)
    first = compressed(proto, recover=recover)
    first.save_plan(tmp_path / "plan.json")
    again = compress(proto, plan=tmp_path / "plan.json", calibration=inputs())
    assert again.model.proto.SerializeToString() == first.model.proto.SerializeToString()
    assert again.plan == first.plan


NULL = dict.fromkeys(("fold", "k", "j", "lowering"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "vit",
            {"wo": {"j": 6}},
            "narrows 'w' to j = 12, and 'wo' differently, but their heads have one size",
        ),
        ("vit", {"wo": NULL}, "narrows 'w' to j = 12, and 'wo' differently"),
        ("vit", {"w": NULL}, "narrows 'wo' to j = 12, and 'w' differently"),
        (
            "nano",
            {"w": {"lowering": "native"}},
            "narrows 'wo' and decomposes 'w', which",
        ),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path, name, changes, message):
    proto = packed(name)
    compressed(proto).save_plan(tmp_path / "plan.json")
    table = json.loads((tmp_path / "plan.json").read_text())
    for row in table["layers"]:
        row.update(changes.get(row["id"], {}))
    (tmp_path / "plan.json").write_text(json.dumps(table))
    with pytest.raises(PlanError, match=message):
        compress(proto, plan=tmp_path / "plan.json", calibration=inputs())


def test_processes_narrow_heads_like_threads():
    proto = packed("vit")
    alone, apart = (compressed(proto, recover=False, **options) for options in ({}, {"workers": 2}))
    assert apart.model.proto.SerializeToString() == alone.model.proto.SerializeToString()
