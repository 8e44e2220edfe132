"""Factors in the operators that a user asks for: what is written, and what stays as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod

import numpy as np
import onnx
import pytest

from editing import edited_plan
from onnx_lowrank import InputError, compress
from onnx_lowrank.core.option import Fold, Lowering, Option, Style
from onnx_lowrank.files.load import load, stored_bytes
from onnx_lowrank.layers.found import find_layers
from onnx_lowrank.layers.lowered import lowered
from rewriting import difference, feed_of, run
from tiny import built, decaying

MODEL = """
<ir_version: 8, opset_import: ["": 17]>
g (float[2, 16, 6, 6] x) => (float[2, 4] y) {
  a = Conv <pads = [1, 1, 1, 1]> (x, wide, b1)
  b = Relu (a)
  c = Conv (b, point)
  d = Relu (c)
  e = Conv <group = 2> (d, grouped)
  f = GlobalAveragePool (e)
  h = Flatten (f)
  i = Gemm <transB = 1> (h, fc, b2)
  j = Relu (i)
  k = MatMul (j, head)
  y = Add (k, b3)
}
"""
RATIO = 0.25
STYLES = ["conv", "matmul", "group-free", "conv,group-free", "matmul,group-free"]


def weights():
    shapes = {
        "wide": (24, 16, 3, 3), "b1": (24,), "point": (32, 24, 1, 1), "grouped": (24, 16, 1, 1),
        "fc": (40, 24), "b2": (40,), "head": (40, 4), "b3": (4,),
    }  # fmt: skip
    made = {
        name: decaying(seed, *shape) if len(shape) > 1 else np.arange(prod(shape), dtype=np.float32)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    # Four slices with few directions each, and none in common.
    rng = np.random.default_rng(9)
    slices = [rng.standard_normal((24, 2)) @ rng.standard_normal((2, 36)) for _ in range(4)]
    sliced = np.concatenate([part.reshape(24, 4, 3, 3) for part in slices], axis=1)
    return made | {"wide": (sliced + 0.02 * made["wide"]).astype(np.float32)}


PROTO = built(MODEL, weights())


def operators(proto):
    """The operator types of all nodes, and the largest number of groups."""
    groups = [a.i for node in proto.graph.node for a in node.attribute if a.name == "group"]
    return [node.op_type for node in proto.graph.node], max(groups, default=1)


def layers(*styles, proto=PROTO):
    return {layer.id: layer for layer in lowered(find_layers(load(proto), {}, (), ()), set(styles)).layers}


# --- what a layer may have -----------------------------------------------------------------------------


def test_without_a_style_no_layer_has_the_lowerings_of_a_style():
    for layer in layers().values():
        assert not {Lowering.POINTWISE, Lowering.SPLIT} & {*layer.whole, *layer.sliced}
        assert layer.whole[0] is layer.sliced[0] is Lowering.NATIVE


def test_conv_writes_rows_as_convolutions():
    found = layers(Style.CONV)
    for name in ("fc", "head"):
        assert found[name].whole == found[name].sliced == (Lowering.POINTWISE,)
    for name in ("wide", "point"):
        assert found[name].whole == found[name].sliced == (Lowering.NATIVE,)


def test_matmul_writes_pointwise_convolutions_as_matrices_of_one_slice():
    found = layers(Style.MATMUL)
    assert (found["point"].whole, found["point"].slices) == ((Lowering.MATMUL,), (1,))
    assert found["wide"].slices == layers()["wide"].slices
    assert found["fc"].whole == (Lowering.NATIVE,)


def test_group_free_splits_few_slices_and_leaves_grouped_operators_alone():
    found = layers(Style.GROUP_FREE)
    assert (found["wide"].sliced, found["wide"].slices) == ((Lowering.SPLIT,), (1, 2, 4, 8, 16))
    assert found["point"].slices == (1, 2, 3, 4, 6, 8, 12), "24 slices are more than 16"
    assert found["grouped"].slices == ()
    assert (found["fc"].sliced, found["fc"].slices) == ((Lowering.NATIVE,), layers()["fc"].slices)
    assert layers(Style.GROUP_FREE, Style.CONV)["fc"].slices == (1,), "their slices would have groups"


SIBLINGS = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N, 16] x) => (float[N, 16] y) {
  a = MatMul (x, p) b = MatMul (x, q) c = Mul (a, b) y = Gemm <alpha = 0.5> (c, s)
}
"""


