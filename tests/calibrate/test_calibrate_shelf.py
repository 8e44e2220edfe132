"""Arrays on a shelf: in memory up to a bound, and otherwise on disk."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest

from onnx_lowrank.calibrate import shelf
from onnx_lowrank.calibrate.shelf import Shelf
from onnx_lowrank.errors import InputError

Usage = namedtuple("Usage", "total used free")
ONE = np.arange(6.0).reshape(2, 3)  # 48 bytes


@pytest.mark.parametrize(("memory", "files"), [(0, 4), (47, 4), (48, 3), (100, 2), (1000, 0)])
def test_what_exceeds_the_bound_is_in_files(memory, files, tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "MEMORY", memory)
    kept = Shelf(tmp_path)
    for number in range(4):
        kept.put(("x", number > 1), number, ONE + number)
    assert len(list(tmp_path.iterdir())) == files
    for number in range(4):
        np.testing.assert_array_equal(kept.get(("x", number > 1), number), ONE + number)
        kept.drop(("x", number > 1), number)
    assert (list(tmp_path.iterdir()), kept.used) == ([], 0)


def test_dropped_arrays_make_room_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "MEMORY", ONE.nbytes)
    kept = Shelf(tmp_path)
    kept.put(("x", False), 0, ONE)
    kept.drop(("x", False), 0)
    kept.put(("y", False), 0, ONE)
    assert list(tmp_path.iterdir()) == []


def test_little_free_memory_is_not_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "free_memory", lambda: 8 * ONE.nbytes - 1)
    kept = Shelf(tmp_path)
    kept.put(("x", False), 0, ONE)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("memory", "further"), [(0, 100), (48, 100), (60, 112), (1000, 1052)])
def test_further_arrays_need_room_on_disk_where_memory_ends(memory, further, tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "MEMORY", memory)
    monkeypatch.setattr(shelf.shutil, "disk_usage", lambda path: Usage(0, 0, 100))
    kept = Shelf(tmp_path)
    kept.put(("x", False), 0, ONE)
    kept.require(further)
    with pytest.raises(InputError, match="GiB more, but"):
        kept.require(further + 1)
