"""The inputs of a distillation: their order, and their changes."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.calibrate.shares import Batch, held_out
from onnx_lowrank.distil.augment import Augmentation, changes, chosen, sides
from onnx_lowrank.distil.inputs import Inputs
from onnx_lowrank.engines.inputs import Spec


class Table:
    """Samples 0, 1, 2, … of one number each, every fifth held out."""

    def __init__(self, count, most=None):
        self.count, self._most = count, most

    def batches(self, size):
        size = min(size, self._most or size)
        held = held_out(self.count)
        for share in (False, True):
            places = np.flatnonzero(held == share)
            for start in range(0, len(places), size):
                yield Batch({"x": places[start : start + size, None].astype(np.float32)}, bool(share))


WANTED = (Spec("x", np.dtype(np.float32), (None, 1)),)


def passed(inputs, seed):
    return [feed["x"][:, 0].astype(int).tolist() for feed in inputs.batches(np.random.default_rng(seed))]


def test_batches_have_a_new_order_in_every_pass_and_no_held_out_sample():
    inputs = Inputs(Table(100), WANTED, 64, 2**20)
    first, again, other = passed(inputs, 0), passed(inputs, 0), passed(inputs, 1)
    assert first == again != other
    drawn = [number for batch in first for number in batch]
    assert sorted(drawn) == [number for number in range(100) if number % 5 != 4]
    assert {len(batch) for batch in first} == {5}


def test_the_last_part_of_a_batch_is_left_out():
    inputs = Inputs(Table(42), WANTED, 64, 2**20)
    assert {len(batch) for batch in passed(inputs, 0)} == {inputs.size}


def test_single_samples_come_whole():
    inputs = Inputs(Table(20, most=1), WANTED, 64, 2**20)
    assert sorted(passed(inputs, 3)) == [[number] for number in range(20) if number % 5 != 4]


def test_samples_of_a_fixed_batch_come_whole():
    inputs = Inputs(Table(40), (Spec("x", np.dtype(np.float32), (4, 1)),), 64, 2**20)
    drawn = [number for batch in passed(inputs, 0) for number in batch]
    assert sorted(drawn) == [number for number in range(40) if number % 5 != 4]


def test_inputs_beyond_the_memory_are_read_again():
    inputs = Inputs(Table(100), WANTED, 64, 64)
    drawn = [number for batch in passed(inputs, 0) for number in batch]
    assert sorted(drawn) == [number for number in range(100) if number % 5 != 4]
    assert passed(inputs, 0) != passed(inputs, 1)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((2, 3, 32, 20), (2, 3)),
        ((2, 32, 20, 3), (1, 2)),
        ((2, 1, 16, 16), (2, 3)),
        ((2, 5, 32, 32), None),
        ((2, 3, 8, 32), None),
        ((2, 3, 32), None),
    ],
)
def test_images_have_few_channels_and_large_sides(shape, found):
    assert sides(shape) == found


@pytest.mark.parametrize("shape", [(16, 3, 24, 20), (16, 24, 20, 1), (16, 40)])
def test_changes_keep_shape_dtype_and_range(shape):
    x = np.random.default_rng(0).random(shape, np.float32)
    for one in changes(shape):
        made = one.change(x, np.random.default_rng(1))
        assert made.shape == x.shape
        assert made.dtype == np.float32
        assert not np.array_equal(made, x)
        assert np.array_equal(made, one.change(x, np.random.default_rng(1)))
        if one.name != "noisy":
            assert made.min() >= 0
            assert made.max() <= 1


def test_mirrored_images_are_images_or_their_mirrors():
    x = np.random.default_rng(0).random((16, 3, 20, 16), np.float32)
    (mirrored,) = [one for one in changes(x.shape) if one.name == "mirrored"]
    made = mirrored.change(x, np.random.default_rng(1))
    same = [np.array_equal(a, b) for a, b in zip(made, x, strict=True)]
    flipped = [np.array_equal(a, b[..., ::-1]) for a, b in zip(made, x, strict=True)]
    assert any(same)
    assert any(flipped)
    assert all(a != b for a, b in zip(same, flipped, strict=True))


def test_a_change_is_used_only_where_the_original_is_as_sure():
    feed = {"image": np.random.default_rng(0).random((16, 3, 20, 16), np.float32)}

    def sureness(changed):
        # Sure only of images whose left edge is as given.
        same = np.isclose(changed["image"][:, :, 0, 0], feed["image"][:, :, 0, 0]).all(axis=1)
        return [float(same.mean())]

    found = chosen(feed, sureness, np.random.default_rng(1))
    assert found.names == ("mixed", "pasted")
    assert chosen(feed, lambda changed: [1.0], np.random.default_rng(1)).names == (
        "mirrored",
        "shifted",
        "mixed",
        "pasted",
    )


def test_texts_and_several_inputs_of_floats_stay():
    ids = {"ids": np.ones((16, 8), np.int64)}
    assert chosen(ids, lambda changed: [1.0], np.random.default_rng(0)) == Augmentation({})
    masked = {"x": np.ones((16, 8), np.float32), "mask": np.ones((16, 8), np.int64)}
    assert chosen(masked, lambda changed: [1.0], np.random.default_rng(0)) == Augmentation({})
    two = {name: np.ones((16, 8), np.float32) for name in "ab"}
    assert chosen(two, lambda changed: [1.0], np.random.default_rng(0)) == Augmentation({})
