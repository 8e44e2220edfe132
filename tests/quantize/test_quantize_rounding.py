"""What each kind says a weight becomes is what ONNX Runtime's tool stores."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from calibrating import run
from onnx_lowrank.quantize.fp16 import Half
from onnx_lowrank.quantize.int4 import Packed
from onnx_lowrank.quantize.int8 import Dynamic, Static
from onnx_lowrank.quantize.kind import affine, symmetric
from tiny import built, cnn, decaying

MATMUL = """
<ir_version: 8, opset_import: ["": 17]>
matmul (float[N, 40] x) => (float[N, 12] y) { y = MatMul (x, w) }
"""


def written(method, proto, tmp_path, *, is_large=False):
    onnx.save(proto, tmp_path / "in.onnx")
    feeds = [{"x": np.random.default_rng(1).standard_normal((4, 8, 6, 6)).astype(np.float32)}]
    method.write(tmp_path / "in.onnx", tmp_path / "out.onnx", feeds, is_large=is_large)
    return onnx.load(tmp_path / "out.onnx")


def stood_for(proto, name, axis):
    """The numbers that a quantized initializer stands for."""
    stored = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    values = stored[f"{name}_quantized"].astype(np.float64)
    scale, zero = (stored[f"{name}_{part}"].astype(np.float64) for part in ("scale", "zero_point"))
    if scale.size > 1:
        shape = [scale.size if n == axis % values.ndim else 1 for n in range(values.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return (values - zero) * scale


@pytest.mark.parametrize("method", [Static(), Dynamic("", is_signed=False)], ids=["static", "dynamic"])
def test_convolutions(method, tmp_path):
    made = written(method, cnn(), tmp_path)
    for name, seed in (("conv1", (1, 16, 8, 3, 3)), ("conv2", (2, 16, 16, 3, 3))):
        weight = decaying(*seed)
        rounded = method.rounded(weight[None], "Conv")[0]
        assert 0 < np.abs(rounded - weight).max() < 0.02 * np.abs(weight).max()
        np.testing.assert_allclose(rounded, stood_for(made, name, 0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("is_signed", [True, False])
def test_matrices(is_signed, tmp_path):
    weight, method = decaying(4, 40, 12), Dynamic("", is_signed=is_signed)
    made = written(method, built(MATMUL, {"w": weight}), tmp_path)
    rounded = method.rounded(weight.T[None], "MatMul")[0].T
    np.testing.assert_allclose(rounded, stood_for(made, "w", 1), rtol=1e-5, atol=1e-7)


STACK = """
<ir_version: 8, opset_import: ["": 17]>
stack (float[3, N, 40] x) => (float[3, N, 12] y) { y = MatMul (x, w) }
"""


@pytest.mark.parametrize("method", [Dynamic("", is_signed=True), Dynamic("", is_signed=False), Packed()])
@pytest.mark.parametrize("is_large", [True, False])
def test_stacks_of_matrices(method, is_large, tmp_path):
    weight = decaying(4, 120, 12).reshape(3, 40, 12)
    made = written(method, built(STACK, {"w": weight}), tmp_path, is_large=is_large)
    rounded = method.rounded(weight.swapaxes(1, 2), "MatMul").swapaxes(1, 2)
    x = np.stack([np.eye(40, dtype=np.float32)] * 3)
    np.testing.assert_allclose(run(made, x=x), rounded, rtol=0.02, atol=1e-6)
    if isinstance(method, Dynamic):
        stored = {each.name: numpy_helper.to_array(each) for each in made.graph.initializer}
        steps = stored["w_quantized"].astype(np.float64) - stored["w_zero_point"]
        np.testing.assert_allclose(rounded, steps * stored["w_scale"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [Packed(), Half()], ids=["int4", "fp16"])
def test_what_a_matrix_gives_for_the_identity(method, tmp_path):
    weight = decaying(5, 40, 12)
    made = written(method, built(MATMUL, {"w": weight}), tmp_path)
    rounded = method.rounded(weight.T[None], "MatMul")[0].T
    assert 0 < np.abs(rounded - weight).max() < 0.1 * np.abs(weight).max()
    np.testing.assert_allclose(run(made, x=np.eye(40, dtype=np.float32)), rounded, rtol=2e-3, atol=2e-6)


@given(seed=st.integers(0, 10_000))
def test_rounded_numbers_stay_where_they_are(seed):
    weight = np.random.default_rng(seed).standard_normal((2, 3, 37)).astype(np.float32)
    for method, operator in ((Static(), "Conv"), (Packed(), "MatMul"), (Half(), "Conv")):
        once = method.rounded(weight, operator)
        np.testing.assert_allclose(method.rounded(once, operator), once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("round_", [lambda w: symmetric(w, 127, (2,)), lambda w: affine(w, (2,))])
def test_features_without_numbers_and_no_more_than_half_a_step(round_):
    weight = np.random.default_rng(6).standard_normal((1, 3, 9)).astype(np.float32)
    weight[0, 1] = 0
    made = round_(weight)
    assert not made[0, 1].any()
    assert np.abs(made - weight).max() <= 0.51 * (weight.max() - weight.min()) / 127
