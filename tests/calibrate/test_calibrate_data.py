import io
import re
import shutil
import struct
import tempfile
import tracemalloc
import zipfile
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from onnx_lowrank.calibrate import data, spool
from onnx_lowrank.engines.inputs import Spec
from onnx_lowrank.errors import InputError


def spec(name="x", shape=(None, 4), dtype="float32"):
    return Spec(name, np.dtype(dtype), shape)


X = (spec(),)


def ramp(*shape, dtype=np.float32):
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def draw(source, wanted=X, size=8, samples=None):
    with data.open_samples(source, wanted, samples) as found:
        return list(found.batches(size))


def rows(batches, name="x"):
    """First elements of all samples, of the fit share and of the held-out share."""
    shares = [[b.feed[name] for b in batches if b.held is held] for held in (False, True)]
    return [[int(sample.flat[0]) for batch in share for sample in batch] for share in shares]


def numbered(count, *shape):
    """Samples that hold their own number."""
    shape = shape or (4,)
    return np.broadcast_to(
        np.arange(count, dtype=np.float32).reshape(count, *[1] * len(shape)), (count, *shape)
    )


def shares(count):
    return [[i for i in range(count) if i % 5 != 4], [i for i in range(count) if i % 5 == 4]]


def sources(folder, x):
    """The same array from everywhere."""
    np.savez(folder / "plain.npz", x=x)
    np.savez_compressed(folder / "packed.npz", x=x)
    np.save(folder / "x.npy", x)
    return {
        "npz": folder / "plain.npz",
        "text": str(folder / "plain.npz"),
        "packed": folder / "packed.npz",
        "npy": folder / "x.npy",
        "mapping": {"x": x},
        "array": x,
        "mapped": np.load(folder / "x.npy", mmap_mode="r"),
    }


KINDS = ("npz", "text", "packed", "npy", "mapping", "array", "mapped")


class Reader:
    def __init__(self, feeds):
        self.feeds = iter(feeds)

    def get_next(self):
        return next(self.feeds, None)


