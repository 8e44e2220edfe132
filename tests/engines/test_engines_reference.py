"""The reference implementation computes what the runtime does, where onnx's own operators do not."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.engines.reference import Reference
from onnx_lowrank.files.load import load
from rewriting import DTYPES, difference, feed_of, model, run

NORM = "BatchNormalization (x, scale, b, mean, var)"
WEIGHTS = {"w": (6, 4, 3, 3), "b": (6,), "t": (6, 3, 3, 2)}
STATISTICS = {
    name: np.linspace(0.5, 2, 6).astype(np.float32) + n
    for n, name in enumerate(("scale", "b", "mean", "var"))
}


@pytest.mark.parametrize(
    ("node", "opset"),
    [
        *((NORM, opset) for opset in (7, 9, 14, 15)),
        ("Conv <group = 2, dilations = [2, 1], pads = [1, 0, 2, 1], strides = [2, 3]> (z, w, b)", 17),
        ('Conv <group = 2, auto_pad = "SAME_LOWER", strides = [2, 1]> (z, w)', 17),
        (
            "ConvTranspose <group = 2, dilations = [2, 1], strides = [2, 1], pads = [1, 0, 0, 1]> (x, t, b)",
            17,
        ),
        ("ConvTranspose <output_shape = [10, 7], strides = [2, 2]> (x, t)", 17),
    ],
)
def test_operators_compute_what_the_runtime_does(node: str, opset: int) -> None:
    body = f"g (float[2,6,5,4] x, float[2,8,7,6] z) => (float[] y) {{ y = {node} }}"
    arrays = STATISTICS if node is NORM else WEIGHTS
    proto = model(body, opset=opset, **{name: array for name, array in arrays.items() if name in node})
    feed = feed_of(proto)
    with Reference().open(load(proto)) as evaluated:
        (given,) = evaluated(feed).values()
    assert given.dtype == np.float32
    assert difference(run(proto, feed), [given]) < 1e-6


@pytest.mark.parametrize("kind", ["double", "float16", "bfloat16"])
def test_results_have_the_type_of_the_input(kind: str) -> None:
    body = f"g ({kind}[1,2,4,4] x) => ({kind}[1,2,2,2] y) {{ y = Conv (x, w) }}"
    proto = model(body, opset=22, ir=10, w=np.ones((2, 2, 3, 3), DTYPES[kind]))
    feed = feed_of(proto)
    with Reference().open(load(proto)) as evaluated:
        (given,) = evaluated(feed).values()
    assert given.dtype == feed["x"].dtype
    assert given[0, 0, 0, 0].astype(float) == pytest.approx(
        feed["x"][0, :, :3, :3].astype(float).sum(), rel=1e-2
    )


def test_training_takes_the_statistics_of_the_batch() -> None:
    body = f"g (float[3,6,5,4] x) => (float[] y, float[] m, float[] v) {{ y, m, v = {NORM} }}"
    proto = model(
        body.replace("Normalization (", "Normalization <training_mode = 1> ("), opset=15, **STATISTICS
    )
    feed = feed_of(proto)
    with Reference().open(load(proto)) as evaluated:
        assert difference(run(proto, feed), evaluated(feed).values()) < 1e-5
