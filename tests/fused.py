"""Models with ONNX Runtime's own operators, and what they must compute after a rewrite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, parser

from onnx_lowrank.core.option import Fold, Option
from rewriting import Found, found, rewritten, run, tensors


def model(inputs: str, node: str, output: str = "float[] y", **weights: Any) -> ModelProto:
    """One node between inputs and an output whose rank the runtime finds out."""
    imports = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
    proto = parser.parse_model(f"{imports} g ({inputs}) => ({output}) {{ {node} }}")
    proto.graph.initializer.extend(tensors(**weights))
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    return proto


def feed(proto: ModelProto, seed: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        value.name: rng.standard_normal([d.dim_value for d in value.type.tensor_type.shape.dim]).astype(
            np.float32
        )
        for value in proto.graph.input
    }


def check_exact(proto: ModelProto, given: Mapping[str, Any] | None = None, tolerance: float = 2e-5) -> Found:
    """At full rank the rewritten model computes what the model did, and its only layer is `w`."""
    given = dict(given or feed(proto))
    seen = found(proto)
    assert [*seen.layers] == ["w"], seen.skipped
    for fold in seen.layer.folds:
        option = Option(fold, 1, seen.layer.full_rank(fold, 1))
        new = rewritten(seen, {"w": option}).model.proto
        for wanted, got in zip(run(proto, given), run(new, given), strict=True):
            assert wanted.shape == got.shape
            assert np.linalg.norm(wanted - got) <= tolerance * np.linalg.norm(wanted)
    return seen


def check_narrow(proto: ModelProto, rank: int, fold: Fold = Fold.ENCODE, **given: Any) -> None:
    """A weight of a low rank is exact at that rank."""
    seen = found(proto)
    new = rewritten(seen, {"w": Option(fold, 1, rank)}).model.proto
    values = given or feed(proto)
    for wanted, got in zip(run(proto, values), run(new, values), strict=True):
        assert np.linalg.norm(wanted - got) <= 1e-4 * np.linalg.norm(wanted)