class TestTables:
    @pytest.mark.parametrize("size", [1, 3, 8, 100])
    @pytest.mark.parametrize("count", [1, 4, 5, 23, 64])
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_sample_once_in_its_share(self, tmp_path, kind, count, size):
        x = ramp(count, 4) * 0.5
        batches = draw(sources(tmp_path, x)[kind], size=size)
        for held, want in zip((False, True), shares(count), strict=True):
            found = [b.feed["x"] for b in batches if b.held is held]
            assert all(1 <= len(part) <= size for part in found)
            if want:
                np.testing.assert_array_equal(np.concatenate(found), x[want], strict=True)
            else:
                assert found == []

    @pytest.mark.parametrize("samples", [1, 2, 5, 7, 22, 23, 99])
    @pytest.mark.parametrize("kind", KINDS)
    def test_fewer_samples_are_evenly_spaced(self, tmp_path, kind, samples):
        count = min(samples, 23)
        want = [i * 23 // count for i in range(count)]
        found = rows(draw(sources(tmp_path, numbered(23))[kind], samples=samples))
        assert found == [[want[i] for i in share] for share in shares(count)]

    @pytest.mark.parametrize("kind", KINDS)
    def test_passes_are_equal_and_independent(self, tmp_path, kind):
        with data.open_samples(sources(tmp_path, ramp(40, 4))[kind], X) as found:
            one, two = found.batches(3), found.batches(3)
            pairs = list(zip(one, two, strict=True))
            again = list(found.batches(3))
        assert len(again) == len(pairs) > 10
        for (a, b), c in zip(pairs, again, strict=True):
            assert a.held == b.held == c.held
            assert a.feed["x"].tobytes() == b.feed["x"].tobytes() == c.feed["x"].tobytes()

    @pytest.mark.parametrize(("count", "held"), [(1, 0), (4, 0), (5, 1), (9, 1), (10, 2), (100, 20)])
    def test_counts(self, count, held):
        with data.open_samples(numbered(count), X) as found:
            assert (found.count, found.held) == (count, held)
            assert found.description == f"array: {count} sample{'s' * (count > 1)}, {held} held out"

    def test_description_has_no_folder(self, tmp_path):
        source = sources(tmp_path, numbered(50))["npz"]
        with data.open_samples(source, X, 40) as found:
            assert found.description == "plain.npz: 40 of 50 samples, 8 held out"

    def test_several_inputs_stay_together(self, tmp_path):
        wanted = (spec("a", (None, 2)), spec("b", ("N",), "int64"))
        np.savez(tmp_path / "two.npz", b=np.arange(37), a=numbered(37, 2))
        batches = draw(tmp_path / "two.npz", wanted, 4, samples=30)
        assert sum(len(b.feed["b"]) for b in batches) == 30
        for batch in batches:
            assert list(batch.feed) == ["a", "b"]
            np.testing.assert_array_equal(batch.feed["a"][:, 1], batch.feed["b"])

    def test_memory_does_not_grow_with_the_samples(self, tmp_path):
        np.savez_compressed(tmp_path / "big.npz", x=np.tile(ramp(500, 1), (1, 25_000)))  # 50 MB
        wanted = (spec(shape=(None, 25_000)),)
        small = 0
        with data.open_samples(tmp_path / "big.npz", wanted) as found:
            tracemalloc.start()
            for batch in found.batches(4):
                small += len(batch.feed["x"])
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert small == 500
        assert peak < 10e6

    def test_big_endian_and_read_only_input(self):
        x = ramp(6, 4).astype(">f4")
        x.flags.writeable = False
        (batch, _) = draw(x)
        assert batch.feed["x"].dtype == np.float32
        assert batch.feed["x"].dtype.isnative
        np.testing.assert_array_equal(batch.feed["x"], x[[0, 1, 2, 3, 5]])

    def test_strided_arrays_become_contiguous(self):
        x = np.asfortranarray(ramp(10, 4))[::2]
        for batch in draw(x):
            assert batch.feed["x"].flags.c_contiguous


class TestFixedBatch:
    @pytest.mark.parametrize("size", [1, 4, 100])
    @pytest.mark.parametrize("count", [4, 19, 20, 43])
    def test_batches_of_the_models_size(self, count, size):
        batches = draw(numbered(count), (spec(shape=(4, 4)),), size)
        groups = [tuple(range(i, i + 4)) for i in range(0, count - 3, 4)]
        found = {
            held: [tuple(b.feed["x"][:, 0]) for b in batches if b.held is held] for held in (False, True)
        }
        assert found[False] == [g for i, g in enumerate(groups) if i % 5 != 4]
        assert found[True] == [g for i, g in enumerate(groups) if i % 5 == 4]

    def test_a_warning_names_what_is_left_out(self):
        with data.open_samples(numbered(43), (spec(shape=(4, 4)),)) as found:
            assert found.count == 40
            assert "The last samples do not fill a batch of 4: 3 left out." in found.warnings

    @pytest.mark.parametrize(("count", "samples"), [(3, None), (40, 3)])
    def test_too_few(self, count, samples):
        with pytest.raises(
            InputError, match="gives 3 samples, but the model takes 4 at once: give 4 or more"
        ):
            data.open_samples(numbered(count), (spec(shape=(4, 4)),), samples)

    def test_two_sizes(self):
        wanted = (spec("a", (2, 4)), spec("b", (3, 4)))
        with pytest.raises(
            InputError, match="'b' takes 3 samples at once, but others take 2: give every array"
        ):
            data.open_samples({"a": numbered(12), "b": numbered(12)}, wanted)


class TestWithoutBatchAxis:
    def test_one_axis_more(self):
        batches = draw(numbered(7, 3, 4), (spec(shape=(3, 4)),))
        assert [b.feed["x"].shape for b in batches] == [(3, 4)] * 7
        assert [int(b.feed["x"][0, 0]) for b in batches] == list(range(7))
        assert [b.held for b in batches] == [i == 4 for i in range(7)]

    def test_scalars_of_their_own(self):
        wanted = (spec(), spec("rate", (), "int64"))
        batches = draw({"x": numbered(6), "rate": np.arange(6)}, wanted)
        assert len(batches) == 6
        for batch in batches:
            assert batch.feed["x"].shape == (1, 4)
            assert batch.feed["rate"].shape == ()
            assert batch.feed["rate"].dtype == np.int64
            assert int(batch.feed["rate"]) == batch.feed["x"][0, 0]

    def test_a_scalar_for_all(self):
        wanted = (spec(), spec("rate", (), "int64"))
        batches = draw({"x": numbered(12), "rate": 16000}, wanted, 4)
        assert [len(b.feed["x"]) for b in batches] == [4, 4, 2, 2]
        assert {int(b.feed["rate"]) for b in batches} == {16000}

    def test_an_array_of_just_the_inputs_shape(self):
        wanted = (spec(), spec("mask", (1, 3)))
        batches = draw({"x": numbered(12), "mask": ramp(1, 3)}, wanted, 4)
        assert [len(b.feed["x"]) for b in batches] == [4, 4, 2, 2]
        for batch in batches:
            np.testing.assert_array_equal(batch.feed["mask"], ramp(1, 3), strict=True)

    def test_a_state_with_a_free_batch_of_its_own_is_met_by_single_samples(self):
        wanted = (spec(), spec("state", (2, "N", 3)))
        batches = draw({"x": numbered(12), "state": np.zeros((2, 1, 3), np.float32)}, wanted, 4)
        assert [b.feed["x"].shape for b in batches] == [(1, 4)] * 12
        assert {b.feed["state"].shape for b in batches} == {(2, 1, 3)}

    def test_states_of_their_own(self):
        wanted = (spec(shape=("N", 4)), spec("state", (2, "N", 3)), spec("rate", (), "int64"))
        arrays = {"x": numbered(5, 1, 4), "state": numbered(5, 2, 1, 3), "rate": np.int64(8000)}
        for batch in draw(arrays, wanted):
            assert batch.feed["x"].shape == (1, 4)
            assert (batch.feed["state"] == batch.feed["x"][0, 0]).all()
            assert batch.feed["state"].shape == (2, 1, 3)

    def test_only_scalars(self):
        (batch,) = draw(np.float32(2.5), (spec(shape=()),))
        assert batch.feed["x"].shape == ()
        assert batch.feed["x"] == 2.5

    def test_unknown_rank(self):
        assert rows(draw(numbered(6, 2, 2), (spec(shape=None),))) == shares(6)

    def test_single_sample_of_a_fixed_model(self):
        (batch,) = draw(ramp(1, 4), (spec(shape=(1, 4)),))
        np.testing.assert_array_equal(batch.feed["x"], ramp(1, 4), strict=True)

    def test_mixed_with_a_fixed_batch(self):
        wanted = (spec(shape=(4, 4)), spec("rate", (), "int64"))
        with pytest.raises(InputError, match="'x' takes 4 samples at once, but others take 1"):
            data.open_samples({"x": numbered(8), "rate": np.arange(8)}, wanted)


def test_sets(folder, feeds):
    """Write ONNX test data sets."""
    for number, arrays in enumerate(feeds):
        place = folder / f"test_data_set_{number}"
        place.mkdir(parents=True)
        for i, array in enumerate(arrays):
            (place / f"input_{i}.pb").write_bytes(numpy_helper.from_array(array).SerializeToString())
        (place / "output_0.pb").write_bytes(b"not read")
    return folder


test_sets.__test__ = False


def batch_files(folder, feeds):
    folder.mkdir(exist_ok=True)
    for number, feed in enumerate(feeds):
        np.savez(folder / f"batch{number}.npz", **feed)
    return folder


def feed_sources(folder, arrays):
    feeds = [{"x": a} for a in arrays]
    return {
        "sets": test_sets(folder / "sets", [[a] for a in arrays]),
        "files": batch_files(folder / "files", feeds),
        "list": feeds,
        "generator": (feed for feed in feeds),
        "reader": Reader(feeds),
    }


FEEDS = ("sets", "files", "list", "generator", "reader")


class TestFeeds:
    @pytest.mark.parametrize("kind", FEEDS)
    def test_fixed_feeds_come_whole_in_natural_order(self, tmp_path, kind):
        arrays = list(numbered(12, 2, 4))
        batches = draw(feed_sources(tmp_path, arrays)[kind], (spec(shape=(2, 4)),), size=1)
        assert [int(b.feed["x"][0, 0]) for b in batches] == list(range(12))
        assert [b.held for b in batches] == [i % 5 == 4 for i in range(12)]
        assert {b.feed["x"].shape for b in batches} == {(2, 4)}

    @pytest.mark.parametrize("kind", FEEDS)
    def test_counts(self, tmp_path, kind):
        fixed = feed_sources(tmp_path / "a", list(numbered(12, 2, 4)))[kind]
        with data.open_samples(fixed, (spec(shape=(2, 4)),)) as found:
            assert (found.count, found.held) == (12, 2)
            assert found.description.endswith(": 12 feeds, 2 held out")
        free = feed_sources(tmp_path / "b", list(numbered(12, 3, 4)))[kind]
        with data.open_samples(free, X) as found:
            assert (found.count, found.held) == (36, 6)
            assert found.description.endswith(": 12 feeds with 36 samples, 6 held out")

    @pytest.mark.parametrize("kind", FEEDS)
    def test_large_free_feeds_are_split(self, tmp_path, kind):
        arrays = np.split(np.array(numbered(60)), 6)
        batches = draw(feed_sources(tmp_path, arrays)[kind], size=4)
        assert [len(b.feed["x"]) for b in batches] == [4, 4, 2] * 6
        assert rows(batches) == [[*range(40), *range(50, 60)], [*range(40, 50)]]

    @pytest.mark.parametrize("kind", FEEDS)
    def test_few_feeds_are_shared_by_samples(self, tmp_path, kind):
        arrays = np.split(np.array(numbered(21)), [10])
        assert rows(draw(feed_sources(tmp_path, arrays)[kind], size=4)) == shares(21)

    @pytest.mark.parametrize("kind", FEEDS)
    @pytest.mark.parametrize("samples", [1, 3, 5, 11, 12, 40])
    def test_at_most_so_many_fixed_feeds(self, tmp_path, kind, samples):
        source = feed_sources(tmp_path, list(numbered(12, 2, 4)))[kind]
        batches = draw(source, (spec(shape=(2, 4)),), samples=samples)
        count = min(samples, 12)
        want = [i * 12 // count for i in range(count)] if kind in ("sets", "files") else list(range(count))
        assert [int(b.feed["x"][0, 0]) for b in batches] == want
        assert sum(b.held for b in batches) == count // 5

    @pytest.mark.parametrize("kind", FEEDS)
    @pytest.mark.parametrize("samples", [1, 6, 14, 59, 60, 61])
    def test_at_most_so_many_samples_of_free_feeds(self, tmp_path, kind, samples):
        source = feed_sources(tmp_path, np.split(np.array(numbered(60)), 6))[kind]
        fit, held = rows(draw(source, samples=samples))
        found = sorted(fit + held)
        assert len(found) == len(set(found)) == min(samples, 60)
        if kind not in ("sets", "files"):
            assert found == list(range(min(samples, 60)))

    def test_only_what_is_used_is_drawn(self):
        drawn = []

        def endless():
            while True:
                drawn.append(len(drawn))
                yield {"x": numbered(4)}

        with data.open_samples(endless(), X, 10) as found:
            assert found.count == 10
        assert len(drawn) == 3

    def test_a_generator_can_be_read_again(self):
        with data.open_samples(({"x": ramp(2, 4) + i} for i in range(7)), X) as found:
            one, two = (np.concatenate([b.feed["x"] for b in found.batches(8)]) for _ in range(2))
        np.testing.assert_array_equal(one, np.concatenate([ramp(2, 4) + i for i in range(7)]), strict=True)
        assert one.tobytes() == two.tobytes()

    def test_lengths_may_differ(self):
        wanted = (spec(shape=(1, None)),)
        feeds = [{"x": ramp(1, n)} for n in range(1, 9)]
        assert [b.feed["x"].shape[1] for b in draw(feeds, wanted)] == list(range(1, 9))

    def test_waveforms_are_not_split(self):
        batches = draw([{"x": ramp(100)}] * 6, (spec(shape=(None,)),), size=3)
        assert [b.feed["x"].shape for b in batches] == [(100,)] * 6

    def test_scalars_in_split_feeds(self):
        wanted = (spec(), spec("rate", (), "int64"))
        batches = draw([{"x": numbered(3) + i, "rate": 8000} for i in range(6)], wanted, size=2)
        assert [b.feed["x"].shape for b in batches] == [(2, 4), (1, 4)] * 6
        assert {int(b.feed["rate"]) for b in batches} == {8000}

    def test_set_inputs_stand_in_the_models_order(self, tmp_path):
        wanted = (spec("b", (2,)), spec("a", (2,), "int64"))
        test_sets(tmp_path, [[np.float32([1, 2]), np.int64([3, 4])]])
        (batch,) = draw(tmp_path, wanted)
        np.testing.assert_array_equal(batch.feed["b"], np.float32([1, 2]), strict=True)
        np.testing.assert_array_equal(batch.feed["a"], np.int64([3, 4]), strict=True)

    def test_one_set_is_a_folder_too(self, tmp_path):
        test_sets(tmp_path, [[ramp(2, 4)]])
        (batch,) = draw(tmp_path / "test_data_set_0", (spec(shape=(2, 4)),))
        np.testing.assert_array_equal(batch.feed["x"], ramp(2, 4), strict=True)

    def test_the_spooled_file_goes(self, monkeypatch, tmp_path):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        found = data.open_samples([{"x": ramp(2, 4)}], X)
        found.close()
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ValueError, match="closed file"):
            list(found.batches(1))

    def test_the_spool_is_closed_on_errors(self, monkeypatch):
        closed = []
        monkeypatch.setattr(data, "Spool", lambda names: _Closing(names, closed))
        with pytest.raises(InputError, match="lacks the input 'x'"):
            data.open_samples([{"x": ramp(2, 4)}, {}], X)
        assert closed == [True]

    def test_a_full_disk(self, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 2**20))
        with pytest.raises(
            InputError, match=r"Feed 0 of .* where 1 MiB are free: pass fewer --calibration-s"
        ):
            data.open_samples([{"x": ramp(2, 4)}], X)

    def test_memory_does_not_grow_with_the_feeds(self):
        feeds = ({"x": np.full((10, 25_000), i, np.float32)} for i in range(50))  # 50 MB
        tracemalloc.start()
        with data.open_samples(feeds, (spec(shape=(None, 25_000)),)) as found:
            total = sum(len(batch.feed["x"]) for batch in found.batches(10))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert total == 500
        assert peak < 10e6


