"""References to weights: the same numbers in the same layout, from a few bytes, in any process."""

from __future__ import annotations

import pickle

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import load
from onnx_lowrank.layers.find import read
from onnx_lowrank.layers.found import find_layers
from onnx_lowrank.work.weights import refer, reference
from rewriting import draw, model

NORM = {"s": np.linspace(0.5, 2, 8), "t": np.zeros(8), "m": np.zeros(8), "v": np.full(8, 0.8)}
NORM = {name: values.astype(np.float32) for name, values in NORM.items()}

# How operators and views lay weights out.
MODELS = {
    "conv": ("float[N,8,6,6] x", "y = Conv (x, w)", {"w": (8, 8, 3, 3)}),
    "grouped": ("float[N,8,6,6] x", "y = Conv <group = 2> (x, w)", {"w": (8, 4, 3, 3)}),
    "deconv": ("float[N,8,6,6] x", "y = ConvTranspose (x, w)", {"w": (8, 6, 3, 3)}),
    "grouped deconv": ("float[N,8,6,6] x", "y = ConvTranspose <group = 2> (x, w)", {"w": (8, 6, 3, 3)}),
    "matmul": ("float[N,8] x", "y = MatMul (x, w)", {"w": (8, 6)}),
    "batched": ("float[3,N,8] x", "y = MatMul (x, w)", {"w": (3, 8, 6)}),
    "left": ("float[8,N] x", "y = MatMul (w, x)", {"w": (6, 8)}),
    "gemm": ("float[N,8] x", "y = Gemm <transB = 1> (x, w)", {"w": (6, 8)}),
    "gather": ("int64[N] x", "y = Gather (w, x)", {"w": (30, 6)}),
    "transposed": ("float[N,8] x", "v = Transpose (w) y = MatMul (x, v)", {"w": (6, 8)}),
    "reshaped": ("float[N,8] x", "v = Reshape (w, z) y = MatMul (x, v)",
                 {"w": (2, 4, 6), "z": np.array([8, 6])}),
    # No view of the stored bytes shows these: they are a copy.
    "shuffled": ("float[N,8] x", "u = Transpose <perm = [1, 0, 2]> (w) v = Reshape (u, z) y = MatMul (x, v)",
                 {"w": (4, 2, 6), "z": np.array([8, 6])}),
    "batchnorm": ("float[N,8,6,6] x", "h = Conv (x, w) y = BatchNormalization (h, s, t, m, v)",
                  {"w": (8, 8, 3, 3), **NORM}),
}  # fmt: skip


def seen(name, folder=None, dtype=np.float32):
    inputs, nodes, weights = MODELS[name]
    proto = model(f"g ({inputs}) => (float[] y) {{ {nodes} }}", **weights)
    if folder is None:
        return find_layers(load(proto), {}, (), ())
    path = folder / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=100)
    return find_layers(load(path), {}, (), ())


def travelled(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - it is ours


@pytest.mark.parametrize("is_external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("name", MODELS)
def test_a_reference_reads_the_weight_in_its_layout(tmp_path, name, is_external):
    found = seen(name, tmp_path if is_external else None)
    (binding,) = found.bindings
    wanted = read(found.model, found.walk, binding)
    made = reference(found.model, found.walk, binding)
    for own in (made, travelled(made)):
        if name == "batchnorm":
            scale = binding.layer.batchnorm.scale.reshape(1, 8, 1, 1, 1)
            np.testing.assert_array_equal(own.read(), wanted.astype(np.float64) * scale)
            assert own.read().dtype == np.float64
        else:
            np.testing.assert_array_equal(own.read(), wanted, strict=True)
            assert own.read().strides == wanted.strides
        assert own.dtype == np.float32
        assert own.size == wanted.size
    if is_external and name != "shuffled":
        assert made.source == (tmp_path / "m.data").resolve()
        assert made.offset >= 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0)])
def test_arrays_of_every_dtype_and_order_travel(tmp_path, dtype, axes):
    array = draw(np.random.default_rng(0), (3, 4, 5), dtype)
    path = tmp_path / "data"
    path.write_bytes(b"\xff" * 7 + array.tobytes())
    for stored in (array, np.asarray(np.memmap(path, dtype, "r", 7, array.shape))):
        view = stored.transpose(axes)
        own = travelled(refer(view))
        assert own.dtype == dtype
        np.testing.assert_array_equal(own.read(), view, strict=True)
        assert own.read().strides == view.strides


def test_a_part_of_an_array_travels_without_the_rest():
    array = np.arange(10_000.0).reshape(1, 100, 100)
    part = array[:, ::50, ::50]
    own = refer(part)
    np.testing.assert_array_equal(own.read(), part)
    assert len(pickle.dumps(own)) < 1000


@pytest.mark.parametrize("transposed", [False, True])
def test_a_large_external_weight_is_a_small_reference(tmp_path, transposed):
    size = 4096
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(4 * size * size + 64)
    array = np.asarray(np.memmap(path, np.float32, "r", 64, (1, size, size)))
    own = refer(array.swapaxes(1, 2) if transposed else array)
    assert len(pickle.dumps(own)) < 1000
    assert own.nbytes == 4 * size * size


def test_reading_takes_what_a_reference_says():
    array = np.zeros((1, 8, 16), np.float16)
    assert refer(array).nbytes == 256
    assert refer(array, np.ones(8)).nbytes == 256 + 8 * 128


@pytest.mark.parametrize("change", ["cut", "remove"])
def test_a_data_file_that_changed_is_an_error_that_names_it(tmp_path, change):
    found = seen("matmul", tmp_path)
    made = reference(found.model, found.walk, found.bindings[0])
    data = tmp_path / "m.data"
    if change == "cut":
        data.write_bytes(data.read_bytes()[:20])
    else:
        data.unlink()
    with pytest.raises(InputError, match=r"m\.data cannot be read .* run again"):
        made.read()
