"""Which outputs are the caches of a decoder?"""

from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from onnx_lowrank.engines.pasts import caches

CACHE = [None, 2, None, 8]


def graph(**outputs):
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()
    ]
    return helper.make_model(helper.make_graph([], "g", [], values))


@pytest.mark.parametrize(
    "names",
    [
        ("present.0.key", "present.0.value"),
        ("present_key_values.3.key",),
        ("present_0", "present_1"),
        ("present_key_0", "present_value_0"),
        ("presentkv",),
        ("Present.0.Key",),
        ("present",),
        ("present.0.decoder.key", "present.0.encoder.value"),
    ],
)
def test_presents_beside_scores_are_caches(names):
    proto = graph(logits=[None, None, 100], **dict.fromkeys(names, CACHE))
    assert caches(proto) == set(names)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("presentation", CACHE),
        ("presence.0", CACHE),
        ("present_state", [None, 8]),
        ("hidden", CACHE),
        ("stateN", [2, None, 128]),
    ],
)
def test_other_outputs_are_results(name, shape):
    assert caches(graph(logits=[None, None, 100], **{name: shape})) == frozenset()


def test_a_cache_of_unknown_rank_is_one():
    proto = graph(logits=[None, None, 100], present=CACHE)
    proto.graph.output[1].type.tensor_type.ClearField("shape")
    assert caches(proto) == {"present"}


def test_a_model_that_gives_nothing_else_is_judged_by_it():
    assert caches(graph(**{"present.0.key": CACHE, "present.0.value": CACHE})) == frozenset()


def test_a_model_that_gives_only_integers_beside_is_judged_by_its_caches():
    proto = graph(ids=[None, None], **{"present.0.key": CACHE})
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    assert caches(proto) == frozenset()
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    assert caches(proto) == {"present.0.key"}
