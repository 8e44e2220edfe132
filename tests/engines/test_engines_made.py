"""Inputs made from the graph: sizes that follow from each other, and decoders with a past."""

from __future__ import annotations

import onnx
import pytest
from onnx.parser import parse_model

from decoders import POSITIONS, TOTAL, decoder
from onnx_lowrank.engines.inputs import specs
from onnx_lowrank.engines.made import make, one_sample
from onnx_lowrank.engines.running import first_run
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import load

TOTALS = [
    TOTAL,
    TOTAL.replace(" ", ""),
    "1 * sequence_length + past_sequence_length",
    "total_sequence_length",
]
ENGINE = runtime("CPUExecutionProvider")


def parsed(inputs: str) -> onnx.ModelProto:
    name = inputs.split()[-1]
    text = f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => (float[] y) {{ y = Identity ({name}) }}'
    return parse_model(text)


def feeds(proto, **shapes):
    return list(make(proto, specs(proto), shapes))


def shapes_of(feed):
    return {name: array.shape for name, array in feed.items()}


@pytest.mark.parametrize(
    ("inputs", "given", "expected"),
    [
        ("float[N, 3, 8, 8] x", {}, {"x": (1, 3, 8, 8)}),
        ("float[?, 8] x", {}, {"x": (1, 8)}),
        ("float[2, 8] x", {}, {}),
        ("float[2, 8] z, float[N, 4] x", {}, {"x": (1, 4)}),
        ("float[N, 8] z, float[N, 4] x", {"z": (3, 8)}, {"x": (3, 4)}),
        ("float[M, 8] z, float[N, 4] x", {"z": (3, 8)}, {"x": (1, 4)}),
        ("float[N, T] z, float[N, 4] x", {}, {}),
        ("float[N, T] z, float[N, 4] x", {"z": (1, 5)}, {"x": (1, 4)}),
        ("float[N, 4] x", {"z": (1, 5)}, {"x": (1, 4)}),
        ("float[N, 4] z, float[N, 4] x", {"z": (1, 5)}, {}),
        ("float[N] x", {}, {}),
        ("float[N] z, float[N, 4] x", {}, {"z": (1,), "x": (1, 4)}),
        ("float[seq_len, 8] x", {}, {}),
        ("float[0, 8] x", {}, {}),
        ("float x", {}, {}),
    ],
)
def test_one_sample_is_told_where_the_batch_alone_is_open(inputs, given, expected):
    proto = parsed(inputs)
    assert one_sample(proto, specs(proto), given) == expected


class TestSizes:
    def test_only_sizes_that_do_not_fit_are_left_out(self, monkeypatch):
        proto = parsed("float[N, 100] x")
        assert [feed["x"].shape for feed in feeds(proto)] == [(4, 100), (1, 100)]
        monkeypatch.setattr("onnx_lowrank.files.arrays.MAX_BYTES", 400)
        assert [feed["x"].shape for feed in feeds(proto)] == [(1, 100)]

    def test_where_none_fits_the_smallest_is_named(self, monkeypatch):
        monkeypatch.setattr("onnx_lowrank.files.arrays.MAX_BYTES", 399)
        with pytest.raises(InputError, match=r"\('x' is 1×100\): give smaller ones with --input-shape"):
            feeds(parsed("int64[M] n, float[N, 100] x"))

    def test_a_stated_zero_is_a_free_size_and_at_last_a_zero(self):
        """ONNX Runtime runs such a model on an input without elements only."""
        proto = parsed("float[0, 100] x")
        assert [feed["x"].shape for feed in feeds(proto)] == [(4, 100), (1, 100), (0, 100)]
        feed, outputs = first_run(ENGINE, load(proto), feeds(proto))
        assert shapes_of(feed) == shapes_of({"x": outputs["y"]}) == {"x": (0, 100)}
        assert [feed["x"].shape for feed in feeds(proto, x=(2, 100))] == [(2, 100)]

    def test_sizes_beyond_floating_point_are_refused(self):
        proto = parsed("float[A, B, C] x")
        for dim in proto.graph.input[0].type.tensor_type.shape.dim:
            dim.dim_param = "*".join(["n"] * 80)
        assert shapes_of(feeds(proto)[-1]) == {"x": (1, 1, 1)}
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param += "* 999999999 * 999999999"
        with pytest.raises(InputError, match="more than 1 GiB"):
            feeds(proto)

    @pytest.mark.parametrize(
        ("dims", "given", "expected"),
        [
            (("L + M", "L", "M"), {}, [(128,), (64,), (64,)]),
            (("L + M", "L", "M"), {"a": (5, 9), "b": (5, 2)}, [(9,), (2,), (7,)]),
            (("2 * L", "L", "L + 1"), {}, [(128,), (64,), (65,)]),
            (("2 * L", "L", "L + 1"), {"a": (5, 6)}, [(6,), (3,), (4,)]),
            (("L / 2", "L", "M"), {"b": (5, 6)}, [(64,), (6,), (64,)]),
        ],
    )
    def test_sums_and_products(self, dims, given, expected):
        proto = parsed("float[N, P] a, float[N, Q] b, float[N, R] c")
        for value, text in zip(proto.graph.input, dims, strict=True):
            value.type.tensor_type.shape.dim[1].dim_param = text
        batch = 5 if given else 4
        assert list(shapes_of(feeds(proto, **given)[0]).values()) == [(batch, *shape) for shape in expected]


