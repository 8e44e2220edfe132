"""Hidden channels of images in whole models: the operators between are narrowed, too, and counted exactly."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibrating import run
from onnx_lowrank import compress
from onnx_lowrank.budgets import registry
from onnx_lowrank.budgets.macs import model_macs
from onnx_lowrank.files.load import load
from onnx_lowrank.graph.parameters import parameters
from onnx_lowrank.layers.found import find_layers
from rewriting import DTYPES, model

DIFFERENT, COPIES = 8, 24
SHAPES = {"x": (2, 8, 6, 6)}
ORDER = np.random.default_rng(5).permutation(COPIES)

RESIDUAL = """m = BatchNormalization (h, s, b, b, v) n = Clip (m)
    c = Conv <group = 24, pads = [1,1,1,1]> (n, dw, b) o = BatchNormalization (c, s, b, b, v) a = Clip (o)"""
BETWEEN = {
    "inverted residual": RESIDUAL,
    "transposed": "n = Relu (h) a = ConvTranspose <group = 24, strides = [2,2]> (n, dw)",
    "strided twice": """c = Conv <group = 24, strides = [2,1]> (h, dw) n = Relu (c)
        a = Conv <group = 24, auto_pad = "SAME_UPPER", strides = [2,2]> (n, dw)""",
    "pools": """n = Sigmoid (h) p = MaxPool <kernel_shape = [2,2]> (n)
        a = AveragePool <kernel_shape = [2,2]> (p)""",
    "norm of a window": "n = Relu (h) a = LpPool <kernel_shape = [2,2]> (n)",
    "instance norm": "n = InstanceNormalization (h, s, b) a = Relu (n)",
    "padded and resized": """p = Pad <mode = "edge"> (h, edges) n = Tanh (p)
        a = Resize <mode = "linear"> (n, , scales)""",
    "columns": "n = PRelu (h, column) a = Mul (n, column)",
    "scaled by its mean": """n = Relu (h) m = ReduceMean <axes = [2,3]> (n) g = GlobalMaxPool (n)
        q = Add (m, g) a = Mul (n, q)""",
}


def copied(array):
    """The array with every channel three times, in another order."""
    return np.concatenate([array] * 3).take(ORDER, 0)


def weights(between, dtype=np.float32):
    """Weights whose 24 hidden channels are 8 different ones."""
    rng = np.random.default_rng(3)

    def draw(*shape):
        return rng.standard_normal(shape) / 4

    bias = copied(draw(DIFFERENT))
    made = {
        "up": copied(draw(DIFFERENT, 8, 1, 1)),
        "down": draw(8, COPIES, 1, 1),
        "dw": copied(draw(DIFFERENT, 1, 3, 3)),
        "b": bias,
        "s": bias + 1,
        "v": bias**2 + 1,
        "column": bias[:, None, None],
    }
    known = {name: value.astype(dtype) for name, value in made.items()}
    known["scales"] = np.array([1, 1, 2, 2], np.float32)
    known["edges"] = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    words = set(between.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return {name: value for name, value in known.items() if name in ("up", "down") or name in words}


def image(between, kind="float", last="Conv (a, down)", **options):
    text = f"g ({kind}[N,8,6,6] x) => ({kind}[] y) {{ h = Conv (x, up) {between} y = {last} }}"
    return model(text, **{**weights(between, DTYPES[kind]), **options})


def narrowed(proto, ratio=0.5, kind="float", number=100, **options):
    data = {"x": inputs(kind=kind, number=number)}
    return compress(proto, ratio, recipe="activation", calibration=data, input_shape=SHAPES, **options)


def inputs(seed=1, number=100, kind="float"):
    return np.random.default_rng(seed).standard_normal((number, 8, 6, 6)).astype(DTYPES[kind])


def choice(result, layer="down"):
    return next(choice for choice in result.plan.choices if choice.layer == layer)


def assert_close(proto, result, kind="float", tolerance=3e-2):
    x = inputs(2, kind=kind)
    wanted, given = (run(each, x=x).astype(np.float64) for each in (proto, result.model.proto))
    assert np.linalg.norm(given - wanted) < tolerance * np.linalg.norm(wanted)


def assert_counted(proto, result, budget):
    """The plan predicts the cost of the written model."""
    found, written = (find_layers(load(each), SHAPES, (), ()) for each in (proto, result.model.proto))
    count = parameters(written.model) if budget == "params" else model_macs(written)
    assert registry.named(budget).on(found).of_model(result.plan.choices) == count


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_redundant_channels_go_without_loss_and_the_plan_counts_what_goes(between, budget):
    proto = image(between)
    result = narrowed(proto, budget=budget)
    assert choice(result).option.lowering == "narrow"
    assert DIFFERENT <= choice(result).option.j < COPIES
    assert_close(proto, result)
    onnx.checker.check_model(result.model.proto, full_check=True)
    assert result.report.reached <= 0.5
    assert_counted(proto, result, budget)


HEADS = {
    "flattened": "p = GlobalAveragePool (h) r = Relu (p) a = Flatten (r)",
    "reshaped": "p = GlobalAveragePool (h) t = Constant <value_ints = [0, -1]> () a = Reshape (p, t)",
    "reshaped to a stated width": """p = ReduceMean <axes = [-1,-2]> (h)
        t = Constant <value_ints = [-1, 24]> () a = Reshape (p, t)""",
    "squeezed": "p = GlobalMaxPool (h) t = Constant <value_ints = [2, 3]> () a = Squeeze (p, t)",
    "reduced": "q = Mul (h, column) r = Clip (q) a = ReduceMean <axes = [2,3], keepdims = 0> (r)",
}


@pytest.mark.parametrize("between", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_a_matrix_reads_the_channels_that_stay(between, budget):
    down = weights("")["down"].reshape(8, COPIES)
    proto = image(between, last="Gemm <transB = 1> (a, down)", down=down)
    # Every image is one vector here.
    result = narrowed(proto, budget=budget, number=2000)
    assert choice(result).option.lowering == "narrow"
    assert_close(proto, result)
    onnx.checker.check_model(result.model.proto, full_check=True)
    assert_counted(proto, result, budget)


@pytest.mark.parametrize("kind", ["float16", "float"])
def test_only_constants_and_groups_change(kind):
    proto = onnx.shape_inference.infer_shapes(image(RESIDUAL, kind))
    result = narrowed(proto, kind=kind, recover=False)
    width = choice(result).option.j
    assert_close(proto, result, kind)
    written = result.model.proto
    onnx.checker.check_model(written, full_check=True)
    # The consumer's node carries the option; all others stay but for their constants and the group.
    for old, new in zip(proto.graph.node, written.graph.node, strict=True):
        for index, name in enumerate(new.input):
            if name != old.input[index]:
                assert name.startswith(f"{old.input[index]}_narrow")
                old.input[index] = name
        for attribute in old.attribute:
            if attribute.name == "group":
                attribute.i = width
        assert (old.op_type, list(old.input), list(old.output), list(old.attribute)) == (
            new.op_type,
            list(new.input),
            list(new.output),
            list(new.attribute),
        )
    shapes = {tuple(t.dims) for t in written.graph.initializer}
    assert shapes == {(width, 8, 1, 1), (width,), (width, 1, 3, 3), (8, width, 1, 1)}
    assert {t.data_type for t in written.graph.initializer} == {proto.graph.initializer[0].data_type}
    assert not {"h", "m", "n", "c", "o", "a"} & {value.name for value in written.graph.value_info}
    # Every channel that stays is one of the old channels, in all constants alike.
    old, new = (
        {t.name: numpy_helper.to_array(t) for t in each.graph.initializer} for each in (proto, written)
    )
    kept = [int(np.flatnonzero((old["up"] == row).all(axis=(1, 2, 3)))[0]) for row in new["up_narrow"]]
    for name in ("dw", "b", "s", "v"):
        np.testing.assert_array_equal(new[f"{name}_narrow"], old[name][kept])


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_a_norm_behind_the_consumer_is_folded_and_counted(budget):
    ones = np.linspace(1, 2, 8, dtype=np.float32)
    extra = {name: ones + n for n, name in enumerate(("t", "p", "q", "r"))}
    proto = image(RESIDUAL, last="Conv (a, down) z = BatchNormalization (y, t, p, q, r)", **extra)
    proto.graph.output[0].name = "z"
    result = narrowed(proto, 0.6, budget=budget)
    assert choice(result).option.lowering == "narrow"
    assert_close(proto, result)
    assert_counted(proto, result, budget)
    rows = {row.id: row for row in result.report.layers}
    assert rows["down"].params.before == 8 * COPIES + 4 * 8
    assert rows["down"].params.after == 8 * choice(result).option.j + 8


def test_constants_that_others_read_stay_and_are_counted_twice():
    last = "Conv (a, down) u = Conv <group = 24> (w, dw) z = Add (u, column)"
    proto = image("n = Mul (h, column) a = Conv <group = 24> (n, dw)", last=last)
    proto.graph.input.add().CopyFrom(
        onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, ["N", COPIES, 3, 3])
    )
    proto.graph.output.add().CopyFrom(
        onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["N", COPIES, 1, 1])
    )
    data = {"x": inputs(), "w": np.ones((100, COPIES, 3, 3), np.float32)}
    result = compress(proto, 0.9, recipe="activation", calibration=data)
    assert choice(result).option.lowering == "narrow"
    assert {"dw", "column"} <= {tensor.name for tensor in result.model.proto.graph.initializer}
    assert_counted(proto, result, "params")


def test_initializers_that_are_inputs_go_too():
    proto = image(RESIDUAL, last="Conv (a, down)")
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tuple(tensor.dims))
        )
    result = narrowed(proto)
    assert choice(result).option.lowering == "narrow"
    assert [value.name for value in result.model.proto.graph.input] == ["x"]
    assert_close(proto, result)
    assert_counted(proto, result, "params")


def test_a_depthwise_convolution_that_is_narrowed_was_not_left_alone():
    proto = image(RESIDUAL)
    assert not narrowed(proto).report.skipped
    (skipped,) = narrowed(proto, 1.0).report.skipped
    assert (skipped.name, skipped.op) == ("c", "Conv")


def test_widths_fill_blocks():
    result = narrowed(image(RESIDUAL), 0.7, align=8)
    assert choice(result).option.lowering == "narrow"
    assert choice(result).option.j in (8, 16)


def test_a_plan_is_replayed_to_the_same_bytes_with_the_same_costs(tmp_path):
    proto = image(RESIDUAL)
    first = narrowed(proto)
    first.save_plan(tmp_path / "plan.json")
    again = compress(proto, plan=tmp_path / "plan.json", calibration={"x": inputs()})
    assert again.plan == first.plan
    assert again.model.proto.SerializeToString() == first.model.proto.SerializeToString()
    width = choice(first).option.j
    assert {c.layer: c.cost for c in first.plan.choices} == {"up": 8 * width, "down": 8 * width}


def test_constants_in_nodes_stay_in_nodes():
    proto = image(RESIDUAL)
    nodes = [
        onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in proto.graph.initializer
    ]
    del proto.graph.initializer[:]
    for node in nodes:
        proto.graph.node.insert(0, node)
    result = narrowed(proto)
    assert choice(result).option.lowering == "narrow"
    assert not result.model.proto.graph.initializer
    onnx.checker.check_model(result.model.proto, full_check=True)
    assert_close(proto, result)
    assert_counted(proto, result, "params")
