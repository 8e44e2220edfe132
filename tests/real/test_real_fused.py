"""Models that ONNX Runtime has fused reach half of their parameters, and their Attention stays."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank import compress
from onnx_lowrank.budgets.macs import dearest_macs
from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import find_layers
from packaged import path_of
from rewriting import run


def sentences(number, seed):
    """Sequences of 16 tokens that occur about as often as words."""
    rng = np.random.default_rng(seed)
    ids = 999 + np.minimum(rng.zipf(1.3, (number, 16)), 29000)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def test_half_of_the_parameters_go():
    """In float16, whose factors have the fewer digits."""
    path = path_of("minilm_fused_fp16")
    options = {"recipe": "activation", "calibration": sentences(20, 1), "recover": False}
    with compress(path, 0.5, **options) as result:
        table = next(row for row in result.report.layers if row.op == "EmbedLayerNormalization")
        assert table.option is not None
        assert result.report.reached <= 0.5
        types = [node.op_type for node in result.proto.graph.node]
        assert types.count("Attention") == 6
        (given,) = run(result.proto, sentences(2, 2))
        np.testing.assert_allclose(np.linalg.norm(given, axis=1), 1, atol=1e-2)


@pytest.mark.parametrize("name", ["minilm_fused", "minilm_fused_fp16"])
def test_macs_are_those_of_the_model_before_it_was_fused(name):
    shapes = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (1, 64))
    before, after = (find_layers(load(path_of(n)), shapes, (), ()) for n in ("minilm", name))
    counts = [dearest_macs(found.work, found.options())[0] for found in (before, after)]
    assert counts[0] == counts[1] is not None
