"""Attention whose queries, keys and values one matrix computes, as exporters write it, with planted heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto

from attending import HEADS, RANK, SIZE, D, low
from rewriting import model

ATTEND = """
    s0 = MatMul (q, k) s1 = Mul (s0, scale) s2 = Add (s1, mask) p = Softmax <axis = -1> (s2)
    c0 = MatMul (p, v) c1 = Transpose <perm = [0, 2, 1, 3]> (c0) c = Reshape (c1, join)
    y0 = MatMul (c, wo) y = Add (y0, bo) }"""

HEAD = "g (float[B,L,24] x, float[B,1,1,L] mask) => (float[B,L,24] y) {"

VIT = f"""{HEAD}
    t0 = MatMul (x, w) t1 = Add (t0, b) t2 = Reshape (t1, parts) t = Transpose <perm = [2, 0, 3, 1, 4]> (t2)
    q = Gather <axis = 0> (t, i0) k0 = Gather <axis = 0> (t, i1) v = Gather <axis = 0> (t, i2)
    k = Transpose <perm = [0, 1, 3, 2]> (k0) {ATTEND}"""
"""timm: one size of heads for all three."""

UNBOUND = (
    VIT.replace("q = Gather <axis = 0> (t, i0)", "a, e, f = Split <axis = 0> (t) q = Squeeze (a, zeros)")
    .replace("k0 = Gather <axis = 0> (t, i1)", "k0 = Squeeze (e, zeros)")
    .replace("v = Gather <axis = 0> (t, i2)", "v = Squeeze (f, zeros)")
)
"""The same with one Split, as newer exporters write it."""

SLICED = (
    VIT.replace("q = Gather <axis = 0> (t, i0)", "a = Slice (t, n0, n1, zeros) q = Squeeze (a, zeros)")
    .replace("k0 = Gather <axis = 0> (t, i1)", "e = Slice (t, n1, n2, zeros) k0 = Squeeze (e, zeros)")
    .replace("v = Gather <axis = 0> (t, i2)", "f = Slice (t, n2, n3, zeros) v = Squeeze (f, zeros)")
)
"""The same with Slices, as Paddle writes it."""

APART = """
    q0 = Reshape (a, heads) q = Transpose <perm = [0, 2, 1, 3]> (q0)
    k0 = Reshape (e, heads) k = Transpose <perm = [0, 2, 3, 1]> (k0)
    v0 = Reshape (f, heads) v = Transpose <perm = [0, 2, 1, 3]> (v0)"""

GPT = f"""{HEAD}
    x1 = Reshape (x, rows) t1 = Gemm (x1, w, b) xs = Shape <start = 0, end = 2> (x)
    ts = Concat <axis = 0> (xs, all) t = Reshape (t1, ts) a, e, f = Split <axis = -1> (t, sizes)
    {APART} {ATTEND}"""
"""GPT-2: the axis of all features is split, and a Reshape states their number."""

NANO = GPT.replace(
    "x1 = Reshape (x, rows) t1 = Gemm (x1, w, b) xs = Shape <start = 0, end = 2> (x)", ""
).replace("ts = Concat <axis = 0> (xs, all) t = Reshape (t1, ts)", "t1 = MatMul (x, w) t = Add (t1, b)")
"""nanoGPT: no Reshape before the Split."""

EQUAL = NANO.replace("(t, sizes)", "(t)")
"""A Split into equal parts, without their sizes."""

CROSS = f"""{HEAD}
    q9 = MatMul (x, wq) q8 = Add (q9, bq) q0 = Reshape (q8, heads) q = Transpose <perm = [0, 2, 1, 3]> (q0)
    t1 = MatMul (x, wkv) t = Add (t1, bkv) e, f = Split <axis = -1> (t, two)
    k0 = Reshape (e, heads) k = Transpose <perm = [0, 2, 3, 1]> (k0)
    v0 = Reshape (f, heads) v = Transpose <perm = [0, 2, 1, 3]> (v0) {ATTEND}"""
"""One matrix for keys and values; the queries have their own."""

SIZED = VIT.replace(
    "c = Reshape (c1, join)",
    """sx = Shape (x) g0 = Gather (sx, i0) g1 = Gather (sx, i1) g2 = Gather (sx, i2)
    u0 = Unsqueeze (g0, zeros) u1 = Unsqueeze (g1, zeros) u2 = Unsqueeze (g2, zeros)
    back = Concat <axis = 0> (u0, u1, u2) c = Reshape (c1, back)""",
)
"""The same, where the size of the result is that of the input, as exporters of open batches write it."""

FORMS = {
    "vit": VIT,
    "sized": SIZED,
    "unbound": UNBOUND,
    "sliced": SLICED,
    "gpt": GPT,
    "nano": NANO,
    "equal": EQUAL,
}
BOUND = ("vit", "sized", "unbound", "sliced")
"""The forms in which all three have one size of heads."""


def weights(rank: int = RANK) -> dict[str, np.ndarray]:
    """Queries, keys and values of low rank side by side, with biases within it."""
    rng = np.random.default_rng(5)
    parts = [low(rng, D, HEADS, SIZE, rank) for _ in range(3)]
    weight = np.concatenate(parts, axis=1)
    heads = weight.reshape(D, 3 * HEADS, SIZE)
    bias = np.einsum("chd,ch->hd", heads, rng.standard_normal((D, 3 * HEADS))).ravel()
    made = {"w": weight, "b": bias, "wo": rng.standard_normal((D, D)) / 5, "bo": rng.standard_normal(D)}
    floats = {name: value.astype(np.float32) for name, value in made.items()}
    floats |= {"wq": floats["w"][:, :D], "wkv": floats["w"][:, D:]}
    floats |= {"bq": floats["b"][:D], "bkv": floats["b"][D:]}
    return floats | {"scale": np.array(SIZE**-0.5, np.float32)}


INTEGERS: dict[str, Any] = {
    "parts": [0, 0, 3, HEADS, SIZE],
    "join": [0, 0, D],
    "heads": [0, 0, HEADS, SIZE],
    "sizes": [D, D, D],
    "two": [D, D],
    "rows": [-1, D],
    "all": [3 * D],
    "zeros": [0],
    **{f"i{n}": n for n in range(3)},
    **{f"n{n}": [n] for n in range(4)},
}


def packed(form: str, rank: int = RANK, text: str = "", opset: int = 17, **others: Any) -> ModelProto:
    """One of the forms."""
    text = text or FORMS[form]
    made = weights(rank) | {name: np.array(value) for name, value in INTEGERS.items()} | others
    words = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return model(text, opset, **{name: value for name, value in made.items() if name in words})


def attended(
    weight: np.ndarray,
    bias: np.ndarray,
    out: np.ndarray,
    behind: np.ndarray,
    sizes: Sequence[int],
    scale: float,
    x: np.ndarray,
    mask: np.ndarray,
) -> np.ndarray:
    """Attention in float64, with queries, keys and values of given sizes side by side."""
    made = x.astype(np.float64) @ weight.astype(np.float64) + bias
    queries, keys, values = (
        part.reshape(*part.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)
        for part in np.split(made, np.cumsum(sizes)[:2], axis=-1)
    )
    scores = queries @ keys.swapaxes(2, 3) * scale + mask
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    result = (shares @ values).transpose(0, 2, 1, 3)
    return result.reshape(*result.shape[:2], -1) @ out.astype(np.float64) + behind
