"""FusedMatMul, FusedGemm and FusedConv compute the same after a rewrite, in ONNX Runtime."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from fused import check_exact, check_narrow, model
from onnx_lowrank import compress
from onnx_lowrank.core.layer import Positions
from onnx_lowrank.core.option import Fold
from rewriting import found


def low(rank, *shape):
    """A weight of a rank, folded as the encode fold does."""
    rng = np.random.default_rng(5)
    flat = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, int(np.prod(shape[1:]))))
    return flat.reshape(shape).astype(np.float32)


@pytest.mark.parametrize(("right", "flip_x", "flip_w"), [*product((True, False), (0, 1), (0, 1))])
@pytest.mark.parametrize("alpha", [1.0, -0.5])
def test_a_fused_product_keeps_its_scale_and_transposes(right, flip_x, flip_w, alpha):
    weight = (20, 24) if right != bool(flip_w) else (24, 20)
    rows = (5, 20) if right != bool(flip_x) else (20, 5)
    names = ("x, w", flip_x, flip_w) if right else ("w, x", flip_w, flip_x)
    node = "y = com.microsoft.FusedMatMul <alpha = {:f}, transA = {}, transB = {}> ({})"
    proto = model(f"float[{rows[0]},{rows[1]}] x", node.format(alpha, names[1], names[2], names[0]), w=weight)
    seen = check_exact(proto)
    assert (seen.layer.f, seen.layer.c) == (24, 20)
    assert seen.layer.uses[0].positions == Positions(5)


def test_a_fused_product_of_a_batch_of_activations():
    check_exact(model("float[2,3,5,20] x", "y = com.microsoft.FusedMatMul <alpha = 2.0> (x, w)", w=(20, 24)))
    check_exact(model("float[2,20,5] x", "y = com.microsoft.FusedMatMul <transA = 1> (x, w)", w=(20, 24)))


@pytest.mark.parametrize("shape", [(3, 20, 24), (1, 20, 24)])
def test_a_batch_of_weights_is_left_alone(shape):
    proto = model("float[3,5,20] x", "y = com.microsoft.FusedMatMul (x, w)", w=shape)
    assert "batch of matrices" in found(proto).reason


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid", "Tanh"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("flip", [0, 1])
def test_a_fused_gemm_keeps_its_activation(activation, biased, flip):
    node = (
        f'y = com.microsoft.FusedGemm <activation = "{activation}", transB = {flip}, alpha = 0.5, beta = 2.0>'
    )
    weights = {"w": (24, 20) if flip else (20, 24), **({"b": (24,)} if biased else {})}
    seen = check_exact(model("float[5,20] x", f"{node} (x, w{', b' if biased else ''})", **weights))
    assert not seen.layer.uses[0].is_linear


CONVOLUTIONS = {
    "plain": ("", (16, 8, 3, 3)),
    "strided": ("strides = [2, 1], pads = [1, 0, 1, 2],", (16, 8, 3, 3)),
    "dilated": ("dilations = [2, 2], kernel_shape = [3, 3],", (16, 8, 3, 3)),
    "groups": ("group = 2,", (16, 4, 3, 3)),
    "same": ('auto_pad = "SAME_UPPER",', (16, 8, 3, 3)),
    "pointwise": ("", (16, 8, 1, 1)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("biased", [True, False])
def test_a_fused_conv_keeps_its_activation(name, biased):
    attributes, shape = CONVOLUTIONS[name]
    node = f'y = com.microsoft.FusedConv <{attributes} activation = "Relu"> (x, w{", b" if biased else ""})'
    check_exact(model("float[2,8,9,10] x", node, w=shape, **({"b": (16,)} if biased else {})))


def test_a_fused_conv_keeps_its_addend():
    node = 'y = com.microsoft.FusedConv <pads = [1, 1, 1, 1], activation = "Relu"> (x, w, b, z)'
    check_exact(model("float[2,8,6,6] x, float[2,16,6,6] z", node, w=(16, 8, 3, 3), b=(16,)))


def test_positions_of_a_fused_conv_follow_from_its_kernel():
    attributes = "kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]"
    node = f'y = com.microsoft.FusedConv <{attributes}, activation = "Relu"> (x, w)'
    use = found(model("float[2,8,9,10] x", node, w=(16, 8, 3, 3))).layer.uses[0]
    assert use.positions == Positions(2, (9, 10), (5, 5))


def test_a_weight_of_low_rank_is_exact_at_its_rank():
    check_narrow(
        model("float[5,20] x", "y = com.microsoft.FusedMatMul <alpha = 3.0> (x, w)", w=low(4, 20, 24)), 4
    )
    node = 'y = com.microsoft.FusedConv <activation = "Relu"> (x, w)'
    check_narrow(model("float[1,8,6,6] x", node, w=low(4, 16, 8, 3, 3)), 4, Fold.ENCODE)


def test_fused_operators_are_compressed_from_end_to_end():
    """The factors are fitted to what the layer reads; its result, behind a Relu, is not recovered."""
    proto = model(
        "float[n,20] x",
        'h = com.microsoft.FusedGemm <activation = "Relu"> (x, w, b) y = com.microsoft.FusedMatMul (h, v)',
        w=low(6, 20, 32),
        b=(32,),
        v=low(6, 32, 16),
    )
    data = {"x": np.random.default_rng(0).standard_normal((64, 20)).astype(np.float32)}
    for recipe, calibration in (("schatten", None), ("activation", data)):
        with compress(proto, 0.6, recipe=recipe, calibration=calibration) as result:
            assert result.report.reached <= 0.6
            assert {row.option is not None for row in result.report.layers} == {True}
            assert result.report.validation.worst < 1e-3
