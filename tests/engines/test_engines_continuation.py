"""Greedy continuations: a decoder whose every token follows from all tokens, masks and positions before."""

from __future__ import annotations

import io
import json
import logging
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
from rich.console import Console

import onnx_lowrank
from decoders import POSITIONS, decoder
from onnx_lowrank.core.outcome import Continuation
from onnx_lowrank.engines import continuation
from onnx_lowrank.engines.continuation import LONGEST, PROMPTS, STEPS, Decoder, continued, prompts
from onnx_lowrank.engines.engine import RejectedError
from onnx_lowrank.engines.runtime import Runtime, runtime
from onnx_lowrank.files.load import load
from tiny import built, cnn

ENGINE = runtime("CPUExecutionProvider")
VOCABULARY = 23

# The next token is (sum of all ids in the cache + last position + sum of the mask + late) mod 23; `late` is 0
# until the mask is longer than `bound`.
TEXT = """
<ir_version: 8, opset_import: ["": 17]>
counting (int64[B, S] input_ids, int64[B, T] attention_mask, int64[B, S] position_ids,
          float[B, 1, P, 1] past_key_values_0_key, float[B, 1, P, 1] past_key_values_0_value)
      => (float[B, S, 23] logits, float[B, 1, T, 1] present_0_key, float[B, 1, T, 1] present_0_value)
<int64[2] both = {1, 3}, int64[1] last = {-1}, int64[1] middle = {1}, int64[3] inner = {1, 2, 3},
 float size = {23}, float zero = {0}>
{
  ids = Cast <to = 1> (input_ids)
  new = Unsqueeze (ids, both)
  present_0_key = Concat <axis = 2> (past_key_values_0_key, new)
  present_0_value = Concat <axis = 2> (past_key_values_0_value, new)
  total = ReduceSum <keepdims = 0> (present_0_key, inner)
  again = ReduceSum <keepdims = 0> (present_0_value, inner)
  mask = Cast <to = 1> (attention_mask)
  seen = ReduceSum <keepdims = 0> (mask, middle)
  positions = Cast <to = 1> (position_ids)
  place = ReduceMax <axes = [1], keepdims = 0> (positions)
  isLate = Greater (seen, bound)
  late = Where (isLate, shift, zero)
  a = Add (total, place)
  b = Add (a, seen)
  c = Add (b, late)
  cached = Sub (total, again)
  d = Add (c, cached)
  next = Mod <fmod = 1> (d, size)
  each = Unsqueeze (next, middle)
  off = Sub (each, classes)
  near = Mul (off, off)
  minus = Neg (near)
  score = Unsqueeze (minus, middle)
  blank = Mul (ids, zero)
  rows = Unsqueeze (blank, last)
  logits = Add (rows, score)
}
"""


def counting(bound=1e9, shift=1.0, text=TEXT):
    values = {"classes": np.arange(VOCABULARY), "bound": np.array(bound), "shift": np.array(shift)}
    return built(text, {name: value.astype(np.float32) for name, value in values.items()})


def wanted(prompt, bound=1e9, shift=1, steps=STEPS):
    """The tokens by the definition."""
    text = list(prompt)
    for _ in range(steps):
        late = shift if len(text) > bound else 0
        text.append((sum(text) + len(text) - 1 + len(text) + late) % VOCABULARY)
    return text[len(prompt) :]


def known(proto):
    found = continuation.decoder(proto)
    assert isinstance(found, Decoder), found
    return found


def texts(number=3, length=10, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (number, length))


def feed(ids, past=0, mask=None):
    number, length = ids.shape
    cache = np.zeros((number, 1, past, 1), np.float32)
    return {
        "input_ids": ids,
        "attention_mask": np.ones((number, past + length), np.int64) if mask is None else mask,
        "position_ids": np.tile(past + np.arange(length), (number, 1)),
        "past_key_values_0_key": cache,
        "past_key_values_0_value": cache,
    }


# --- the tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_cache_the_mask_and_the_positions_grow_with_the_text(length):
    proto = counting()
    rows = texts(4, length, seed=length)
    with ENGINE.open(load(proto)) as run:
        assert known(proto).greedy(run, rows).tolist() == [wanted(row) for row in rows]
        assert known(proto).greedy(run, rows[2:3], 5).tolist() == [wanted(rows[2], steps=5)]


