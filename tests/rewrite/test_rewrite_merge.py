"""Which adjacent operators become one, what that computes and saves, and what else changes: nothing."""
# ruff: noqa: E501 - tables of models, one a line

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import tiny
from onnx_lowrank.budgets.macs import dearest_macs
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.core.outcome import Merge
from onnx_lowrank.files.load import load
from onnx_lowrank.files.save import save
from onnx_lowrank.files.spilling import Spill
from onnx_lowrank.files.tensors import tensors as all_tensors
from onnx_lowrank.graph.parameters import parameters
from onnx_lowrank.graph.shapes import infer
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.work import work
from onnx_lowrank.rewrite.merge import merge
from onnx_lowrank.rewrite.replace import Rewritten
from rewriting import constants, difference, evaluate, feed_of, found, model, rewritten, run, shaped, tensors

IMAGE, ROWS, COLUMNS = "float[2,12,6,6] x", "float[5,12] x", "float[12,5] x"
CONV = {"a": (24, 12, 3, 3), "b": (4, 24, 1, 1)}
"""Kernels 3×3 and 1×1 whose product is smaller than both."""
P, Q = (24, 4, 1, 1), (4, 24, 3, 3)
"""A kernel 1×1 and one of 3×3 whose product is smaller than both."""
POINTS = "float[2,4,6,6] x"
RIGHT = {"a": (12, 8), "b": (8, 10)}
LEFT = {"a": (8, 12), "b": (10, 8)}
EPS = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float16): 2.0**-11, np.dtype(np.float64): 2.0**-53}


def named(proto: ModelProto) -> ModelProto:
    """The nodes of the main graph are called n.OUTPUT; before IR 4 its initializers are inputs, too."""
    for node in proto.graph.node:
        node.name = f"n.{node.output[0]}"
    for tensor in proto.graph.initializer if proto.ir_version < 4 else ():
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        proto.graph.input.append(value)
    return shaped(proto)


def of(proto: ModelProto, *chained: str) -> Rewritten:
    """A model in which each of these nodes is the chain of one layer."""
    return Rewritten(load(proto), {f"layer {name}": ((name,),) for name in chained}, ())


def built(
    inputs: str, nodes: str, weights: Mapping[str, Any], opset: int = 17, ir: int = 8, chained: Any = ("n.h",)
) -> Rewritten:
    extra = ", float[] z" if re.search(r"\bz =", nodes) else ""
    proto = model(f"g ({inputs}) => (float[] y{extra}) {{ {nodes} }}", opset=opset, ir=ir, **weights)
    return of(named(proto), *chained)


def macs(proto: ModelProto) -> int:
    """Multiply-accumulates of all operators."""
    loaded = load(proto)
    count, _ = dearest_macs(work(Walk(proto), infer(loaded, {}), ()), [])
    assert count is not None
    return count


def widened(proto: ModelProto) -> ModelProto:
    """The same model in float64."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    for tensor in all_tensors(copy):
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
            value = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for value in (*copy.graph.input, *copy.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    del copy.graph.value_info[:]
    return copy


def assert_computes(before: ModelProto, after: ModelProto, eps: float = 2.0**-24) -> None:
    """Both are within a few roundings of what the model before computes in float64."""
    onnx.checker.check_model(after, full_check=True)
    feed = feed_of(before)
    exact = evaluate(widened(before), {name: value.astype(np.float64) for name, value in feed.items()})
    for proto in (before, after):
        names = {value.name for value in proto.graph.input}
        outputs = run(proto, {name: value for name, value in feed.items() if name in names})
        assert difference(exact, outputs) < 16 * eps


def emptied(proto: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(proto)
    for field in ("node", "initializer", "value_info", "quantization_annotation", "input"):
        copy.graph.ClearField(field)
    return copy


def assert_nothing_else(before: ModelProto, after: ModelProto, made: Merge) -> None:
    """One merge has taken out two nodes and what only they read, and put one in B's place."""
    assert emptied(before) == emptied(after)
    old, new = before.graph, after.graph
    pair = {node.name: node for node in old.node if node.name in (made.first, made.second)}
    first, second = pair[made.first], pair[made.second]
    read = {name for node in new.node for name in node.input}
    gone = {*first.input, *second.input, *first.output} - read
    kept = [node for node in old.node if node is not first and not gone & {*node.output}]
    assert [node.name for node in new.node if not node.name.endswith("/constant")] == [n.name for n in kept]
    for node, other in zip(kept, (n for n in new.node if not n.name.endswith("/constant")), strict=True):
        assert node is second or node == other
    (product,) = [node for node in new.node if node.name == made.second]
    assert (product.output, product.doc_string) == (second.output, second.doc_string)
    for field, key in (
        ("initializer", "name"),
        ("value_info", "name"),
        ("input", "name"),
        ("quantization_annotation", "tensor_name"),
    ):
        stay = [entry for entry in getattr(old, field) if getattr(entry, key) not in gone]
        entries = list(getattr(new, field))
        assert entries[: len(stay)] == stay
        rest = [getattr(entry, key) for entry in entries[len(stay) :]]
        assert all(field == "initializer" and re.search("_merged(_bias)?(_[0-9]+)?$", name) for name in rest)
    defined = {entry.name for entry in (*old.initializer, *old.input)} | {
        n for x in old.node for n in x.output
    }
    added = {n for x in new.node for n in (*x.input, *x.output)} - defined
    assert all("_merged" in name for name in added)


def check(
    before: Rewritten, elements: tuple[int, int, int], saved: int, at: tuple[int, int], eps: float = 2.0**-24
) -> ModelProto:
    """One merge, which computes the same with fewer parameters and MACs."""
    data = before.model.proto.SerializeToString(deterministic=True)
    after, (made,) = merge(before)
    assert before.model.proto.SerializeToString(deterministic=True) == data
    old, new = before.model.proto, after.model.proto
    assert_computes(old, new, eps)
    assert_nothing_else(old, new, made)
    assert made.elements == elements
    assert made.saved == saved == parameters(before.model) - parameters(after.model) > 0
    first, second, product = elements
    assert macs(old) - macs(new) == first * at[0] + (second - product) * at[1] > 0
    assert after.chains == dict.fromkeys(before.chains, ((made.second,),))
    again, none = merge(after)
    assert (again is after, none) == (True, ())
    return new


# --- convolutions ---------------------------------------------------------------------------------

