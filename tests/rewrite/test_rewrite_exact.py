"""A chain of full rank computes what its node did: every operator, dtype, fold and slice count."""
# ruff: noqa: E501 - tables of models, one a line

from __future__ import annotations

from math import prod

import numpy as np
import onnx
import pytest

from onnx_lowrank.budgets.params import parameters as cost
from onnx_lowrank.core.option import Lowering, Option
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.parameters import parameters
from onnx_lowrank.layers.bias import bias
from rewriting import (
    DTYPES,
    Found,
    assert_only_named_changes,
    difference,
    draw,
    evaluate,
    found,
    rewritten,
    run,
)

TOLERANCE = {"float": 24, "float16": 24, "bfloat16": 24, "double": 96}
"""Of ‖y − ŷ‖ / ‖y‖, in units of the dtype's eps; float64 has the error of the factorization itself as well."""

CONV = [  # (attributes, input, weight)
    ("1d", "", (2, 4, 9), (6, 4, 3)),
    ("1d strided", "strides = [2], pads = [1, 0]", (2, 4, 9), (6, 4, 4)),
    ("1d dilated, grouped", "dilations = [2], group = 2", (1, 8, 9), (6, 4, 3)),
    ("1d same", 'auto_pad = "SAME_UPPER", strides = [3]', (1, 4, 10), (5, 4, 4)),
    ("2d", "", (2, 4, 6, 7), (6, 4, 3, 3)),
    ("2d padded", "pads = [1, 1, 1, 1]", (2, 4, 5, 4), (5, 4, 3, 3)),
    ("2d asymmetric", "pads = [2, 0, 1, 1]", (1, 4, 5, 6), (6, 4, 3, 3)),
    ("2d strided", "strides = [2, 3], pads = [1, 2, 0, 1]", (1, 4, 7, 9), (6, 4, 3, 3)),
    ("2d dilated", "dilations = [2, 1], pads = [2, 1, 2, 1]", (1, 4, 6, 6), (6, 4, 3, 3)),
    ("2d dilated, strided", "dilations = [1, 3], strides = [2, 1]", (1, 4, 6, 9), (6, 4, 3, 3)),
    ("2d grouped", "group = 2, pads = [1, 1, 1, 1]", (2, 8, 5, 5), (6, 4, 3, 3)),
    ("2d grouped, strided", "group = 3, strides = [2, 2]", (1, 6, 6, 6), (9, 2, 3, 3)),
    ("2d one channel per group", "group = 4", (1, 4, 6, 6), (8, 1, 3, 3)),
    ("2d same upper", 'auto_pad = "SAME_UPPER"', (1, 4, 5, 6), (6, 4, 3, 2)),
    ("2d same lower", 'auto_pad = "SAME_LOWER"', (1, 4, 5, 6), (6, 4, 2, 3)),
    ("2d same upper, strided", 'auto_pad = "SAME_UPPER", strides = [2, 3]', (1, 4, 7, 8), (6, 4, 4, 3)),
    ("2d same lower, strided", 'auto_pad = "SAME_LOWER", strides = [3, 2]', (1, 4, 8, 7), (6, 4, 3, 4)),
    ("2d valid", 'auto_pad = "VALID", strides = [2, 1]', (1, 4, 7, 6), (6, 4, 3, 3)),
    ("2d notset", 'auto_pad = "NOTSET", pads = [1, 0, 1, 0]', (1, 4, 7, 6), (6, 4, 3, 3)),
    ("2d named kernel", "kernel_shape = [3, 2], strides = [1, 1]", (1, 4, 7, 6), (6, 4, 3, 2)),
    ("2d even", "pads = [1, 0, 2, 1]", (1, 4, 5, 5), (5, 4, 4, 2)),
    ("2d 1x1", "", (2, 6, 4, 4), (8, 6, 1, 1)),
    ("2d 1x1 strided", "strides = [2, 2]", (1, 6, 5, 4), (8, 6, 1, 1)),
    ("2d 1x1 strided to the same size", "strides = [2, 2], pads = [1, 1, 1, 1]", (1, 6, 3, 3), (8, 6, 1, 1)),
    ("2d 1x1 padded", "pads = [1, 0, 1, 2]", (1, 6, 3, 4), (8, 6, 1, 1)),
    ("2d 1x1 grouped", "group = 2", (1, 8, 3, 3), (8, 4, 1, 1)),
    ("2d 1x1 same", 'auto_pad = "SAME_LOWER", strides = [2, 2]', (1, 6, 5, 4), (8, 6, 1, 1)),
    ("2d 5x1", "pads = [2, 1, 2, 0], strides = [1, 2]", (1, 4, 5, 6), (6, 4, 5, 1)),
    ("2d 1x5", "pads = [1, 2, 0, 2], strides = [2, 1]", (1, 4, 5, 6), (6, 4, 1, 5)),
    ("2d 1x3 same", 'auto_pad = "SAME_UPPER", strides = [2, 2]', (1, 4, 5, 6), (6, 4, 1, 3)),
    ("2d one channel", "pads = [1, 1, 1, 1]", (2, 1, 5, 5), (6, 1, 3, 3)),
    ("2d one feature", "", (2, 6, 5, 5), (1, 6, 3, 3)),
    ("3d", "pads = [1, 0, 1, 1, 0, 1]", (1, 4, 4, 4, 5), (5, 4, 3, 2, 3)),
    ("3d strided, dilated", "strides = [2, 1, 1], dilations = [1, 1, 2]", (1, 4, 5, 4, 6), (5, 4, 2, 3, 2)),
    ("3d grouped, same", 'group = 2, auto_pad = "SAME_UPPER"', (1, 4, 3, 4, 3), (6, 2, 2, 3, 2)),
    ("3d 1x1x3", "strides = [2, 2, 2], pads = [0, 1, 1, 0, 1, 1]", (1, 4, 5, 4, 6), (5, 4, 1, 1, 3)),
]
TRANSPOSED = [
    ("1d", "", (2, 6, 5), (6, 4, 3)),
    ("1d strided", "strides = [2], pads = [1, 0], output_padding = [1]", (1, 6, 5), (6, 4, 3)),
    ("2d", "", (2, 6, 4, 5), (6, 4, 3, 3)),
    ("2d strided", "strides = [2, 3], pads = [1, 0, 0, 1]", (1, 6, 4, 3), (6, 4, 3, 3)),
    ("2d output padding", "strides = [2, 2], output_padding = [1, 0]", (1, 6, 4, 3), (6, 4, 3, 3)),
    ("2d dilated", "dilations = [2, 1], strides = [1, 2], pads = [1, 0, 1, 0]", (1, 6, 4, 3), (6, 4, 3, 3)),
    ("2d grouped", "group = 2, strides = [2, 1]", (1, 6, 4, 3), (6, 4, 3, 3)),
    ("2d many groups", "group = 3", (1, 6, 4, 3), (6, 3, 2, 2)),
    ("2d output shape", "output_shape = [9, 8], strides = [2, 2]", (1, 6, 4, 4), (6, 4, 3, 3)),
    (
        "2d output shape, grouped",
        "output_shape = [8, 9], strides = [2, 2], group = 2",
        (1, 6, 4, 4),
        (6, 4, 3, 3),
    ),
    (
        "2d output shape, same",
        'output_shape = [7, 8], strides = [2, 2], auto_pad = "SAME_UPPER"',
        (1, 6, 4, 4),
        (6, 4, 3, 2),
    ),
    ("2d same upper", 'auto_pad = "SAME_UPPER", strides = [2, 2]', (1, 6, 4, 3), (6, 4, 3, 3)),
    ("2d same lower", 'auto_pad = "SAME_LOWER", strides = [2, 2]', (1, 6, 4, 3), (6, 4, 3, 3)),
    ("2d valid", 'auto_pad = "VALID", strides = [2, 1]', (1, 6, 4, 3), (6, 4, 3, 2)),
    ("2d 1x1", "", (1, 6, 4, 3), (6, 8, 1, 1)),
    ("2d 1x1 strided", "strides = [2, 2]", (1, 6, 4, 3), (6, 8, 1, 1)),
    ("2d 1x1 output padding", "strides = [2, 2], output_padding = [1, 1]", (1, 6, 4, 3), (6, 8, 1, 1)),
    ("2d 4x1 strided", "strides = [2, 2], pads = [1, 0, 1, 0]", (1, 6, 4, 3), (6, 5, 4, 1)),
    ("2d 1x4 cropped", "pads = [1, 1, 1, 1]", (1, 6, 5, 4), (6, 5, 1, 4)),
    ("2d upsampling", "strides = [2, 2], pads = [1, 1, 1, 1]", (1, 6, 3, 3), (6, 4, 4, 4)),
    ("3d", "strides = [1, 2, 1]", (1, 6, 3, 3, 2), (6, 4, 2, 3, 2)),
    ("3d grouped", "group = 2, pads = [0, 1, 0, 1, 0, 0]", (1, 6, 3, 3, 2), (6, 3, 2, 3, 2)),
]
GEMM = [
    (name, attributes, x, w, side, bias)
    for side, weights in (
        (1, [("", (5, 8), (8, 6)), ("transA = 1", (8, 5), (8, 6)), ("transB = 1", (5, 8), (6, 8))]),
        (0, [("", (8, 5), (6, 8)), ("transA = 1", (8, 5), (8, 6)), ("transB = 1", (5, 8), (6, 8))]),
    )
    for attributes, x, w in weights
    for bias in (None, (), (1,), "last", "row", "full", "column")
    for name in (f"{'B' if side else 'A'} {attributes or 'plain'}, bias {bias}",)
]
MATMUL = [
    *((f"right, rank {rank}", (*(2, 3, 2, 5)[5 - rank :], 8), (8, 6), 1) for rank in range(1, 6)),
    ("left, rank 1", (8,), (6, 8), 0),
    *((f"left, rank {rank}", (*(2, 3, 2)[5 - rank :], 8, 5), (6, 8), 0) for rank in range(2, 6)),
    ("right, batched", (3, 5, 8), (3, 8, 6), 1),
    ("right, batched, broadcast", (5, 8), (3, 8, 6), 1),
    ("right, batch of one", (3, 5, 8), (1, 8, 6), 1),
    ("right, two batch axes", (2, 1, 5, 8), (1, 3, 8, 6), 1),
    ("left, batched", (3, 8, 5), (3, 6, 8), 0),
    ("left, two batch axes", (2, 3, 8, 5), (2, 3, 6, 8), 0),
]
ADDED = [  # a MatMul and the Add behind it
    ("right, rank 1", (8,), (8, 6), 1, (6,)),
    ("right, rank 2", (5, 8), (8, 6), 1, (6,)),
    ("right, rank 3", (2, 5, 8), (8, 6), 1, (1, 6)),
    ("right, more axes", (5, 8), (8, 6), 1, (1, 1, 6)),
    ("right, batch of one", (3, 5, 8), (1, 8, 6), 1, (6,)),
    ("left, rank 1", (8,), (6, 8), 0, (6,)),
    ("left, rank 2", (8, 5), (6, 8), 0, (6, 1)),
    ("left, rank 4", (2, 3, 8, 5), (6, 8), 0, (1, 6, 1)),
]
GATHER = [((),), ((4,),), ((2, 3),), ((2, 1, 3),)]

