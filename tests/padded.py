"""An encoder of texts with a mask, and texts of several lengths in one array."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto

from rewriting import model

WORDS, D, HIDDEN, LENGTH = 60, 16, 40, 10

HEAD = "g (int64[B,L] input_ids, int64[B,L] attention_mask) => "
BODY = """{
    x = Gather (words, input_ids)
    m0 = Cast <to = 1> (attention_mask) m1 = Sub (one, m0) m2 = Mul (m1, low) m = Unsqueeze (m2, axis)
    q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)
    kt = Transpose <perm = [0, 2, 1]> (k) s0 = MatMul (q, kt) s1 = Add (s0, m) p = Softmax <axis = -1> (s1)
    c = MatMul (p, v) o = MatMul (c, wo) r = Add (o, x)
    h0 = MatMul (r, w1) h1 = Add (h0, b1) h = Relu (h1) f0 = MatMul (h, w2) f = Add (f0, b2)
    hidden = Add (f, r)
    z = Unsqueeze (m0, last) kept = Mul (hidden, z) total = ReduceSum <keepdims = 0> (kept, axis)
    number = ReduceSum <keepdims = 1> (m0, axis) pooled = Div (total, number) }"""
POOLED = f"{HEAD}(float[B,16] pooled) {BODY}"
HIDDEN_STATES = f"{HEAD}(float[B,L,16] hidden) {BODY}"
UNMASKED = POOLED.replace("s1 = Add (s0, m)", "s1 = Identity (s0)")
"""The mask hides positions from the mean only: attention sees them."""


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"wq": (D, D), "wk": (D, D), "wv": (D, D), "wo": (D, D), "w1": (D, HIDDEN), "w2": (HIDDEN, D)}
    made = {name: rng.standard_normal(shape) / np.sqrt(shape[0]) for name, shape in shapes.items()}
    made |= {"b1": rng.standard_normal(HIDDEN), "b2": rng.standard_normal(D)}
    made |= {"words": rng.standard_normal((WORDS, D)), "one": np.array(1), "low": np.array(-1e4)}
    floats = {name: np.asarray(value, np.float32) for name, value in made.items()}
    return floats | {"axis": np.array([1]), "last": np.array([2])}


def encoder(text: str = POOLED) -> ModelProto:
    return model(text, **weights())


def texts(number: int, padding: Any = 0, seed: int = 1) -> dict[str, np.ndarray]:
    """Texts of 3 to 10 ids, with ids behind them that a mask hides; or a function that gives these ids."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, WORDS, (number, LENGTH))
    mask = (np.arange(LENGTH) < rng.integers(3, LENGTH + 1, (number, 1))).astype(np.int64)
    other = padding(ids.shape) if callable(padding) else padding
    return {"input_ids": np.where(mask, ids, other), "attention_mask": mask}
