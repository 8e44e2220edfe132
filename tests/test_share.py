"""Shared encoders in whole models: layers with one row space get one encoder, and outputs stay."""

from __future__ import annotations

import json
import re
from io import StringIO

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console

from calibrating import run
from editing import edited_plan
from onnx_lowrank import PlanError, compress
from onnx_lowrank.documents import recipes
from onnx_lowrank.report.terminal import show
from rewriting import DTYPES, model

CHANNELS, FEATURES, RANK = 32, 24, 9

ATTENTION = """g (float[N,32] x) => (float[N,24] y) {
    q = MatMul (x, wq) k = MatMul (x, wk) b = Add (k, bk) v = MatMul (x, wv)
    s = Mul (q, b) y = Add (s, v) }"""
GEMM = """g (float[N,32] x) => (float[N,24] y) {
    q = Gemm <transB = 1> (x, wq) k = Gemm <beta = 2.0> (x, wk, bk) v = Gemm (x, wv)
    s = Mul (q, k) y = Add (s, v) }"""
TURNED = """g (float[32,N] x) => (float[N,24] y) {
    q = Gemm <transA = 1, transB = 1> (x, wq) k = Gemm <transA = 1> (x, wk, bk) v = Gemm <transA = 1> (x, wv)
    s = Mul (q, k) y = Add (s, v) }"""
LEFT = """g (float[32,N] x) => (float[24,N] y) {
    q = MatMul (wq, x) k = MatMul (wk, x) b = Add (k, bk) v = MatMul (wv, x)
    s = Mul (q, b) y = Add (s, v) }"""
CONV = """g (float[N,8,6,6] x) => (float[N,24,3,3] y) {
    q = Conv <pads = [1,1,1,1], strides = [2,2]> (x, wq)
    k = Conv <pads = [1,1,1,1], strides = [2,2]> (x, wk, bk)
    v = Conv <pads = [1,1,1,1], strides = [2,2]> (x, wv)
    n = BatchNormalization (v, one, bk, bk, one) s = Mul (q, k) y = Add (s, n) }"""
BODIES = {"attention": ATTENTION, "gemm": GEMM, "turned": TURNED, "left": LEFT, "conv": CONV}
WEIGHTS = ("wq", "wk", "wv")


def weights(kind, dtype=np.float32):
    """Three weights whose rows lie in one space of dimension 9, and a bias."""
    rng = np.random.default_rng(3)
    length = 8 * 9 if kind == "conv" else CHANNELS
    rows = rng.standard_normal((RANK, length)) / length**0.5
    made = {}
    for name, scale in zip(WEIGHTS, (1.0, 3.0, 0.3), strict=True):
        matrix = scale * rng.standard_normal((FEATURES, RANK)) @ rows
        is_turned = kind == "attention" or (kind in ("gemm", "turned") and name != "wq")
        made[name] = matrix.T if is_turned else matrix
        if kind == "conv":
            made[name] = matrix.reshape(FEATURES, 8, 3, 3)
    made["bk"] = rng.standard_normal((FEATURES, 1) if kind == "left" else FEATURES)
    if kind == "conv":
        made["one"] = np.ones(FEATURES)
    return {name: value.astype(dtype) for name, value in made.items()}


