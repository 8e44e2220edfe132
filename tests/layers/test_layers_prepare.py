"""When a BatchNormalization is folded, and when it stays."""
# ruff: noqa: E501 - tables of models, one a line

from __future__ import annotations

import re

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper
from onnx.parser import parse_model

from onnx_lowrank.budgets.params import parameters as cost
from onnx_lowrank.graph.parameters import parameters
from rewriting import (
    DTYPES,
    assert_only_named_changes,
    assert_same,
    found,
    full_rank,
    model,
    rewritten,
    tensors,
)

F = 6
NORM = {"s": (F,), "b": (F,), "m": (F,), "v": np.linspace(0.5, 2, F).astype(np.float32)}
X = "float[1,4,6,6] x"
CONV = "h = Conv (x, w)"
BN = "y = BatchNormalization (h, s, b, m, v)"
KERNEL = (F, 4, 3, 3)

FOLDED = {
    "conv": (X, f"{CONV} {BN}", {"w": KERNEL}, 4 * F),
    "bias": (X, f"h = Conv (x, w, c) {BN}", {"w": KERNEL, "c": (F,)}, 5 * F),
    "bias behind views": (X, f"d = Identity (c) e = Squeeze (d) h = Conv (x, w, e) {BN}", {"w": KERNEL, "c": (1, F)}, 5 * F),
    "bias read elsewhere": (X, f"h = Conv (x, w, c) {BN} z = Relu (c)", {"w": KERNEL, "c": (F,)}, 4 * F),
    "shared parameters": (X, f"{CONV} y = BatchNormalization (h, v, b, b, v)", {"w": KERNEL}, 2 * F),
    "epsilon": (X, f"{CONV} y = BatchNormalization <epsilon = 0.25> (h, s, b, m, v)", {"w": KERNEL}, 4 * F),
    "transposed": (X, f"h = ConvTranspose <strides = [2,2]> (x, w) {BN}", {"w": (4, F, 3, 3)}, 4 * F),
    "gemm": ("float[3,8] x", f"h = Gemm (x, w) {BN}", {"w": (8, F)}, 4 * F),
    "gemm scaled": ("float[3,8] x", f"h = Gemm <alpha = 2.0, beta = -0.5> (x, w, c) {BN}", {"w": (8, F), "c": (1, F)}, 5 * F),
    "gemm, scalar bias": ("float[3,8] x", f"h = Gemm <beta = 3.0> (x, w, c) {BN}", {"w": (8, F), "c": np.float32(2)}, 4 * F + 1),
    "cast weight": (X, f"k = Cast <to = 1> (w) h = Conv (x, k) {BN}", {"w": np.random.default_rng(1).standard_normal(KERNEL)}, 4 * F),
    "cast parameters": (X, f"{CONV} t = Cast <to = 1> (s) y = BatchNormalization (h, t, b, m, v)", {"w": KERNEL, "s": np.linspace(1, 2, F)}, 4 * F),
}  # fmt: skip


def built(inputs: str, nodes: str, weights: dict[str, object], opset: int = 17) -> ModelProto:
    used = {name: value for name, value in NORM.items() if name in re.findall(r"\w+", nodes)}
    extra = ", float[] z" if " z =" in nodes else ""
    body = f"g ({inputs}) => (float[] y{extra}) {{ {nodes} }}"
    return model(body, opset=opset, **{**used, **weights})


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name):
    inputs, nodes, weights, freed = FOLDED[name]
    proto = built(inputs, nodes, weights)
    seen = found(proto)
    layer = seen.layer
    assert layer.batchnorm is not None
    assert (layer.freed, layer.added) == (freed, F)
    result = rewritten(seen)
    new = result.model.proto
    assert "BatchNormalization" not in {node.op_type for node in new.graph.node}
    assert_same(proto, new, 1e-5)
    assert_only_named_changes(proto, new, [layer], result.chains)
    assert parameters(result.model) == parameters(seen.model) - cost(layer) + cost(layer, full_rank(layer))
    assert rewritten(seen, {}).model.proto.graph == proto.graph


