"""The store: what is written is read, and all else counts as absent."""

import hashlib
import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnx_lowrank.files.store import Entry, Store
from windows import pretend

KEY, OTHER = "ab" * 32, "cd" * 32
ENTRY = Entry(b"text", (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3))))

DTYPES = st.one_of(arrays.floating_dtypes(), arrays.integer_dtypes(), arrays.boolean_dtypes())
ARRAYS = arrays.arrays(DTYPES.filter(lambda d: d.itemsize <= 8), arrays.array_shapes(min_dims=0, min_side=0))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def place(store: Store, key: str = KEY) -> Path:
    return store.folder / f"{key}.entry"


@given(st.binary(), st.lists(ARRAYS, max_size=3))
def test_what_is_written_is_read(tmp_path_factory, text, values):
    store = Store(tmp_path_factory.mktemp("store"))
    store.put(KEY, Entry(text, values))
    found = store.get(KEY)
    assert found is not None
    assert found.text == text
    for value, read in zip(values, found.arrays, strict=True):
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        assert read.tobytes() == value.tobytes()
        assert read.flags.c_contiguous == value.flags.c_contiguous


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0)])
def test_the_order_of_axes_in_memory_stays(store, axes):
    value = np.arange(24.0).reshape(2, 3, 4).transpose(axes)
    store.put(KEY, Entry(b"", (value,)))
    (found,) = store.get(KEY).arrays
    assert np.array_equal(found, value)
    assert found.strides == value.strides


def test_views_are_read_in_c_order(store):
    view = np.arange(24.0).reshape(2, 3, 4)[:, ::-1, ::2]
    store.put(KEY, Entry(b"", (view,)))
    assert np.array_equal(store.get(KEY).arrays[0], view)
    assert store.get(KEY).arrays[0].flags.c_contiguous


def test_an_entry_is_private_and_has_no_other_file_beside_it(store):
    store.put(KEY, ENTRY)
    assert [path.name for path in store.folder.iterdir()] == [f"{KEY}.entry"]
    assert place(store).stat().st_mode & 0o777 == 0o600


def test_equal_entries_have_equal_bytes(store, tmp_path):
    other = Store(tmp_path / "other")
    for each in (store, other):
        each.put(KEY, ENTRY)
    assert place(store).read_bytes() == place(other).read_bytes()


@given(st.data())
def test_a_damaged_entry_counts_as_absent_and_is_replaced(tmp_path_factory, data):
    store = Store(tmp_path_factory.mktemp("store"))
    store.put(KEY, ENTRY)
    right = place(store).read_bytes()
    at = data.draw(st.integers(0, len(right) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "noise"]))
    wrong = {
        "flip": right[:at] + bytes([right[at] ^ data.draw(st.integers(1, 255))]) + right[at + 1 :],
        "cut": right[:at],
        "grow": right + right[: at + 1],
        "noise": data.draw(st.binary(max_size=200)),
    }[kind]
    place(store).write_bytes(wrong)
    assert store.get(KEY) is None
    store.put(KEY, ENTRY)
    assert place(store).read_bytes() == right


def forged(head: bytes, rest: bytes = b"") -> bytes:
    """A file with the right digest."""
    body = head + b"\n" + rest
    return b"onnx-lowrank entry 1\n" + bytes.fromhex(KEY) + hashlib.sha256(body).digest() + body


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"[]",
        b"{}",
        b"7",
        b"[0.0]",
        b"[true]",
        b"[-1]",
        b"[1e400]",
        b'[0, ["|O8", [0], 0]]',
        b'[0, ["<f8", "C", 0]]',
        b'[0, ["<f8", [], 0]]',
        b'[0, ["<f8", [1], 0]]',
        b'[0, ["<f8", [0, 0], 0, 0]]',
        b'[0, ["<f8", ["0"], 0]]',
        b'[0, ["<f8", [[]], 0]]',
        b'[0, ["<f8", [0, 1], -1, -1]]',
        b'[0, ["<f8", [0, 1, 2], 0, 4611686018427387904, 4611686018427387904]]',
        b'[0, ["<f8", [0], 4611686018427387904]]',
        b'[0, ["<f8", %s%s]]' % (str(list(range(70))).encode(), b", 0" * 70),
        b'[0, ["<f8", [0], 99999999999999999999]]',
        b"[" * 30_000,
    ],
)
def test_a_forged_description_allocates_nothing(store, head):
    store.folder.mkdir()
    place(store).write_bytes(forged(head))
    assert store.get(KEY) is None


