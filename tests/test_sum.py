"""Shared decoders in whole models: layers whose results are added get one decoder, and outputs stay."""

from __future__ import annotations

import json
import re
from io import StringIO

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console

from calibrating import run, seen
from editing import edited_plan
from onnx_lowrank import PlanError, compress
from onnx_lowrank.report.terminal import show
from rewriting import DTYPES, model
from summing import BODIES, CHANNELS, FEATURES, PLAIN, RANK, inputs, source, weights


def elements(proto):
    """The parameters of a model."""
    arrays = (numpy_helper.to_array(tensor) for tensor in proto.graph.initializer)
    return sum(array.size for array in arrays if array.dtype.kind == "f")


def least(kind):
    """The parameters with one decoder of the planted rank: all biases in nodes are one."""
    lengths = {"conv": 8 * 9 + 8, "three": 3 * CHANNELS}.get(kind, 2 * CHANNELS)
    return RANK * (FEATURES + lengths) + (0 if kind == "plain" else FEATURES)


def summed(kind="matmul", proto=None, ratio=None, **options):
    """Compress a model so far that all layers of the sum have to share."""
    proto = proto or model(BODIES[kind], **weights(kind))
    ratio = ratio or (least(kind) + 1) / elements(proto)
    return proto, compress(proto, ratio, recipe="activation", calibration=source(kind), **options)


def distance(wanted, given):
    return np.linalg.norm(given.astype(float) - wanted) / np.linalg.norm(wanted.astype(float))


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("recover", [True, False])
def test_one_column_space_needs_one_decoder(kind, recover):
    proto, result = summed(kind, recover=recover)
    (option,) = {choice.option for choice in result.plan.choices}
    assert (option.lowering, option.j) == ("summed", RANK)
    x = inputs(kind, seed=2)
    assert distance(run(proto, x=x), run(result.model.proto, x=x)) < 1e-5
    onnx.checker.check_model(result.model.proto, full_check=True)
    stored = [t.name for t in result.model.proto.graph.initializer]
    assert sum("encoder" in name for name in stored) == len(result.plan.choices)
    assert sum("decoder" in name for name in stored) == 1


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("kind", ["matmul", "gemm", "conv"])
def test_the_costs_are_those_of_the_model(kind, budget):
    shape = {"x": (4, 8, 6, 6) if kind == "conv" else (4, CHANNELS)}
    lengths, positions = (8 * 9 + 8, 4 * 9) if kind == "conv" else (2 * CHANNELS, 4)
    ratio = None if budget == "params" else 1.001 * RANK * (lengths + FEATURES) / (lengths * FEATURES)
    _, result = summed(kind, ratio=ratio, budget=budget, input_shape=shape)
    assert {choice.option.lowering for choice in result.plan.choices} == {"summed"}
    assert {choice.option.j for choice in result.plan.choices} == {RANK}
    totals = result.report.totals
    assert totals.amount("params").after == elements(result.model.proto) == least(kind)
    assert totals.amount("macs").after == positions * RANK * (lengths + FEATURES)
    assert sum(row.macs.after for row in result.report.layers) == totals.amount("macs").after
    removed = [row.params.before - row.params.after for row in result.report.layers]
    assert sum(removed) == totals.amount("params").before - totals.amount("params").after


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_types_share_too(dtype):
    kind = DTYPES[dtype]
    proto = model(PLAIN.replace("float[", f"{dtype}["), **weights("plain", kind))
    data = {"x": inputs("plain", dtype=kind)}
    result = compress(proto, (least("plain") + 1) / elements(proto), recipe="activation", calibration=data)
    assert {choice.option.lowering for choice in result.plan.choices} == {"summed"}
    x = inputs("plain", seed=2, dtype=kind)
    assert distance(run(proto, x=x), run(result.model.proto, x=x)) < (1e-2 if dtype == "float16" else 1e-12)


