"""Texts with random tokens: which change, where, and how much."""

from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrating import ENGINE, measured, seen
from onnx_lowrank import compress
from onnx_lowrank.calibrate import variety
from onnx_lowrank.calibrate.shares import Batch
from onnx_lowrank.files.load import load
from rewriting import model

WORDS, LENGTH = 2000, 40
TEXT = """g (int64[N,L] input_ids, int64[N,L] attention_mask) => (float[N,L,6] y)
    { a = Gather (words, input_ids) y = MatMul (a, w) }"""
FIRST, LAST = 1, 2


class Texts:
    """Texts in batches, every fifth batch held out."""

    def __init__(self, ids, mask=None):
        self.ids, self.mask, self.count = ids, np.ones_like(ids) if mask is None else mask, len(ids)

    def batches(self, size):
        for number, start in enumerate(range(0, self.count, size)):
            part = slice(start, start + size)
            yield Batch({"input_ids": self.ids[part], "attention_mask": self.mask[part]}, number % 5 == 4)


class Accepting:
    """An engine that takes all ids."""

    @contextmanager
    def open(self, model):
        yield lambda feed: {}


def varied(proto, samples, engine=ENGINE):
    return variety.varied(load(proto), samples, engine)


def proto(words=WORDS):
    return model(TEXT, words=(words, 6), w=(6, 6))


def texts(number, seed=0, words=WORDS):
    ids = np.random.default_rng(seed).integers(10, words, (number, LENGTH))
    ids[:, 0], ids[:, -1] = FIRST, LAST
    return ids


def copies(samples, size=7, engine=ENGINE):
    """The original texts, their copies with other tokens, and whether each is held out."""
    found = []
    batches = list(varied(proto(), samples, engine).batches(size))
    given = [batch.feed["input_ids"] for batch in samples.batches(size)]
    for before, batch in pairwise(batches):
        ids = batch.feed["input_ids"]
        if not any(ids is whole or np.array_equal(ids, whole) for whole in given):
            near = [next(row for row in before.feed["input_ids"] if _is_copy(row, copy)) for copy in ids]
            found += [(row, copy, batch.held) for row, copy in zip(near, ids, strict=True)]
            assert before.held == batch.held
    return [np.array(column) for column in zip(*found, strict=True)]


def _is_copy(row, copy):
    return np.mean(row == copy) > 0.3


def test_a_third_of_the_texts_of_either_share_is_repeated():
    samples = Texts(texts(100))
    whole, _, held = copies(samples)
    assert len(whole) == pytest.approx(100 / 3, abs=1)
    shares = [batch.held for batch in samples.batches(7) for _ in batch.feed["input_ids"]]
    assert held.sum() == pytest.approx(sum(shares) / 3, abs=1)
    assert len(np.unique(whole, axis=0)) == len(whole)


def test_all_given_texts_are_read():
    samples = Texts(texts(60))
    read = np.concatenate([batch.feed["input_ids"] for batch in varied(proto(), samples).batches(7)])
    assert {tuple(row) for row in samples.ids} <= {tuple(row) for row in read}


def test_half_of_the_share_of_tokens_that_the_texts_lack_is_replaced():
    ids = texts(100)
    unseen = 1 - len(np.unique(ids)) / WORDS
    assert 0.1 < unseen < 0.9
    whole, other, _ = copies(Texts(ids))
    assert (whole != other)[:, 1:-1].mean() == pytest.approx(unseen / 2, abs=0.04)


def test_marks_of_the_beginning_and_end_stay():
    whole, other, _ = copies(Texts(texts(60)))
    assert (whole != other).any()
    np.testing.assert_array_equal(other[:, [0, -1]], whole[:, [0, -1]])


def test_hidden_positions_stay():
    ids = texts(60)
    mask = np.ones_like(ids)
    mask[:, 20:] = 0
    whole, other, _ = copies(Texts(ids, mask))
    assert (whole[:, :20] != other[:, :20]).any()
    np.testing.assert_array_equal(other[:, 20:], whole[:, 20:])


@given(size=st.integers(1, 50), seed=st.integers(0, 5))
def test_every_pass_reads_the_same_texts(size, seed):
    samples = varied(proto(), Texts(texts(40, seed)))
    passes = [[batch.feed["input_ids"] for batch in samples.batches(size)] for _ in range(2)]
    for one, other in zip(*passes, strict=True):
        np.testing.assert_array_equal(one, other)


def test_new_tokens_come_from_the_whole_vocabulary():
    whole, other, _ = copies(Texts(texts(100)))
    new = other[whole != other]
    assert new.min() < 50
    assert new.max() > WORDS - 50
    assert new.max() < WORDS


def test_texts_that_hold_every_token_are_not_repeated():
    samples = Texts(np.array([np.random.default_rng(row).permutation(20) for row in range(30)]))
    assert varied(proto(20), samples) is samples


def test_ids_outside_the_table_stay():
    ids = texts(60)
    ids[:, 5], ids[:, 6] = -np.arange(1, 61), WORDS + np.arange(60)
    whole, other, _ = copies(Texts(ids), engine=Accepting())
    np.testing.assert_array_equal(other[:, 5:7], whole[:, 5:7])


def test_the_given_texts_are_not_changed():
    ids = texts(60)
    before = ids.copy()
    list(varied(proto(), Texts(ids)).batches(7))
    np.testing.assert_array_equal(ids, before)