def test_a_larger_entry_than_expected_is_not_read(store):
    store.folder.mkdir()
    place(store).write_bytes(forged(b'[0, ["<f8", [0], 4]]', bytes(32)))
    assert store.get(KEY, 31) is None
    assert store.get(KEY, 32) is not None


def test_the_entry_of_another_key_counts_as_absent(store):
    store.put(OTHER, ENTRY)
    place(store, OTHER).rename(place(store))
    assert store.get(KEY) is None


def test_links_pipes_and_folders_count_as_absent(store, tmp_path):
    store.put(OTHER, ENTRY)
    place(store).symlink_to(place(store, OTHER))
    assert store.get(KEY) is None
    place(store).unlink()
    os.mkfifo(place(store))
    assert store.get(KEY) is None  # It does not wait for a writer.
    place(store).unlink()
    place(store).mkdir()
    assert store.get(KEY) is None


def test_the_oldest_use_goes_first(tmp_path):
    size = Entry(b"", (np.zeros(1000),))
    store = Store(tmp_path, 96_000)
    keys = [f"{number:064x}" for number in range(11)]
    for number, key in enumerate(keys):
        store.put(key, size)
        os.utime(store.folder / f"{key}.entry", (number, number))
    assert store.get(keys[0]) is not None  # This use is the latest.
    store.put(KEY, size)
    left = {path.name.removesuffix(".entry") for path in tmp_path.iterdir()}
    assert left == {keys[0], *keys[2:], KEY}


def test_the_bound_holds_and_foreign_files_stay(tmp_path):
    foreign = [tmp_path / "thesis.tex", tmp_path / f"{KEY}.entry.bak"]
    for path in foreign:
        path.write_bytes(bytes(50_000))
    stores = [Store(tmp_path, 40_000) for _ in range(2)]
    for number in range(40):
        stores[number % 2].put(f"{number:064x}", Entry(bytes(1000), (np.zeros(100 * (number % 7)),)))
        taken = sum(path.stat().st_size for path in tmp_path.glob("*.entry"))
        assert taken <= 40_000 * (1 + 1 / 16) + 10_000
    assert all(path.exists() for path in foreign)
    stores[0].put(KEY, Entry(bytes(40_001)))
    assert stores[0].get(KEY) is None


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    store = Store(tmp_path / "file" / "results")
    with caplog.at_level(logging.WARNING, "onnx_lowrank"):
        for key in (KEY, OTHER):
            store.put(key, ENTRY)
            assert store.get(key) is None
    (record,) = caplog.records
    assert "cannot be written (Not a directory), so nothing more is kept there" in record.getMessage()


def test_windows_keeps_an_entry_that_is_being_read(store, caplog, monkeypatch):
    pretend(monkeypatch)
    store.put(KEY, ENTRY)
    with place(store).open("rb"):
        store.put(KEY, ENTRY)
    store.put(OTHER, ENTRY)
    assert store.get(KEY).text == store.get(OTHER).text == ENTRY.text
    assert len([*store.folder.iterdir()]) == 2
    assert not caplog.records


def test_a_full_disk_leaves_nothing(store, caplog, monkeypatch):
    def full(file, key, entry):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_lowrank.files.store._write", full)
    store.put(KEY, ENTRY)
    assert list(store.folder.iterdir()) == []
    assert "No space left on device" in caplog.text


def test_what_a_dead_run_left_is_removed(store):
    store.folder.mkdir()
    (store.folder / ".onnx-lowrank-0123456789abcdef.tmp").write_bytes(b"half")
    store.put(KEY, ENTRY)
    assert [path.name for path in store.folder.iterdir()] == [f"{KEY}.entry"]


def test_an_entry_is_whole_while_others_write_and_remove_it(tmp_path):
    """Two stores of one folder: a reader never sees a part of an entry."""
    entry = Entry(b"x" * 50_000, (np.arange(20_000.0),))
    writer, reader = Store(tmp_path), Store(tmp_path)
    seen = []

    def write():
        for number in range(60):
            writer.put(KEY, entry)
            if number % 3 == 0:
                (tmp_path / f"{KEY}.entry").unlink()

    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        seen.append(reader.get(KEY))
    thread.join()
    found = [each for each in (*seen, reader.get(KEY)) if each is not None]
    assert found
    assert all(each.text == entry.text and np.array_equal(each.arrays[0], entry.arrays[0]) for each in found)
