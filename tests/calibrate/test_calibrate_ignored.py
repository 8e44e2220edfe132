"""Padding: is it found, and does it count nowhere?"""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

import onnx_lowrank
from calibrating import measured, seen
from onnx_lowrank.calibrate import ignored, measurement, sensitivity
from onnx_lowrank.calibrate.differences import differs
from onnx_lowrank.calibrate.ignored import _axes
from onnx_lowrank.engines.padding import NO_PADDING, Padding
from padded import HIDDEN_STATES, LENGTH, POOLED, UNMASKED, WORDS, encoder, texts, weights

NUMBER = 40
LAYERS = {"words", "wq", "wk", "wv", "wo", "w1", "w2"}


def padding_of(proto, data):
    with measured(seen(proto), data) as calibration:
        return calibration.statistics.padding


def random_ids(seed):
    return lambda shape: np.random.default_rng(seed).integers(1, WORDS, shape)


def test_a_mean_over_shown_positions_has_no_axis_of_positions():
    found = padding_of(encoder(), texts(NUMBER))
    assert found.mask == "attention_mask"
    assert found.axes == {}
    assert found.layers == LAYERS


def test_states_of_all_positions_have_the_second_axis():
    found = padding_of(encoder(HIDDEN_STATES), texts(NUMBER))
    assert found.axes == {"hidden": 1}
    assert found.layers == LAYERS


def test_a_mask_that_attention_does_not_obey_hides_nothing():
    assert padding_of(encoder(UNMASKED), texts(NUMBER)) == NO_PADDING


def test_texts_of_one_length_have_no_padding():
    data = texts(NUMBER)
    data["attention_mask"][:] = 1
    assert padding_of(encoder(), data) == NO_PADDING


@pytest.mark.parametrize("value", [2, -10000])
def test_a_mask_of_other_numbers_hides_nothing(value):
    data = texts(NUMBER)
    data["attention_mask"] = np.where(data["attention_mask"], 1, value)
    assert padding_of(encoder(), data) == NO_PADDING


def test_two_masks_hide_nothing():
    text = POOLED.replace("int64[B,L] attention_mask)", "int64[B,L] attention_mask, int64[B,L] other_mask)")
    data = texts(NUMBER)
    assert padding_of(encoder(text), data | {"other_mask": data["attention_mask"]}) == NO_PADDING


def test_flat_vectors_follow_the_positions_too():
    """PyTorch's dynamo exporter multiplies matrices of all tokens of a batch."""
    text = POOLED.replace(
        "h0 = MatMul (r, w1)", "flat = Reshape (r, rows) g0 = MatMul (flat, w1) h0 = Reshape (g0, back)"
    )
    proto = encoder(text)
    for name, sizes in (("rows", [-1, 16]), ("back", [-1, LENGTH, 40])):
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(sizes)], sizes))
    assert padding_of(proto, texts(NUMBER)).layers == LAYERS


def test_a_convolution_over_positions_sees_the_padding():
    """Its vectors next to the padding differ, so all of them count; and so does the result."""
    text = HIDDEN_STATES.replace(
        "hidden = Add (f, r)",
        "t = Transpose <perm = [0, 2, 1]> (f) e = Conv <pads = [1, 1]> (t, wc) "
        "hidden = Transpose <perm = [0, 2, 1]> (e)",
    )
    proto = encoder(text)
    kernel = np.random.default_rng(0).standard_normal((16, 16, 3))
    proto.graph.initializer.append(
        helper.make_tensor("wc", TensorProto.FLOAT, kernel.shape, kernel.ravel().tolist())
    )
    assert padding_of(proto, texts(NUMBER)) == NO_PADDING