class TestDecoders:
    @pytest.mark.parametrize("total", ["sequence_length", *TOTALS])
    def test_the_first_inputs_run(self, total):
        model = load(decoder(total))
        made = feeds(model.proto)[0]
        assert shapes_of(made) == {
            "input_ids": (4, 64),
            "attention_mask": (4, 64),
            "position_ids": (4, 64),
            "past_key_values_0_key": (4, 2, 0, 8),
            "past_key_values_0_value": (4, 2, 0, 8),
        }
        assert made["position_ids"].tolist() == [list(range(64))] * 4
        assert made["attention_mask"].all()
        assert set(made["input_ids"].flat) == set(range(24))
        used, outputs = first_run(ENGINE, model, iter([made]))
        assert used is made
        assert outputs["logits"].shape == (4, 64, 24)

    @pytest.mark.parametrize("total", TOTALS)
    def test_a_past_where_an_empty_one_is_rejected(self, total):
        model = load(decoder(total, needs_past=True))
        made = feeds(model.proto)
        used, outputs = first_run(ENGINE, model, made)
        assert used is made[1]
        assert (used["attention_mask"].shape, used["past_key_values_0_key"].shape) == ((4, 72), (4, 2, 8, 8))
        assert used["position_ids"][0].tolist() == list(range(8, 72))
        assert outputs["present_0_key"].shape == (4, 2, 72, 8)

    def test_positions_stay_in_their_table(self):
        proto = decoder()
        made = feeds(proto, input_ids=(1, POSITIONS + 3))[0]
        assert made["position_ids"].tolist() == [[*range(POSITIONS), 0, 1, 2]]
        first_run(ENGINE, load(proto), [made])

    @pytest.mark.parametrize(
        ("given", "length", "past"),
        [
            ({"input_ids": (2, 5)}, 5, 0),
            ({"attention_mask": (2, 7)}, 7, 0),
            ({"input_ids": (2, 5), "attention_mask": (2, 7)}, 5, 2),
            ({"past_key_values_0_value": (2, 2, 3, 8)}, 64, 3),
            ({"past_key_values_0_value": (2, 2, 3, 8), "attention_mask": (2, 7)}, 4, 3),
        ],
    )
    def test_given_shapes_tell_the_others(self, given, length, past):
        proto = decoder()
        made = feeds(proto, **given)[0]
        assert shapes_of(made) == {
            "input_ids": (2, length),
            "attention_mask": (2, past + length),
            "position_ids": (2, length),
            "past_key_values_0_key": (2, 2, past, 8),
            "past_key_values_0_value": (2, 2, past, 8),
        }
        assert made["position_ids"][0].tolist() == list(range(past, past + length))
        first_run(ENGINE, load(proto), [made])

    def test_dimensions_without_names(self):
        proto = decoder()
        for value in proto.graph.input:
            for dim in value.type.tensor_type.shape.dim:
                dim.ClearField("dim_param")
        made = feeds(proto)[0]
        assert made["past_key_values_0_key"].shape == (4, 2, 0, 8)
        first_run(ENGINE, load(proto), [made])

    def test_encoders_and_caches(self):
        inputs = (
            "int64[batch, length] input_ids, int64[length] cache_position, int64 position, "
            "float[batch, 8, past_decoder_length, 64] past_key_values_0_decoder_key, "
            "float[batch, 8, encoder_length_out, 64] past_key_values_0_encoder_key, "
            "float[2, batch_size, 8, past_length, 64] past_1, int64[batch, length] token_type_ids, "
            "bool[1] use_cache_branch"
        )
        empty, full = feeds(parsed(inputs))[:2]
        for made, past in ((empty, 0), (full, 8)):
            assert shapes_of(made) == {
                "input_ids": (4, 64),
                "cache_position": (64,),
                "position": (),
                "past_key_values_0_decoder_key": (4, 8, past, 64),
                "past_key_values_0_encoder_key": (4, 8, 64, 64),
                "past_1": (2, 4, 8, past, 64),
                "token_type_ids": (4, 64),
                "use_cache_branch": (1,),
            }
            assert made["cache_position"].tolist() == list(range(past, past + 64))
            assert made["position"] == past
            assert not made["token_type_ids"].any()
            assert made["use_cache_branch"].tolist() == [past > 0]

    def test_a_past_of_fixed_length(self):
        inputs = "int64[1, 1] position_ids, float[1, 2, 7, 8] past_key"
        (made,) = feeds(parsed(inputs))
        assert made["position_ids"].tolist() == [[7]]

    def test_the_cache_is_used_where_there_is_no_past_to_be_empty(self):
        assert feeds(parsed("bool[1] use_cache_branch"))[0]["use_cache_branch"].all()

    def test_series_and_frames_are_no_past(self):
        inputs = "float[N, past_length, 3] past_values, float[N, past_length, 3] past_mask, "
        made = feeds(parsed(inputs + "float[N, C, past_height, W] past_frames"))[0]
        assert [*shapes_of(made).values()] == [(4, 64, 3), (4, 64, 3), (4, 3, 224, 224)]

    @pytest.mark.parametrize(
        "name", ["past_key_values_0_key", "past_0", "past_key_0", "past_value_self_3", "past_kv"]
    )
    def test_names_of_a_past(self, name):
        assert feeds(parsed(f"float[B, 2, past, 8] {name}"))[0][name].shape == (4, 2, 0, 8)
        assert feeds(parsed(f"float[B, 2, L, 8] {name}"))[0][name].shape == (4, 2, 64, 8)