class _Closing(spool.Spool):
    def __init__(self, names, closed):
        super().__init__(names)
        self.closed = closed

    def close(self):
        super().close()
        self.closed.append(True)


class TestDtypes:
    @pytest.mark.parametrize("feeds", [False, True])
    @pytest.mark.parametrize("given", ["float16", "float32", "float64", "longdouble"])
    @pytest.mark.parametrize("wanted", ["float16", "bfloat16", "float32", "float64"])
    def test_floats_are_converted(self, wanted, given, feeds):
        target = np.dtype(getattr(ml_dtypes, wanted, None) or wanted)
        x = np.random.default_rng(0).standard_normal((7, 4)).astype(given)
        wanted_spec = (Spec("x", target, (None, 4)),)
        with data.open_samples([{"x": x}] if feeds else x, wanted_spec) as found:
            batches = list(found.batches(8))
            narrowed = [w for w in found.warnings if "rounded" in w]
        assert {b.feed["x"].dtype for b in batches} == {target}
        got = np.concatenate([b.feed["x"] for b in batches])
        np.testing.assert_array_equal(got, x[[0, 1, 2, 3, 5, 6, 4]].astype(target))
        assert bool(narrowed) == (np.dtype(given).itemsize > target.itemsize)
        if narrowed:
            name = np.dtype(given).name
            assert narrowed == [f"The input 'x' is given as {name} and rounded to the model's {wanted}."]

    @pytest.mark.parametrize("given", ["bool", "uint8", "int8", "int16", "int32", "int64", "uint64"])
    @pytest.mark.parametrize("wanted", ["uint8", "int8", "int16", "int32", "int64", "uint64"])
    def test_integers_that_fit_are_converted(self, wanted, given):
        batches = draw(np.array([[0], [1], [1]], given), (spec(shape=(None, 1), dtype=wanted),))
        (got,) = (b.feed["x"] for b in batches)
        np.testing.assert_array_equal(got, np.array([[0], [1], [1]], wanted), strict=True)

    @pytest.mark.parametrize(
        ("wanted", "given", "value"),
        [
            ("uint8", "int64", -1),
            ("uint8", "int16", 256),
            ("int8", "uint8", 128),
            ("int32", "int64", 2**31),
            ("int32", "int64", -(2**31) - 1),
            ("int64", "uint64", 2**63),
            ("uint64", "int64", -1),
        ],
    )
    def test_integers_that_do_not_fit(self, wanted, given, value):
        x = np.array([[0], [0], [value]], given)
        with pytest.raises(InputError, match=f"sample 2 of the input 'x' has a value outside {wanted}"):
            data.open_samples(x, (spec(shape=(None, 1), dtype=wanted),))

    @pytest.mark.parametrize("kind", [*KINDS, *FEEDS])
    @pytest.mark.parametrize("given", ["uint8", "int8", "int64", "bool"])
    @pytest.mark.parametrize("wanted", ["float32", "float16"])
    def test_integers_for_floats_want_preprocessing(self, tmp_path, wanted, given, kind):
        x = np.ones((6, 4), given)
        source = {**sources(tmp_path, x), **feed_sources(tmp_path, [x])}[kind]
        message = (
            f"'x' is {wanted} in the model, but {given} was given: apply the model's own preprocessing first"
        )
        with pytest.raises(InputError, match=message):
            data.open_samples(source, (spec(dtype=wanted),))

    @pytest.mark.parametrize(
        ("wanted", "given"),
        [
            ("int64", "float32"),
            ("bool", "uint8"),
            ("bool", "float32"),
            ("float32", "complex64"),
            ("float32", "S3"),
        ],
    )
    def test_others_are_refused(self, wanted, given):
        with pytest.raises(
            InputError, match=f"is {wanted} in the model, but {np.dtype(given).name} was given"
        ):
            data.open_samples(np.ones((2, 4), given), (spec(dtype=wanted),))

    @pytest.mark.parametrize("kind", ["npz", "npy", "files", "list", "mapping"])
    def test_bfloat16_survives_files(self, tmp_path, kind):
        x = ramp(3, 4).astype(ml_dtypes.bfloat16)
        source = {**sources(tmp_path, x), **feed_sources(tmp_path, [x])}[kind]
        (batch,) = draw(source, (Spec("x", x.dtype, (None, 4)),))
        np.testing.assert_array_equal(batch.feed["x"], x, strict=True)

    @pytest.mark.parametrize("kind", ["npz", "files", "list", "mapping", "sets"])
    @pytest.mark.parametrize("objects", [False, True])
    def test_strings(self, tmp_path, kind, objects):
        x = np.array([["a", "bcd"], ["", "é"]])
        x = x.astype(object) if objects and kind in ("list", "mapping", "sets") else x
        wanted = (Spec("x", np.dtype(object), (None, 2)),)
        if kind == "sets":
            source = test_sets(tmp_path, [[x.astype(object)]])
        elif kind == "npz":
            np.savez(tmp_path / "s.npz", x=x)
            source = tmp_path / "s.npz"
        else:
            source = {"files": None, "list": [{"x": x}], "mapping": {"x": x}}[kind]
            source = batch_files(tmp_path, [{"x": x}]) if kind == "files" else source
        (batch,) = draw(source, wanted)
        assert batch.feed["x"].dtype == object
        assert batch.feed["x"].tolist() == [["a", "bcd"], ["", "é"]]

    def test_objects_that_are_no_strings(self):
        with pytest.raises(InputError, match="'x' has an element that is no string"):
            data.open_samples(np.array([["a", 1]], object), (Spec("x", np.dtype(object), (None, 2)),))