def inputs(kind, number=2000, seed=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shape = {"conv": (number // 10, 8, 6, 6), "left": (CHANNELS, number), "turned": (CHANNELS, number)}
    return rng.standard_normal(shape.get(kind, (number, CHANNELS))).astype(dtype)


def source(kind):
    data = inputs(kind)
    columns = kind in ("left", "turned")
    return [{"x": part} for part in np.array_split(data, 40, axis=1)] if columns else {"x": data}


def shared(kind="attention", ratio=None, recipe="activation", **options):
    """Compress a model so far that all three layers have to share."""
    proto = model(BODIES[kind], **weights(kind))
    ratio = ratio or (0.3 if kind == "conv" else 0.45)
    if kind == "conv":
        options = {"align": 1} | options  # the rank 9 is not in ONNX Runtime's layout
    return proto, compress(proto, ratio, recipe=recipe, calibration=source(kind), **options)


def distance(wanted, given):
    return np.linalg.norm(given.astype(float) - wanted) / np.linalg.norm(wanted.astype(float))


def names(result):
    return [(node.op_type, node.name) for node in result.model.proto.graph.node]


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("recover", [True, False])
def test_one_row_space_needs_one_encoder(kind, recover):
    proto, result = shared(kind, recover=recover)
    options = {choice.option for choice in result.plan.choices}
    (option,) = options
    assert (option.lowering, option.j) == ("shared", RANK)
    x = inputs(kind, seed=2)
    assert distance(run(proto, x=x), run(result.model.proto, x=x)) < 1e-5
    onnx.checker.check_model(result.model.proto, full_check=True)
    stored = [t.name for t in result.model.proto.graph.initializer]
    assert sum("encoder" in name for name in stored) == 1
    assert sum("decoder" in name for name in stored) == 3
    assert sum("encoder" in name for _, name in names(result)) == 1
    assert sum("decoder" in name for _, name in names(result)) + sum(
        name in ("q", "k", "v") for _, name in names(result)
    ) == len(WEIGHTS)


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("kind", ["attention", "conv"])
def test_the_sums_are_those_of_the_model(kind, budget):
    shape = {"x": (4, 8, 6, 6) if kind == "conv" else (4, CHANNELS)}
    _, result = shared(kind, budget=budget, input_shape=shape)
    assert {choice.option.lowering for choice in result.plan.choices} == {"shared"}
    stored = sum(numpy_helper.to_array(t).size for t in result.model.proto.graph.initializer)
    assert result.report.totals.amount("params").after == stored
    length = 8 * 9 if kind == "conv" else CHANNELS
    evaluations = 4 * (9 if kind == "conv" else 1)
    assert result.report.totals.amount("macs").after == evaluations * RANK * (length + 3 * FEATURES)
    assert sum(row.macs.after for row in result.report.layers) == result.report.totals.amount("macs").after


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_types_share_too(dtype):
    kind = DTYPES[dtype]
    proto = model(ATTENTION.replace("float[", f"{dtype}["), **weights("attention", kind))
    result = compress(proto, 0.45, recipe="activation", calibration={"x": inputs("attention", dtype=kind)})
    assert {choice.option.lowering for choice in result.plan.choices} == {"shared"}
    assert {t.data_type for t in result.model.proto.graph.initializer} == {
        onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    }
    x = inputs("attention", seed=2, dtype=kind)
    assert distance(run(proto, x=x), run(result.model.proto, x=x)) < (1e-2 if dtype == "float16" else 1e-12)


def test_before_ir_4_the_encoder_is_a_constant_in_front_of_its_node():
    proto = model(ATTENTION, ir=3, opset=9, **weights("attention"))
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in proto.graph.initializer
    )
    result = compress(proto, 0.45, recipe="activation", calibration={"x": inputs("attention")})
    assert {choice.option.lowering for choice in result.plan.choices} == {"shared"}
    onnx.checker.check_model(result.model.proto, full_check=True)
    x = inputs("attention", seed=2)
    assert distance(run(proto, x=x), run(result.model.proto, x=x)) < 1e-5


def test_recovery_fits_decoders_to_what_the_layers_before_make():
    body = """g (float[N,32] x) => (float[N,24] y) { h0 = MatMul (x, first) h = Tanh (h0)
        q = MatMul (h, wq) k = MatMul (h, wk) b = Add (k, bk) v = MatMul (h, wv)
        s = Mul (q, b) y = Add (s, v) }"""
    rng = np.random.default_rng(8)
    first = rng.standard_normal((CHANNELS, 20)) @ rng.standard_normal((20, CHANNELS)) / 25
    first += 0.04 * rng.standard_normal((CHANNELS, CHANNELS))
    proto = model(body, first=first.astype(np.float32), **weights("attention"))
    found = {}
    for recover in (False, True):
        result = compress(
            proto, 0.4, recipe="activation", calibration={"x": inputs("attention")}, recover=recover
        )
        assert sum(c.option is not None and c.option.lowering == "shared" for c in result.plan.choices) == 3
        stored = [t.name for t in result.model.proto.graph.initializer]
        assert sum(name.startswith("w") and "encoder" in name for name in stored) == 1
        x = inputs("attention", seed=2)
        found[recover] = distance(run(proto, x=x), run(result.model.proto, x=x))
    assert found[True] <= found[False] * 1.01


@pytest.mark.parametrize("recover", [True, False])
def test_a_shared_plan_is_replayed_to_the_same_bytes(tmp_path, recover):
    proto, first = shared(recover=recover)
    first.save_plan(tmp_path / "plan.json")
    again = compress(proto, plan=tmp_path / "plan.json", calibration=source("attention"))
    assert again.model.proto.SerializeToString() == first.model.proto.SerializeToString()
    assert again.plan == first.plan


def edited(tmp_path, **changes):
    """Replay the plan of `attention` with changes of its rows, by layer, or of its other keys."""
    proto, result = shared(recover=False)
    shape = {"x": (4, CHANNELS)}
    plan = edited_plan(result, tmp_path, **changes)
    return compress(proto, plan=plan, calibration=source("attention"), input_shape=shape)


def rows(**values):
    """The same changes for all layers."""
    return dict.fromkeys(WEIGHTS, values)


def test_an_edited_rank_is_kept(tmp_path):
    result = edited(tmp_path, **rows(j=5))
    shapes = [tuple(t.dims) for t in result.model.proto.graph.initializer]
    assert shapes.count((CHANNELS, 5)) == 1
    assert shapes.count((5, FEATURES)) == 3


def test_some_layers_may_leave_the_group(tmp_path):
    result = edited(tmp_path, wk={"lowering": None})
    stored = {t.name: tuple(t.dims) for t in result.model.proto.graph.initializer}
    assert stored["wq_encoder"] == stored["wk_encoder"] == (CHANNELS, RANK)
    assert "wv_encoder" not in stored
    kept = edited(tmp_path, wv={"fold": None, "k": None, "j": None})
    stored = {t.name: tuple(t.dims) for t in kept.model.proto.graph.initializer}
    assert stored["wv"] == (CHANNELS, FEATURES)
    assert {"wq_encoder", "wq_decoder", "wk_decoder"} <= stored.keys()
    assert "wk_encoder" not in stored


def test_the_first_layer_may_leave_the_group(tmp_path):
    result = edited(tmp_path, wq={"lowering": None}, wk={"encoder": "wk"}, wv={"encoder": "wk"})
    stored = {t.name: tuple(t.dims) for t in result.model.proto.graph.initializer}
    assert stored["wq_encoder"] == stored["wk_encoder"] == (CHANNELS, RANK)
    assert "wv_encoder" not in stored
    assert result.report.totals.amount("params").after == FEATURES + sum(
        np.prod(stored[f"{name}_{role}"])
        for name, role in [("wq", "encoder"), ("wk", "encoder"), *((name, "decoder") for name in WEIGHTS)]
    )


@pytest.mark.parametrize("recover", [True, False])
@pytest.mark.parametrize("apart", WEIGHTS)
def test_a_plan_shares_among_those_that_are_alike(apart, recover):
    known = weights("attention")
    rng = np.random.default_rng(11)
    rows = rng.standard_normal((CHANNELS, RANK)) / 6
    known[apart] = (rows @ rng.standard_normal((RANK, FEATURES))).astype(np.float32)
    proto = model(ATTENTION, **known)
    data = {"x": inputs("attention")}
    result = compress(proto, 0.56, recipe="activation", calibration=data, recover=recover)
    ways = {choice.layer: choice.option.lowering for choice in result.plan.choices}
    assert ways == {name: "native" if name == apart else "shared" for name in WEIGHTS}
    assert {choice.option.j for choice in result.plan.choices} == {RANK}
    x = inputs("attention", seed=2)
    assert distance(run(proto, x=x), run(result.model.proto, x=x)) < 1e-5
    stored = sum(numpy_helper.to_array(t).size for t in result.model.proto.graph.initializer)
    assert result.report.totals.amount("params").after == stored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wk": {"j": 5}}, "'wq' shares an encoder with 'wk', whose option differs: give both the same"),
        (
            {"wq": {"lowering": None}},
            "'wk' has the encoder 'wq', and the first layer with it is 'wk': set encoder to 'wk' for all",
        ),
        ({"wq": {"fold": None, "k": None, "j": None}}, "the first layer with it is 'wk': set encoder to"),
        (
            {"wk": {"encoder": None}},
            "'wk' has no encoder, and the first layer with none is 'wk': set encoder to 'wk'",
        ),
        (rows(encoder="wk"), "'wq' has the encoder 'wk', and the first layer with it is 'wq'"),
        ({"wv": {"encoder": "wv"}}, "'wv' shares an encoder with no other layer"),
        ({"wk": {"lowering": None}, "wv": {"lowering": None}}, "'wq' shares an encoder with no other layer"),
        (rows(k=2), "can share an encoder with fold encode and k = 1 only"),
        (rows(j=33), "cannot have rank j = 33: choose one between 1 and 32"),
        ({"factors": "weights"}, "needs moments of their inputs: pass --calibration"),
    ],
)
def test_a_wrong_shared_plan_is_refused(tmp_path, changes, message):
    with pytest.raises(PlanError, match=message):
        edited(tmp_path, **changes)