NAN = np.full(F, np.nan, np.float32)
KEPT = {
    "read by another": (X, f"{CONV} {BN} z = Relu (h)", {"w": KERNEL}),
    "between": (X, f"k = Conv (x, w) h = Relu (k) {BN}", {"w": KERNEL}),
    "training": (X, f"{CONV} y, a, c = BatchNormalization <training_mode = 1> (h, s, b, m, v)", {"w": KERNEL}),
    "computed parameter": (X, f"{CONV} t = Relu (s) y = BatchNormalization (h, t, b, m, v)", {"w": KERNEL}),
    "not finite": (X, f"{CONV} {BN}", {"w": KERNEL, "m": NAN}),
    "negative variance": (X, f"{CONV} {BN}", {"w": KERNEL, "v": -np.ones(F, np.float32)}),
    "computed bias": (X, f"d = Relu (c) h = Conv (x, w, d) {BN}", {"w": KERNEL, "c": (F,)}),
    "full bias": ("float[3,8] x", f"h = Gemm (x, w, c) {BN}", {"w": (8, F), "c": (3, F)}),
    "column bias": ("float[3,8] x", f"h = Gemm (x, w, c) {BN}", {"w": (8, F), "c": (3, 1)}),
    "weight on the left": ("float[8,6] x", f"h = Gemm (w, x) {BN}", {"w": (7, 8)}),
    "matmul": ("float[3,8] x", f"h = MatMul (x, w) {BN}", {"w": (8, F)}),
    "as a parameter": ("float[1,8] x", "h = Gemm (x, w) k = Squeeze (h) y = BatchNormalization (z, k, b, m, v) z = Relu (b)", {"w": (8, F)}),
    "bias beyond float16": ("float16[1,4,6,6] x", f"{CONV} {BN}", {"w": np.ones(KERNEL, np.float16), "m": np.full(F, -9e4, np.float32)}),
    "two uses": (X, f"{CONV} {BN} k = Conv (x, w) z = BatchNormalization (k, s, b, m, v)", {"w": KERNEL}),
    "other domain": (X, f"{CONV} y = local.BatchNormalization (h, s, b, m, v)", {"w": KERNEL}),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_kept(name):
    inputs, nodes, weights = KEPT[name]
    used = {key: value for key, value in NORM.items() if key not in weights}
    proto = parse_model(
        f'<ir_version: 8, opset_import: ["" : 17, "local" : 1]> g ({inputs}) => (float[] y) {{ {nodes} }}'
    )
    proto.graph.initializer.extend(tensors(**used, **weights))
    layer = found(proto).layer
    assert layer.batchnorm is None
    assert (layer.freed, layer.added) == (0, 0)


def test_a_returned_output_keeps_its_batchnorm():
    proto = model(f"g ({X}) => (float[] y, float[] h) {{ {CONV} {BN} }}", w=KERNEL, **NORM)
    assert found(proto).layer.batchnorm is None


@pytest.mark.parametrize(
    ("opset", "attributes", "folded"),
    [
        (6, "", False),
        (6, "is_test = 1", True),
        (6, "is_test = 0", False),
        (6, "is_test = 1, spatial = 0", False),
        (7, "", True),
        (7, "spatial = 1", True),
        (7, "spatial = 0", False),
        (9, "", True),
        (14, "training_mode = 0", True),
        (14, "training_mode = 1", False),
    ],
)
def test_modes_of_all_opsets(opset, attributes, folded):
    brackets = f"<{attributes}>" * bool(attributes)
    nodes = f"{CONV} y = BatchNormalization {brackets} (h, s, b, m, v)"
    proto = model(f"g ({X}) => (float[1,6,4,4] y) {{ {nodes} }}", opset=opset, w=KERNEL, **NORM)
    assert (found(proto).layer.batchnorm is not None) == folded


@pytest.mark.parametrize(("opset", "folded"), [(6, False), (7, True)])
def test_a_gemm_that_cannot_broadcast_keeps_it(opset, folded):
    nodes = "h = Gemm (x, w, c) y = BatchNormalization <is_test = 1> (h, s, b, m, v)"
    nodes = nodes if opset < 7 else nodes.replace("<is_test = 1> ", "")
    proto = model(
        f"g (float[1,8] x) => (float[1,6] y) {{ {nodes} }}", opset=opset, w=(8, F), c=(1, F), **NORM
    )
    assert (found(proto).layer.batchnorm is not None) == folded


def with_norm(kind, weight, scale):
    """A convolution of 4,096 weights of about one size, and a BatchNormalization that scales by another."""
    dtype, size = DTYPES[kind], 32
    norm = {"s": np.full(size, scale), "b": np.zeros(size), "m": np.zeros(size), "v": np.ones(size)}
    proto = parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g ({kind}[1,32,4,4] x) => ({kind}[] y) '
        f"{{ h = Conv (x, w) y = BatchNormalization <epsilon = 0.0> (h, s, b, m, v) }}"
    )
    arrays = {"w": weight * np.random.default_rng(0).uniform(0.5, 1, (size, size, 2, 2)), **norm}
    proto.graph.initializer.extend(tensors(**{name: a.astype(dtype) for name, a in arrays.items()}))
    return proto


@pytest.mark.parametrize(
    ("kind", "weight", "scale", "is_skipped"),
    [
        ("float", 3e38, 1e38, True),
        ("float", 1e37, 1e34, False),
        ("bfloat16", 3e38, 1e38, True),
        ("bfloat16", 1e37, 1e34, False),
        ("float16", 6e4, 6e4, True),
        ("float16", 6e3, 6e3, False),
        ("double", 1e200, 1e200, True),
        ("double", 1e100, 1e100, True),
        ("double", 1e75, 1e70, False),
    ],
)
def test_numbers_beyond_what_factors_hold_are_a_reason_to_skip_the_layer(kind, weight, scale, is_skipped):
    """The factors of a weight W have numbers of up to the square root of its norm."""
    seen = found(with_norm(kind, weight, scale))
    assert [s.reason.partition(":")[0] for s in seen.skipped if s.op == "Conv"] == (
        ["its numbers are too large"] if is_skipped else []
    )
    for layer in seen.layers.values():
        assert layer.batchnorm is not None
        factors = [numpy_helper.to_array(tensor) for tensor in rewritten(seen).model.proto.graph.initializer]
        assert all(np.isfinite(array.astype(np.float64)).all() for array in factors)


def test_huge_numbers_without_a_batchnorm_are_the_layer_s_own():
    for kind, weight in (("float", 3.4e38), ("float16", 65504), ("double", 1e150)):
        inputs = f"{kind}[1,4,6,6] x"
        proto = model(
            f"g ({inputs}) => ({kind}[1,6,4,4] y) {{ y = Conv (x, w) }}",
            w=np.full(KERNEL, weight, DTYPES[kind]),
        )
        assert found(proto).layer.batchnorm is None