def test_before_ir_4_factors_are_constants():
    proto = model(PLAIN, ir=3, opset=9, **weights("plain"))
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in proto.graph.initializer
    )
    _, result = summed("plain", proto)
    assert {choice.option.lowering for choice in result.plan.choices} == {"summed"}
    onnx.checker.check_model(result.model.proto, full_check=True)
    x = inputs("plain", seed=2)
    assert distance(run(proto, x=x), run(result.model.proto, x=x)) < 1e-5


def noisy(kind, seed=4):
    """The same weights with more than the planted rank."""
    rng = np.random.default_rng(seed)
    known = weights(kind)
    for name in ("wa", "wb"):
        known[name] = (known[name] + 0.05 * rng.standard_normal(known[name].shape)).astype(np.float32)
    return known


@pytest.mark.parametrize("kind", ["matmul", "apart", "gemm", "conv", "left"])
def test_a_bias_keeps_the_mean_of_the_sum(kind):
    # Without the Relu, which is not linear.
    body = BODIES[kind].replace("Relu", "Identity")
    proto, result = summed(kind, model(body, **noisy(kind)), recover=False)
    assert {choice.option.lowering for choice in result.plan.choices} == {"summed"}
    x = inputs(kind)
    wanted, given = (run(p, x=x).astype(float) for p in (proto, result.model.proto))
    axes = {"conv": (0, 2, 3), "left": (1,)}.get(kind, (0,))
    lost = np.abs((wanted - given).mean(axis=axes)).max()
    assert lost < 0.2 * np.abs(wanted - given).mean()
    assert distance(wanted, given) > 1e-3


def test_recovery_makes_up_for_errors():
    body = """g (float[N,32] x) => (float[N,24] y) { f0 = MatMul (x, first) f = Tanh (f0) t = Abs (f)
        a = MatMul (f, wa) b = MatMul (t, wb) y = Add (a, b) }"""
    rng = np.random.default_rng(8)
    first = rng.standard_normal((CHANNELS, 20)) @ rng.standard_normal((20, CHANNELS)) / 25
    first += 0.04 * rng.standard_normal((CHANNELS, CHANNELS))
    proto = model(body, first=first.astype(np.float32), **noisy("plain"))
    found = {}
    for recover in (False, True):
        _, result = summed("plain", proto, ratio=0.5, recover=recover)
        ways = [c.option.lowering for c in result.plan.choices if c.option is not None]
        assert ways.count("summed") == 2
        x = inputs("plain", seed=2)
        found[recover] = distance(run(proto, x=x), run(result.model.proto, x=x))
    assert found[True] < 0.99 * found[False]
    assert {row.fit.recovered for row in result.report.layers if row.option.lowering == "summed"} == {True}


def test_sums_that_do_not_fit_together_stay_apart():
    """Each layer has few directions, but not the same ones."""
    rng = np.random.default_rng(5)
    known = weights("plain")
    for name in ("wa", "wb"):
        low = rng.standard_normal((CHANNELS, 6)) @ rng.standard_normal((6, FEATURES))
        known[name] = (low / CHANNELS**0.5).astype(np.float32)
    proto = model(PLAIN, **known)
    _, result = summed("plain", proto, ratio=(2 * 6 * (CHANNELS + FEATURES) + 1) / elements(proto))
    assert {choice.option.lowering for choice in result.plan.choices} == {"native"}
    assert {choice.option.j for choice in result.plan.choices} == {6}


def test_layers_that_share_inputs_and_are_added_take_the_better_way():
    body = """g (float[N,32] x) => (float[N,24] y) {
        a = MatMul (x, wa) b = MatMul (x, wb) s = Add (a, b) y = Tanh (s) }"""
    _, result = summed("plain", model(body, **weights("plain")))
    assert {choice.option.lowering for choice in result.plan.choices} == {"summed"}