def test_layers_in_other_operators_share_nothing():
    proto = built(SIBLINGS, {name: decaying(seed, 16, 16) for seed, name in enumerate("pqs")})
    assert layers(proto=proto)["p"].siblings == ("p", "q")
    assert layers(Style.GROUP_FREE, proto=proto)["p"].siblings == ("p", "q")
    found = layers(Style.CONV, proto=proto)
    assert found["p"].siblings == found["q"].siblings == ()
    assert found["s"].whole == (Lowering.NATIVE,), "a Conv has no alpha"


# --- what is written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_a_plan_keeps_its_operators_and_replays_to_the_same_bytes(style, tmp_path):
    one = compress(PROTO, RATIO, lowering=style)
    assert one.proto == compress(PROTO, RATIO, lowering=style).proto
    path = tmp_path / "plan.json"
    one.save_plan(path)
    rows = [row["lowering"] for row in json.loads(path.read_text())["layers"] if row["lowering"]]
    assert (
        set(rows) - {"native"}
        == {
            "conv": {"pointwise"},
            "matmul": {"matmul"},
            "group-free": {"split"},
            "conv,group-free": {"pointwise", "split"},
            "matmul,group-free": {"matmul", "split"},
        }[style]
    )
    assert compress(PROTO, plan=path).proto == one.proto


@pytest.mark.parametrize("style", STYLES)
def test_the_new_operators_are_those_of_the_style(style):
    result = compress(PROTO, RATIO, lowering=style, exclude="grouped")
    old, _ = operators(PROTO)
    new, groups = operators(result.proto)
    assert groups == 2 or "group-free" not in style, "the input's own"
    assert ("Split" in new) == ("group-free" in style)
    if "conv" in style:
        assert {row.option.lowering for row in result.report.layers if row.option and row.op != "Conv"} == {
            Lowering.POINTWISE
        }
    if "matmul" in style:
        assert new.count("MatMul") > old.count("MatMul") + 1


@pytest.mark.parametrize("style", STYLES)
def test_merged_and_unmerged_models_compute_the_same(style, tmp_path):
    result = compress(PROTO, RATIO, lowering=style)
    path = edited_plan(result, tmp_path, merge=False)
    feed = feed_of(PROTO)
    assert difference(run(result.proto, feed), run(compress(PROTO, plan=path).proto, feed)) < 1e-5


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_full_rank_is_exact(style, tmp_path):
    result = compress(PROTO, RATIO, lowering=style)
    known = layers(*map(Style, style.split(",")))
    full = {
        row.id: {"j": known[row.id].full_rank(row.option.fold, row.option.k)}
        for row in result.report.layers
        if row.option is not None
    }
    assert full
    made = compress(PROTO, plan=edited_plan(result, tmp_path, **full)).proto
    onnx.checker.check_model(made, full_check=True)
    assert difference(run(PROTO, feed_of(PROTO)), run(made, feed_of(PROTO))) < 1e-5


@pytest.mark.parametrize("style", STYLES)
def test_the_bytes_of_a_plan_hold(style):
    result = compress(PROTO, 0.7, budget="bytes", lowering=style)
    before, after = (stored_bytes(load(proto)) for proto in (PROTO, result.proto))
    assert after <= 0.7 * before
    assert result.report.reached == pytest.approx(after / before, abs=0.02)


