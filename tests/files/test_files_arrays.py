"""Arrays in files that nobody trusts: little memory for little that is wanted, whatever a file announces."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.files import arrays

LARGE = 2**26


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """What happens inside takes no more memory than this at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def header(shape: tuple[int, ...], kind: str = "<f4") -> bytes:
    stream = io.BytesIO()
    described = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()


def packed(
    path: Path, content: bytes, compression: int = zipfile.ZIP_DEFLATED, member: str = "x.npy"
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", content)
    return path


READERS = [arrays.load, arrays.archive]


@pytest.mark.parametrize("read", READERS)
def test_headers_are_read_without_their_data(tmp_path, read):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(LARGE, np.uint8), y=np.ones((2, 3)))
    with at_most(2**20):
        found = read(tmp_path / "a.npz")
    assert {name: (array.shape, array.dtype, array.nbytes) for name, array in found.items()} == {
        "x": ((LARGE,), np.uint8, LARGE),
        "y": ((2, 3), np.float64, 48),
    }
    np.testing.assert_array_equal(found["y"].read(), np.ones((2, 3)), strict=True)


@pytest.mark.parametrize("read", READERS)
def test_a_header_of_64_mib_is_not_read(tmp_path, read):
    content = b"\x93NUMPY\x02\x00" + struct.pack("<I", LARGE) + b" " * LARGE
    packed(tmp_path / "a.npz", content)
    with at_most(2**20), pytest.raises(InputError, match=r"a\.npz is damaged"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_python_unpacks_without_bound_is_refused(tmp_path, read, compression):
    path = packed(tmp_path / "a.npz", header((LARGE // 4,)) + bytes(LARGE), compression)
    with at_most(2**20), pytest.raises(InputError, match=r"a\.npz is damaged"):
        read(path)


@pytest.mark.parametrize("read", READERS)
def test_a_header_that_exhausts_the_parser_is_damage(tmp_path, read):
    text = b"-" * 9000 + b"1\n"
    path = packed(tmp_path / "a.npz", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
    with pytest.raises(InputError, match=r"a\.npz is damaged"):
        read(path)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (2, 0, 5)])
def test_arrays_without_elements_are_read(tmp_path, shape):
    np.savez(tmp_path / "a.npz", x=np.zeros(shape, np.float32))
    found = arrays.archive(tmp_path / "a.npz")["x"]
    np.testing.assert_array_equal(found.read(), np.zeros(shape, np.float32), strict=True)


def test_an_empty_shape_that_no_array_can_have_is_damage(tmp_path):
    found = arrays.archive(packed(tmp_path / "a.npz", header((3, 0, 2**62, 2**62))))["x"]
    with pytest.raises(InputError, match=r"a\.npz is damaged"):
        found.read()
    with found.reader() as take, pytest.raises(InputError, match=r"a\.npz is damaged"):
        take(np.arange(3))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_fortran_order_is_read_whole_and_not_by_rows(tmp_path, shape):
    x = np.asfortranarray(np.arange(np.prod(shape), dtype=np.int64).reshape(shape))
    np.savez(tmp_path / "a.npz", x=x)
    found = arrays.archive(tmp_path / "a.npz")["x"]
    np.testing.assert_array_equal(found.read(), x, strict=True)
    assert found.read().flags.c_contiguous
    with pytest.raises(InputError, match=r"the array 'x' is in Fortran order"), found.reader():
        pass


@pytest.mark.parametrize("order", "<>")
def test_texts_of_no_characters_are_damage(tmp_path, order):
    good, bad = (
        packed(tmp_path / f"{code}.npz", header((2,), f"{order}U1") + struct.pack(f"{order}2I", code, 65))
        for code in (0x10FFFF, 0x110000)
    )
    assert arrays.archive(good)["x"].read().tolist() == ["\U0010ffff", "A"]
    with pytest.raises(InputError, match=r"npz is damaged"):
        arrays.archive(bad)["x"].read()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken", b"\x93NUMPY\x01\x00"])
def test_no_archive(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"^The inputs .*a\.npz is not an \.npz archive: write it with"):
        arrays.archive(tmp_path / "a.npz", "The inputs")


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"^The inputs .*none\.npz cannot be read \(No such file"):
        arrays.archive(tmp_path / "none.npz", "The inputs")
    with pytest.raises(InputError, match=r"^/.*cannot be read \(Is a directory"):
        arrays.archive(tmp_path)