@pytest.mark.parametrize("size", [1, 4])
def test_batches_that_the_model_fixes_are_repeated_whole(size):
    text = f"""g (int64[{size},{LENGTH}] input_ids) => (float[{size},{LENGTH},6] y)
        {{ y = Gather (words, input_ids) }}"""

    class Fixed:
        count = 24 * size

        def batches(self, _):
            return (Batch({"input_ids": part}, False) for part in texts(self.count).reshape(24, size, LENGTH))

    sizes = [len(b.feed["input_ids"]) for b in varied(model(text, words=(WORDS, 6)), Fixed()).batches(99)]
    assert sizes == [size] * 32


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [("float", "N,L", WORDS), ("int8", "N,L", WORDS), ("int64", "L", WORDS)],
    ids=["floats", "too few bits", "one token for each sample"],
)
def test_inputs_that_hold_no_text_are_not_repeated(kind, shape, words):
    text = f"""g ({kind}[{shape}] ids) => (float[{shape},6] y) {{
        i = Cast <to = 7> (ids) y = Gather (words, i) }}"""
    samples = object()
    assert varied(model(text, words=(words, 6)), samples) is samples


def test_small_integers_are_repeated():
    text = "g (uint8[N,L] ids) => (float[N,L,6] y) { i = Cast <to = 7> (ids) y = Gather (words, i) }"

    class Bytes(Texts):
        def batches(self, size):
            for batch in super().batches(size):
                yield Batch({"ids": batch.feed["input_ids"].astype(np.uint8)}, batch.held)

    ids = texts(30) % 100
    first, copy, *_ = varied(model(text, words=(256, 6)), Bytes(ids)).batches(7)
    assert copy.feed["ids"].dtype == np.uint8
    assert copy.feed["ids"].max() > 100
    assert copy.feed["ids"].shape == (3, *first.feed["ids"].shape[1:])


def test_a_model_that_takes_no_other_tokens_gets_none():
    """The ids also choose from another table, which is smaller than that of the tokens."""
    text = """g (int64[N,L] input_ids, int64[N,L] attention_mask) => (float[N,L,6] y)
        { t = Transpose (places) a = Gather (words, input_ids) b = Gather (t, input_ids) y = Add (a, b) }"""
    samples = Texts(texts(60) % 50)
    assert varied(model(text, words=(WORDS, 6), places=(6, 50)), samples) is samples


def test_a_batch_without_texts_stays():
    class Empty(Texts):
        def batches(self, size):
            yield from super().batches(size)
            yield Batch({"input_ids": np.zeros((0, 5), np.int64), "attention_mask": np.zeros((0, 5))}, False)

    *_, last = varied(proto(), Empty(texts(60))).batches(7)
    assert last.feed["input_ids"].shape == (0, 5)


def test_images_are_not_repeated():
    text = "g (float[N,4] x) => (float[N,6] y) { y = MatMul (x, w) }"
    samples = object()
    assert varied(model(text, w=(4, 6)), samples) is samples


def test_positions_and_types_stay():
    text = """g (int64[N,L] input_ids, int64[N,L] token_type_ids, int64[N,L] position_ids) => (float[N,L,6] y)
        { a = Gather (words, input_ids) b = Gather (types, token_type_ids)
        c = Gather (places, position_ids) d = Add (a, b) y = Add (d, c) }"""

    class Several:
        count = 9

        def batches(self, size):
            ids = texts(9)
            yield Batch({"input_ids": ids, "token_type_ids": ids % 9, "position_ids": ids % 80}, False)

    found = varied(model(text, words=(WORDS, 6), types=(9, 6), places=(80, 6)), Several())
    first, copy = found.batches(9)
    assert (copy.feed["input_ids"] != first.feed["input_ids"][::3]).any()
    np.testing.assert_array_equal(copy.feed["token_type_ids"], first.feed["token_type_ids"][::3])
    np.testing.assert_array_equal(copy.feed["position_ids"], first.feed["position_ids"][::3])


def test_moments_hold_copies_and_neither_comparisons_nor_counts_of_rows_do():
    found = seen(proto())
    data = {"input_ids": texts(60), "attention_mask": np.ones((60, LENGTH), np.int64)}
    with measured(found, data) as calibration:
        compared = np.concatenate([batch.feed["input_ids"] for batch in calibration.compared.batches(7)])
        moments = {name: calibration.statistics[name] for name in ("words", "w")}
    fitted = np.arange(60) % 5 != 4
    np.testing.assert_array_equal(np.sort(compared, axis=0), np.sort(data["input_ids"], axis=0))
    counts = np.bincount(data["input_ids"][fitted].ravel(), minlength=WORDS)
    np.testing.assert_array_equal(moments["words"].counts, counts)
    assert moments["w"].inputs.count == 64 * LENGTH


@pytest.mark.parametrize(("words", "told"), [(WORDS, True), (20, False)])
def test_the_report_tells_that_texts_are_read_again(words, told):
    ids = np.random.default_rng(0).integers(0, words, (40, LENGTH))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    made = compress(model(TEXT, words=(words, 6), w=(6, 6)), 0.9, recipe="activation", calibration=feeds)
    again = ", every third read again with other tokens"
    assert made.report.calibration.source == "arrays: 40 samples, 8 held out" + (again if told else "")