CASES = {
    **{f"Conv {name}": ("Conv", a, x, w, 1, None) for name, a, x, w in CONV},
    **{f"Conv {name}, bias": ("Conv", a, x, w, 1, "f") for name, a, x, w in CONV[4:8]},
    **{f"ConvTranspose {name}": ("ConvTranspose", a, x, w, 1, None) for name, a, x, w in TRANSPOSED},
    **{
        f"ConvTranspose {name}, bias": ("ConvTranspose", a, x, w, 1, "f") for name, a, x, w in TRANSPOSED[2:8]
    },
    **{f"Gemm {n}": ("Gemm", a, x, w, side, bias) for n, a, x, w, side, bias in GEMM},
    **{
        f"Gemm scaled {n}": (
            "Gemm",
            ", ".join(filter(None, (a, "alpha = 0.5, beta = 2.0"))),
            x,
            w,
            side,
            bias,
        )
        for n, a, x, w, side, bias in GEMM
    },
    **{f"MatMul {name}": ("MatMul", "", x, w, side, None) for name, x, w, side in MATMUL},
    **{f"MatMul {name}, Add": ("MatMul", "", x, w, side, bias) for name, x, w, side, bias in ADDED},
    **{f"Gather rank {len(x)}": ("Gather", "", x, (11, 6), 0, None) for (x,) in GATHER},
}


