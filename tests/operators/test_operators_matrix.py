"""Products of float64: ONNX Runtime fuses nothing for which its older versions have no kernel."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest

from onnx_lowrank.core.option import Option
from rewriting import draw, found, model, rewritten

GEMMS = list(itertools.product((0, 1), repeat=3))  # the weight's operand, transA, transB
SHAPES = [((5, 24), 1), ((24, 5), 0), ((3, 5, 24), 1), ((24,), 1)]


def check(proto, shape, folder):
    """At full rank, with every number of slices, ONNX Runtime computes the same without a fused product."""
    seen = found(proto)
    layer = seen.layer
    (fold,) = layer.folds
    given = {"x": np.random.default_rng(3).standard_normal(shape)}
    (wanted,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, given)
    for k in layer.slices[:2]:
        made = rewritten(seen, {layer.id: Option(fold, k, layer.full_rank(fold, k))}).model.proto
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
        (got,) = onnxruntime.InferenceSession(made.SerializeToString(), options).run(None, given)
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)
        fused = {node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node}
        assert "FusedMatMul" not in fused, "before version 1.26, its kernel is not for float64"
    return layer


@pytest.mark.parametrize("opset", [7, 10, 17])
@pytest.mark.parametrize(("operand", "left", "right"), GEMMS)
def test_gemms_of_float64(operand, left, right, opset, tmp_path):
    has_rows = not left if operand else right
    has_inputs_first = not right if operand else left
    shape = (5, 24) if has_rows else (24, 5)
    weight = (24, 20) if has_inputs_first else (20, 24)
    inputs = "x, w" if operand else "w, x"
    node = f"y = Gemm <transA = {left}, transB = {right}, alpha = 0.5> ({inputs}, b)"
    proto = model(
        f"g (double{list(shape)} x) => (double y) {{ {node} }}",
        opset,
        w=draw(np.random.default_rng(1), weight, np.float64),
        b=np.full((1, 1), 3.0),
    )
    assert check(proto, shape, tmp_path).c == 24


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize(("shape", "operand"), SHAPES)
def test_products_of_float64(shape, operand, opset, tmp_path):
    inputs, weight = ("x, w", (24, 20)) if operand else ("w, x", (20, 24))
    proto = model(
        f"g (double{list(shape)} x) => (double y) {{ y = MatMul ({inputs}) }}",
        opset,
        w=draw(np.random.default_rng(1), weight, np.float64),
    )
    assert len(check(proto, shape, tmp_path).slices) > 1