class TestValues:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("sample", [0, 4, 22])
    def test_not_finite_in_a_table(self, tmp_path, kind, value, sample):
        x = np.array(numbered(23))
        x[sample, 2] = value
        with pytest.raises(
            InputError, match=rf"sample {sample} of the input 'x' has NaN or Inf \(as float32\)"
        ):
            data.open_samples(sources(tmp_path, x)[kind], X)

    def test_the_number_is_the_sources(self):
        x = np.array(numbered(20))
        x[15] = np.nan
        with pytest.raises(InputError, match="sample 15 of"):
            data.open_samples(x, X, 4)
        x[15], x[16] = 0, np.nan
        assert sum(len(b.feed["x"]) for b in draw(x, samples=4)) == 4

    @pytest.mark.parametrize("kind", FEEDS)
    def test_not_finite_in_a_feed(self, tmp_path, kind):
        arrays = [np.array(a) for a in numbered(7, 2, 4)]
        arrays[3][1, 1] = np.nan
        where = {"sets": "test_data_set_3", "files": r"batch3\.npz"}.get(
            kind, "Feed 3 of the calibration data"
        )
        with pytest.raises(
            InputError, match=rf"{where}: the input 'x' has NaN or Inf \(as float32\): correct it"
        ):
            data.open_samples(feed_sources(tmp_path, arrays)[kind], X)

    def test_overflow_on_rounding(self):
        x = np.zeros((3, 4))
        x[1, 1] = 1e300
        with pytest.raises(InputError, match=r"sample 1 of the input 'x' has NaN or Inf \(as float32\)"):
            data.open_samples(x, X)

    @pytest.mark.parametrize("kind", [*KINDS, "files", "list"])
    def test_equal_samples_are_warned_of(self, tmp_path, kind):
        x = np.tile(ramp(1, 4), (40, 1))
        source = {**sources(tmp_path, x), **feed_sources(tmp_path, [x])}[kind]
        with data.open_samples(source, X) as found:
            assert found.warnings == ("All 40 samples are the same: give different ones.",)

    def test_an_input_of_one_value_is_warned_of(self):
        wanted = (spec("a"), spec("b"), spec("mask", dtype="int64"))
        arrays = {"a": ramp(40, 4), "b": np.full((40, 4), 2, np.float32), "mask": np.ones((40, 4), np.int64)}
        with data.open_samples(arrays, wanted) as found:
            assert found.warnings == ("The input 'b' is 2 everywhere in all samples: check the data.",)

    @pytest.mark.parametrize(("count", "words"), [(1, "1 sample"), (2, "2 samples"), (31, "31 samples")])
    def test_few_samples_are_warned_of(self, count, words):
        with data.open_samples(ramp(count, 4), X) as found:
            assert found.warnings == (
                f"Estimates from {words} are weak: give at least 32, better a few hundred.",
            )

    def test_enough_good_samples_have_no_warning(self):
        with data.open_samples(ramp(32, 4), X) as found:
            assert found.warnings == ()