def bias_shape(
    kind: object, op: str, attributes: str, x: tuple[int, ...], w: tuple[int, ...], side: int
) -> object:
    if not isinstance(kind, str):
        return kind
    if kind == "f":
        groups = int(attributes.split("group = ")[1].split(",")[0]) if "group" in attributes else 1
        return (w[0],) if op == "Conv" else (w[1] * groups,)
    rows, columns = (5, 6) if side else (6, 5)
    return {"last": (columns,), "row": (1, columns), "full": (rows, columns), "column": (rows, 1)}[kind]


def build(case: str, kind: str, norm: bool = False, opset: int = 0, ir: int = 10) -> onnx.ModelProto:
    """A model of one operator, perhaps with a BatchNormalization behind it."""
    op, attributes, x, w, side, bias = CASES[case]
    dtype = DTYPES[kind]
    opset = opset or (22 if kind == "bfloat16" else 19)
    rng = np.random.default_rng(len(case))
    shape = bias_shape(bias, op, attributes, x, w, side)
    arrays = {"w": draw(rng, w, dtype)}
    if shape is not None:
        arrays["c"] = draw(rng, shape, dtype)
    operands = ["x", "w"] if side else ["w", "x"]
    added = op == "MatMul" and shape is not None
    operands += ["c"] * (len(arrays) > 1 and not added)
    brackets = f"<{attributes}>" * bool(attributes)
    nodes = [onnx.parser.parse_node(f"y = {op} {brackets} ({', '.join(operands)})")]
    if added:
        nodes[0].output[0] = "h"
        nodes.append(onnx.parser.parse_node("y = Add (h, c)"))
    if norm:
        groups = int(attributes.split("group = ")[1].split(",")[0]) if "group" in attributes else 1
        f = {"Conv": w[0], "ConvTranspose": w[1] * groups, "Gemm": 6}[op]
        for name in ("scale", "shift", "mean", "variance"):
            values = draw(rng, (f,), np.float64)
            arrays[name] = (np.abs(values) + 0.5 if name == "variance" else values).astype(dtype)
        nodes[0].output[0] = "h"
        nodes.append(onnx.parser.parse_node("y = BatchNormalization (h, scale, shift, mean, variance)"))
    number = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    integer = onnx.TensorProto.INT64
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", integer if op == "Gather" else number, x)],
        [onnx.helper.make_tensor_value_info("y", number, None)],
        [inline(name, array) for name, array in arrays.items()],
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=ir)