@pytest.mark.parametrize("recover", [True, False])
def test_a_plan_is_replayed_to_the_same_bytes(tmp_path, recover):
    proto, first = summed(recover=recover)
    first.save_plan(tmp_path / "plan.json")
    again = compress(proto, plan=tmp_path / "plan.json", calibration=source("matmul"))
    assert again.model.proto.SerializeToString() == first.model.proto.SerializeToString()
    assert again.plan == first.plan


def edited(tmp_path, **changes):
    """Replay the plan of `matmul` with changes of its rows, by layer, or of its other keys."""
    proto, result = summed(recover=False)
    return compress(proto, plan=edited_plan(result, tmp_path, **changes), calibration=source("matmul"))


def test_an_edited_rank_is_kept(tmp_path):
    result = edited(tmp_path, wa={"j": 5}, wb={"j": 5})
    shapes = [tuple(t.dims) for t in result.model.proto.graph.initializer]
    assert shapes.count((CHANNELS, 5)) == 2
    assert shapes.count((5, FEATURES)) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wb": {"j": 5}}, "'wa' shares a decoder with 'wb', whose option differs: give both the same"),
        (
            {"wa": {"lowering": None}},
            "'wb' shares a decoder, and 'wa', whose result is added to its own,",
        ),
        (
            {"wb": {"fold": None, "k": None, "j": None}},
            "'wb', whose result is added to its own, does not",
        ),
        ({"wa": {"k": 2}, "wb": {"k": 2}}, "can share a decoder with fold encode and k = 1 only"),
        ({"wa": {"j": 25}, "wb": {"j": 25}}, "cannot have rank j = 25: choose one between 1 and 24"),
        ({"budget": "latency"}, "The plan shares decoders, and the budget latency does not count them"),
        ({"factors": "weights"}, "needs moments of the sums and of their inputs: pass --calibration"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path, changes, message):
    with pytest.raises(PlanError, match=message):
        edited(tmp_path, **changes)


def test_an_excluded_layer_stays():
    proto, result = summed("three", exclude=["wb"], ratio=0.605)
    ways = {choice.layer: choice.option.lowering for choice in result.plan.choices}
    assert ways == {"wa": "summed", "wc": "summed"}
    stored = {t.name: numpy_helper.to_array(t) for t in result.model.proto.graph.initializer}
    np.testing.assert_array_equal(stored["wb"], weights("three")["wb"])
    x = inputs("three", seed=2)
    assert distance(run(proto, x=x), run(result.model.proto, x=x)) < 1e-5


BOTH = """g (float[N,32] x) => (float[N,24] y) {
    p = MatMul (x, wp) q = MatMul (x, wq) t = Tanh (p) u = Tanh (q)
    a = MatMul (t, wa) b = MatMul (u, wb) s = Add (a, b) y = Tanh (s) }"""


def both(**options):
    """Two layers share an encoder and two others a decoder: no other plan for the ratio is exact."""
    rng = np.random.default_rng(9)
    rows = rng.standard_normal((CHANNELS, RANK)) / CHANNELS**0.5
    known = weights("plain")
    for name in ("wp", "wq"):
        known[name] = (rows @ rng.standard_normal((RANK, CHANNELS)) / RANK**0.5).astype(np.float32)
    proto = model(BOTH, **known)
    return summed("plain", proto, (RANK * (5 * CHANNELS + FEATURES) + 1) / elements(proto), **options)


@pytest.mark.parametrize("recover", [True, False])
def test_layers_share_encoders_and_decoders_in_one_plan(tmp_path, recover):
    proto, result = both(recover=recover)
    ways = {c.layer: (c.option.lowering, c.option.encoder, c.option.j) for c in result.plan.choices}
    shared, added = ("shared", "wp", RANK), ("summed", "", RANK)
    assert ways == {"wp": shared, "wq": shared, "wa": added, "wb": added}
    x = inputs("plain", seed=2)
    assert distance(run(proto, x=x), run(result.model.proto, x=x)) < 1e-5
    onnx.checker.check_model(result.model.proto, full_check=True)
    assert result.report.totals.amount("params").after == elements(result.model.proto)
    factors = ["wp_encoder", "wp_decoder", "wq_decoder", "wa_encoder", "wa_decoder", "wb_encoder"]
    assert [tensor.name for tensor in result.model.proto.graph.initializer] == factors
    assert [row.joined for row in result.report.layers] == [("wp", "wq")] * 2 + [("wa", "wb")] * 2
    result.save_plan(tmp_path / "plan.json")
    again = compress(proto, plan=tmp_path / "plan.json", calibration=source("plain"))
    assert again.plan == result.plan
    assert again.model.proto.SerializeToString() == result.model.proto.SerializeToString()