class TestNamesAndShapes:
    @pytest.mark.parametrize("kind", ["npz", "files", "list", "mapping"])
    @pytest.mark.parametrize("wrong", ["unknown", "missing", "keys"])
    def test_names(self, tmp_path, kind, wrong):
        wanted = (spec("a"), spec("b"))
        names = {"unknown": ("a", "b", "c"), "missing": ("a",), "keys": ("a", 7)}[wrong]
        feed = {name: ramp(6, 4) for name in names}
        if kind in ("npz", "files"):
            batch_files(tmp_path, [{str(name): array for name, array in feed.items()}])
        source = {"npz": tmp_path / "batch0.npz", "files": tmp_path, "list": [feed], "mapping": feed}[kind]
        message = {"unknown": "has no input 'c': name the arrays 'a', 'b'", "keys": "has no input '?7'?"}
        with pytest.raises(
            InputError, match=message.get(wrong, "lacks the input 'b': give an array for each")
        ):
            data.open_samples(source, wanted)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(6, 5), (6,), (6, 4, 1), (2, 6, 4, 1), ()])
    def test_shapes_of_tables(self, tmp_path, kind, shape):
        with pytest.raises(
            InputError, match=r"'x' has the shape .×4 in the model, but .* was given: reshape"
        ):
            data.open_samples(sources(tmp_path, np.ones(shape, np.float32))[kind], X)

    @pytest.mark.parametrize("kind", FEEDS)
    @pytest.mark.parametrize("shape", [(6, 5), (6,), (1, 6, 4), ()])
    def test_shapes_of_feeds(self, tmp_path, kind, shape):
        with pytest.raises(
            InputError, match=r"'x' has the shape .×4 in the model, but .* was given: reshape"
        ):
            data.open_samples(feed_sources(tmp_path, [np.ones(shape, np.float32)])[kind], X)

    @pytest.mark.parametrize("kind", [*KINDS, *FEEDS])
    @pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
    def test_empty(self, tmp_path, kind, shape):
        x = np.ones(shape, np.float32)
        source = {**sources(tmp_path, x), **feed_sources(tmp_path, [x])}[kind]
        with pytest.raises(InputError, match=r"'x' is empty.*: give samples"):
            data.open_samples(source, (spec(shape=(None, None)),))

    @pytest.mark.parametrize("kind", ["mapping", "npz", "files", "list", "sets"])
    def test_a_past_of_no_length_is_no_lack_of_samples(self, tmp_path, kind):
        past = np.ones((12, 2, 0, 3), np.float32)
        arrays = {"x": numbered(12), "past": past, "lengths": np.ones((12, 0), np.int32)}
        wanted = (spec(), spec("past", (None, 2, None, 3)), spec("lengths", (None, None), "int64"))
        if kind == "sets":
            test_sets(tmp_path, [list(arrays.values())])
        else:
            np.savez(tmp_path / "a.npz", **arrays)
        sources = {"mapping": arrays, "npz": tmp_path / "a.npz", "list": [arrays]}
        batches = draw(sources.get(kind, tmp_path), wanted)
        assert rows(batches) == shares(12)
        for batch in batches:
            assert batch.feed["past"].shape == (len(batch.feed["x"]), 2, 0, 3)
            assert batch.feed["lengths"].dtype == np.int64

    @pytest.mark.parametrize("kind", ["mapping", "list"])
    def test_no_samples_of_one_input(self, kind):
        arrays = {"x": ramp(0, 4), "past": np.ones((0, 3), np.float32)}
        wanted = (spec(), spec("past", (None, None)))
        with pytest.raises(InputError, match=r"'x' is empty.*: give samples"):
            data.open_samples(arrays if kind == "mapping" else [arrays], wanted)
        with pytest.raises(InputError, match=r"'past' is empty.*: give samples"):
            data.open_samples(
                {**arrays, "x": ramp(5, 4)} if kind == "mapping" else [{**arrays, "x": ramp(5, 4)}], wanted
            )

    def test_different_numbers_of_samples(self):
        with pytest.raises(
            InputError, match="'b' has 5 samples, but 'a' has 6: give the same number of each"
        ):
            data.open_samples({"a": ramp(6, 4), "b": ramp(5, 4)}, (spec("a"), spec("b")))

    @pytest.mark.parametrize("source", [ramp(6, 4), "x.npy"])
    def test_one_array_for_two_inputs(self, tmp_path, source):
        if isinstance(source, str):
            np.save(tmp_path / source, ramp(6, 4))
            source = tmp_path / source
        with pytest.raises(
            InputError, match="is one array, but the model has the inputs 'a', 'b': name arrays"
        ):
            data.open_samples(source, (spec("a"), spec("b")))

    def test_no_tensor(self):
        with pytest.raises(InputError, match="'x' of the model is no tensor: leave --calibration out"):
            data.open_samples(ramp(6, 4), (Spec("x", None, None),))

    def test_no_inputs(self):
        with pytest.raises(InputError, match="has no inputs: leave --calibration out"):
            data.open_samples({}, ())