def widened(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A bfloat16 model with the same numbers in float32, which the runtime can run."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        if tensor.data_type == onnx.TensorProto.BFLOAT16:
            tensor.CopyFrom(inline(tensor.name, onnx.numpy_helper.to_array(tensor).astype(np.float32)))
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return copy


def outputs(proto: onnx.ModelProto, kind: str, x: np.ndarray) -> list[np.ndarray]:
    if kind == "bfloat16":
        x = x if x.dtype == np.int64 else x.astype(np.float32)
        return run(widened(proto), {"x": x})
    if kind == "double" and any("Conv" in node.op_type for node in proto.graph.node):
        return evaluate(proto, {"x": x})
    return run(proto, {"x": x})


def options(seen: Found) -> list[Option]:
    layer = seen.layer
    return [
        Option(fold, k, layer.full_rank(fold, k), lowering)
        for fold in layer.folds
        for k in layer.slices
        for lowering in layer.lowerings(k)
        # Other numbers of slices give other numbers of the same nodes.
        if lowering not in (Lowering.SPLIT, Lowering.POINTWISE) or k in (1, layer.slices[-1])
    ]


def expected_slices(case: str) -> set[int]:
    """Every divisor of the input channels, wherever the operator can be cut."""
    op, attributes, _, w, _side, _ = CASES[case]
    if op == "Gather" or (len(w) > 2 and op == "MatMul"):
        return {1}
    c = {"Conv": w[1], "MatMul": 8, "Gemm": 8}.get(op, 0)
    if op == "ConvTranspose":
        c = w[0] // (int(attributes.split("group = ")[1].split(",")[0]) if "group" in attributes else 1)
    return {k for k in range(1, c + 1) if c % k == 0}


def value_for(proto: onnx.ModelProto, kind: str) -> np.ndarray:
    x = proto.graph.input[0].type.tensor_type
    shape = tuple(dim.dim_value for dim in x.shape.dim)
    rng = np.random.default_rng(11)
    is_ids = x.elem_type == onnx.TensorProto.INT64
    return np.asarray(
        rng.integers(-11, 11, shape) if is_ids else draw(rng, shape, np.float64).astype(DTYPES[kind])
    )


def tolerance(kind: str) -> float:
    eps = float(2.0**-7) if kind == "bfloat16" else float(np.finfo(DTYPES[kind]).eps)
    return TOLERANCE[kind] * eps


def check_all(case: str, kind: str, proto: onnx.ModelProto) -> None:
    seen = found(proto)
    assert not seen.skipped, seen.skipped
    layer = seen.layer
    assert set(layer.slices) == expected_slices(case)
    value = value_for(proto, kind)
    original = outputs(proto, kind, value)
    before = parameters(seen.model)
    for option in options(seen):
        result = rewritten(seen, {layer.id: option})
        new = result.model.proto
        assert difference(original, outputs(new, kind, value)) < tolerance(kind), option
        assert parameters(result.model) == before - cost(layer) + cost(layer, option)
        assert_only_named_changes(proto, new, [layer], result.chains)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_full_rank_is_exact(case, kind):
    check_all(case, kind, build(case, kind))


FOLDABLE = [
    case
    for case, (op, _, x, _, side, bias) in CASES.items()
    if (op in ("Conv", "ConvTranspose") or (op == "Gemm" and side)) and bias not in ("full", "column")
]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("case", FOLDABLE)
def test_full_rank_with_a_batchnorm_is_exact(case, kind):
    proto = build(case, kind, norm=True)
    assert found(proto).layer.batchnorm is not None
    check_all(case, kind, proto)


FEATURES = {  # the axis of the output features, where a bias lies along it
    case: 1 if "Conv" in op else -1 if side or len(x) == 1 else -2
    for case, (op, _, x, _, side, bias) in CASES.items()
    if bias == "f" or bias in (("last", "row") if side else ("column",)) or (op == "MatMul" and bias)
}


def check_new_bias(case: str, kind: str, proto: onnx.ModelProto, axis: int) -> None:
    seen = found(proto)
    layer = seen.layer
    value = value_for(proto, kind)
    (original,) = outputs(proto, kind, value)
    change = 16 * draw(np.random.default_rng(len(case)), (layer.f,), np.float64)
    along = np.moveaxis(change.reshape(layer.f, *[1] * (original.ndim - 1)), 0, axis)
    expected = original.astype(np.float64) + along
    assert difference([expected], [original]) > 2 * tolerance(kind)
    old = bias(seen.model, seen.walk, seen.bindings[0])
    for option in (options(seen)[0], options(seen)[-1]):
        result = rewritten(seen, {layer.id: option}, {layer.id: old.values + change})
        new = result.model.proto
        assert difference([expected], outputs(new, kind, value)) < tolerance(kind), option
        assert parameters(result.model) == parameters(seen.model) - cost(layer) + cost(layer, option)
        if "Add" not in case:
            assert_only_named_changes(proto, new, [layer], result.chains)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("case", FEATURES)
def test_full_rank_with_a_new_bias_is_exact(case, kind):
    check_new_bias(case, kind, build(case, kind), FEATURES[case])


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("case", FOLDABLE)
def test_full_rank_with_a_batchnorm_and_a_new_bias_is_exact(case, kind):
    check_new_bias(case, kind, build(case, kind, norm=True), 1)


@pytest.mark.parametrize("case", CASES)
def test_only_a_bias_per_feature_can_be_changed(case):
    seen = found(build(case, "float"))
    assert (bias(seen.model, seen.walk, seen.bindings[0]) is not None) == (case in FEATURES)


@pytest.mark.parametrize(
    "case", [case for case, (op, *_) in CASES.items() if op in ("Conv", "ConvTranspose")]
)
def test_every_fold_is_offered(case):
    _, attributes, _, w, _, _ = CASES[case]
    axes = [n > 1 for n in w[2:]]
    count = {0: 1, 1: 2}.get(sum(axes), 4 if len(axes) == 2 else 2)
    if "output_shape" in attributes:
        count = min(count, 2)
    assert len(found(build(case, "float")).layer.folds) == count


SAMPLE = [
    "Conv 2d strided",
    "ConvTranspose 2d strided",
    "MatMul right, rank 3",
    "Gather rank 2",
    "Gemm B plain, bias last",
]


@pytest.mark.parametrize(("opset", "ir"), [(7, 3), (9, 3), (9, 4), (11, 4), (13, 8), (17, 8), (22, 10)])
@pytest.mark.parametrize("case", SAMPLE)
def test_full_rank_is_exact_in_old_and_new_opsets(case, opset, ir):
    proto = build(case, "float", opset=opset, ir=ir)
    if ir < 4:
        for tensor in proto.graph.initializer:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    seen = found(proto)
    x = np.asarray(
        np.random.default_rng(5).integers(0, 11, (2, 3))
        if "Gather" in case
        else draw(np.random.default_rng(5), CASES[case][2])
    )
    original = run(proto, {"x": x})
    for option in options(seen):
        result = rewritten(seen, {"w": option})
        new = result.model.proto
        assert difference(original, run(new, {"x": x})) < TOLERANCE["float"] * np.finfo(np.float32).eps
        assert_only_named_changes(proto, new, [seen.layer], result.chains)
        assert result.removed_inputs == (("w",) if ir < 4 else ())
        assert any(node.op_type == "Constant" and "encoder" in node.output[0] for node in new.graph.node) == (
            ir < 4
        )
        assert parameters(result.model) - parameters(seen.model) == cost(seen.layer, option) - prod(
            CASES[case][3]
        )


@pytest.mark.parametrize("case", [case for case, (op, *_) in CASES.items() if "Conv" in op])
def test_the_reference_computes_what_the_runtime_does(case):
    proto = build(case, "float")
    x = draw(np.random.default_rng(2), CASES[case][2])
    assert difference(run(proto, {"x": x}), evaluate(proto, {"x": x})) < 1e-6
