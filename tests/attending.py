"""Attention as exporters write it, with planted heads of low rank."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from onnx import ModelProto

from rewriting import model

D, HEADS, SIZE = 24, 3, 8
RANK = 3
"""The rank of every planted head."""

BERT = """g (float[B,L,24] x, float[B,1,1,L] mask) => (float[B,L,24] y) {
    q0 = MatMul (x, wq) q1 = Add (bq, q0)
    k0 = MatMul (x, wk) k1 = Add (bk, k0)
    v0 = MatMul (x, wv) v1 = Add (bv, v0)
    SHAPES
    q2 = Reshape (q1, qs) q = Transpose <perm = [0, 2, 1, 3]> (q2)
    k2 = Reshape (k1, ks) k = Transpose <perm = [0, 2, 3, 1]> (k2)
    v2 = Reshape (v1, vs) v = Transpose <perm = [0, 2, 1, 3]> (v2)
    s0 = MatMul (q, k) s1 = Div (s0, scale) s2 = Add (s1, mask)
    p = Softmax <axis = -1> (s2)
    c0 = MatMul (p, v) c1 = Transpose <perm = [0, 2, 1, 3]> (c0)
    c = Reshape (c1, back)
    y0 = MatMul (c, wo) y = Add (y0, bo) }"""

CONSTANT = "ks = Identity (split) vs = Identity (ks) qs = Identity (split) back = Identity (join)"
"""The targets are constants, one of them for queries, keys and values."""

BUILT = """
    t = Shape (v1) b0 = Gather (t, zero) l0 = Gather (t, one)
    b = Unsqueeze (b0, zeros) l = Unsqueeze (l0, zeros)
    qs = Concat <axis = 0> (b, l, heads, size) ks = Concat <axis = 0> (b, l, heads, size)
    vs = Concat <axis = 0> (b, l, heads, size) back = Concat <axis = 0> (b, l, all)"""
"""The targets are built from the shape of the values, as PyTorch writes them."""

GQA = """g (float[B,L,24] x, float[B,1,1,L] mask) => (float[B,L,24] y) {
    q0 = MatMul (x, wq) k0 = MatMul (x, wk) v0 = MatMul (x, wv)
    q2 = Reshape (q0, many) q = Transpose <perm = [0, 2, 1, 3]> (q2)
    k2 = Reshape (k0, few) k3 = Transpose <perm = [0, 2, 1, 3]> (k2)
    v2 = Reshape (v0, few) v3 = Transpose <perm = [0, 2, 1, 3]> (v2)
    k4 = Unsqueeze (k3, axis) k5 = Expand (k4, repeat) k6 = Reshape (k5, joined)
    v4 = Unsqueeze (v3, axis) v5 = Expand (v4, repeat) v = Reshape (v5, joined)
    k = Transpose <perm = [0, 1, 3, 2]> (k6)
    s0 = MatMul (q, k) s1 = Mul (s0, scale) s2 = Add (s1, mask)
    p = Softmax <axis = -1> (s2)
    c0 = MatMul (p, v) c1 = Transpose <perm = [0, 2, 1, 3]> (c0)
    c = Reshape (c1, join)
    y = MatMul (c, wo) }"""


def _repeated(name: str, result: str) -> str:
    """Heads that are repeated as PyTorch writes it: all sizes come from a Shape, and -1 is replaced."""
    sizes = " ".join(
        f"{name}g{n} = Gather ({name}t, i{n}) {name}u{n} = Unsqueeze ({name}g{n}, zeros)" for n in range(4)
    )
    one, two, three = (f"{name}u{n}" for n in (1, 2, 3))
    joined = " ".join(f"{name}j{n} = Unsqueeze ({name}g{n}, zeros)" for n in (0, 2, 3))
    return f"""{name}t = Shape ({name}3) {sizes} {joined} {name}4 = Unsqueeze ({name}3, axis)
        {name}x = Concat <axis = 0> ({name}u0, {one}, pair, {two}, {three})
        {name}s = Shape ({name}x) {name}o = ConstantOfShape <value = int64[1] {{1}}> ({name}s)
        {name}e = Equal ({name}x, minus) {name}w = Where ({name}e, {name}o, {name}x)
        {name}5 = Expand ({name}4, {name}w) {name}m = Mul ({name}g1, two) {name}n = Unsqueeze ({name}m, zeros)
        {name}z = Concat <axis = 0> ({name}j0, {name}n, {name}j2, {name}j3)
        {result} = Reshape ({name}5, {name}z)"""


REPEATED = GQA.replace(
    "k4 = Unsqueeze (k3, axis) k5 = Expand (k4, repeat) k6 = Reshape (k5, joined)", _repeated("k", "k6")
).replace("v4 = Unsqueeze (v3, axis) v5 = Expand (v4, repeat) v = Reshape (v5, joined)", _repeated("v", "v"))


INTEGERS = {
    "zero": np.array(0),
    "one": np.array(1),
    "zeros": np.array([0]),
    "heads": np.array([HEADS]),
    "size": np.array([SIZE]),
    "all": np.array([D]),
    "split": np.array([0, 0, HEADS, SIZE]),
    "join": np.array([0, 0, D]),
}


def low(rng: np.random.Generator, c: int, heads: int, size: int, rank: int) -> np.ndarray:
    """A matrix (c, heads · size) whose columns of every head have a rank."""
    parts = [rng.standard_normal((c, rank)) @ rng.standard_normal((rank, size)) for _ in range(heads)]
    return np.concatenate(parts, axis=1) / np.sqrt(c * rank)


def weights(rank: int = RANK, dtype: Any = np.float32, **others: Any) -> dict[str, np.ndarray]:
    """The weights of `BERT`: values and output, queries and keys of low rank, with biases within it."""
    rng = np.random.default_rng(3)
    made: dict[str, np.ndarray] = {}
    for name in ("wq", "wk", "wv"):
        made[name] = low(rng, D, HEADS, SIZE, rank)
        bias = [made[name][:, n * SIZE : (n + 1) * SIZE].T @ rng.standard_normal(D) for n in range(HEADS)]
        made[f"b{name[1]}"] = np.concatenate(bias)
    made |= {"wo": rng.standard_normal((HEADS * SIZE, D)) / 5, "bo": rng.standard_normal(D)}
    made["scale"] = np.array(np.sqrt(SIZE))
    return {name: np.asarray(value, dtype) for name, value in made.items()} | INTEGERS | others


def grouped(rank: int = RANK) -> dict[str, np.ndarray]:
    """The weights of `GQA`: 4 heads of queries, 2 of keys and values."""
    rng = np.random.default_rng(4)
    made = {"wq": low(rng, D, 4, SIZE, rank), "wo": rng.standard_normal((32, D)) / 5}
    made |= {name: low(rng, D, 2, SIZE, rank) for name in ("wk", "wv")}
    floats = {name: value.astype(np.float32) for name, value in {**made, "scale": np.array(0.35)}.items()}
    many, few, joined = [0, 0, 4, SIZE], [0, 0, 2, SIZE], [0, 4, -1, SIZE]
    numbers = {"many": many, "few": few, "joined": joined, "repeat": [1, 1, 2, 1, 1], "axis": [2]}
    numbers |= {"pair": [2], "minus": [-1], "zeros": [0], "two": 2, **{f"i{n}": n for n in range(4)}}
    return floats | {name: np.array(value) for name, value in {**numbers, "join": [0, 0, 32]}.items()}


def bert(shapes: str = CONSTANT, text: str = BERT, dtype: str = "float", **others: Any) -> ModelProto:
    """The model, with its targets of Reshape written in one of the ways."""
    body = text.replace("SHAPES", shapes).replace("float[", f"{dtype}[")
    kind = np.dtype(np.float16) if dtype == "float16" else np.dtype(np.float32)
    made = weights(dtype=kind, **others)
    return model(body, **{name: made[name] for name in made if re.search(rf"\b{name}\b(?! =)", body)})


def inputs(
    number: int = 300, length: int = 6, seed: int = 1, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """Sequences, the last of whose positions are masked in some."""
    rng = np.random.default_rng(seed)
    mask = np.where(rng.random((number, 1, 1, length)) < 0.2, -100.0, 0.0)
    return {"x": rng.standard_normal((number, length, D)).astype(dtype), "mask": mask.astype(dtype)}