def test_a_layer_without_siblings_cannot_share(tmp_path):
    body = "g (float[N,32] x) => (float[N,24] y) { y = MatMul (x, wq) }"
    proto = model(body, wq=weights("attention")["wq"])
    result = compress(proto, 0.9, recipe="activation", calibration={"x": inputs("attention")})
    result.save_plan(tmp_path / "plan.json")
    table = json.loads((tmp_path / "plan.json").read_text())
    table["layers"][0]["lowering"] = "shared"
    (tmp_path / "plan.json").write_text(json.dumps(table))
    with pytest.raises(PlanError, match="'wq' reads a tensor that no other layer reads so"):
        compress(proto, plan=tmp_path / "plan.json", calibration={"x": inputs("attention")})


def test_the_report_shows_that_an_encoder_is_shared():
    _, result = shared()
    layers = result.report.layers
    assert {row.full_rank for row in layers} == {CHANNELS}
    assert layers[0].params.after == RANK * (CHANNELS + FEATURES)
    assert layers[2].params.after == RANK * FEATURES
    console = Console(width=160, record=True, file=StringIO())
    show(result.report, console)
    assert re.search(rf"shared\s+1\s+{RANK} of {CHANNELS}", console.export_text())


def test_the_certificate_is_that_of_the_stored_factors():
    proto, result = shared(ratio=0.35, recover=False)
    stored = {t.name: numpy_helper.to_array(t) for t in result.model.proto.graph.initializer}
    known = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    (encoder,) = (value for name, value in stored.items() if "encoder" in name)
    for row in result.report.layers:
        weight = known[row.id].astype(float)
        product = encoder.astype(float) @ stored[f"{row.id}_decoder"].astype(float)
        bound = np.linalg.norm(weight - product, 2) / np.linalg.norm(weight, 2)
        assert bound <= row.certificate.spectral[0] <= bound * (1 + 1e-6) + 1e-9


