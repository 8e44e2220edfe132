"""Models of layers whose results are added, and that can share a decoder without an error."""

from __future__ import annotations

import re

import numpy as np

CHANNELS, FEATURES, RANK = 32, 24, 7

MATMUL = """g (float[N,32] x) => (float[N,24] y) { t = Tanh (x) r = Slice (x, from, to, axis)
    a0 = MatMul (x, wa) a = Add (a0, ba) b = MatMul (t, wb) s = Add (a, b) y = Add (s, r) }"""
APART = """g (float[N,32] x) => (float[N,24] y) { t = Tanh (x) r = Slice (x, from, to, axis)
    a0 = MatMul (x, wa) b0 = MatMul (t, wb) b = Add (bb, b0) s = Add (r, a0) y = Add (s, b) }"""
PLAIN = """g (float[N,32] x) => (float[N,24] y) { t = Tanh (x)
    a = MatMul (x, wa) b = MatMul (t, wb) s = Add (b, a) y = Tanh (s) }"""
GEMM = """g (float[N,32] x) => (float[N,24] y) { t = Tanh (x)
    a = Gemm <transB = 1> (x, wa, ba) b = Gemm <beta = 2.0> (t, wb, bb) s = Sum (a, b) y = Relu (s) }"""
LEFT = """g (float[32,N] x) => (float[24,N] y) { t = Tanh (x)
    a0 = MatMul (wa, x) a = Add (a0, ba) b = MatMul (wb, t) y = Add (b, a) }"""
CONV = """g (float[N,8,6,6] x) => (float[N,24,3,3] y) { t = Tanh (x)
    a = Conv <pads = [1,1,1,1], strides = [2,2]> (x, wa) n = BatchNormalization (a, one, ba, ba, one)
    b = Conv <strides = [2,2]> (t, wb, bb) s = Add (n, b) y = Relu (s) }"""
THREE = """g (float[N,32] x) => (float[N,24] y) { t = Tanh (x) u = Abs (x)
    a = MatMul (x, wa) b = MatMul (t, wb) c = MatMul (u, wc) y = Sum (a, b, c, bb) }"""
BODIES = {
    "matmul": MATMUL,
    "apart": APART,
    "plain": PLAIN,
    "gemm": GEMM,
    "left": LEFT,
    "conv": CONV,
    "three": THREE,
}


def weights(kind, dtype=np.float32):
    """Weights whose columns lie in one space of dimension 7, and biases."""
    rng = np.random.default_rng(3)
    space = np.linalg.qr(rng.standard_normal((FEATURES, RANK)))[0]
    made = {}
    for name, scale in (("wa", 1.0), ("wb", 3.0), ("wc", 0.5)):
        length = 8 * (9 if name == "wa" else 1) if kind == "conv" else CHANNELS
        matrix = scale * space @ rng.standard_normal((RANK, length)) / length**0.5
        is_turned = kind != "left" and not (kind == "gemm" and name == "wa")
        made[name] = matrix.T if is_turned else matrix
        if kind == "conv":
            made[name] = matrix.reshape(FEATURES, 8, *([3, 3] if name == "wa" else [1, 1]))
    shape = (FEATURES, 1) if kind == "left" else (FEATURES,)
    made |= {"ba": rng.standard_normal(shape), "bb": rng.standard_normal(shape), "one": np.ones(FEATURES)}
    floats = {name: value.astype(dtype) for name, value in made.items()}
    integers = {"from": np.array([0]), "to": np.array([FEATURES]), "axis": np.array([1])}
    read = set(re.findall(r"\w+", BODIES[kind]))
    return {name: value for name, value in (floats | integers).items() if name in read}


def inputs(kind, number=2000, seed=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shape = {"conv": (number // 10, 8, 6, 6), "left": (CHANNELS, number)}.get(kind, (number, CHANNELS))
    return (rng.standard_normal(shape) + 0.3).astype(dtype)


def source(kind):
    data = inputs(kind)
    return [{"x": part} for part in np.array_split(data, 40, axis=1)] if kind == "left" else {"x": data}