@pytest.mark.parametrize(
    ("excluded", "way", "params"),
    [
        ("wq", "summed", CHANNELS**2 + RANK * (4 * CHANNELS + FEATURES)),
        ("wb", "shared", CHANNELS * FEATURES + RANK * (4 * CHANNELS + FEATURES)),
    ],
)
def test_an_excluded_layer_leaves_the_other_kind_of_sharing(excluded, way, params):
    proto, _ = both()
    _, result = summed("plain", proto, (params + 1) / elements(proto), exclude=[excluded])
    ways = [choice.option.lowering for choice in result.plan.choices if choice.option is not None]
    assert ways.count(way) == 2
    assert {"summed", "shared"} & set(ways) == {way}


def test_the_report_names_the_layers_that_share():
    _, result = summed()
    layers = result.report.layers
    assert {row.full_rank for row in layers} == {FEATURES}
    assert [row.params.after for row in layers] == [RANK * (CHANNELS + FEATURES), RANK * CHANNELS]
    assert {row.joined for row in layers} == {("wa", "wb")}
    assert [row["joined"] for row in json.loads(result.report.to_json())["layers"]] == [["wa", "wb"]] * 2
    console = Console(width=160, record=True, file=StringIO())
    show(result.report, console)
    text = console.export_text()
    assert re.search(rf"summed\s+1\s+{RANK} of {FEATURES}", text)
    assert "summed: one decoder for all of wa, wb." in text


def test_the_certificate_is_that_of_the_stored_factors():
    proto, result = summed("plain", model(PLAIN, **noisy("plain")), recover=False)
    stored = {t.name: numpy_helper.to_array(t) for t in result.model.proto.graph.initializer}
    known = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    (decoder,) = (value for name, value in stored.items() if "decoder" in name)
    for row in result.report.layers:
        weight = known[row.id].astype(float)
        product = stored[f"{row.id}_encoder"].astype(float) @ decoder.astype(float)
        bound = np.linalg.norm(weight - product, 2) / np.linalg.norm(weight, 2)
        assert bound <= row.certificate.spectral[0] <= bound * (1 + 1e-6) + 1e-9


def test_float16_layers_whose_sum_alone_overflows_are_compressed():
    """The model adds what keeps the sum small between both layers."""
    rng, large = np.random.default_rng(0), np.full(24, 40000, np.float16)
    body = """g (float16[N,32] x) => (float16[N,24] y) { t = Tanh (x)
        a = Gemm (x, wa, ba) b = Gemm (t, wb, bb) r0 = Add (a, r) y = Add (r0, b) }"""
    matrices = {name: (rng.standard_normal((32, 24)) / 6).astype(np.float16) for name in ("wa", "wb")}
    proto = model(body, **matrices, ba=large, bb=large, r=-large)
    data = {"x": rng.standard_normal((500, 32)).astype(np.float16)}
    with compress(proto, 0.6, calibration=data, recipe="activation") as result:
        assert result.report.totals.amount("params").ratio <= 0.6
    small = {"ba": large / 2, "bb": large / 2 - 10000, "r": -large}
    for biases, addends in (({"ba": large, "bb": large, "r": -large}, ()), (small, ("wa", "wb"))):
        found = seen(model(body, **matrices, **biases))
        assert [layer.addends for layer in found.layers] == [addends, addends]
