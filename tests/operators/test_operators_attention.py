"""com.microsoft Attention computes the same after a rewrite, in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from fused import check_exact, check_narrow, feed, model
from onnx_lowrank import compress
from onnx_lowrank.core.layer import Positions
from onnx_lowrank.core.option import Fold, Option
from rewriting import found, rewritten, run

X = "float[2,5,24] x"
ATTENTION = "com.microsoft.Attention <num_heads = 4>"


@pytest.mark.parametrize("biased", [True, False])
def test_attention_is_exact_at_full_rank(biased):
    weights = {"w": (24, 96), **({"b": (96,)} if biased else {})}
    seen = check_exact(model(X, f"y = {ATTENTION} (x, w{', b' if biased else ''})", **weights))
    assert (seen.layer.f, seen.layer.c) == (96, 24)
    assert seen.layer.uses[0].positions == Positions(2, (5,), (5,))


def test_attention_with_sizes_of_its_own():
    sizes = "num_heads = 4, qkv_hidden_sizes = [16, 16, 32], unidirectional = 1"
    node = f"y = com.microsoft.Attention <{sizes}> (x, w, b)"
    check_exact(model(X, node, w=(24, 64), b=(64,)))


def test_attention_with_a_mask():
    proto = model(f"{X}, int32[2,5] m", f"y = {ATTENTION} (x, w, b, m)", w=(24, 96), b=(96,))
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    check_exact(proto, {"x": feed(model(X, "y = Identity (x)"))["x"], "m": mask})


def test_attention_with_a_past():
    node = f"y, p = {ATTENTION} (x, w, b, , past)"
    inputs = f"{X}, float[2,2,4,3,8] past"
    proto = model(inputs, node, "float[] y, float[] p", w=(24, 96), b=(96,))
    check_exact(proto)


def test_the_narrow_input_is_not_as_wide_as_the_heads():
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal((24, 6)) @ rng.standard_normal((6, 96))).astype(np.float32)
    proto = model(X, f"y = {ATTENTION} (x, w, b)", w=weight, b=(96,))
    check_narrow(proto, 6)
    new = rewritten(found(proto), {"w": Option(Fold.ENCODE, 1, 6)}).model.proto
    shapes = {tensor.name: tuple(tensor.dims) for tensor in new.graph.initializer}
    assert {(24, 6), (6, 96)} <= set(shapes.values())
    assert [node.op_type for node in new.graph.node] == ["MatMul", "Attention"]


def test_attention_is_compressed_from_end_to_end():
    rng = np.random.default_rng(2)
    weight = (rng.standard_normal((24, 8)) @ rng.standard_normal((8, 96))).astype(np.float32)
    proto = model("float[n,5,24] x", f"y = {ATTENTION} (x, w, b)", w=weight, b=(96,))
    data = {"x": rng.standard_normal((40, 5, 24)).astype(np.float32)}
    with compress(proto, 0.5, recipe="activation", calibration=data) as result:
        (row,) = result.report.layers
        assert row.op == "Attention"
        assert row.option is not None
        assert result.report.validation.worst < 1e-3


def test_attention_is_timed_on_its_own():
    proto = model(X, f"y = {ATTENTION} (x, w, b)", w=(24, 96), b=(96,))
    with compress(proto, 0.9, budget="latency", align=1) as result:
        assert result.report.timing is not None
        (wanted,), (got,) = run(proto, feed(proto)), run(result.proto, feed(proto))
        assert got.shape == wanted.shape


@pytest.mark.parametrize("shape", [(96,), (2, 24, 96)])
def test_a_weight_that_is_no_matrix_is_left_alone(shape):
    assert "no matrix" in found(model(X, f"y = {ATTENTION} (x, w)", w=shape)).reason
