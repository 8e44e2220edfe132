"""Small language models whose table is also the output head, and tokens for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto

from rewriting import model

ROWS, FEATURES = 60, 12


def language_model(*, tied: bool = True, seed: int = 0) -> ModelProto:
    """Look up, one residual layer, scores of all tokens by the same table or by a matrix of its own."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, FEATURES + 1) ** -0.8

    def drawn(*shape: int) -> np.ndarray[Any, Any]:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    table = (drawn(ROWS, FEATURES) * spectrum @ drawn(FEATURES, FEATURES)).astype(np.float32)
    weights = {"table": table, "w1": drawn(FEATURES, 24), "w2": drawn(24, FEATURES)}
    head = "t = Transpose <perm = [1,0]> (table)"
    if not tied:
        head, weights["t"] = "", drawn(FEATURES, ROWS)
    return model(
        f"""g (int64[N,5] i) => (float[N,5,{ROWS}] y) {{
            e = Gather (table, i) a = MatMul (e, w1) r = Relu (a) b = MatMul (r, w2) h = Add (e, b)
            {head} y = MatMul (h, t) }}""",
        **weights,
    )


def tokens(number: int = 40, seed: int = 1) -> np.ndarray[Any, Any]:
    """Tokens of which a few are frequent, shape (number, 5)."""
    share = 1 / np.arange(1.0, ROWS + 1)
    return np.random.default_rng(seed).choice(ROWS, (number, 5), p=share / share.sum())