@pytest.mark.parametrize("style", ["conv", "group-free"])
def test_measured_times_choose_among_the_lowerings_of_the_style(style):
    result = compress(PROTO, 0.9, budget="latency", align=1, lowering=style)
    known = layers(Style(style))
    chosen = [row for row in result.report.layers if row.option is not None]
    assert chosen
    for row in chosen:
        assert row.option.lowering in (*known[row.id].lowerings(row.option.k), Lowering.NARROW)


@pytest.mark.parametrize("style", STYLES)
def test_a_calibrated_plan_with_a_style_is_replayed(style, tmp_path):
    data = {"x": np.random.default_rng(0).standard_normal((24, 16, 6, 6), np.float32)}
    proto = built(MODEL.replace("float[2,", "float[N,"), weights())
    result = compress(proto, RATIO, lowering=style, calibration=data, recipe="activation")
    path = tmp_path / "plan.json"
    result.save_plan(path)
    assert compress(proto, plan=path, calibration=data).proto == result.proto


# --- what cannot be written so -------------------------------------------------------------------------

AXES = """
<ir_version: 8, opset_import: ["": 17]>
g (float[2, 3, 5, 16] x) => (float[2, 3, 5, 16] y) { y = MatMul (x, w) }
"""


def test_a_matrix_of_more_axes_keeps_its_operator_and_the_report_says_so():
    proto = built(AXES, {"w": decaying(1, 16, 16)})
    result = compress(proto, RATIO, lowering="conv")
    assert set(operators(result.proto)[0]) <= {"MatMul", "Reshape", "Transpose", "Constant"}
    assert result.report.warnings[0].startswith(
        "1 of the rewritten layers ('w' first) cannot be written as convolutions"
    )
    assert not any("convolutions" in warning for warning in compress(proto, RATIO).report.warnings)


def test_a_grouped_operator_is_kept_with_the_reason():
    (row,) = (r for r in compress(PROTO, RATIO, lowering="group-free").report.layers if r.id == "grouped")
    assert row.option is None
    assert row.reason == "its operator has groups, and --lowering group-free writes none"


def test_a_plan_cannot_have_an_operator_that_a_layer_lacks(tmp_path):
    result = compress(PROTO, RATIO, lowering="conv")
    path = edited_plan(result, tmp_path, wide={"fold": "encode", "k": 1, "j": 1, "lowering": "split"})
    with pytest.raises(InputError, match="'wide' cannot be lowered as split: choose one of native"):
        compress(PROTO, plan=path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lowering": "convolution"}, "There is no lowering 'convolution': choose of conv, matmul, group-fr"),
        ({"lowering": ["conv", "matmul"]}, "--lowering is conv,matmul, but conv and matmul exclude"),
        ({"lowering": 3}, "lowering is '3' of type int: give names, of conv, matmul, group-free"),
        ({"target": "tpu"}, "There is no target 'tpu': choose one of cpu, cuda, tensorrt, openvino, webgpu"),
        ({"target": 1}, "target is '1' of type int: give a name"),
        ({"engine": "mine", "dry_run": True}, "There is no engine 'mine': choose one of onnxruntime, openv"),
    ],
)
def test_what_is_no_style_target_or_engine_is_told(options, text):
    with pytest.raises(InputError, match=text):
        compress(PROTO, RATIO, **options)


@pytest.mark.parametrize("options", [{"lowering": "conv"}, {"target": "qnn"}])
def test_a_plan_has_its_own_operators(options, tmp_path):
    path = tmp_path / "plan.json"
    compress(PROTO, RATIO).save_plan(path)
    with pytest.raises(InputError, match="A plan has its own ranks and operators: leave out --lowering and"):
        compress(PROTO, plan=path, **options)


def test_split_slices_count_what_they_store():
    layer = replace(layers()["wide"], sliced=(Lowering.SPLIT,))
    assert layer.lowerings(2) == (Lowering.SPLIT,)
    assert str(Option(Fold.ENCODE, 2, 3, Lowering.SPLIT)) == "encode k=2 j=3 split"