def test_moments_are_those_of_shown_positions_alone():
    data = texts(NUMBER)
    with measured(seen(encoder()), data) as calibration:
        known = calibration.statistics["wq"]
    rows = weights()["words"][data["input_ids"]].astype(np.float64)
    held = np.arange(NUMBER) % 5 == 4
    for moments, share in ((known.inputs, ~held), (known.held, held)):
        kept = rows[share][data["attention_mask"][share] > 0]
        assert moments.count == len(kept) < rows[share].size // 16
        np.testing.assert_allclose(moments.mean[0], kept.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(moments.second[0], np.cov(kept.T, bias=True), atol=1e-5)


def test_sums_of_results_count_shown_positions_alone():
    text = POOLED.replace("r = Add (o, x)", "").replace("MatMul (r, w1)", "MatMul (x, w1)")
    text = text.replace("hidden = Add (f, r)", "both = Add (o, f) hidden = Add (both, x)")
    data = texts(NUMBER)
    with measured(seen(encoder(text)), data) as calibration:
        known = calibration.statistics.summed_outputs(("wo", "w2")).read()
    held = np.arange(NUMBER) % 5 == 4
    for moments, share in ((known.outputs, ~held), (known.held_outputs, held)):
        assert moments.count == data["attention_mask"][share].sum() < data["attention_mask"][share].size


def test_samples_of_several_lengths_are_blocks():
    """The number of independent vectors is that of texts without padding, one after the other."""
    data = texts(NUMBER)
    data["input_ids"] = np.broadcast_to(data["input_ids"][:, :1], data["input_ids"].shape)  # one word each
    with measured(seen(encoder()), data) as calibration:
        padded = calibration.statistics["w1"].inputs
    feeds = [
        {name: values[n : n + 1, : data["attention_mask"][n].sum()] for name, values in data.items()}
        for n in range(NUMBER)
    ]
    with measured(seen(encoder()), feeds) as calibration:
        apart = calibration.statistics["w1"].inputs
    assert padded.count == apart.count
    assert padded.independent < 0.9 * padded.count
    assert padded.independent == pytest.approx(apart.independent, rel=0.02)
    np.testing.assert_allclose(padded.second, apart.second, atol=1e-4)


@pytest.mark.parametrize("recipe", ["activation", "output"])
@pytest.mark.parametrize("text", [POOLED, HIDDEN_STATES], ids=["pooled", "hidden"])
def test_ids_of_padding_change_neither_the_model_nor_its_error(recipe, text):
    proto = encoder(text)
    made = []
    for seed in (1, 2):
        data = texts(NUMBER, random_ids(seed))
        with onnx_lowrank.compress(proto, ratio=0.6, recipe=recipe, calibration=data) as result:
            made.append((result.model.proto, result.report))
    (one, first), (other, second) = made
    errors = [report.validation.worst for report in (first, second)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert 0 < errors[0] < 0.9
    names = {tensor.name: tensor for tensor in other.graph.initializer}
    assert names.keys() != {tensor.name for tensor in proto.graph.initializer}
    for tensor in one.graph.initializer:
        ours, theirs = (_array(t) for t in (tensor, names[tensor.name]))
        np.testing.assert_allclose(ours, theirs, atol=2e-3 * max(np.abs(theirs).max(), 1e-3))


def _array(tensor):
    from onnx.numpy_helper import to_array

    return np.asarray(to_array(tensor), np.float64)


def test_the_axis_of_a_cache_is_the_third():
    shown = np.arange(6) < np.array([[4], [6], [2]])
    value = np.random.default_rng(0).standard_normal((3, 2, 6, 5))
    other = np.where(shown[:, None, :, None], value, value + 1)
    assert _axes({"present.0.key": (value, other), "same": (value, value)}, shown) == {"present.0.key": 2}
    other[0, 0, 0, 0] += 1
    assert _axes({"present.0.key": (value, other)}, shown) is None


def test_rounding_is_no_difference():
    value = np.array([1.0, -3.0, np.inf, np.nan, 0.0])
    assert not differs(value, value * (1 + 1e-5)).any()
    assert differs(value, np.array([1.0, -3.0, 1.0, np.nan, 0.1])).tolist() == [
        False,
        False,
        True,
        False,
        True,
    ]
    assert differs(value, np.array([1.0, np.nan, np.inf, np.nan, 0.0])).tolist()[1]
    assert differs(value, value[:3]).all()


def test_the_report_tells_which_positions_are_left_out():
    with onnx_lowrank.compress(
        encoder(), ratio=0.6, recipe="activation", calibration=texts(NUMBER)
    ) as result:
        source = result.report.calibration.source
    assert source == "arrays: 40 samples, 8 held out, without the positions that 'attention_mask' hides"


CROSS = """g (int64[B,L] input_ids, int64[B,S] encoder_attention_mask, float[B,S,16] encoder_hidden_states)
    => (float[B,L,16] logits) {
    x = Gather (words, input_ids)
    m0 = Cast <to = 1> (encoder_attention_mask) m1 = Sub (one, m0) m2 = Mul (m1, low) m = Unsqueeze (m2, axis)
    q = MatMul (x, wq) k = MatMul (encoder_hidden_states, wk) v = MatMul (encoder_hidden_states, wv)
    kt = Transpose <perm = [0, 2, 1]> (k) s0 = MatMul (q, kt) s1 = Add (s0, m) p = Softmax <axis = -1> (s1)
    c = MatMul (p, v) o = MatMul (c, wo) logits = Add (o, x) }"""


def crossed(number, length, source):
    rng = np.random.default_rng(3)
    mask = (np.arange(source) < rng.integers(2, source + 1, (number, 1))).astype(np.int64)
    return {
        "input_ids": rng.integers(1, WORDS, (number, length)),
        "encoder_attention_mask": mask,
        "encoder_hidden_states": rng.standard_normal((number, source, 16)).astype(np.float32),
    }


@pytest.mark.parametrize("length", [6, 8])
def test_the_mask_of_an_encoder_hides_no_tokens_of_the_decoder(length):
    """Also where both have as many positions."""
    found = padding_of(encoder(CROSS), crossed(NUMBER, length, 8))
    assert found.layers == {"wk", "wv"}
    assert found.axes == {}


def test_feeds_of_other_lengths_count_by_their_own_positions():
    feeds = [texts(4, seed=seed) for seed in range(8)]
    feeds += [{name: values[:, :7] for name, values in texts(4, seed=9).items()} for _ in range(2)]
    with measured(seen(encoder()), feeds) as calibration:
        known, padding = calibration.statistics["wq"], calibration.statistics.padding
    assert padding.layers == LAYERS
    counts = [int(feed["attention_mask"].sum()) for feed in feeds]
    held = [(n + 1) % 5 == 0 for n in range(10)]
    assert known.inputs.count == sum(n for n, is_held in zip(counts, held, strict=True) if not is_held)
    assert known.held.count == sum(n for n, is_held in zip(counts, held, strict=True) if is_held)


def test_ids_of_several_codebooks_all_count():
    """A table with several ids for a position has more vectors than positions."""
    text = POOLED.replace("int64[B,L] input_ids", "int64[B,L,2] input_ids").replace(
        "x = Gather (words, input_ids)",
        "x0 = Gather (words, input_ids) x = ReduceSum <keepdims = 0> (x0, last)",
    )
    data = texts(NUMBER)
    data["input_ids"] = np.stack([data["input_ids"], data["input_ids"][::-1]], axis=2)
    with measured(seen(encoder(text)), data) as calibration:
        assert calibration.statistics.padding.layers == LAYERS - {"words"}
        fit = np.arange(NUMBER) % 5 != 4
        assert calibration.statistics["words"].outputs.count == 2 * LENGTH * fit.sum()


def test_a_layer_that_gets_no_vectors_is_measured_without_padding():
    """An expert that sees no token of the tried samples."""
    text = POOLED.replace(
        "h0 = MatMul (r, w1)",
        """h0 = MatMul (r, w1) far = Equal (input_ids, rare) where = NonZero (far)
        at = Transpose <perm = [1, 0]> (where) few = GatherND (r, at) e = MatMul (few, we)
        """,
    ).replace(
        "hidden = Add (f, r)", "hidden0 = Add (f, r) e1 = ScatterND (hidden0, at, e) hidden = Identity (e1)"
    )
    data = texts(NUMBER)
    data["input_ids"][data["input_ids"] == WORDS - 1] = 1
    data["input_ids"][-2, 0] = WORDS - 1
    rng = np.random.default_rng(5)
    proto = encoder(text)
    for name, values, kind in (
        ("we", rng.standard_normal((16, 16)), TensorProto.FLOAT),
        ("rare", np.array(WORDS - 1), TensorProto.INT64),
    ):
        proto.graph.initializer.append(helper.make_tensor(name, kind, values.shape, values.ravel().tolist()))
    found = padding_of(proto, data)
    assert "we" not in found.layers
    assert {"wq", "w1"} <= found.layers


@pytest.mark.parametrize(
    ("nodes", "output"),
    [
        ("y = SequenceConstruct (pooled)", "seq(float[B,16]) y"),
        ("sure = Mul (pooled, none) y = Add (sure, one)", "float[B,16] y"),
        ("big = Mul (pooled, none) far = Add (big, many) y = Cast <to = 7> (far)", "int64[B,16] y"),
    ],
    ids=["sequence", "saturated", "integers"],
)
def test_an_output_that_is_blind_proves_nothing(nodes, output):
    """Attention does not obey the mask, which only the layers' inputs show."""
    text = UNMASKED.replace("(float[B,16] pooled)", f"({output})").replace("number) }", f"number) {nodes} }}")
    proto = encoder(text)
    for name, value in (("none", 1e-6), ("many", 30000.0)):
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
    assert padding_of(proto, texts(NUMBER)) == NO_PADDING


def test_positions_before_samples_are_not_taken_for_samples():
    """PyTorch's attention computes with the positions first."""
    text = POOLED.replace(
        "h0 = MatMul (r, w1)",
        "t = Transpose <perm = [1, 0, 2]> (r) g0 = MatMul (t, w1) h0 = Transpose <perm = [1, 0, 2]> (g0)",
    )
    assert padding_of(encoder(text), texts(NUMBER)).layers == LAYERS - {"w1"}
    feeds = [texts(5, seed=seed) for seed in range(8)]
    feeds[0] = {name: values[:1] for name, values in feeds[0].items()}
    assert padding_of(encoder(text), feeds).layers == LAYERS - {"w1"}


def test_single_samples_are_enough_where_all_feeds_have_one():
    feeds = [{name: values[n : n + 1] for name, values in texts(NUMBER).items()} for n in range(NUMBER)]
    assert padding_of(encoder(), feeds).layers == LAYERS


def test_padding_with_the_ids_of_the_text_is_not_tried():
    data = texts(NUMBER)
    data["input_ids"][:] = 7
    assert padding_of(encoder(HIDDEN_STATES), data) == NO_PADDING


def test_a_model_with_large_outputs_is_not_tried(monkeypatch):
    monkeypatch.setattr("onnx_lowrank.calibrate.ignored._MEMORY", 100)
    assert padding_of(encoder(), texts(NUMBER)) == NO_PADDING


def test_runs_end_with_the_last_shown_position():
    found = padding_of(encoder(), texts(NUMBER))
    assert found.removable == {"input_ids", "attention_mask"}
    data = texts(NUMBER)
    trimmed = found.trim({name: values[:3] for name, values in data.items()})
    length = data["attention_mask"][:3].sum(axis=1).max()
    assert {name: values.shape for name, values in trimmed.items()} == {
        "input_ids": (3, length),
        "attention_mask": (3, length),
    }


def test_every_sample_ends_with_its_last_shown_position_and_has_one_at_least():
    padding = Padding("m", removable=frozenset({"m", "i"}))
    feed = {"m": np.array([[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]), "i": np.arange(12).reshape(3, 4)}
    assert padding.ends(feed).tolist() == [2, 1, 3]
    assert padding.trim(feed)["i"].tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("int64[B,L] input_ids", "int64[B,10] input_ids"),
        ("h0 = MatMul (r, w1)", "flat = Reshape (r, rows) g0 = MatMul (flat, w1) h0 = Reshape (g0, back)"),
        ("pooled = Div (total, number)", "s = Shape (x) n0 = Gather (s, one_axis) n = Cast <to = 1> (n0) "
         "p0 = Div (total, number) pooled = Mul (p0, n)"),
    ],
    ids=["fixed input", "constant in a Reshape", "number of positions in the result"],
)  # fmt: skip
def test_a_model_that_needs_all_positions_keeps_them(old, new):
    proto = encoder(POOLED.replace(old, new))
    for name, sizes in (("rows", [-1, 16]), ("back", [-1, LENGTH, 40]), ("one_axis", [1])):
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(sizes)], sizes))
    found = padding_of(proto, texts(NUMBER))
    assert found.layers == LAYERS
    assert found.removable == frozenset()


