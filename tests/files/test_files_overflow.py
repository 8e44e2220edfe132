"""Arrays beyond a bound are in a file, with the same bits."""

import gc
import resource
import tempfile

import numpy as np
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.overflow import Overflow

ARRAYS = [
    np.arange(6.0).reshape(1, 2, 3),
    np.random.default_rng(0).standard_normal((2, 3, 5)),
    np.random.default_rng(1).standard_normal((4, 7)).T,
    np.empty((0, 3)),
    np.array(2.5),
]


@pytest.mark.parametrize("most", [0, 48, 1000])
def test_arrays_come_back(most):
    overflow = Overflow(most)
    held = [overflow.put(array) for array in ARRAYS]
    del overflow
    gc.collect()
    for give, array in zip([*held, *held], [*ARRAYS, *ARRAYS], strict=True):
        np.testing.assert_array_equal(give(), array, strict=True)


def test_only_the_first_arrays_stay_in_memory():
    overflow = Overflow(100)
    held = [overflow.put(array) for array in ARRAYS[:2]]
    assert [give() is array for give, array in zip(held, ARRAYS, strict=False)] == [True, False]


def test_without_a_file_there_is_no_folder_to_write_to(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    overflow = Overflow(48)
    overflow.put(ARRAYS[0])
    with pytest.raises(InputError, match=r"none cannot be written \(No such file or directory\): make room"):
        overflow.put(ARRAYS[1])


def test_a_full_disk_is_one_error():
    overflow = Overflow(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be written \(File too large\): make room there"):
            overflow.put(np.ones(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