CONVS: dict[str, tuple[str, str, dict[str, Any], tuple[int, int, int], int, tuple[int, int]]] = {
    # B is 1×1: inputs, nodes, weights, elements, parameters saved, positions of A and of B
    "1×1 behind 3×3": (IMAGE, "h = Conv (x, a) y = Conv (h, b)", CONV, (2592, 96, 432), 2256, (32, 32)),
    "1×1 behind padded": (IMAGE, "h = Conv <pads = [1,0,1,2]> (x, a) y = Conv (h, b)", CONV, (2592, 96, 432), 2256, (72, 72)),
    "1×1 behind strided, dilated": (IMAGE, "h = Conv <strides = [2,1], dilations = [1,2], kernel_shape = [3,3]> (x, a) y = Conv <kernel_shape = [1,1]> (h, b)", CONV, (2592, 96, 432), 2256, (8, 8)),
    "1×1 behind auto_pad": (IMAGE, 'h = Conv <auto_pad = "SAME_LOWER", strides = [2,2]> (x, a) y = Conv (h, b)', CONV, (2592, 96, 432), 2256, (18, 18)),
    "1×1 behind padded, both biases": (IMAGE, "h = Conv <pads = [1,1,1,1]> (x, a, p) y = Conv (h, b, q)", {**CONV, "p": (24,), "q": (4,)}, (2592, 96, 432), 2280, (72, 72)),
    "1×1 behind padded, A's bias": (IMAGE, "h = Conv <pads = [1,1,1,1]> (x, a, p) y = Conv (h, b)", {**CONV, "p": (24,)}, (2592, 96, 432), 2276, (72, 72)),
    "1×1 behind padded, B's bias": (IMAGE, "h = Conv <pads = [1,1,1,1]> (x, a) y = Conv (h, b, q)", {**CONV, "q": (4,)}, (2592, 96, 432), 2256, (72, 72)),
    "1×1 with SAME": (IMAGE, 'h = Conv (x, a) y = Conv <auto_pad = "SAME_UPPER"> (h, b)', CONV, (2592, 96, 432), 2256, (32, 32)),
    "1×1 with explicit defaults": (IMAGE, "h = Conv <group = 1> (x, a) y = Conv <group = 1, strides = [1,1], pads = [0,0,0,0], dilations = [1,1]> (h, b)", CONV, (2592, 96, 432), 2256, (32, 32)),
    "1×1 behind 1×1": (IMAGE, "h = Conv (x, a, p) y = Conv (h, b, q)", {"a": (24, 12, 1, 1), "b": (4, 24, 1, 1), "p": (24,), "q": (4,)}, (288, 96, 48), 360, (72, 72)),
    "1×1 behind padded 1×1": (IMAGE, "h = Conv <pads = [1,1,1,1], strides = [2,2]> (x, a, p) y = Conv (h, b, q)", {"a": (24, 12, 1, 1), "b": (4, 24, 1, 1), "p": (24,), "q": (4,)}, (288, 96, 48), 360, (32, 32)),
    "one axis": ("float[2,12,9] x", "h = Conv (x, a, p) y = Conv (h, b)", {"a": (24, 12, 3), "b": (4, 24, 1), "p": (24,)}, (864, 96, 144), 836, (14, 14)),
    "three axes": ("float[1,12,4,4,4] x", "h = Conv (x, a, p) y = Conv (h, b)", {"a": (24, 12, 2, 1, 2), "b": (4, 24, 1, 1, 1), "p": (24,)}, (1152, 96, 192), 1076, (36, 36)),
    # A is 1×1
    "3×3 behind 1×1": (POINTS, "h = Conv (x, a) y = Conv (h, b)", {"a": P, "b": Q}, (96, 864, 144), 816, (72, 32)),
    "padded behind 1×1": (POINTS, "h = Conv (x, a) y = Conv <pads = [1,0,1,2]> (h, b)", {"a": P, "b": Q}, (96, 864, 144), 816, (72, 72)),
    "strided behind 1×1": (POINTS, "h = Conv (x, a) y = Conv <strides = [2,1], pads = [1,1,1,1]> (h, b)", {"a": P, "b": Q}, (96, 864, 144), 816, (72, 36)),
    "auto_pad behind 1×1": (POINTS, 'h = Conv (x, a) y = Conv <strides = [2,2], auto_pad = "SAME_UPPER"> (h, b, q)', {"a": P, "b": Q, "q": (4,)}, (96, 864, 144), 816, (72, 18)),
    "dilated behind 1×1, both biases": (POINTS, "h = Conv (x, a, p) y = Conv <dilations = [2,1], strides = [1,2]> (h, b, q)", {"a": P, "b": Q, "p": (24,), "q": (4,)}, (96, 864, 144), 840, (72, 8)),
    "behind 1×1, A's bias, VALID": (POINTS, 'h = Conv (x, a, p) y = Conv <auto_pad = "VALID"> (h, b)', {"a": P, "b": Q, "p": (24,)}, (96, 864, 144), 836, (72, 32)),
    "behind 1×1, A's bias, zero pads": (POINTS, "h = Conv (x, a, p) y = Conv <pads = [0,0,0,0]> (h, b)", {"a": P, "b": Q, "p": (24,)}, (96, 864, 144), 836, (72, 32)),
    "padded behind 1×1, B's bias": (POINTS, "h = Conv (x, a) y = Conv <pads = [1,1,1,1]> (h, b, q)", {"a": P, "b": Q, "q": (4,)}, (96, 864, 144), 816, (72, 72)),
    "strided 1×1 behind 1×1": (POINTS, "h = Conv (x, a, p) y = Conv <strides = [2,2]> (h, b, q)", {"a": P, "b": (4, 24, 1, 1), "p": (24,), "q": (4,)}, (96, 96, 16), 200, (72, 18)),
    "one axis behind 1": ("float[2,4,9] x", "h = Conv (x, a) y = Conv <pads = [2,2], dilations = [2]> (h, b)", {"a": (24, 4, 1), "b": (4, 24, 3)}, (96, 288, 48), 336, (18, 18)),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("ir", [3, 8])
def test_convolutions(case, ir):
    inputs, nodes, weights, elements, saved, at = CONVS[case]
    new = check(built(inputs, nodes, weights, ir=ir), elements, saved, at)
    (node,) = [node for node in new.graph.node if node.op_type == "Conv"]
    assert len(node.input) == (3 if "p" in weights or "q" in weights else 2)


# --- matrices -------------------------------------------------------------------------------------

MATRICES: dict[str, tuple[str, str, dict[str, Any], int, str]] = {
    # inputs, nodes, weights, parameters saved, the operator that is left
    "matmul": (ROWS, "h = MatMul (x, a) y = MatMul (h, b)", RIGHT, 56, "MatMul"),
    "matmul, vector": ("float[12] x", "h = MatMul (x, a) y = MatMul (h, b)", RIGHT, 56, "MatMul"),
    "matmul, batch": ("float[2,3,5,12] x", "h = MatMul (x, a) y = MatMul (h, b)", RIGHT, 56, "MatMul"),
    "matmul, left": (COLUMNS, "h = MatMul (a, x) y = MatMul (b, h)", LEFT, 56, "MatMul"),
    "matmul, left, vector": ("float[12] x", "h = MatMul (a, x) y = MatMul (b, h)", LEFT, 56, "MatMul"),
    "matmul, left, batch": ("float[2,12,5] x", "h = MatMul (a, x) y = MatMul (b, h)", LEFT, 56, "MatMul"),
    "matmul, gemm": (ROWS, "h = MatMul (x, a) y = Gemm (h, b)", RIGHT, 56, "Gemm"),
    "matmul, gemm, all": (ROWS, "h = MatMul (x, a) y = Gemm <alpha = 0.5, beta = -2.0, transB = 1> (h, b, q)", {"a": (12, 8), "b": (10, 8), "q": (10,)}, 56, "Gemm"),
    "matmul, gemm, full bias": (ROWS, "h = MatMul (x, a) y = Gemm <beta = 0.5> (h, b, q)", {**RIGHT, "q": (5, 10)}, 56, "Gemm"),
    "matmul, gemm, left": (COLUMNS, "h = MatMul (a, x) y = Gemm <transA = 1, alpha = 3.0> (b, h, q)", {"a": (8, 12), "b": (8, 10), "q": (10, 1)}, 56, "Gemm"),
    "gemm, matmul": (ROWS, "h = Gemm <alpha = 0.5, transB = 1> (x, a) y = MatMul (h, b)", {"a": (8, 12), "b": (8, 10)}, 56, "MatMul"),
    "gemm with bias, matmul": (ROWS, "h = Gemm <alpha = 0.5, beta = 3.0> (x, a, p) y = MatMul (h, b)", {**RIGHT, "p": (8,)}, 54, "Gemm"),
    "gemm with row, matmul": (ROWS, "h = Gemm <transB = 1> (x, a, p) y = MatMul (h, b)", {"a": (8, 12), "b": (8, 10), "p": (1, 8)}, 54, "Gemm"),
    "gemm with scalar, matmul": (ROWS, "h = Gemm <beta = 0.5> (x, a, p) y = MatMul (h, b)", {**RIGHT, "p": np.float32(1.5)}, 47, "Gemm"),
    "gemm with bias, left, matmul": (COLUMNS, "h = Gemm <beta = 3.0> (a, x, p) y = MatMul (b, h)", {**LEFT, "p": (8, 1)}, 54, "Gemm"),
    "gemm, gemm": (ROWS, "h = Gemm <alpha = -2.0> (x, a) y = Gemm <alpha = 0.5, beta = 3.0> (h, b, q)", {**RIGHT, "q": (10,)}, 56, "Gemm"),
    "gemm, gemm, biases": (ROWS, "h = Gemm <alpha = -2.0, beta = 0.5> (x, a, p) y = Gemm <alpha = 0.5, beta = 3.0> (h, b, q)", {**RIGHT, "p": (8,), "q": (10,)}, 64, "Gemm"),
    "gemm, gemm, A's bias": (ROWS, "h = Gemm (x, a, p) y = Gemm <alpha = 0.5, beta = 3.0, transB = 1> (h, b)", {"a": (12, 8), "b": (10, 8), "p": (8,)}, 54, "Gemm"),
    "gemm, gemm, scalars": (ROWS, "h = Gemm (x, a, p) y = Gemm <beta = 3.0> (h, b, q)", {**RIGHT, "p": np.ones(1, np.float32), "q": np.ones((1, 1), np.float32)}, 48, "Gemm"),
    "gemm, gemm, beta 0": (ROWS, "h = Gemm <beta = 0.0> (x, a, p) y = Gemm (h, b, q)", {**RIGHT, "p": (8,), "q": (10,)}, 64, "Gemm"),
    "gemm, gemm, left": (COLUMNS, "h = Gemm <alpha = 2.0> (a, x, p) y = Gemm <alpha = 0.5, transA = 1> (b, h, q)", {"a": (8, 12), "b": (8, 10), "p": (8, 1), "q": (10, 1)}, 64, "Gemm"),
    "opset 6": (ROWS, "h = MatMul (x, a) y = MatMul (h, b)", RIGHT, 56, "MatMul"),
    "opset 9": (ROWS, "h = Gemm (x, a, p) y = Gemm (h, b, q)", {**RIGHT, "p": (8,), "q": (10,)}, 64, "Gemm"),
}  # fmt: skip


@pytest.mark.parametrize("case", MATRICES)
@pytest.mark.parametrize("ir", [3, 8])
def test_matrices(case, ir):
    inputs, nodes, weights, saved, op = MATRICES[case]
    opset = int(case.split()[1]) if case.startswith("opset") else 17
    # 12 × 8 and 8 × 10 are 176 elements, 12 × 10 are 120.
    shape = re.findall(r"\d+", inputs)
    rows = int(np.prod([int(n) for n in shape])) // 12
    before = built(inputs, nodes, weights, opset=opset, ir=ir)
    new = check(before, (96, 80, 120), saved, (rows, rows))
    assert [node.op_type for node in new.graph.node if node.op_type != "Constant"] == [op]


ADDS: dict[str, tuple[str, str, dict[str, Any], int, list[str]]] = {
    # inputs, nodes, weights, parameters saved, the nodes that are left
    "between": (ROWS, "h = MatMul (x, a) s = Add (h, p) y = MatMul (s, b)", {**RIGHT, "p": (8,)}, 54, ["MatMul", "Add"]),
    "between, constant first": (ROWS, "h = MatMul (x, a) s = Add (p, h) y = MatMul (s, b)", {**RIGHT, "p": (8,)}, 54, ["MatMul", "Add"]),
    "between, batch": ("float[2,3,5,12] x", "h = MatMul (x, a) s = Add (h, p) y = MatMul (s, b)", {**RIGHT, "p": (8,)}, 54, ["MatMul", "Add"]),
    "between, vector": ("float[12] x", "h = MatMul (x, a) s = Add (h, p) y = MatMul (s, b)", {**RIGHT, "p": (8,)}, 54, ["MatMul", "Add"]),
    "of a scalar": (ROWS, "h = MatMul (x, a) s = Add (h, p) y = MatMul (s, b)", {**RIGHT, "p": np.float32(1.5)}, 47, ["MatMul", "Add"]),
    "both": ("float[2,5,12] x", "h = MatMul (x, a) s = Add (h, p) m = MatMul (s, b) y = Add (m, q)", {**RIGHT, "p": (8,), "q": (10,)}, 64, ["MatMul", "Add"]),
    "both, constants first": (ROWS, "h = MatMul (x, a) s = Add (p, h) m = MatMul (s, b) y = Add (q, m)", {**RIGHT, "p": (8,), "q": (10,)}, 64, ["MatMul", "Add"]),
    "both, the second of a scalar": (ROWS, "h = MatMul (x, a) s = Add (h, p) m = MatMul (s, b) y = Add (m, q)", {**RIGHT, "p": (8,), "q": np.float32(0.5)}, 55, ["MatMul", "Add"]),
    "behind only": (ROWS, "h = MatMul (x, a) m = MatMul (h, b) y = Add (m, q)", {**RIGHT, "q": (10,)}, 56, ["MatMul", "Add"]),
    "gemm": (ROWS, "h = MatMul (x, a) s = Add (h, p) y = Gemm <alpha = 0.5> (s, b)", {**RIGHT, "p": (8,)}, 54, ["Gemm"]),
    "gemm with bias": (ROWS, "h = MatMul (x, a) s = Add (h, p) y = Gemm <beta = 2.0, transB = 1> (s, b, q)", {"a": (12, 8), "b": (10, 8), "p": (8,), "q": (10,)}, 64, ["Gemm"]),
    "behind a gemm with bias": (ROWS, "h = Gemm <alpha = 2.0, beta = 0.5> (x, a, p) m = MatMul (h, b) y = Add (m, q)", {**RIGHT, "p": (8,), "q": (10,)}, 64, ["MatMul", "Add"]),
    "of data, behind": (ROWS, "h = MatMul (x, a) s = Add (h, p) m = MatMul (s, b) n = Relu (m) y = Add (m, n)", {**RIGHT, "p": (8,)}, 54, ["MatMul", "Add", "Relu", "Add"]),
    "of two axes, behind": (ROWS, "h = MatMul (x, a) s = Add (h, p) m = MatMul (s, b) y = Add (m, q)", {**RIGHT, "p": (8,), "q": (5, 10)}, 54, ["MatMul", "Add", "Add"]),
    "returned": (ROWS, "h = MatMul (x, a) s = Add (h, p) z = MatMul (s, b) y = Neg (z)", {**RIGHT, "p": (8,)}, 54, ["MatMul", "Add", "Neg"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ADDS)
@pytest.mark.parametrize("ir", [3, 8])
def test_an_add_behind_a_matmul_is_its_bias(case, ir):
    inputs, nodes, weights, saved, ops = ADDS[case]
    before = built(inputs, nodes, weights, ir=ir)
    after, (made,) = merge(before)
    old, new = before.model.proto, after.model.proto
    assert_computes(old, new)
    assert [node.op_type for node in new.graph.node if node.op_type != "Constant"] == ops
    assert made.elements == (96, 80, 120)
    assert made.saved == saved == parameters(before.model) - parameters(after.model)
    assert after.chains == {"layer n.h": ((made.second,),)}
    names = [node.name for node in new.graph.node]
    assert len(set(names)) == len(names)
    read = {name for node in new.graph.node for name in node.input}
    assert {tensor.name for tensor in new.graph.initializer} <= read
    assert merge(after) == (after, ())


@pytest.mark.parametrize(
    ("inputs", "shapes", "product"),
    [
        (IMAGE, (CONV["a"], CONV["b"]), "mchw,fm->fchw"),
        (POINTS, (P, Q), "mc,fmhw->fchw"),
    ],
)
def test_the_certificate_of_a_product_of_kernels_is_that_of_its_rounding(inputs, shapes, product):
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    before = built(inputs, "h = Conv (x, a) y = Conv (h, b)", dict(zip("ab", weights, strict=True)))
    after, (made,) = merge(before)
    (stored,) = map(numpy_helper.to_array, after.model.proto.graph.initializer)
    maps = [weight.astype(np.float64).reshape([n for n in weight.shape if n > 1]) for weight in weights]
    exact = np.einsum(product, *maps)
    lost = np.linalg.norm(exact - stored) / np.linalg.norm(exact)
    assert lost < made.certificate.frobenius[0] == pytest.approx(lost, rel=1e-4)


def test_a_row_of_layers_with_adds_becomes_one():
    """As exporters write linear layers of a sequence."""
    nodes = (
        "h = MatMul (x, a) s = Add (h, p) i = MatMul (s, b) t = Add (i, q) j = MatMul (t, c) y = Add (j, r)"
    )
    weights = {"a": (12, 8), "b": (8, 6), "c": (6, 5), "p": (8,), "q": (6,), "r": (5,)}
    before = built("float[2,5,12] x", nodes, weights, chained=("n.h", "n.i", "n.j"))
    after, made = merge(before)
    assert len(made) == 2
    assert_computes(before.model.proto, after.model.proto)
    assert [node.op_type for node in after.model.proto.graph.node] == ["MatMul", "Add"]
    assert parameters(after.model) == 12 * 5 + 5
    assert after.chains == {f"layer {name}": (("n.j",),) for name in ("n.h", "n.i", "n.j")}


def test_before_opset_7_an_add_stays_where_it_is():
    nodes = "h = MatMul (x, a) s = Add (h, p) y = MatMul (s, b)"
    assert merge(built(ROWS, nodes, {**RIGHT, "p": (8,)}, opset=7))[1]
    nodes = nodes.replace("Add (", "Add <broadcast = 1> (")
    assert merge(built(ROWS, nodes, {**RIGHT, "p": (8,)}, opset=6))[1] == ()


# --- what is left alone ---------------------------------------------------------------------------

PAIR = "h = MatMul (x, a) y = MatMul (h, b)"
NORM = {name: np.linspace(0.5, 1.5, 24).astype(np.float32) for name in "skmv"}
ALONE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "two readers": (ROWS, f"{PAIR} z = Neg (h)", RIGHT),
    "read twice": ("float[8,12] x", "h = MatMul (x, a) y = MatMul (h, h)", {"a": (12, 8)}),
    "returned": (ROWS, "z = MatMul (x, a) y = MatMul (z, b)", RIGHT),
    "relu between": (ROWS, "h = MatMul (x, a) r = Relu (h) y = MatMul (r, b)", RIGHT),
    "batchnorm between": (IMAGE, "h = Conv (x, a) n = BatchNormalization (h, s, k, m, v) y = Conv (n, b)", {**CONV, **NORM}),
    "larger": (ROWS, PAIR, {"a": (12, 4), "b": (4, 10)}),
    "as large": (ROWS, PAIR, {"a": (12, 6), "b": (6, 12)}),
    "as large, but for a bias": (ROWS, "h = Gemm (x, a, p) y = Gemm (h, b, q)", {"a": (12, 6), "b": (6, 12), "p": (6,), "q": (12,)}),
    "smaller, but for a bias": (ROWS, "h = Gemm (x, a, p) y = MatMul (h, b)", {"a": (12, 6), "b": (6, 11), "p": np.ones(1, np.float32)}),
    "weight of A is shared": (ROWS, f"{PAIR} z = Neg (a)", RIGHT),
    "weight of B is shared": (ROWS, f"{PAIR} z = Neg (b)", RIGHT),
    "weight of A is returned": (ROWS, "z = Identity (a) h = MatMul (x, z) y = MatMul (h, b)", RIGHT),
    "one weight for both": ("float[5,8] x", "h = MatMul (x, a) y = MatMul (h, a)", {"a": (8, 8)}),
    "view of A's weight": (ROWS, "t = Transpose <perm = [1,0]> (a) h = MatMul (x, t) y = MatMul (h, b)", {"a": (8, 12), "b": (8, 10)}),
    "view of B's weight": (ROWS, "t = Identity (b) h = MatMul (x, a) y = MatMul (h, t)", RIGHT),
    "cast weight": (ROWS, "t = Cast <to = 1> (b) h = MatMul (x, a) y = MatMul (h, t)", {"a": (12, 8), "b": np.ones((8, 10), np.float16)}),
    "computed weight": (ROWS, "t = Neg (b) h = MatMul (x, a) y = MatMul (h, t)", RIGHT),
    "weights on different sides": ("float[5,12] x", "h = MatMul (x, a) y = MatMul (b, h)", {"a": (12, 8), "b": (2, 5)}),
    "batch of matrices": ("float[2,5,12] x", PAIR, {"a": (12, 8), "b": (2, 8, 10)}),
    "vector": (ROWS, PAIR, {"a": (12, 8), "b": (8,)}),
    "A's data transposed": (COLUMNS, "h = Gemm <transA = 1> (x, a) y = MatMul (h, b)", RIGHT),
    "B's data transposed": ("float[8,12] x", "h = Gemm (x, a) y = Gemm <transA = 1> (h, b)", RIGHT),
    "bias of A by rows": (ROWS, "h = Gemm (x, a, p) y = MatMul (h, b)", {**RIGHT, "p": (5, 1)}),
    "bias of A by elements": (ROWS, "h = Gemm (x, a, p) y = MatMul (h, b)", {**RIGHT, "p": (5, 8)}),
    "bias of A by two rows": ("float[2,12] x", "h = Gemm (x, a, p) y = MatMul (h, b)", {**RIGHT, "p": (2, 8)}),
    "bias of A by two columns": ("float[12,2] x", "h = Gemm (a, x, p) y = MatMul (b, h)", {**LEFT, "p": (8, 2)}),
    "bias of B by elements": (ROWS, "h = Gemm (x, a, p) y = Gemm (h, b, q)", {**RIGHT, "p": (8,), "q": (5, 10)}),
    "bias of A is shared": (ROWS, "h = Gemm (x, a, p) y = MatMul (h, b) z = Neg (p)", {**RIGHT, "p": (8,)}),
    "bias of B is shared": (ROWS, "h = Gemm (x, a, p) y = Gemm (h, b, q) z = Neg (q)", {**RIGHT, "p": (8,), "q": (10,)}),
    "bias of A is computed": (ROWS, "t = Neg (p) h = Gemm (x, a, t) y = MatMul (h, b)", {**RIGHT, "p": (8,)}),
    "add of two axes": (ROWS, "h = MatMul (x, a) s = Add (h, p) y = MatMul (s, b)", {**RIGHT, "p": (1, 8)}),
    "add of data": (ROWS, "h = MatMul (x, a) t = Neg (h) s = Add (h, t) y = MatMul (s, b)", RIGHT),
    "add of itself": (ROWS, "h = MatMul (x, a) s = Add (h, h) y = MatMul (s, b)", RIGHT),
    "add of what is shared": (ROWS, "h = MatMul (x, a) s = Add (h, p) y = MatMul (s, b) z = Neg (p)", {**RIGHT, "p": (8,)}),
    "add that is returned": (ROWS, "h = MatMul (x, a) z = Add (h, p) y = MatMul (z, b)", {**RIGHT, "p": (8,)}),
    "add between, on the left": (COLUMNS, "h = MatMul (a, x) s = Add (h, p) y = MatMul (b, s)", {**LEFT, "p": (5,)}),
    "add between, then relu": (ROWS, "h = MatMul (x, a) s = Add (h, p) r = Relu (s) y = MatMul (r, b)", {**RIGHT, "p": (8,)}),
    "add behind a conv": (IMAGE, "h = Conv (x, a) s = Add (h, p) y = Conv (s, b)", {"a": (4, 12, 3, 3), "b": (4, 4, 1, 1), "p": (4,)}),
    "add behind a gemm": (ROWS, "h = Gemm (x, a) s = Add (h, p) y = MatMul (s, b)", {**RIGHT, "p": (8,)}),
    "add that widens B": (ROWS, "h = MatMul (x, a) s = Add (h, p) m = MatMul (s, b) y = Add (m, q)", {"a": (12, 8), "b": (8, 1), "p": (8,), "q": (10,)}),
    "two adds": (ROWS, "h = MatMul (x, a) s = Add (h, p) t = Add (s, q) y = MatMul (t, b)", {**RIGHT, "p": (8,), "q": (8,)}),
    "groups in A": (IMAGE, "h = Conv <group = 2> (x, a) y = Conv (h, b)", {"a": (24, 6, 3, 3), "b": (4, 24, 1, 1)}),
    "groups in B": (IMAGE, "h = Conv (x, a) y = Conv <group = 2> (h, b)", {"a": (24, 12, 3, 3), "b": (4, 12, 1, 1)}),
    "groups in both": (IMAGE, "h = Conv <group = 2> (x, a) y = Conv <group = 2> (h, b)", {"a": (24, 6, 3, 3), "b": (4, 12, 1, 1)}),
    "two spatial kernels": (IMAGE, "h = Conv (x, a) y = Conv (h, b)", {"a": (24, 12, 3, 3), "b": (4, 24, 3, 3)}),
    "rows, then columns": (IMAGE, "h = Conv (x, a) y = Conv (h, b)", {"a": (24, 12, 1, 3), "b": (4, 24, 3, 1)}),
    "strided A": (POINTS, "h = Conv <strides = [2,2]> (x, a) y = Conv (h, b)", {"a": P, "b": Q}),
    "padded A": (POINTS, "h = Conv <pads = [1,1,1,1]> (x, a) y = Conv (h, b)", {"a": P, "b": Q}),
    "strided 1×1 B": (IMAGE, "h = Conv (x, a) y = Conv <strides = [2,2]> (h, b)", CONV),
    "padded 1×1 B": (IMAGE, "h = Conv (x, a) y = Conv <pads = [0,0,1,1]> (h, b)", CONV),
    "A's bias under B's pads": (POINTS, "h = Conv (x, a, p) y = Conv <pads = [1,1,1,1]> (h, b)", {"a": P, "b": Q, "p": (24,)}),
    "A's bias under B's auto_pad": (POINTS, 'h = Conv (x, a, p) y = Conv <auto_pad = "SAME_UPPER"> (h, b)', {"a": P, "b": Q, "p": (24,)}),
    "more outputs than inputs": (POINTS, "h = Conv (x, a) y = Conv <pads = [2,1,1,1]> (h, b)", {"a": P, "b": Q}),
    "transposed convolution": (IMAGE, "h = Conv (x, a) y = ConvTranspose (h, b)", {"a": (24, 12, 1, 1), "b": (24, 4, 1, 1)}),
    "two einsums": (ROWS, 'h = Einsum <equation = "ij,jk->ik"> (x, a) y = Einsum <equation = "ij,jk->ik"> (h, b)', RIGHT),
    "result as a weight": ("float[4,12,3,3] x", "h = Conv (x, a) y = Conv (c, h)", {"a": (8, 12, 3, 3), "c": (1, 8, 5, 5)}),
    "overflow": (ROWS, PAIR, {"a": np.full((12, 8), 1e20, np.float32), "b": np.full((8, 10), 1e20, np.float32)}),
    "infinite": (ROWS, PAIR, {"a": np.full((12, 8), np.inf, np.float32), "b": (8, 10)}),
    "infinite bias": (ROWS, "h = Gemm (x, a, p) y = MatMul (h, b)", {**RIGHT, "p": np.full(8, 3e38, np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("case", ALONE)
def test_left_alone(case):
    inputs, nodes, weights = ALONE[case]
    before = built(inputs, nodes, weights, chained=("n.h", "n.z", "n.t"))
    onnx.checker.check_model(before.model.proto, full_check=True)
    run(before.model.proto, feed_of(before.model.proto))  # it is no error that leaves it alone
    data = before.model.proto.SerializeToString(deterministic=True)
    after, made = merge(before)
    assert after is before
    assert made == ()
    assert before.model.proto.SerializeToString(deterministic=True) == data


@pytest.mark.parametrize(
    ("inputs", "nodes", "weights"),
    [
        (ROWS, PAIR, {"a": (12, 8), "b": (7, 10)}),
        (IMAGE, "h = Conv (x, a) y = Conv (h, b)", {**CONV, "b": (4, 23, 1, 1)}),
        (IMAGE, "h = Conv (x, a) y = Conv (h, b)", {**CONV, "b": (4, 24, 1)}),
        (IMAGE, "h = Conv (x, a, p) y = Conv (h, b)", {**CONV, "p": (1,)}),
        (IMAGE, "h = Conv (x, a, p) y = Conv (h, b, q)", {**CONV, "p": (24,), "q": (1, 4)}),
        (IMAGE, "h = Conv (x, a) y = Conv <strides = [1]> (h, b)", CONV),
        (ROWS, "h = Gemm (x, a, p) y = MatMul (h, b)", {**RIGHT, "p": (7,)}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_left_alone(inputs, nodes, weights):
    text = f"g ({inputs}) => (float[2] y) {{ {nodes} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    proto.graph.initializer.extend(tensors(**weights))
    for node in proto.graph.node:
        node.name = f"n.{node.output[0]}"
    assert merge(of(proto, "n.h"))[1] == ()


@pytest.mark.parametrize("node", ["n.h", "n.y"])
def test_a_node_that_the_user_wants_left_alone_merges_with_none(node):
    before = built(ROWS, PAIR, RIGHT)
    assert merge(before, spared={("", node)}) == (before, ())
    assert len(merge(before, spared={("", "n.x"), ("other", node)})[1]) == 1


def test_another_domain_is_left_alone():
    proto = model(
        "g (float[5,12] x) => (float[5,10] y) { h = local.MatMul (x, a) y = MatMul (h, b) }",
        functions='<domain: "local", opset_import: ["" : 17]> MatMul (p, q) => (r) { r = MatMul (p, q) }',
        **RIGHT,
    )
    assert merge(of(named(proto), "n.h", "n.y"))[1] == ()


def test_before_opset_7_a_gemm_keeps_its_bias():
    nodes = "h = Gemm <broadcast = 1> (x, a, p) y = MatMul (h, b)"
    before = built(ROWS, nodes, {**RIGHT, "p": (8,)}, opset=6)
    assert merge(before)[1] == ()


@pytest.mark.parametrize(
    ("chains", "merges"),
    [
        ({}, False),
        ({"one": (("n.h",),)}, True),
        ({"one": (("n.y",),)}, True),
        ({"one": (("n.h",),), "two": (("n.y",),)}, True),
        ({"one": (("n.h", "n.y"),)}, False),
        ({"one": (("n.x",),)}, False),
    ],
)
def test_one_of_them_belongs_to_a_chain_and_they_are_not_the_factors_of_one_layer(chains, merges):
    before = replace(built(ROWS, PAIR, RIGHT), chains=chains)
    after, made = merge(before)
    assert bool(made) == merges
    if merges:
        expected = Merge("n.h", "n.y", tuple(sorted(chains)), (96, 80, 120), 56, made[0].certificate)
        assert made[0] == expected
        assert after.chains == dict.fromkeys(chains, (("n.y",),))


def test_a_name_of_several_nodes_is_no_chains():
    before = built(ROWS, f"{PAIR} z = Neg (x)", RIGHT)
    before.model.proto.graph.node[2].name = "n.h"
    assert merge(before)[1] == ()


# --- constants, names, notes ----------------------------------------------------------------------


@pytest.mark.parametrize("held", ["a", "b", "ab", "abpq"])
@pytest.mark.parametrize("ir", [3, 8, 10])
def test_constant_nodes(held, ir):
    nodes = "h = Gemm <beta = 0.5> (x, a, p) y = Gemm (h, b, q)"
    proto = model(f"g ({ROWS}) => (float[] y) {{ {nodes} }}", ir=ir)
    arrays = {t.name: t for t in tensors(**RIGHT, p=(8,), q=(10,))}
    constants(proto.graph, *(arrays[name] for name in held))
    proto.graph.initializer.extend(arrays[name] for name in "abpq" if name not in held)
    new = check(of(named(proto), "n.h"), (96, 80, 120), 64, (5, 5))
    as_nodes = ir < 4 or "b" in held
    assert len(new.graph.initializer) == (0 if as_nodes else 2)
    assert [node.op_type for node in new.graph.node] == ["Constant"] * 2 * as_nodes + ["Gemm"]


@pytest.mark.parametrize("ir", [3, 8])
def test_inputs_of_initializers_go_with_them(ir):
    before = built(ROWS, PAIR, {**RIGHT, "unused": (3,)}, ir=ir)
    proto = before.model.proto
    listed = (("a", (12, 8)), ("b", (8, 10)), ("unused", (3,)))
    for name, shape in listed if ir >= 4 else ():
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    before = replace(of(proto, "n.h"), removed_inputs=("b0",))
    check(before, (96, 80, 120), 56, (5, 5))
    after, _ = merge(before)
    assert [value.name for value in after.model.proto.graph.input] == ["x", "unused"]
    assert after.removed_inputs == ("a", "b", "b0")


def test_what_is_said_about_them_goes_or_stays():
    before = built(ROWS, PAIR, {**RIGHT, "b_merged": (2,)}, ir=10, opset=21)
    proto = before.model.proto
    graph = proto.graph
    for name, shape in (("h", (5, 8)), ("a", (12, 8)), ("b_merged", (2,))):
        graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    for name in ("h", "b", "y"):
        graph.quantization_annotation.add(tensor_name=name)
    proto.metadata_props.add(key="onnx_lowrank.run", value="a run")
    for node, notes in zip(graph.node, ({"k": "1", "only a": "2"}, {"k": "3", "only b": "4"}), strict=True):
        node.doc_string = f"of {node.name}"
        for key, value in notes.items():
            node.metadata_props.add(key=key, value=value)
    new = check(of(proto, "n.h"), (96, 80, 120), 56, (5, 5))
    (node,) = new.graph.node
    assert (node.name, node.doc_string) == ("n.y", "of n.y")
    assert {e.key: e.value for e in node.metadata_props} == {"k": "3", "only b": "4", "only a": "2"}
    assert list(node.input) == ["x", "b_merged_2"]
    assert [value.name for value in new.graph.value_info] == ["b_merged"]
    assert [note.tensor_name for note in new.graph.quantization_annotation] == ["y"]
    assert new.metadata_props == proto.metadata_props


def test_a_nameless_node_gets_a_name():
    before = built(ROWS, PAIR, RIGHT)
    before.model.proto.graph.node[1].name = ""
    after, (made,) = merge(before)
    assert (made.first, made.second) == ("n.h", "y/merged")
    assert after.model.proto.graph.node[0].name == "y/merged"
    assert after.chains == {"layer n.h": (("y/merged",),)}


def test_a_nameless_kept_node_goes_by_its_output():
    before = built(ROWS, PAIR, RIGHT, chained=("n.y",))
    before.model.proto.graph.node[0].name = ""
    after, (made,) = merge(before)
    assert (made.first, made.second, made.layers) == ("h", "n.y", ("layer n.y",))
    assert after.chains == before.chains


def test_training_information_keeps_what_it_names():
    before = built(ROWS, PAIR, RIGHT)
    before.model.proto.training_info.add().algorithm.node.append(helper.make_node("Neg", ["h"], ["t"]))
    assert merge(before)[1] == ()


# --- scopes ---------------------------------------------------------------------------------------

BRANCHES = """g (float[5,12] x, bool c) => (float[5,10] y) {
  y = If (c) <then_branch = t () => (float[5,10] u) { h = MatMul (x, a) u = MatMul (h, b) },
              else_branch = e () => (float[5,10] v) { v = MatMul (x, d) }>
}"""


@pytest.mark.parametrize("inside", ["", "a", "b", "ab"])
@pytest.mark.parametrize("ir", [3, 8])
def test_branches(inside, ir):
    proto = model(BRANCHES, ir=ir)
    branch = proto.graph.node[0].attribute[0].g
    for node in branch.node:
        node.name = f"n.{node.output[0]}"
    arrays = {tensor.name: tensor for tensor in tensors(**RIGHT, d=(12, 10))}
    proto.graph.initializer.extend(arrays[name] for name in "abd" if name not in inside)
    named(proto)
    branch.initializer.extend(arrays[name] for name in "ab" if name in inside and ir >= 4)
    constants(branch, *(arrays[name] for name in "ab" if name in inside and ir < 4))
    before = of(proto, "n.h")
    after, (made,) = merge(before)
    new = after.model.proto
    onnx.checker.check_model(new, full_check=True)
    assert made.saved == 56 == parameters(before.model) - parameters(after.model)
    for taken in (True, False):
        feed = feed_of(proto) | {"c": np.array(taken)}
        assert difference(run(proto, feed), run(new, feed)) < 1e-6
    body = new.graph.node[-1].attribute[0].g
    assert [node.op_type for node in body.node if node.op_type != "Constant"] == ["MatMul"]
    if ir >= 4:
        assert [t.name for t in body.initializer] == (["b_merged"] if "b" in inside else [])
    assert new.graph.node[-1].attribute[1] == proto.graph.node[0].attribute[1]


def test_scopes_do_not_mix():
    text = BRANCHES.replace("{ h = MatMul (x, a) u", "{ u").replace(
        "{\n  y = If", "{ h = MatMul (x, a)\n  y = If"
    )
    proto = named(model(text, **RIGHT, d=(12, 10)))
    assert merge(of(proto, "n.h"))[1] == ()


def test_functions():
    proto = model(
        "g (float[5,12] x) => (float[5,10] y) { y = local.Two (x) }",
        functions='<domain: "local", opset_import: ["" : 17]> Two (x) => (y) { h = MatMul (x, a) y = MatMul (h, b) }',
        opset=17,
    )
    function = proto.functions[0]
    for node in function.node:
        node.name = f"n.{node.output[0]}"
    constants(function, *tensors(**RIGHT))
    after, (made,) = merge(of(proto, "n.y"))
    new = after.model.proto
    assert [node.op_type for node in new.functions[0].node] == ["Constant", "MatMul"]
    assert made.saved == parameters(load(proto)) - parameters(after.model)
    assert difference(run(proto, feed_of(proto)), run(new, feed_of(proto))) < 1e-6


def test_a_reference_to_a_functions_attribute_is_left_alone():
    proto = model(
        "g (float[5,12] x) => (float[5,10] y) { y = local.Two <t = 1.0> (x) }",
        functions='<domain: "local", opset_import: ["" : 17]> Two <t> (x) => (y) { h = MatMul (x, a) y = Gemm <alpha : float = @t> (h, b) }',
    )
    for node in proto.functions[0].node:
        node.name = f"n.{node.output[0]}"
    constants(proto.functions[0], *tensors(**RIGHT))
    assert merge(of(proto, "n.h"))[1] == ()


# --- several --------------------------------------------------------------------------------------


def test_three_become_one():
    nodes = "h = MatMul (x, a) g = MatMul (h, b) y = MatMul (g, c)"
    before = built(ROWS, nodes, {**RIGHT, "c": (10, 9)}, chained=("n.g",))
    after, made = merge(before)
    assert [(m.first, m.second, m.elements) for m in made] == [
        ("n.g", "n.y", (80, 90, 72)),
        ("n.h", "n.y", (96, 72, 108)),
    ]
    assert all(m.layers == ("layer n.g",) for m in made)
    assert after.chains == {"layer n.g": (("n.y",),)}
    assert [node.name for node in after.model.proto.graph.node] == ["n.y"]
    assert sum(m.saved for m in made) == parameters(before.model) - parameters(after.model)
    assert_computes(before.model.proto, after.model.proto)


def test_a_kept_operator_goes_into_both_factors_of_a_chain():
    """Once the first factor is a product, the plan's chain is no more."""
    before = built(
        ROWS,
        "h = MatMul (x, a) g = MatMul (h, b) y = MatMul (g, c)",
        {"a": (12, 100), "b": (100, 20), "c": (20, 9)},
    )
    before = replace(before, chains={"layer": (("n.g", "n.y"),)})
    after, made = merge(before)
    assert [(m.first, m.second, m.elements) for m in made] == [
        ("n.h", "n.g", (1200, 2000, 240)),
        ("n.g", "n.y", (240, 180, 108)),
    ]
    assert after.chains == {"layer": (("n.y",),)}
    assert_computes(before.model.proto, after.model.proto)


@pytest.mark.parametrize("missing", ["left", "right"])
def test_a_node_without_data_is_left_alone(missing):
    before = built(COLUMNS, "h = MatMul (a, x) y = MatMul (b, h)", LEFT)
    node = before.model.proto.graph.node[0]
    if missing == "right":
        del node.input[1:]
    else:
        node.input[0] = ""
    assert merge(before)[1] == ()


def test_only_as_long_as_it_pays():
    """The second and the third become a narrow matrix, which the first one had better feed."""
    nodes = "h = MatMul (x, a) g = MatMul (h, b) y = MatMul (g, c)"
    before = built("float[5,90] x", nodes, {"a": (90, 4), "b": (4, 30), "c": (30, 60)}, chained=("n.g",))
    after, made = merge(before)
    assert [(m.first, m.second, m.elements) for m in made] == [("n.g", "n.y", (120, 1800, 240))]
    assert after.chains == {"layer n.g": (("n.y",),)}
    assert_computes(before.model.proto, after.model.proto)


def test_the_largest_saving_goes_first_and_disjoint_pairs_go_together():
    nodes = "h = MatMul (x, a) r = Relu (h) g = MatMul (r, b) e = MatMul (g, c) s = Relu (e) f = MatMul (s, d) y = MatMul (f, k)"
    weights = {"a": (12, 8), "b": (8, 9), "c": (9, 8), "d": (8, 20), "k": (20, 6)}
    before = built(ROWS, nodes, weights, chained=("n.g", "n.f", "n.h"))
    after, made = merge(before)
    assert [(m.first, m.second, m.saved) for m in made] == [("n.f", "n.y", 232), ("n.g", "n.e", 80)]
    assert after.chains == {
        "layer n.g": (("n.e",),),
        "layer n.f": (("n.y",),),
        "layer n.h": (("n.h",),),
    }
    assert_computes(before.model.proto, after.model.proto)


def test_a_pair_that_overflows_leaves_its_nodes_to_others():
    huge = np.full((12, 8), 1e30, np.float32)
    nodes = "h = MatMul (x, a) g = MatMul (h, b) y = MatMul (g, c)"
    before = built(
        ROWS, nodes, {"a": huge, "b": np.full((8, 9), 1e30, np.float32), "c": (9, 8)}, chained=("n.g",)
    )
    _, made = merge(before)
    assert [(m.first, m.second) for m in made] == [("n.g", "n.y")]


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float", "float16", "bfloat16", "double"])
@pytest.mark.parametrize("op", ["Conv", "Gemm"])
def test_products_are_rounded_once(kind, op):
    dtype = {
        "float": np.float32,
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "double": np.float64,
    }[kind]
    rng = np.random.default_rng(5)
    shapes = {**CONV, "p": (24,), "q": (4,)}
    if op == "Gemm":
        shapes = {"a": (12, 8), "b": (8, 10), "p": (8,), "q": (10,)}
    weights = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    inputs = (IMAGE if op == "Conv" else ROWS).replace("float", kind)
    nodes = f"h = {op} (x, a, p) y = {op} (h, b, q)"
    proto = named(model(f"g ({inputs}) => ({kind}[] y) {{ {nodes} }}", **weights))
    after, (made,) = merge(of(proto, "n.h"))
    a, b, p, q = (weights[name].astype(np.float64) for name in "abpq")
    product = np.einsum("fm,mcij->fcij", b[:, :, 0, 0], a) if op == "Conv" else a @ b
    vector = (b[:, :, 0, 0] @ p if op == "Conv" else p @ b) + q
    stored = {t.name: numpy_helper.to_array(t) for t in after.model.proto.graph.initializer}
    assert set(stored) == {"b_merged", "b_merged_bias"} or set(stored) == {"b_merged", "n.y_merged_bias"}
    for exact, value in zip((product, vector), stored.values(), strict=True):
        assert value.dtype == dtype
        eps = float(ml_dtypes.finfo(dtype).eps)
        assert np.abs(value.astype(np.float64) - exact).max() <= (eps / 2 + 2.0**-50) * np.abs(exact).max()
    assert made.saved > 0
    if kind in ("float", "float16"):
        assert_computes(proto, after.model.proto, float(ml_dtypes.finfo(dtype).eps) / 2)


@pytest.mark.parametrize(("scale", "merges"), [(1.0, True), (100.0, False)])
def test_float16_that_overflows_is_not_made(scale, merges):
    weights = {name: np.full(shape, 30 * scale, np.float16) for name, shape in RIGHT.items()}
    text = f"g (float16[5,12] x) => (float16[] y) {{ {PAIR} }}"
    assert bool(merge(of(named(model(text, **weights)), "n.h"))[1]) == merges


def test_two_types_are_left_alone():
    proto = built(ROWS, PAIR, RIGHT).model.proto
    (b,) = [t for t in proto.graph.initializer if t.name == "b"]
    b.CopyFrom(numpy_helper.from_array(np.ones((8, 10)), "b"))
    assert merge(of(proto, "n.h"))[1] == ()


# --- data files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_data_files(tmp_path, shared):
    proto = built(ROWS, PAIR, {**RIGHT, "other": (8, 10)}).model.proto
    before = of(proto, "n.h")
    copy = ModelProto.FromString(proto.SerializeToString())
    onnx.save_model(
        copy, tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0
    )
    loaded = onnx.load(tmp_path / "in.onnx", load_external_data=False)
    if shared:
        inits = {t.name: t for t in loaded.graph.initializer}
        del inits["other"].external_data[:]
        inits["other"].external_data.extend(inits["b"].external_data)
        onnx.save(loaded, tmp_path / "in.onnx")
    stored = load(tmp_path / "in.onnx")
    with Spill() as spill:
        source = replace(before, model=replace(stored, files={**stored.files, **spill.files}))
        after, made = merge(source, spill.tensor)
        assert bool(made) != shared
        save(after.model, tmp_path / "out.onnx")
    if not shared:
        assert after.model.proto.graph.initializer[-1].data_location == TensorProto.EXTERNAL
        new = onnx.load(tmp_path / "out.onnx")
        assert_computes(proto, new)
        assert sum(int(np.prod(t.dims)) for t in new.graph.initializer) == 120 + 80


# --- with rewrite ---------------------------------------------------------------------------------

CHAINS = """
<ir_version: {ir}, opset_import: ["": 17]>
cnn (float[2, 8, 6, 6] x) => (float[] y) {{
  a = Conv <pads = [1, 1, 1, 1]> (x, first)
  b = Relu (a)
  c = Conv <pads = [1, 1, 1, 1]> (b, second)
  d = Conv (c, third)
  e = Relu (d)
  y = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (e, fourth)
}}
"""
KERNELS = {"first": (16, 8, 3, 3), "second": (32, 16, 3, 3), "third": (48, 32, 1, 1), "fourth": (8, 48, 3, 3)}


def cnn(ir: int) -> ModelProto:
    arrays = {name: tiny.decaying(n, *shape) for n, (name, shape) in enumerate(KERNELS.items())}
    return named(tiny.built(CHAINS.format(ir=ir), arrays))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # The decoder (32 × 6) and the encoder (5 × 32) are 5 × 6, and then the first encoder has rank 5, too.
        (
            ("second", "third"),
            [
                ("n.c", "n.d/encoder", ("second", "third"), (192, 160, 30), 322),
                ("n.c/encoder", "n.d/encoder", ("second", "third"), (864, 30, 720), 174),
            ],
        ),
        # The decoder (32 × 6) and the kept 48 × 32 are 48 × 6.
        (("second",), [("n.c", "n.d", ("second",), (192, 1536, 288), 1440)]),
        # The kept 32 × 16 × 3 × 3 and the encoder (5 × 32) are 5 × 16 × 3 × 3.
        (("third",), [("n.c", "n.d/encoder", ("third",), (4608, 160, 720), 4048)]),
        (("first", "fourth"), []),
        ((), []),
    ],
)
@pytest.mark.parametrize("ir", [3, 8, 10])
def test_chains_of_adjacent_layers(names, expected, ir):
    proto = cnn(ir)
    seen = found(proto)
    options = {
        "first": Option(Fold.ENCODE, 1, 4),
        "second": Option(Fold.ENCODE, 1, 6),
        "third": Option(Fold.ENCODE, 1, 5),
        "fourth": Option(Fold.DECODE, 1, 4),
    }
    before = rewritten(seen, {name: options[name] for name in names})
    after, made = merge(before)
    assert [(m.first, m.second, m.layers, m.elements, m.saved) for m in made] == expected
    assert sum(m.saved for m in made) == parameters(before.model) - parameters(after.model)
    assert set(after.chains) == set(before.chains)
    by_name = {node.name: node for node in after.model.proto.graph.node}
    for uses in after.chains.values():
        assert all(name in by_name for chain in uses for name in chain)
    assert_computes(before.model.proto, after.model.proto)
    fall = macs(before.model.proto) - macs(after.model.proto)
    assert fall == sum(
        72 * (first + second - product) for first, second, product in (m.elements for m in made)
    )
    assert after.model.proto.metadata_props == before.model.proto.metadata_props


def test_chains_name_the_product_in_both_layers():
    seen = found(cnn(8))
    before = rewritten(seen, {"second": Option(Fold.ENCODE, 1, 6), "third": Option(Fold.ENCODE, 1, 5)})
    assert before.chains == {"second": (("n.c/encoder", "n.c"),), "third": (("n.d/encoder", "n.d"),)}
    after, _ = merge(before)
    assert after.chains == {"second": (("n.d/encoder",),), "third": (("n.d/encoder", "n.d"),)}


def test_a_chain_alone_stays_at_any_rank():
    seen = found(built(ROWS, "y = MatMul (x, a)", {"a": (12, 10)}).model.proto)
    before = rewritten(seen, {"a": Option(Fold.ENCODE, 1, 10)})
    assert merge(before)[1] == ()


def test_uses_that_share_their_factors_are_left_alone():
    """The decoder of w feeds the encoder of v, but every use of w reads the same factors."""
    nodes = "h = MatMul (x, w) y = MatMul (h, v) z = MatMul (x, w)"
    seen = found(built("float[5,40] x", nodes, {"w": (40, 30), "v": (30, 20)}).model.proto)
    options = {"w": Option(Fold.ENCODE, 1, 4), "v": Option(Fold.ENCODE, 1, 3)}
    assert merge(rewritten(seen, options))[1] == ()
    alone = found(built("float[5,40] x", nodes.split(" z")[0], {"w": (40, 30), "v": (30, 20)}).model.proto)
    assert [m.elements for m in merge(rewritten(alone, options))[1]] == [(120, 90, 12), (160, 12, 120)]


def test_the_same_model_gives_the_same_bytes():
    seen = found(cnn(10))
    options = {"second": Option(Fold.ENCODE, 1, 6), "third": Option(Fold.ENCODE, 1, 5)}
    data = set()
    for _ in range(3):
        before = rewritten(seen, options)
        held = before.model.proto.SerializeToString(deterministic=True)
        after, _ = merge(before)
        assert before.model.proto.SerializeToString(deterministic=True) == held
        data.add(after.model.proto.SerializeToString(deterministic=True))
    assert len(data) == 1


def test_notes_of_both_nodes():
    """From IR 10 on nodes say what was done; of two notes under one key the second node's stays."""
    seen = found(cnn(10))
    before = rewritten(seen, {"third": Option(Fold.ENCODE, 1, 5)})
    kept: NodeProto = next(node for node in before.model.proto.graph.node if node.name == "n.c")
    kept.metadata_props.add(key="author", value="somebody")
    after, _ = merge(before)
    node = next(node for node in after.model.proto.graph.node if node.name == "n.d/encoder")
    notes = {entry.key: entry.value for entry in node.metadata_props}
    assert notes["onnx_lowrank.layer"] == "third"
    assert notes["author"] == "somebody"