@pytest.mark.parametrize("text", [POOLED, HIDDEN_STATES], ids=["pooled", "hidden"])
def test_texts_of_like_length_share_a_batch_and_all_are_seen_once(text):
    data = texts(NUMBER) | {"input_ids": np.arange(NUMBER * LENGTH).reshape(NUMBER, LENGTH) % WORDS}
    lengths = data["attention_mask"].sum(axis=1)
    with measured(seen(encoder(text)), data) as calibration:
        batches = list(calibration.trimmed.batches(4))
        compared = list(calibration.compared.batches(4))
    assert calibration.trimmed.count == NUMBER
    seen_rows = [tuple(row[:3]) for batch in batches for row in batch.feed["input_ids"]]
    assert sorted(seen_rows) == sorted(tuple(row[:3]) for row in data["input_ids"])
    assert sum(len(batch.feed["input_ids"]) for batch in batches if batch.held) == NUMBER // 5
    taken = sum(batch.feed["input_ids"].size for batch in batches)
    assert lengths.sum() <= taken < 0.5 * (lengths.sum() + NUMBER * LENGTH)
    widths = {batch.feed["input_ids"].shape[1] for batch in compared}
    assert (widths == {LENGTH}) == (text is HIDDEN_STATES)


def test_a_batch_of_ordered_texts_is_cut_into_quarters():
    with measured(seen(encoder()), texts(160)) as calibration:
        shares = [[b for b in calibration.trimmed.batches(16) if b.held is held] for held in (False, True)]
    for batches, number in zip(shares, (128, 32), strict=True):
        assert [len(batch.feed["input_ids"]) for batch in batches] == [4] * (number // 4)
        padded = [(batch.feed["attention_mask"] == 0).mean() for batch in batches]
        assert np.mean(padded) < 0.1


def test_sections_count_the_batches_that_are_cut(monkeypatch):
    """160 texts in quarters of 16 are 40 batches: 16 sections have at most 3 of them."""
    lengths, here = [], measurement._Measurement._here

    def noting(self, run, tasks, batches, length):
        lengths.append((length, len(list(self._trimmed.batches(16)))))
        yield from here(self, run, tasks, batches, length)

    monkeypatch.setattr(measurement._Measurement, "_batch_size", lambda *_: 16)
    monkeypatch.setattr(measurement._Measurement, "_here", noting)
    with measured(seen(encoder()), texts(160)):
        pass
    assert lengths == [(3, 40)]


def test_feeds_of_one_sample_are_trimmed_alone():
    data = texts(NUMBER)
    feeds = [{name: values[n : n + 1] for name, values in data.items()} for n in range(NUMBER)]
    with measured(seen(encoder()), feeds) as calibration:
        found = [batch.feed["input_ids"].shape for batch in calibration.trimmed.batches(1)]
    assert sorted(found) == sorted((1, length) for length in data["attention_mask"].sum(axis=1))


def test_trimmed_samples_give_the_same_moments(monkeypatch):
    data = texts(NUMBER)
    with measured(seen(encoder()), data) as calibration:
        trimmed = {name: calibration.statistics[name] for name in LAYERS - {"words"}}
    monkeypatch.setattr(ignored, "removable", lambda *_: frozenset())
    with measured(seen(encoder()), data) as calibration:
        assert calibration.statistics.padding.removable == frozenset()
        for name, known in trimmed.items():
            other = calibration.statistics[name]
            assert known.inputs.count == other.inputs.count
            np.testing.assert_allclose(known.inputs.second, other.inputs.second, rtol=1e-4, atol=1e-5)
            assert known.inputs.independent == pytest.approx(other.inputs.independent, rel=1e-3)


def test_every_fourth_batch_stands_for_all_lengths():
    """Recovery looks behind a Relu on every n-th batch only."""
    data = texts(1600)
    with measured(seen(encoder()), data) as calibration:
        widths = [b.feed["input_ids"].shape[1] for b in calibration.trimmed.batches(16) if not b.held]
    assert np.mean(widths[::4]) == pytest.approx(np.mean(widths), rel=0.05)
    assert len(set(widths[::4])) > 2


@pytest.mark.parametrize(
    ("text", "least", "most"), [(POOLED, 0.4, 0.7), (HIDDEN_STATES, 0.85, 1.15)], ids=["pooled", "hidden"]
)
def test_probes_of_pooled_outputs_see_the_shorter_texts_and_others_all(monkeypatch, text, least, most):
    data, chosen, choose = texts(120), [], sensitivity._chosen

    def choosing(*arguments):
        chosen.extend(choose(*arguments))
        return chosen

    monkeypatch.setattr(sensitivity, "_chosen", choosing)
    with onnx_lowrank.compress(encoder(text), ratio=0.6, recipe="output", calibration=data):
        pass
    lengths = np.concatenate([feed["attention_mask"].sum(axis=1) for feed in chosen])
    assert least < lengths.mean() / data["attention_mask"].sum(axis=1).mean() < most
