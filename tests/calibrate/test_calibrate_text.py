"""Texts as samples: windows of tokens, the inputs beside them, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from decoders import POSITIONS, decoder
from onnx_lowrank import compress
from onnx_lowrank.calibrate import data
from onnx_lowrank.calibrate.sources import tokens
from onnx_lowrank.calibrate.sources.source import Need, Options
from onnx_lowrank.engines.id_limits import id_limits
from onnx_lowrank.engines.inputs import Spec, specs
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import load
from tokenizing import CLS, FIRST, SEP, words, written


def spec(name, *shape, dtype="int64"):
    return Spec(name, np.dtype(dtype), shape)


IDS = spec("input_ids", "batch", "seq")
ENCODER = (IDS, spec("attention_mask", "batch", "seq"), spec("token_type_ids", "batch", "seq"))


@pytest.fixture
def text(tmp_path):
    """A text of 1000 words of five letters, each with a space behind it: 6000 bytes."""
    path = tmp_path / "text.txt"
    path.write_text(words(range(1000)) + "\n")
    return path


@pytest.fixture
def bare(tmp_path):
    """The options for a tokenizer that adds no special tokens."""
    return Options(written(tmp_path / "bare.json", 1000, specials=False))


@pytest.fixture
def marked(tmp_path):
    """The options for a tokenizer that adds special tokens."""
    return Options(written(tmp_path / "marked.json", 1000))


def feeds(path, options, wanted=(IDS,), most=None, size=10_000, **more):
    """The samples of both shares in their order, by input."""
    need = Need(tuple(wanted), most=most, options=options, **more)
    with data.open_needed(path, need) as samples:
        return [batch.feed for batch in samples.batches(size)]


def firsts(found):
    """The number of the first word of every sample."""
    return sorted(int(row[0]) - FIRST for feed in found for row in feed["input_ids"])


class TestWindows:
    def test_windows_follow_each_other(self, text, bare):
        found = feeds(text, bare, shapes={"input_ids": (1, 100)})
        rows = np.concatenate([feed["input_ids"] for feed in found])
        rows = rows[np.argsort(rows[:, 0])]
        np.testing.assert_array_equal(rows, FIRST + np.arange(1000).reshape(10, 100), strict=True)

    def test_the_last_words_do_not_fill_a_window(self, text, bare):
        assert firsts(feeds(text, bare, shapes={"input_ids": (1, 300)})) == [0, 300, 600]

    def test_fewer_are_evenly_spaced(self, text, bare):
        found = feeds(text, bare, most=4, shapes={"input_ids": (1, 200)})
        assert firsts(found) == [0, 200, 400, 600]

    def test_a_larger_text_is_read_in_places_only(self, text, bare):
        # The places are the bytes 0, 2000 and 4000; the next words are 0, 334 and 667.
        found = feeds(text, bare, most=3, shapes={"input_ids": (1, 4)})
        rows = np.concatenate([feed["input_ids"] for feed in found]) - FIRST
        np.testing.assert_array_equal(rows, [[0, 1, 2, 3], [334, 335, 336, 337], [667, 668, 669, 670]])

    def test_time_is_bounded_by_what_is_asked_for(self, tmp_path):
        path = tmp_path / "large.txt"
        path.write_text("word " * 1_000_000)
        read = []
        found = tokens.windows(path, lambda block: read.append(len(block)) or [7] * block.count(" "), 16, 10)
        assert found.shape == (10, 16)
        assert sum(read) < 10 * 16 * 8 * 2

    @pytest.mark.parametrize("length", [100, 10**6, 10**15])
    def test_no_more_is_read_than_the_bound(self, tmp_path, monkeypatch, length):
        monkeypatch.setattr(tokens, "_TEXT_BYTES", 50_000)
        path = tmp_path / "large.txt"
        path.write_text("word " * 100_000)
        read = []
        found = tokens.windows(
            path, lambda block: read.append(len(block)) or [7] * block.count(" "), length, 10**9
        )
        assert len(found) == (7 if length == 100 else 0)
        assert sum(read) <= 50_000

    def test_a_place_inside_a_character_is_moved_behind_it(self, tmp_path):
        path = tmp_path / "umlauts.txt"
        path.write_text("€€€€€ " * 4000, encoding="utf-8")
        read = []
        found = tokens.windows(path, lambda block: read.append(block) or [7] * block.count("€€€€€ "), 2, 50)
        assert found.shape == (50, 2)
        assert set("".join(read)) == {"€", " "}

    @pytest.mark.parametrize("size", [1, 5, 100])
    def test_a_text_without_spaces_is_cut_anywhere(self, tmp_path, size):
        path = tmp_path / "long.txt"
        path.write_text("x" * 20_000)
        found = tokens.windows(path, lambda block: [ord(letter) for letter in block], size, 10**9)
        assert found.shape == (20_000 // size, size)

    def test_blocks_join_to_the_text(self, tmp_path):
        rng = np.random.default_rng(3)
        content = "".join(rng.choice(list("ab €ü\n"), 50_000))
        path = tmp_path / "mixed.txt"
        path.write_bytes(content.encode())
        found = tokens.windows(path, lambda block: [ord(letter) for letter in block], 1, 10**9)
        assert "".join(map(chr, found[:, 0])) == content

    def test_the_description_tells_the_length(self, text, bare):
        need = Need((IDS,), most=8, shapes={"input_ids": (1, 100)}, options=bare)
        with data.open_needed(text, need) as samples:
            assert samples.description == "text.txt: 8 of 10 samples of 100 tokens, 1 held out"


class TestEncoders:
    def test_special_tokens_stand_around_every_window(self, text, marked):
        (feed, _) = feeds(text, marked, ENCODER, most=5, shapes={"input_ids": (1, 12)})
        assert list(feed) == ["input_ids", "attention_mask", "token_type_ids"]
        np.testing.assert_array_equal(feed["input_ids"][0], [CLS, *range(FIRST, FIRST + 10), SEP])
        assert set(feed["input_ids"][:, 0]) == {CLS}
        assert set(feed["input_ids"][:, -1]) == {SEP}
        np.testing.assert_array_equal(feed["attention_mask"], np.ones((4, 12), np.int64), strict=True)
        np.testing.assert_array_equal(feed["token_type_ids"], np.zeros((4, 12), np.int64), strict=True)

    def test_padding_and_truncation_of_the_tokenizer_are_left_out(self, tmp_path, text):
        strategy = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
        padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
        padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[UNK]"}
        path = written(tmp_path / "t.json", 1000, truncation=strategy, padding=padding)
        (feed,) = feeds(text, Options(path), most=1, shapes={"input_ids": (1, 12)})
        np.testing.assert_array_equal(feed["input_ids"], [[CLS, *range(FIRST, FIRST + 10), SEP]])

    @pytest.mark.parametrize(
        ("shape", "given", "want"),
        [(("batch", 20), None, 20), (("batch", "seq"), (8, 30), 30), (("batch", "seq"), None, 128)],
    )
    def test_the_length(self, text, bare, shape, given, want):
        shapes = {} if given is None else {"input_ids": given}
        (feed,) = feeds(text, bare, [spec("input_ids", *shape)], most=1, shapes=shapes)
        assert feed["input_ids"].shape == (1, want)

    def test_a_fixed_batch_is_filled(self, text, bare):
        found = feeds(text, bare, [spec("input_ids", 3, 10), spec("mask", 3, 10, dtype="bool")], most=30)
        assert {tuple(array.shape for array in feed.values()) for feed in found} == {((3, 10), (3, 10))}
        assert all(feed["mask"].all() for feed in found)

    def test_inputs_without_a_batch(self, text, bare):
        wanted = [spec("ids", "seq"), spec("position_ids", "seq", dtype="int32"), spec("mask", 8)]
        (feed,) = feeds(text, bare, wanted, most=1, shapes={"ids": (8,)})
        np.testing.assert_array_equal(feed["ids"], FIRST + np.arange(8), strict=True)
        np.testing.assert_array_equal(feed["position_ids"], np.arange(8, dtype=np.int32), strict=True)
        np.testing.assert_array_equal(feed["mask"], np.ones(8, np.int64), strict=True)

    def test_another_name_is_taken_if_it_is_the_only_one(self, text, bare):
        (feed,) = feeds(text, bare, [spec("tokens", "b", 8), spec("mask", "b", 8)], most=1)
        np.testing.assert_array_equal(feed["tokens"], [FIRST + np.arange(8)])


class TestDecoders:
    def wanted(self):
        proto = decoder()
        return {"wanted": specs(proto), "limits": id_limits(proto)}

    def words_of(self, tmp_path, count):
        path = tmp_path / "few.txt"
        path.write_text(words(np.random.default_rng(1).integers(count, size=3000)))
        return path

    def test_the_past_is_empty_and_the_model_runs(self, tmp_path, bare):
        path = self.words_of(tmp_path, 21)
        feed = feeds(path, bare, most=6, **self.wanted())[0]
        assert {name: array.shape for name, array in feed.items()} == {
            "input_ids": (5, POSITIONS),
            "attention_mask": (5, POSITIONS),
            "position_ids": (5, POSITIONS),
            "past_key_values_0_key": (5, 2, 0, 8),
            "past_key_values_0_value": (5, 2, 0, 8),
        }
        np.testing.assert_array_equal(feed["position_ids"][3], np.arange(POSITIONS))
        with runtime("CPUExecutionProvider").open(load(decoder())) as run:
            assert run(feed)["logits"].shape == (5, POSITIONS, 24)

    def test_positions_and_a_flag_that_all_samples_share(self, text, bare):
        wanted = [IDS, spec("position_ids", 1, "seq"), spec("use_cache_branch", 1, dtype="bool")]
        found = feeds(text, bare, wanted, most=4, shapes={"input_ids": (1, 8)})
        assert [feed["input_ids"].shape for feed in found] == [(1, 8)] * 4
        for feed in found:
            np.testing.assert_array_equal(feed["position_ids"], [np.arange(8)])
            np.testing.assert_array_equal(feed["use_cache_branch"], [False])

    def test_a_decoder_is_compressed(self, tmp_path, bare):
        given = {"calibration": self.words_of(tmp_path, 21), "tokenizer": bare.tokenizer}
        shape = {"input_ids": (1, 16)}
        result = compress(decoder(), 0.8, recipe="activation", input_shape=shape, **given)
        said = "few.txt: 187 samples of 16 tokens, 37 held out, every third read again with other tokens"
        assert result.report.calibration.source == said

    def test_ids_beyond_the_vocabulary(self, text, bare):
        with pytest.raises(InputError, match=r"gives the id \d+ \('w\d+'\), but the .* takes ids below 24"):
            feeds(text, bare, **self.wanted())

    def test_more_tokens_than_positions(self, text, bare):
        with pytest.raises(InputError, match="100 positions, fewer than the 101 tokens of --input-shape"):
            feeds(text, bare, shapes={"input_ids": (1, 101)}, **self.wanted())

    def test_a_past_of_fixed_length(self, text, bare):
        past = spec("past_key_values.0.key", "batch", 2, 16, 8, dtype="float32")
        with pytest.raises(InputError, match="key' of the shape batch×2×16×8 has no free length"):
            feeds(text, bare, [IDS, past])

    def test_a_past_of_unknown_heads(self, text, bare):
        past = spec("past_key_values.0.key", "batch", "heads", "past_length", 8, dtype="float32")
        with pytest.raises(InputError, match="batch×heads×past_length×8 has open sizes besides its batch"):
            feeds(text, bare, [IDS, past])


class TestRefused:
    def test_a_text_without_a_tokenizer(self, text):
        with pytest.raises(InputError, match=r"text.txt is a text, so its tokenizer is needed, too: pass"):
            feeds(text, Options())

    def test_a_missing_library(self, text, bare, monkeypatch):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(
            InputError, match=r'tokenizers, which is not .*: pip install "onnx-lowrank\[text\]"\.$'
        ):
            feeds(text, bare)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{}", "t.json is no tokenizer"),
            (b"garbage", "t.json is no tokenizer"),
            (b"\xff\xfe", "t.json is no tokenizer"),
            (b"", "t.json is no tokenizer"),
            (None, "t.json cannot be read"),
        ],
    )
    def test_a_file_that_is_no_tokenizer(self, tmp_path, text, content, message):
        path = tmp_path / "t.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            feeds(text, Options(path))

    @pytest.mark.parametrize("name", ["PanicException", "Exception"])
    def test_a_panic_of_the_library(self, text, bare, monkeypatch, name):
        panic = type(name, (BaseException if name == "PanicException" else Exception,), {})

        class Failing:
            def __getattr__(self, asked):
                raise panic("index out\nof bounds")

        monkeypatch.setattr("tokenizers.Tokenizer", Failing())
        with pytest.raises(InputError, match=r"bare.json is no tokenizer \(index out of bounds\): pass the"):
            feeds(text, bare)

    def test_a_folder_or_a_large_file_as_tokenizer(self, tmp_path, text, bare, monkeypatch):
        with pytest.raises(InputError, match=r"is no file: pass the tokenizer.json of the model"):
            feeds(text, Options(tmp_path))
        monkeypatch.setattr(tokens, "_TOKENIZER_BYTES", 10)
        with pytest.raises(InputError, match=r"bare.json has 0 MiB: pass the tokenizer.json of"):
            feeds(text, bare)

    @pytest.mark.parametrize("content", ["", "w0000", "w0000 " * 127])
    def test_a_short_text(self, text, bare, content):
        text.write_text(content)
        refused = r"text.txt is too short, as it gives fewer than the 128 tokens of one sample"
        with pytest.raises(InputError, match=refused):
            feeds(text, bare)

    def test_a_length_without_room_for_the_text(self, text, marked):
        with pytest.raises(InputError, match="samples of 2 tokens have no room beside the 2 special tokens"):
            feeds(text, marked, [spec("input_ids", "batch", 2)])

    def test_another_encoding(self, text, bare):
        text.write_bytes(words(range(1000)).encode() + b" \xff ")
        with pytest.raises(InputError, match=r"text.txt is no text in UTF-8 \(in the bytes 0 to 6002\)"):
            feeds(text, bare)

    def test_a_model_without_ids(self, text, bare):
        with pytest.raises(InputError, match="not exactly one of the inputs 'x' can take its tokens"):
            feeds(text, bare, [spec("x", "n", 8, dtype="float32")])
        with pytest.raises(InputError, match="not exactly one of the inputs 'a', 'b' can take its tokens"):
            feeds(text, bare, [spec("a", "n", 8), spec("b", "n", 8)])

    def test_an_input_that_a_text_does_not_fill(self, text, bare):
        with pytest.raises(InputError, match="no values for the input 'pixels' of the shape n×3×8×8: give"):
            feeds(text, bare, [IDS, spec("pixels", "n", 3, 8, 8, dtype="float32")])

    def test_a_shape_that_does_not_fit(self, text, bare):
        with pytest.raises(InputError, match="'input_ids' has the shape batch×seq in the model, which --in"):
            feeds(text, bare, shapes={"input_ids": (1, 2, 3)})


def test_the_inputs_to_compare_on_are_one_feed(text, marked):
    need = Need(ENCODER, most=3, shapes={"input_ids": (1, 12)}, options=marked)
    feed = data.read_feed(text, need)
    assert {array.shape for array in feed.values()} == {(data.COMPARED, 12)}
    (row,) = data.read_feed(text, replace(need, specs=(spec("input_ids", 1, 12),))).values()
    np.testing.assert_array_equal(row, [[CLS, *range(FIRST, FIRST + 10), SEP]])
