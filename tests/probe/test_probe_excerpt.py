"""A layer cut out of its model and of the compressed one, or why not."""

from __future__ import annotations

import pytest

from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.probe.excerpt import excerpts
from rewriting import difference, feed_of, found, model, rewritten, run


def cut(proto):
    """The two excerpts of a model's one layer."""
    seen = found(proto)
    result = rewritten(seen)
    (binding,) = seen.bindings
    (chain,) = result.chains[binding.layer.id]
    return excerpts(seen.model, seen.walk, result.model, Walk(result.model.proto), binding, chain)


@pytest.mark.parametrize("bias", ["c", "d"], ids=["stored", "behind a view"])
def test_what_is_constant_comes_along(bias):
    body = f"g (float[5,8] x) => (float[] y) {{ d = Identity (c) y = Gemm (x, w, {bias}) }}"
    pair = cut(model(body, w=(8, 6), c=(6,)))
    feed = feed_of(pair[0])
    assert difference(run(pair[0], feed), run(pair[1], feed)) < 1e-6


def test_a_layer_with_a_computed_bias_does_not_run_alone():
    assert cut(model("g (float[5,8] x, float[6] c) => (float[] y) { y = Gemm (x, w, c) }", w=(8, 6))) is None