def test_gate_and_up_may_share_or_be_narrowed():
    """Redundant hidden channels are dropped; without them, a common row space is shared."""
    body = """g (float[N,32] x) => (float[N,32] y) {
        h = MatMul (x, gate) s = Sigmoid (h) u = MatMul (x, up) a = Mul (s, u) y = MatMul (a, down) }"""
    rng = np.random.default_rng(6)
    order = rng.permutation(60)
    base = rng.standard_normal((2, CHANNELS, 20)) / 4
    copied = [np.concatenate([b] * 3, axis=1)[:, order] for b in base]
    rows = rng.standard_normal((CHANNELS, RANK)) / 4
    lying = [rows @ rng.standard_normal((RANK, 60)) / 3 for _ in range(2)]
    down = rng.standard_normal((60, CHANNELS)) / 4
    for (gate, up), way in ((copied, "narrow"), (lying, "shared")):
        made = {"gate": gate, "up": up, "down": down}
        proto = model(body, **{name: value.astype(np.float32) for name, value in made.items()})
        ratio = 0.4 if way == "narrow" else 0.6
        result = compress(proto, ratio, recipe="activation", calibration={"x": inputs("attention", 4000)})
        used = {c.option.lowering for c in result.plan.choices if c.option is not None}
        assert way in used
        x = inputs("attention", seed=2)
        assert distance(run(proto, x=x), run(result.model.proto, x=x)) < 3e-2


def test_recipes_without_share_do_not_share():
    recipe = recipes.load("activation")
    assert recipe.share
    proto = model(ATTENTION, **weights("attention"))
    for other in ("schatten", "pca"):
        source_ = None if other == "schatten" else {"x": inputs("attention")}
        result = compress(proto, 0.6, recipe=other, calibration=source_)
        assert all(c.option is None or c.option.lowering != "shared" for c in result.plan.choices)
