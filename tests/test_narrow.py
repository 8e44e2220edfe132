"""Narrowed pairs of layers in whole models: redundant hidden channels go, and nothing is added."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibrating import run
from onnx_lowrank import PlanError, compress
from onnx_lowrank.calibrate import sensitivity
from rewriting import DTYPES, model

FEATURES, HIDDEN, COPIES = 24, 20, 60

MLP = """g (float[N,24] x) => (float[N,24] y) {
    h = MatMul (x, up) b = Add (h, bias) a = Relu (b) d = MatMul (a, down) y = Add (d, last) }"""
GATED = """g (float[N,24] x) => (float[N,24] y) {
    h = MatMul (x, gate) s = Sigmoid (h) g0 = Mul (h, s)
    u = MatMul (x, up) a = Mul (g0, u) y = MatMul (a, down) }"""
GEMM = """g (float[N,24] x) => (float[N,24] y) {
    h = Gemm <transB = 1> (x, up, bias) a = Relu (h) y = Gemm <alpha = 0.5, beta = 2.0> (a, down, last) }"""
LEFT = """g (float[24,N] x) => (float[24,N] y) {
    h = MatMul (up, x) b = Add (h, bias) a = Relu (b) y = MatMul (down, a) }"""
CONV = """g (float[N,8,6,6] x) => (float[N,8,6,6] y) {
    h = Conv <pads = [1,1,1,1]> (x, up, bias) n = BatchNormalization (h, s, bias, m, v) a = Relu (n)
    c = Conv <pads = [1,1,1,1]> (a, down) y = BatchNormalization (c, t, o, o, t) }"""


def copied(array, axis):
    """The array with every channel three times, in another order."""
    order = np.random.default_rng(5).permutation(COPIES)
    return np.concatenate([array] * 3, axis=axis).take(order, axis)


def weights(kind, dtype=np.float32):
    """Weights whose 60 hidden channels are 20 different ones."""
    rng = np.random.default_rng(3)

    def draw(*shape):
        return rng.standard_normal(shape) / 4

    up, bias = copied(draw(FEATURES, HIDDEN), 1), copied(draw(HIDDEN), 0)
    down, last = draw(COPIES, FEATURES), draw(FEATURES)
    made = {
        "mlp": {"up": up, "bias": bias, "down": down, "last": last},
        "gated": {"gate": copied(draw(FEATURES, HIDDEN), 1), "up": up, "down": down},
        "gemm": {"up": up.T, "bias": bias, "down": down, "last": last},
        "left": {"up": up.T, "bias": bias[:, None], "down": down.T},
        "conv": {
            "up": copied(draw(HIDDEN, 8, 3, 3), 0),
            "bias": bias,
            "down": draw(8, COPIES, 3, 3),
            "s": bias + 1,
            "m": bias,
            "v": bias**2 + 1,
            "t": np.ones(8),
            "o": np.zeros(8),
        },
    }[kind]
    return {name: value.astype(dtype) for name, value in made.items()}


BODIES = {"mlp": MLP, "gated": GATED, "gemm": GEMM, "left": LEFT, "conv": CONV}


def inputs(kind, number=4000, seed=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shape = {"conv": (number // 10, 8, 6, 6), "left": (FEATURES, number)}.get(kind, (number, FEATURES))
    return rng.standard_normal(shape).astype(dtype)


def narrowed(kind, ratio=0.4, recipe="activation", proto=None, **options):
    proto = proto or model(BODIES[kind], **weights(kind))
    data = inputs(kind)
    source = [{"x": part} for part in np.array_split(data, 40, axis=1)] if kind == "left" else {"x": data}
    return proto, compress(proto, ratio, recipe=recipe, calibration=source, **options)


def choice(result, layer):
    return next(choice for choice in result.plan.choices if choice.layer == layer)


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("recover", [True, False])
def test_redundant_channels_go_without_loss(kind, recover):
    proto, result = narrowed(kind, recover=recover)
    option = choice(result, "down").option
    assert option.lowering == "narrow"
    assert option.j >= HIDDEN
    x = inputs(kind, seed=2)
    wanted, given = run(proto, x=x), run(result.model.proto, x=x)
    assert np.linalg.norm(given - wanted) < 3e-2 * np.linalg.norm(wanted)
    types = [node.op_type for node in proto.graph.node if node.op_type != "BatchNormalization"]
    assert [n.op_type for n in result.model.proto.graph.node if n.op_type != "BatchNormalization"] == types
    assert result.report.reached <= 0.4
    onnx.checker.check_model(result.model.proto, full_check=True)


def test_the_effect_of_a_layer_that_can_only_be_narrowed_is_measured(monkeypatch):
    """Every chain of rank 8 costs more than the weight with 4 features, but fewer channels cost less."""
    arrays = weights("mlp")
    arrays |= {"down": arrays["down"][:, :4], "last": arrays["last"][:4]}
    probed, original = [], sensitivity.measure

    def recorded(model, walk, bindings, *args, **options):
        probed.extend(binding.layer.id for binding in bindings)
        return original(model, walk, bindings, *args, **options)

    monkeypatch.setattr(sensitivity, "measure", recorded)
    proto = model(MLP.replace("[N,24] y", "[N,4] y"), **arrays)
    _, result = narrowed("mlp", 0.5, recipe="output", proto=proto, align=8)
    assert "down" in probed
    assert choice(result, "down").option.lowering == "narrow"


def test_every_stored_shape_is_narrow():
    _, result = narrowed("conv")
    width = choice(result, "down").option.j
    shapes = sorted(tuple(t.dims) for t in result.model.proto.graph.initializer if len(t.dims) == 4)
    assert shapes == sorted([(width, 8, 3, 3), (8, width, 3, 3)])
    assert sum(tuple(t.dims) == (width,) for t in result.model.proto.graph.initializer) == 4
    assert not any(COPIES in t.dims for t in result.model.proto.graph.initializer)


def test_shapes_that_the_model_states_for_hidden_activations_go():
    proto = onnx.shape_inference.infer_shapes(model(MLP, **weights("mlp")))
    assert {"h", "b", "a"} <= {value.name for value in proto.graph.value_info}
    _, result = narrowed("mlp", proto=proto)
    assert not {"h", "b", "a"} & {value.name for value in result.model.proto.graph.value_info}
    onnx.checker.check_model(result.model.proto, full_check=True)


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_types_are_narrowed(dtype):
    kind = DTYPES[dtype]
    text = MLP.replace("float[", f"{dtype}[")
    proto = model(text, **weights("mlp", kind))
    result = compress(proto, 0.4, recipe="activation", calibration={"x": inputs("mlp", dtype=kind)})
    assert choice(result, "down").option.lowering == "narrow"
    assert {t.data_type for t in result.model.proto.graph.initializer} == {
        onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    }
    x = inputs("mlp", seed=2, dtype=kind)
    wanted, given = run(proto, x=x), run(result.model.proto, x=x)
    assert np.linalg.norm(given - wanted) < 3e-2 * np.linalg.norm(wanted)


def test_a_constant_that_others_read_stays_for_them():
    body = MLP.replace(
        "y = Add (d, last)", "o = MatMul (x, wide) w = Add (o, bias) q = MatMul (w, down2) y = Add (d, q)"
    )
    rng = np.random.default_rng(9)
    extra = {"wide": (FEATURES, COPIES), "down2": (COPIES, FEATURES)}
    extra = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in extra.items()}
    known = weights("mlp")
    known.pop("last")
    proto = model(body, **known, **extra)
    result = compress(
        proto, 0.75, recipe="activation", calibration={"x": inputs("mlp")}, exclude=("wide", "down2")
    )
    assert choice(result, "down").option.lowering == "narrow"
    assert "bias" in {t.name for t in result.model.proto.graph.initializer}
    x = inputs("mlp", seed=2)
    wanted, given = run(proto, x=x), run(result.model.proto, x=x)
    assert np.linalg.norm(given - wanted) < 3e-2 * np.linalg.norm(wanted)


def test_a_narrow_plan_is_replayed_to_the_same_bytes(tmp_path):
    proto, first = narrowed("gated")
    first.save_plan(tmp_path / "plan.json")
    again = compress(proto, plan=tmp_path / "plan.json", calibration={"x": inputs("gated")})
    assert again.model.proto.SerializeToString() == first.model.proto.SerializeToString()
    assert again.plan == first.plan


def edited(tmp_path, **changes):
    """Replay the plan of `mlp` with changes of its rows, by layer."""
    proto, result = narrowed("mlp")
    result.save_plan(tmp_path / "plan.json")
    table = json.loads((tmp_path / "plan.json").read_text())
    for row in table["layers"]:
        row.update(changes.get(row["id"], {}))
    (tmp_path / "plan.json").write_text(json.dumps(table))
    return compress(proto, plan=tmp_path / "plan.json", calibration={"x": inputs("mlp")})


def test_an_edited_width_is_kept(tmp_path):
    result = edited(tmp_path, down={"j": 33})
    assert (33, FEATURES) in {tuple(t.dims) for t in result.model.proto.graph.initializer}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down": {"j": 60}}, "cannot keep j = 60 channels: choose a number between 1 and 59"),
        ({"down": {"k": 2}}, "can be narrowed with fold encode and k = 1 only"),
        ({"up": {"fold": "encode", "k": 1, "j": 4}}, "narrows 'down' and decomposes 'up'"),
        (
            {"up": {"fold": "encode", "k": 1, "j": 4, "lowering": "narrow"}},
            "'up' cannot be lowered as narrow: choose one of native",
        ),
    ],
)
def test_a_wrong_narrow_plan_is_refused(tmp_path, changes, message):
    with pytest.raises(PlanError, match=message):
        edited(tmp_path, **changes)


def test_the_report_shows_both_layers(tmp_path):
    _, result = narrowed("mlp")
    rows = {row.id: row for row in result.report.layers}
    width = choice(result, "down").option.j
    assert (rows["down"].params.before, rows["down"].params.after) == (COPIES * FEATURES, width * FEATURES)
    assert (rows["up"].params.before, rows["up"].params.after) == (COPIES * FEATURES, width * FEATURES)
    assert rows["down"].full_rank == COPIES
    assert rows["up"].reason == f"narrowed to {width} channels with down"
    assert "narrow" in str(result.report)


def test_the_certificate_bounds_the_refitted_weight():
    known = weights("mlp")
    # Copies that differ a little, so that the columns that stay tell their numbers.
    known["up"] += np.random.default_rng(8).standard_normal(known["up"].shape).astype(np.float32) / 1000
    _, result = narrowed("mlp", proto=model(MLP, **known), recover=False)
    width = choice(result, "down").option.j
    stored = {t.name: numpy_helper.to_array(t) for t in result.model.proto.graph.initializer}
    refitted = next(value for value in stored.values() if value.shape == (width, FEATURES))
    up = next(value for value in stored.values() if value.shape == (FEATURES, width))
    kept = [int(np.flatnonzero((known["up"] == column[:, None]).all(axis=0)).item()) for column in up.T]
    assert kept == sorted(set(kept))
    made = np.zeros((COPIES, FEATURES))
    made[kept] = refitted
    lost = known["down"].astype(np.float64) - made
    (certificate,) = (row.certificate for row in result.report.layers if row.id == "down")
    for order, bounds in ((2, certificate.spectral), ("fro", certificate.frobenius)):
        error = np.linalg.norm(lost, order) / np.linalg.norm(known["down"].astype(np.float64), order)
        assert error <= bounds[0] <= 1.001 * error


def test_macs_fall_with_the_width_and_data_free_recipes_do_not_narrow():
    _, result = narrowed("mlp", budget="macs", input_shape={"x": (4, FEATURES)})
    assert choice(result, "down").option.lowering == "narrow"
    assert result.report.totals.amount("macs").after <= 0.4 * result.report.totals.amount("macs").before
    free = compress(model(MLP, **weights("mlp")), 0.6)
    assert all(c.option is None or c.option.lowering != "narrow" for c in free.plan.choices)
