"""Given inputs: a file is read as far as it is wanted."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from onnx_lowrank.engines.inputs import Spec, describe, read
from onnx_lowrank.errors import InputError

X = (Spec("x", np.dtype(np.float32), ("N", 4)),)
LARGE = 2**24


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": np.ones((2, 4), np.float32), "z": np.zeros((LARGE, 4), np.uint8)}, "no input 'z'"),
        ({"x": np.zeros((LARGE, 4), np.uint8)}, "is float32 in the model, but uint8"),
        ({"x": np.zeros((LARGE // 5, 5), np.float32)}, r"but \d+×5 was given: reshape it"),
        ({"y": np.zeros((LARGE // 4, 4), np.float32)}, "no input 'y'"),
    ],
)
def test_arrays_that_do_not_fit_are_not_unpacked(tmp_path, given, message):
    np.savez_compressed(tmp_path / "in.npz", **given)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            read(tmp_path / "in.npz", X)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_inputs_larger_than_the_bound_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("onnx_lowrank.files.arrays.MAX_BYTES", 4 * 4 * 100)
    np.savez_compressed(tmp_path / "in.npz", x=np.zeros((101, 4), np.float32))
    with pytest.raises(InputError, match=r"^The inputs .*in\.npz takes .* GiB, more than .* GiB: give"):
        read(tmp_path / "in.npz", X)
    np.savez_compressed(tmp_path / "in.npz", x=np.zeros((100, 4), np.float32))
    assert read(tmp_path / "in.npz", X)["x"].shape == (100, 4)
    assert read({"x": np.zeros((101, 4), np.float32)}, X)["x"].shape == (101, 4), "is in memory already"


def test_transposed_and_empty_arrays_are_inputs(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(4, 3).T
    np.savez(tmp_path / "in.npz", x=x)
    np.testing.assert_array_equal(read(tmp_path / "in.npz", X)["x"], x, strict=True)
    np.savez(tmp_path / "in.npz", x=np.zeros((0, 4), np.float32))
    assert read(tmp_path / "in.npz", X)["x"].shape == (0, 4)


def test_texts_are_objects_to_the_runtime(tmp_path):
    wanted = (Spec("t", np.dtype(object), ("N",)),)
    np.savez(tmp_path / "in.npz", t=np.array(["a", "bcd"]))
    given = read(tmp_path / "in.npz", wanted)["t"]
    assert (given.dtype, given.tolist()) == (np.dtype(object), ["a", "bcd"])


def test_inputs_are_described_one_by_one_unless_many_are_alike():
    past = {f"past.{i}": np.zeros((1, 3, 0, 8), np.float32) for i in range(6)}
    few = dict(list(past.items())[:3])
    ids = {"ids": np.zeros((1, 5), np.int64), "mask": np.zeros((1, 5), np.int64), "n": np.array(1.0)}
    assert describe(ids) == "ids int64 1×5, mask int64 1×5, n float64 scalar"
    assert describe(few) == ", ".join(f"past.{i} float32 1×3×0×8" for i in range(3))
    assert describe({**ids, **past}).endswith("scalar, past.0 to past.5 (6 inputs) float32 1×3×0×8")
