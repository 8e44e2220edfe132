"""Smaller heads in real models whose queries, keys and values one matrix computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from calibrating import made, measured, plan_of, run
from narrowing import narrow
from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import find_layers
from packaged import path_of


def attending(path):
    """The model with the layers of attention alone."""
    layers = find_layers(load(path), {}, (), ()).layers
    heads = [layer for layer in layers if layer.narrowing and layer.narrowing.between != "channels"]
    names = {member.id for layer in heads for member in (layer, *layer.partners)}
    return find_layers(load(path), {}, sorted(names), ())


def narrowed(path, data, size):
    """The model with all heads of a size."""
    found = attending(path)
    options = [narrow(layer.width_step * size) if layer.narrowing else None for layer in found.layers]
    with measured(found, data) as calibration:
        result = made(found, plan_of(found, options), calibration)
        proto = result.rewritten.model.proto
    onnx.checker.check_model(proto)
    return found, proto


def relative(path, proto, feed):
    wanted, given = run(onnx.load(path), **feed), run(proto, **feed)
    return np.linalg.norm(wanted - given) / np.linalg.norm(wanted)


def sentences(number, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1000, 30000, (number, 16))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


@pytest.mark.parametrize("name", ["minilm_fused", "minilm_fused_fp16"])
def test_attention_stays_attention(name):
    path = path_of(name)
    found, proto = narrowed(path, sentences(64, 1), 28)
    assert len(found.layers) == 12
    kinds = [[node.op_type for node in model.graph.node] for model in (onnx.load(path), proto)]
    assert kinds[0] == kinds[1]
    nodes = [node for node in proto.graph.node if node.op_type == "Attention"]
    for node in nodes:
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert values["qkv_hidden_sizes"] == [12 * 28] * 3
        assert values["scale"] == pytest.approx(32**-0.5)
    assert relative(path, proto, sentences(8, 2)) < 0.3


def test_the_heads_of_a_text_recognizer_get_one_size():
    path = path_of("ppocr_ch_PP-OCRv4_rec_infer")
    rng = np.random.default_rng(1)
    images = [rng.uniform(-1, 1, (n, 3, 48, 96)).astype(np.float32) for n in (16, 4)]
    found, proto = narrowed(path, {"x": images[0]}, 13)
    assert [layer.narrowing.bound for layer in found.layers] == [
        other
        for first, second in zip(found.layers[::2], found.layers[1::2], strict=True)
        for other in (second.id, first.id)
    ]
    # Paddle casts the constants of its shapes; those that change need no cast.
    views = ("Constant", "Cast")
    kinds = [
        [node.op_type for node in model.graph.node if node.op_type not in views]
        for model in (onnx.load(path), proto)
    ]
    assert kinds[0] == kinds[1]
    assert relative(path, proto, {"x": images[1]}) < 0.3
