"""Padding: is it found, and does it count nowhere?"""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

import onnx_lowrank
from calibrating import measured, seen
from onnx_lowrank.calibrate.ignored import _axes, _differs
from onnx_lowrank.engines.padding import NO_PADDING
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
    assert not _differs(value, value * (1 + 1e-5)).any()
    assert _differs(value, np.array([1.0, -3.0, 1.0, np.nan, 0.1])).tolist() == [
        False,
        False,
        True,
        False,
        True,
    ]
    assert _differs(value, np.array([1.0, np.nan, np.inf, np.nan, 0.0])).tolist()[1]
    assert _differs(value, value[:3]).all()


def test_the_report_tells_which_positions_are_left_out():
    with onnx_lowrank.compress(
        encoder(), ratio=0.6, recipe="activation", calibration=texts(NUMBER)
    ) as result:
        source = result.report.calibration.source
    assert source == "arrays: 40 samples, 8 held out, without the positions that 'attention_mask' hides"