@pytest.mark.parametrize("bound", [0, 5, 12, 18, 100])
def test_the_share_of_tokens_that_agree_is_planted(bound):
    ids = texts(3, 10)
    found = continued(load(counting()), load(counting(bound)), ENGINE, [feed(ids)])
    agreed = sum(a == b for row in ids for a, b in zip(wanted(row[:5]), wanted(row[:5], bound), strict=True))
    assert found == Continuation(3, 3 * STEPS, agreed)
    one = TEXT.replace("[B,", "[1,")
    single = continued(load(counting(text=one)), load(counting(bound, text=one)), ENGINE, [feed(ids)])
    assert single == found
    assert (found.agreement == 1) == (bound == 100)
    assert found.agreement == agreed / 48


def test_no_more_prompts_and_calls_than_bounded():
    runs = []

    class Counted(Runtime):
        @contextmanager
        def open(self, model):
            with Runtime.open(self, model) as inner:

                def run(given):
                    runs.append(given["input_ids"].shape)
                    return inner(given)

                yield run

    engine = Counted(ENGINE.module, ENGINE.provider)
    given = [feed(texts(3, 4)), feed(texts(30, 6))]
    found = continued(load(counting()), load(counting()), engine, given)
    assert (found.prompts, found.tokens) == (PROMPTS, PROMPTS * STEPS)
    calls = [(3, 2), *[(3, 1)] * (STEPS - 1), (5, 3), *[(5, 1)] * (STEPS - 1)]
    assert runs == 2 * calls
    runs.clear()
    one = TEXT.replace("[B,", "[1,")
    assert continued(load(counting(text=one)), load(counting(text=one)), engine, given) == found
    assert len(runs) == 2 * PROMPTS * STEPS
    assert runs[:STEPS] == [(1, 2), *[(1, 1)] * (STEPS - 1)]


def test_a_text_ends_where_the_model_has_no_further_position():
    proto = decoder()
    ids = np.random.default_rng(0).integers(0, 24, POSITIONS - 5)
    with ENGINE.open(load(proto)) as run:
        assert known(proto).positions == POSITIONS
        assert known(proto).greedy(run, ids[None]).shape == (1, 6)  # the last token needs no position
        assert known(proto).greedy(run, np.tile(ids, (2, 2))).shape == (2, 0)


def test_prompts_are_first_halves_without_padding():
    ids = np.arange(24).reshape(3, 8)
    mask = np.ones((3, 8), np.int64)
    mask[1, :4] = 0  # on the left
    mask[2, 2:] = 0  # on the right
    found = prompts(known(counting()), [feed(ids, mask=mask), feed(np.array([[7]]), past=3)])
    assert [list(text) for text in found] == [[0, 1, 2, 3], [12, 13], [16], [7]]
    (long,) = prompts(known(counting()), [feed(np.arange(300)[None])])
    assert list(long) == list(range(150 - LONGEST, 150))
    none = feed(ids, mask=np.zeros((3, 8), np.int64))
    assert prompts(known(counting()), [none]) == []
    assert continued(load(counting()), load(counting()), ENGINE, [none]) is None


# --- the interface --------------------------------------------------------------------------------------


def renamed(proto, names):
    """A model with other names of inputs and outputs."""
    for value in (*proto.graph.input, *proto.graph.output):
        value.name = names.get(value.name, value.name)
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    return proto


@pytest.mark.parametrize(
    ("past", "present"),
    [
        ("past_key_values.0.{}", "present.0.{}"),
        ("past_key_values.0.{}", "present_key_values.0.{}"),
        ("past_key_values.0.decoder.{}", "present.0.decoder.{}"),
        ("past_{}_0", "present_{}_0"),
    ],
)
def test_pasts_belong_to_presents_by_their_names(past, present):
    names = {}
    for part in ("key", "value"):
        names[f"past_key_values_0_{part}"] = past.format(part)
        names[f"present_0_{part}"] = present.format(part)
    proto = renamed(counting(), names)
    found = known(proto)
    assert found.presents == {past.format(part): present.format(part) for part in ("key", "value")}
    assert (found.ids, found.logits, found.positions) == ("input_ids", "logits", None)
    with ENGINE.open(load(proto)) as run:
        assert found.greedy(run, np.array([[3, 4]])).tolist() == [wanted([3, 4])]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "float[B, 1, P, 1] past_key_values_0_key",
            "float[B, 1, 4, 1] past_key_values_0_key",
            "cannot be empty",
        ),
        (
            "float[B, 1, T, 1] present_0_key",
            "double[B, 1, T, 1] present_0_key",
            "no output belongs to the past",
        ),
        (
            "float[B, 1, T, 1] present_0_key",
            "float[B, 2, T, 1] present_0_key",
            "no output belongs to the past",
        ),
        ("float[B, 1, T, 1] present_0_key", "float[B, T, 1] present_0_key", "no output belongs to the past"),
        ("present_0_key", "kept_0_key", "no output belongs to the past 'past_key_values_0_key'"),
        ("int64[B, S] position_ids", "int64[3, B, S] position_ids", "more axes than two"),
        ("int64[B, S] input_ids", "float[B, S, 1] input_ids", "not only the ids of tokens"),
        (
            "int64[B, S] input_ids",
            "int64[B, S] input_ids, float[B, 7, 4] encoder",
            "not only the ids of tokens",
        ),
        (
            "float[B, S, 23] logits",
            "float[B, 23] logits",
            "scores of the next token are? not clear|scores of the",
        ),
    ],
)
def test_a_model_without_such_an_interface_has_a_reason(old, new, reason):
    assert TEXT.count(old) >= 1
    found = continuation.decoder(onnx.parser.parse_model(TEXT.replace(old, new)))
    assert isinstance(found, str)
    assert any(part in found for part in reason.split("|"))