class TestBadSources:
    def test_missing(self, tmp_path):
        with pytest.raises(InputError, match=r"nothing\.npz does not exist: pass"):
            data.open_samples(tmp_path / "nothing.npz", X)

    @pytest.mark.parametrize("names", [[], ["readme.txt"], ["sub/x.npz"], ["test_data_set_x/input_0.pb"]])
    def test_folders_with_nothing(self, tmp_path, names):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"1")
        with pytest.raises(InputError, match=r"holds neither test_data_set_\*/input_\*\.pb nor \.npz files"):
            data.open_samples(tmp_path, X)

    def test_folders_with_both(self, tmp_path):
        test_sets(tmp_path, [[ramp(2, 4)]])
        batch_files(tmp_path, [{"x": ramp(2, 4)}])
        with pytest.raises(InputError, match=r"holds both .* give a folder of one of them"):
            data.open_samples(tmp_path, X)

    @pytest.mark.parametrize("source", [3, None, 2.5])
    def test_other_types(self, source):
        with pytest.raises(InputError, match=f"is of the type {type(source).__name__}: pass a path, arrays"):
            data.open_samples(source, X)

    @pytest.mark.parametrize(
        ("given", "reader"),
        [([1, 2], False), ([1, 2], True), ([[ramp(2, 4)]], False), ([[ramp(2, 4)]], True), ([None], False)],
    )
    def test_feeds_that_are_no_dicts(self, given, reader):
        message = f"Feed 0 of the calibration data is of the type {type(given[0]).__name__}: give a dict"
        with pytest.raises(InputError, match=message):
            data.open_samples(Reader(given) if reader else given, X)

    @pytest.mark.parametrize("source", [[], iter(()), Reader([])])
    def test_no_feeds(self, source):
        with pytest.raises(InputError, match="gives no feeds: pass a fresh generator that gives dicts"):
            data.open_samples(source, X)

    @pytest.mark.parametrize("feeds", [False, True])
    def test_ragged_lists(self, feeds):
        arrays = {"x": [[1.0, 2.0], [3.0]]}
        with pytest.raises(InputError, match=r"'x' is no array \(.*\): give one"):
            data.open_samples([arrays] if feeds else arrays, X)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"hello",
            b"PK\x03\x04",
            b"\x93NUMPY",
            b"\x93NUMPY\x09\x00aaaa",
            b"\x93NUMPY\x01\x00\x04\x00{(a\n",
        ],
    )
    @pytest.mark.parametrize("name", ["a.npz", "a.npy"])
    def test_no_arrays(self, tmp_path, content, name):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            InputError, match=f"{name} is damaged, or neither an .npz archive nor an .npy array"
        ):
            data.open_samples(tmp_path / name, X)

    @pytest.mark.parametrize("kind", ["npz", "packed", "npy"])
    @pytest.mark.parametrize("seed", range(40))
    def test_damaged_files_give_samples_or_one_sentence(self, tmp_path, kind, seed):
        path = sources(tmp_path, ramp(50, 4))[kind]
        content = bytearray(path.read_bytes())
        rng = np.random.default_rng(seed)
        for place in rng.integers(len(content), size=3):
            content[place] ^= int(rng.integers(1, 256))
        path.write_bytes(content[: int(rng.integers(1, len(content)))] if seed % 2 else content)
        try:
            batches = draw(path)
        except InputError as error:
            assert re.fullmatch(r"[^\n]+\.", str(error))  # noqa: PT017 - either is right
        else:
            assert all(np.isfinite(b.feed["x"]).all() for b in batches)

    def test_a_flipped_bit_in_an_archive_is_found(self, tmp_path):
        path = sources(tmp_path, ramp(50, 4))["npz"]
        content = bytearray(path.read_bytes())
        content[400] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"plain\.npz is damaged"):
            data.open_samples(path, X)

    @pytest.mark.parametrize("kind", ["npz", "npy", "files"])
    def test_pickles_are_not_loaded(self, tmp_path, kind):
        x = np.array([[{}], [1]], object)
        np.savez(tmp_path / "x.npz", x=x)
        np.save(tmp_path / "x.npy", x)
        source = tmp_path if kind == "files" else tmp_path / f"x.{kind}"
        with pytest.raises(InputError, match="holds pickled objects, which are not read"):
            data.open_samples(source, X)

    @pytest.mark.parametrize("kind", ["npz", "npy"])
    def test_fortran_order(self, tmp_path, kind):
        source = sources(tmp_path, np.asfortranarray(ramp(6, 4)))[kind]
        with pytest.raises(InputError, match=r"in Fortran order.* save numpy\.ascontiguousarray"):
            data.open_samples(source, X)

    def test_a_header_that_promises_more_than_there_is(self, tmp_path):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 4)}
        )
        (tmp_path / "x.npy").write_bytes(header.getvalue())
        with pytest.raises(
            InputError, match=r"of the shape \[1099511627776, 4\] does not fit into its 128 bytes"
        ):
            data.open_samples(tmp_path / "x.npy", X)

    @pytest.mark.parametrize("feeds", [False, True])
    def test_large_samples_are_refused(self, tmp_path, monkeypatch, feeds):
        monkeypatch.setattr("onnx_lowrank.files.arrays.MAX_BYTES", 1000)
        np.savez_compressed(tmp_path / "x.npz", x=np.zeros((5, 300), np.float32))
        with pytest.raises(
            InputError, match=r"takes .* GiB, more than .* GiB: give smaller samples, or fewer"
        ):
            data.open_samples(tmp_path if feeds else tmp_path / "x.npz", (spec(shape=(None, 300)),))

    def test_an_encrypted_member(self, tmp_path):
        path = sources(tmp_path, ramp(6, 4))["npz"]
        content = bytearray(path.read_bytes())
        for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            at = content.index(signature) + place
            content[at : at + 2] = struct.pack("<H", 1)
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"plain\.npz is damaged"):
            data.open_samples(path, X)

    def test_a_member_that_is_no_array(self, tmp_path):
        path = sources(tmp_path, ramp(6, 4))["npz"]
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("notes.txt", "hello")
        with pytest.raises(InputError, match="is damaged, or neither"):
            data.open_samples(path, X)


