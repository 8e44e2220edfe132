"""What the files weigh when layers are narrowed together or share a factor."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import attending
import packing
import summing
from calibrating import seen
from onnx_lowrank import BudgetError, compress
from onnx_lowrank.budgets.bytes import BUDGET
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.layer import narrow_layers
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.core.plan import Choice, Plan
from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import find_layers
from rewriting import model

MLP = """g (float[N,48] x) => (float[N,48] y) {
    h = MatMul (x, up) b = Add (h, bias) a = Relu (b) d = MatMul (a, down) y = Add (d, last) }"""
GATED = """g (float[N,48] x) => (float[N,48] y) {
    h = Gemm <transB = 1> (x, gate) s = Sigmoid (h) u = Gemm <transB = 1> (x, up) a = Mul (s, u)
    y = Gemm <alpha = 0.5, beta = 2.0> (a, down, last) }"""
CONV = """g (float[N,12,6,6] x) => (float[N,12,6,6] y) {
    h = Conv <pads = [1,1,1,1]> (x, up, bias) n = BatchNormalization (h, s, bias, m, v) a = Relu (n)
    p = Conv <group = 150, pads = [1,1,1,1]> (a, depth) c = Conv <pads = [1,1,1,1]> (p, down)
    y = BatchNormalization (c, t, o, o, t) }"""
QKV = """g (float[N,96] x) => (float[N,64] y) {
    q = MatMul (x, wq) k = MatMul (x, wk) b = Add (k, bk) v = MatMul (x, wv)
    s = Mul (q, b) y = Add (s, v) }"""


MIXED = """g (float[N,{c}] x) => (float[N,{c}] y) {{
    n0 = MatMul (x, first) n = Tanh (n0) q0 = MatMul (n, wq) q = Tanh (q0) k0 = MatMul (n, wk) k = Tanh (k0)
    v0 = MatMul (n, wv) v = Tanh (v0) s0 = Mul (q, k) s = Add (s0, v) p0 = MatMul (s, last) p = Tanh (p0)
    h = MatMul (p, up) a = Relu (h) y = MatMul (a, down) }}"""


def drawn(**shapes):
    rng = np.random.default_rng(4)
    return {name: (rng.standard_normal(shape) / 7).astype(np.float32) for name, shape in shapes.items()}


def feed(*shape):
    return {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}


def mlp():
    """140 hidden channels, of which 35 are different."""
    made = drawn(up=(48, 35), bias=35, down=(140, 48), last=48)
    made["up"], made["bias"] = np.tile(made["up"], 4), np.tile(made["bias"], 4)
    return model(MLP, **made), feed(2000, 48)


def gated():
    made = drawn(gate=(40, 48), up=(40, 48), down=(160, 48), last=48)
    made |= {name: np.tile(made[name].T, 4).T for name in ("gate", "up")}
    return model(GATED, ir=10, **made), feed(2000, 48)


def conv():
    made = drawn(
        up=(50, 12, 3, 3), bias=50, s=50, m=50, v=50, depth=(50, 1, 3, 3), down=(12, 150, 3, 3), t=12, o=12
    )
    made |= {"v": made["v"] ** 2 + 1, "t": np.ones(12, np.float32)}
    made |= {n: np.concatenate([made[n]] * 3) for n in ("up", "bias", "s", "m", "v", "depth")}
    return model(CONV, **made), feed(100, 12, 6, 6)


def qkv():
    """Three layers with one row space of dimension 16."""
    rows, made = drawn(rows=(96, 16))["rows"], drawn(wq=(16, 64), wk=(16, 64), wv=(16, 64), bk=64)
    return model(QKV, **made | {n: rows @ made[n] for n in ("wq", "wk", "wv")}), feed(2000, 96)


def bert():
    return attending.bert(), attending.inputs()


def built_shapes():
    return attending.bert(attending.BUILT), attending.inputs()


def gqa():
    return model(
        attending.GQA, ir=10, **{n: v for n, v in attending.grouped().items() if n in attending.GQA}
    ), (attending.inputs())


def packed(form):
    return lambda: (packing.packed(form), attending.inputs())


def added():
    """Three layers, large enough, with one column space of dimension 16."""
    columns, made = drawn(columns=(16, 64))["columns"], drawn(wa=(96, 16), wb=(96, 16), wc=(96, 16), bb=64)
    body = summing.THREE.replace("32]", "96]").replace("24]", "64]")
    return model(body, **made | {n: made[n] @ columns for n in ("wa", "wb", "wc")}), feed(2000, 96)


MADE = {"mlp": mlp, "gated": gated, "conv": conv, "bert": bert, "shapes": built_shapes, "gqa": gqa}
MADE |= {form: packed(form) for form in packing.FORMS}


def saved(result, folder):
    """The bytes of all files of a result."""
    folder.mkdir(exist_ok=True)
    result.save(folder / "out.onnx")
    return sum(path.stat().st_size for path in folder.iterdir())


def external(proto, folder):
    """The model with its tensors in a data file."""
    folder.mkdir()
    stored = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 64}
    onnx.save(proto, folder / "in.onnx", **stored)
    return folder / "in.onnx"


def widths(layer):
    """The narrowest, a middle and the widest narrow option of a layer."""
    step = layer.width_step
    return sorted({step, layer.width // step // 2 * step or step, layer.width - step})


def plan_of(found, choices, *, recover=False):
    return Plan(
        model=found.model.sha256,
        recipe="activation",
        measure="activation",
        ratio=1.0,
        budget="bytes",
        choices=tuple(choices),
        factors=Fit.ACTIVATIONS,
        recover=recover,
    )


def follow(proto, choices, data):
    """Compress by choices."""
    return compress(proto, plan=plan_of(seen(proto), choices), calibration=data, device="cpu")


@pytest.mark.parametrize("name", MADE)
def test_the_line_of_a_narrow_layer_is_what_its_model_weighs(name, tmp_path):
    """Within the lengths of numbers and of messages, at all widths, and no less than the file."""
    proto, data = MADE[name]()
    found = seen(proto)
    meter, tried = BUDGET.on(found), 0
    for layer in (layer for layer in found.layers if layer.narrowing and not layer.narrowing.bound):
        tariff = meter.tariff(layer)
        for width in widths(layer):
            tried += 1
            option = Option(layer.narrow_fold, 1, width, Lowering.NARROW)
            choices = [Choice(each.id, option if each is layer else None, 0, 0.0) for each in found.layers]
            whole = meter.of_model(choices)
            linear = meter.total - tariff.keep + tariff.cost(option) + meter._shared
            assert whole - 16 <= linear <= whole + 64
            size = saved(follow(proto, choices, data), tmp_path / f"{layer.id}_{width}")
            assert whole - 700 <= size <= whole
    assert tried or name in packing.BOUND


@pytest.mark.parametrize("form", packing.FORMS)
def test_two_narrowings_of_a_packed_matrix_weigh_no_more_than_their_lines(form, tmp_path):
    proto, data = MADE[form]()
    found = seen(proto)
    meter = BUDGET.on(found)
    narrow = [layer for layer in found.layers if layer.narrowing]
    assert len(narrow) == 2
    options = {each.id: Option(each.narrow_fold, 1, each.width // 2, Lowering.NARROW) for each in narrow}
    choices = [Choice(each.id, options.get(each.id), 0, 0.0) for each in found.layers]
    whole, linear = meter.of_model(choices), meter.total + meter._shared
    linear += sum(meter.tariff(each).cost(options[each.id]) - meter.tariff(each).keep for each in narrow)
    # Numbers in shapes that both change count twice in the lines.
    assert whole - 16 <= linear <= whole + 400
    assert whole - 1200 <= saved(follow(proto, choices, data), tmp_path / "out") <= whole


@pytest.mark.parametrize("names", ["wq wk", "wk wv", "wq wv", "wq wk wv"])
def test_the_lines_of_layers_that_share_are_what_their_model_weighs(names, tmp_path):
    proto, data = qkv()
    found, names = seen(proto), names.split()
    meter = BUDGET.on(found)
    for j in (1, 20, 90):
        option = Option(found.layers[0].shared_fold, 1, j, Lowering.SHARED, names[0])
        choices = [Choice(each.id, option if each.id in names else None, 0, 0.0) for each in found.layers]
        whole, linear = meter.of_model(choices), meter.total + meter._shared
        for layer in (layer for layer in found.layers if layer.id in names):
            linear += meter.tariff(layer).cost(option) - meter.tariff(layer).keep
        assert whole - 16 <= linear <= whole + 64
        size = saved(follow(proto, choices, data), tmp_path / f"{j}")
        assert whole - 900 <= size <= whole


@pytest.mark.parametrize("kind", summing.BODIES)
def test_the_lines_of_layers_that_share_a_decoder_are_what_their_model_weighs(kind, tmp_path):
    proto = model(summing.BODIES[kind], **summing.weights(kind))
    found = seen(proto)
    meter = BUDGET.on(found)
    for j in (1, 7, 20):
        option = Option(found.layers[0].shared_fold, 1, j, Lowering.SUMMED)
        choices = [Choice(each.id, option, 0, 0.0) for each in found.layers]
        whole = meter.of_model(choices)
        linear = meter.total + meter._shared
        linear += sum(meter.tariff(each).cost(option) - meter.tariff(each).keep for each in found.layers)
        assert whole - 16 <= linear <= whole + 64
        size = saved(follow(proto, choices, summing.source(kind)), tmp_path / f"{j}")
        assert whole - 900 <= size <= whole


RATIOS = [
    ("mlp", 0.45, "narrow"),
    ("gated", 0.45, "narrow"),
    ("conv", 0.45, "narrow"),
    ("qkv", 0.35, "shared"),
    ("added", 0.3, "summed"),
]
"""The padding between the tensors of a data file would weigh more than what smaller models save."""


@pytest.mark.parametrize("recover", [True, False])
@pytest.mark.parametrize(
    ("is_external", "name", "ratio", "way"),
    [
        *((is_external, *each) for is_external in (False, True) for each in RATIOS),
        (False, "bert", 0.85, "narrow"),
        (False, "gqa", 0.85, "narrow"),
    ],
)
def test_files_keep_to_the_ratio(name, ratio, way, recover, is_external, tmp_path):
    proto, data = {**MADE, "qkv": qkv, "added": added}[name]()
    given = external(proto, tmp_path / "in") if is_external else proto
    options = {"budget": "bytes", "recipe": "activation", "calibration": data, "device": "cpu"}
    planned = compress(given, ratio, dry_run=True, recover=recover, **options).report.totals.amount("bytes")
    with compress(given, ratio, recover=recover, **options) as result:
        assert way in {choice.option.lowering for choice in result.plan.choices if choice.option}
        size = saved(result, tmp_path / "out")
        assert size <= result.report.totals.amount("bytes").after <= planned.after <= ratio * planned.before
        files = sum(path.stat().st_size for path in (tmp_path / "in").iterdir()) if is_external else 0
        assert planned.before == (files or len(proto.SerializeToString()))
        result.save_plan(tmp_path / "plan.json")
    with compress(given, plan=tmp_path / "plan.json", calibration=data, device="cpu") as again:
        assert again.plan == result.plan


@pytest.mark.parametrize("recover", [True, False])
@pytest.mark.parametrize(("c", "f", "hidden"), [(237, 287, 240), (184, 137, 311)])
def test_the_padding_of_a_data_file_does_not_depend_on_the_order_of_the_work(c, f, hidden, recover, tmp_path):
    """Layers that share are made after the others without recovery, but their tensors stay in graph order."""
    made = drawn(first=(c, c), wq=(c, f), wk=(c, f), wv=(c, f), last=(f, c), up=(c, hidden), down=(hidden, c))
    given = external(model(MIXED.format(c=c), **made), tmp_path / "in")
    found = find_layers(load(given), {}, (), ())
    shared, native = Option(Fold.ENCODE, 1, 7, Lowering.SHARED, "wk"), Option(Fold.ENCODE, 1, 3)
    narrow = Option(found.layers[-1].narrow_fold, 1, 100, Lowering.NARROW)
    options = {"first": native, "wq": native, "wk": shared, "wv": shared, "last": native, "down": narrow}
    choices = [Choice(each.id, options.get(each.id), 0, 0.0) for each in found.layers]
    plan = plan_of(found, choices, recover=recover)
    with compress(given, plan=plan, calibration=feed(400, c), device="cpu") as result:
        size = saved(result, tmp_path / "out")
        # Every reference to the data file counts with the longest name.
        named = len(result.proto.graph.initializer) * (255 - len(f"out.onnx.{16 * 'x'}.data"))
        assert 0 <= BUDGET.on(found).of_model(choices) - size - named <= 600


def test_the_smallest_ratio_is_reached(tmp_path):
    for name in ("mlp", "conv", "qkv", "added"):
        proto, data = {**MADE, "qkv": qkv, "added": added}[name]()
        options = {"budget": "bytes", "recipe": "activation", "calibration": data, "device": "cpu"}
        with pytest.raises(BudgetError) as caught:
            compress(proto, 0.01, **options)
        result = compress(proto, caught.value.smallest_ratio, **options)
        size = saved(result, tmp_path / name)
        assert size <= caught.value.smallest_ratio * len(proto.SerializeToString())


def test_a_narrowed_layer_costs_its_smaller_weight():
    found = seen(mlp()[0])
    meter, (up, down) = BUDGET.on(found), found.layers
    narrow = narrow_layers([(up, None), (down, Option(down.narrow_fold, 1, 10, Lowering.NARROW))])
    assert meter.tariff(up).keep - meter.tariff(narrow["up"]).keep == 4 * 48 * 130
    assert meter.tariff(down).keep - meter.tariff(narrow["down"]).keep == 4 * 48 * 130