def test_what_is_no_decoder_is_told_in_the_log(caplog):
    with caplog.at_level(logging.DEBUG, "onnx_lowrank"):
        assert continued(load(cnn()), load(cnn()), ENGINE, [{}]) is None
    assert caplog.messages == ["no text is continued: it has no past among its inputs"]


def test_an_original_that_fails_is_told_in_the_log_and_a_compressed_one_is_an_error(caplog):
    # A mask of ones selects beyond the one element of `last`.
    beyond = "one = Gather (last, attention_mask)\n float_one = Cast <to = 1> (one)\n"
    beyond += "odd = ReduceSum <keepdims = 0> (float_one)\n nothing = Mul (odd, zero)\n"
    broken = counting(
        text=TEXT.replace("cached = Sub (total, again)", beyond + "cached = Add (nothing, zero)")
    )
    with caplog.at_level(logging.DEBUG, "onnx_lowrank"):
        assert continued(load(broken), load(counting()), ENGINE, [feed(texts())]) is None
    assert "no text is continued: the model fails on a prompt" in caplog.text
    with pytest.raises(RejectedError):
        continued(load(counting()), load(broken), ENGINE, [feed(texts())])


# --- in a run -------------------------------------------------------------------------------------------


def data(number, length, seed=0):
    """Inputs of the small decoder, behind an empty past."""
    ids = np.random.default_rng(seed).integers(0, 24, (number, length))
    cache = np.zeros((number, 2, 0, 8), np.float32)
    names = ("past_key_values_0_key", "past_key_values_0_value")
    return feed(ids) | dict.fromkeys(names, cache)


def again(original, compressed, rows):
    """The agreement, computed anew: every prompt with each model."""
    both = []
    for proto in (original, compressed):
        with ENGINE.open(load(proto)) as run:
            both.append([token for row in rows for token in known(proto).greedy(run, row[None])[0]])
    return sum(a == b for a, b in zip(*both, strict=True)) / len(both[0])


@pytest.mark.parametrize("source", ["calibration", "inputs"])
def test_the_report_has_the_agreement(source):
    given = data(40, 12)
    with onnx_lowrank.compress(decoder(), ratio=0.6, recipe="schatten", **{source: given}) as result:
        found = result.report.validation.continuation
        rows = given["input_ids"][4::5] if source == "calibration" else given["input_ids"][:8]
        expected = again(decoder(), result.proto, [row[:6] for row in rows])
        file = io.StringIO()
        result.report.table(Console(file=file, width=100))
        table = json.loads(result.report.to_json())["validation"]["continuation"]
    assert (found.prompts, found.tokens) == (8, 128)
    assert 0 < found.agreement == expected < 1
    assert table == {"prompts": 8, "tokens": 128, "agreement": expected}
    assert f"  greedy continuation of 8 prompts: {expected:.0%} of 128 tokens agree\n" in file.getvalue()


def test_without_texts_nothing_is_continued():
    with onnx_lowrank.compress(decoder(), ratio=0.6) as result:
        assert result.report.validation.continuation is None
    x = np.random.default_rng(0).standard_normal((10, 8, 6, 6), np.float32)
    with onnx_lowrank.compress(cnn(), ratio=0.6, inputs={"x": x}) as result:
        assert result.report.validation.continuation is None