class TestBadTensors:
    @pytest.mark.parametrize("content", [b"hello", b"\x08", b"\xff" * 30, b""])
    def test_no_tensor(self, tmp_path, content):
        test_sets(tmp_path, [[ramp(2, 4)]])
        path = tmp_path / "test_data_set_0" / "input_0.pb"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"input_0\.pb is no serialized TensorProto, or is damaged"):
            data.open_samples(tmp_path, X)

    def test_external_data_is_not_followed(self, tmp_path):
        test_sets(tmp_path, [[ramp(2, 4)]])
        tensor = TensorProto(data_type=1, dims=[2, 4], data_location=TensorProto.EXTERNAL)
        tensor.external_data.append(onnx.StringStringEntryProto(key="location", value="/etc/passwd"))
        (tmp_path / "test_data_set_0" / "input_0.pb").write_bytes(tensor.SerializeToString())
        with pytest.raises(InputError, match=r"input_0\.pb keeps its data in another file"):
            data.open_samples(tmp_path, X)

    def test_fewer_bytes_than_the_shape_takes(self, tmp_path):
        test_sets(tmp_path, [[ramp(2, 4)]])
        tensor = TensorProto(data_type=1, dims=[2**40, 4], raw_data=b"1234")
        (tmp_path / "test_data_set_0" / "input_0.pb").write_bytes(tensor.SerializeToString())
        with pytest.raises(InputError, match="is no serialized TensorProto, or is damaged"):
            data.open_samples(tmp_path, X)

    @pytest.mark.parametrize(("given", "message"), [(1, "lacks input_1.pb"), (3, "has input_2.pb")])
    def test_number_of_files(self, tmp_path, given, message):
        test_sets(tmp_path, [[ramp(2, 4)] * given])
        with pytest.raises(InputError, match=f"test_data_set_0 {message}, but the model has 2 inputs"):
            data.open_samples(tmp_path, (spec("a"), spec("b")))


def test_real_readers_of_onnx_runtime():
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Own(quantization.CalibrationDataReader):
        def __init__(self):
            self.left = iter([{"x": ramp(2, 4) + i} for i in range(6)])

        def get_next(self):
            return next(self.left, None)

    assert [len(b.feed["x"]) for b in draw(Own())] == [2] * 6


def test_a_path_is_taken_as_text(tmp_path):
    source = sources(tmp_path, ramp(6, 4))["npz"]
    assert isinstance(source, Path)
    assert rows(draw(str(source))) == rows(draw(source))
