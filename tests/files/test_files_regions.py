"""Copies of byte ranges: equal bytes by way of the system and by way of memory; one error for each fault."""

import errno
import os

import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.files import regions
from onnx_lowrank.files.regions import Region

DATA = bytes(range(256)) * 40


def copied(path, region, before=b"head"):
    with path.open("x+b") as out:
        out.write(before)
        region.copy(out)
        out.write(b"tail")
    return path.read_bytes()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.data"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 26])
@pytest.mark.parametrize(("offset", "length"), [(0, len(DATA)), (7, 5000), (100, 0)])
def test_a_region_is_copied_to_the_position_of_a_file(source, tmp_path, monkeypatch, offset, length, at_once):
    monkeypatch.setattr(regions, "_AT_ONCE", at_once)
    expected = b"head" + DATA[offset : offset + length] + b"tail"
    assert copied(tmp_path / "out", Region(source, offset, length)) == expected


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the system copies no ranges")
@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EIO, None])
def test_bytes_that_the_system_does_not_copy_are_read_and_written(
    source, tmp_path, monkeypatch, calls, number
):
    original, made = os.copy_file_range, []

    def copy(*args):
        made.append(args)
        if len(made) <= calls:
            return original(*args)
        if number is None:
            return 0
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", copy)
    monkeypatch.setattr(regions, "_AT_ONCE", 1000)
    assert copied(tmp_path / "out", Region(source, 3, 9000)) == b"head" + DATA[3:9003] + b"tail"
    assert len(made) == calls + 1


def test_without_the_call_of_the_system_bytes_are_read_and_written(source, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    assert copied(tmp_path / "out", Region(source, 3, 9000)) == b"head" + DATA[3:9003] + b"tail"


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the system copies no ranges")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_an_error_of_the_copy(source, tmp_path, monkeypatch, number):
    def full(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", full)
    with (tmp_path / "out").open("x+b") as out, pytest.raises(OSError, match=os.strerror(number)):
        Region(source, 0, 10).copy(out)


def test_a_source_that_became_shorter_or_went_is_named(source, tmp_path):
    region = Region(source, 100, len(DATA) - 100)
    source.write_bytes(DATA[:1000])
    with pytest.raises(InputError, match=f"in.data lacks {len(DATA) - 1000} bytes that it had"):
        copied(tmp_path / "a", region)
    source.unlink()
    with pytest.raises(InputError, match=r"in.data cannot be read \(No such file"):
        copied(tmp_path / "b", region)
