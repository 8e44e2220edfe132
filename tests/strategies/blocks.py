"""Blocks of a draft: each takes a value, adds an operator with a weight, and gives the operator's result."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from .drafts import Draft, Value

Block = Callable[[Draft, Value], Value]
LARGEST = 3000
"""Elements of a value that is not made any larger."""


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _window(d: Draft, sizes: tuple[int, ...]) -> tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]:
    """Attributes of a convolution, its kernel, and the sizes of its result."""
    mode = d.pick("", "", "SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET")
    is_same = mode.startswith("SAME")
    kernel, strides, dilations, before, after, out = [], [], [], [], [], []
    for n in sizes:
        k, s = d.size(1, 4), d.size(1, 3)
        gap = 1 if is_same else d.size(1, 2)
        p, q = (0, 0) if mode in ("VALID", "SAME_UPPER", "SAME_LOWER") else (d.size(0, 2), d.size(0, 2))
        if n + p + q < (k - 1) * gap + 1:
            k = 1
        kernel.append(k)
        strides.append(s)
        dilations.append(gap)
        before.append(min(p, (k - 1) * gap) if k > 1 else p)
        after.append(min(q, (k - 1) * gap) if k > 1 else q)
        out.append(-(-n // s) if is_same else (n + before[-1] + after[-1] - (k - 1) * gap - 1) // s + 1)
    attributes: dict[str, Any] = {"strides": strides if any(s > 1 for s in strides) else None}
    if not is_same:
        attributes["dilations"] = dilations
    if mode:
        attributes["auto_pad"] = mode
    if mode in ("", "NOTSET"):
        attributes["pads"] = before + after
    if d.rarely():
        attributes["kernel_shape"] = kernel
    return attributes, tuple(kernel), tuple(out)


def convolution(d: Draft, x: Value) -> Value:
    batch, channels, *sizes = x.shape
    attributes, kernel, out = _window(d, tuple(sizes))
    group = d.pick(1, 1, *_divisors(channels))
    features = group * d.size(1, max(1, 16 // group))
    weight = d.weight(features, channels // group, *kernel, fan=channels // group * prod(kernel))
    operands = [x.name, weight, *([d.small(features)] if d.pick(True, False) else [])]
    if d.kind == "float" and d.rarely(6):
        activation = d.pick("Relu", "Tanh", "Sigmoid")
        name = d.node(
            "FusedConv", operands, domain="com.microsoft", group=group, activation=activation, **attributes
        )
    else:
        name = d.node("Conv", operands, group=group if group > 1 else None, **attributes)
    y = Value(name, (batch, features, *out), x.is_open)
    return batchnorm(d, y) if d.rarely(3) else y


def transposed_convolution(d: Draft, x: Value) -> Value:
    batch, channels, *sizes = x.shape
    kernel = [d.size(1, 4) for _ in sizes]
    strides = [d.size(1, 2) for _ in sizes]
    gaps = [d.size(1, 2) for _ in sizes]
    # More padding than this would cut a result away.
    most = [(k - 1) * gap // 2 for k, gap in zip(kernel, gaps, strict=True)]
    before, after = ([d.size(0, n) for n in most] for _ in range(2))
    extra = [d.size(0, s - 1) for s in strides]
    group = d.pick(1, 1, *_divisors(channels))
    features = d.size(1, max(1, 14 // group))
    weight = d.weight(channels, features, *kernel, fan=channels // group)
    operands = [x.name, weight, *([d.small(features * group)] if d.pick(True, False) else [])]
    name = d.node(
        "ConvTranspose", operands, group=group, strides=strides, dilations=gaps, pads=before + after,
        output_padding=extra if any(extra) else None,
    )  # fmt: skip
    out = [
        (n - 1) * s + (k - 1) * gap + 1 + e - p - q
        for n, s, k, gap, e, p, q in zip(sizes, strides, kernel, gaps, extra, before, after, strict=True)
    ]
    y = Value(name, (batch, features * group, *out), x.is_open)
    return batchnorm(d, y) if d.rarely() else y


def batchnorm(d: Draft, x: Value) -> Value:
    n = x.shape[1]
    tensors = [d.small(n, least=0.5), d.small(n), d.small(n), d.small(n, least=0.5)]
    return Value(d.node("BatchNormalization", [x.name, *tensors]), x.shape, x.is_open)


def gemm(d: Draft, x: Value) -> Value:
    rows, columns = x.shape
    features = d.size(4, 16)
    # A transposed or a left operand is summed over the rows.
    is_left, turned = (False, False) if x.is_open else (d.rarely(3), d.rarely(3))
    inner, outer = (columns, rows) if turned == is_left else (rows, columns)
    flipped = d.pick(False, True)
    stored = (features, inner) if flipped != is_left else (inner, features)
    out = (features, outer) if is_left else (outer, features)
    weight = d.weight(*stored, fan=inner)
    shapes = [(out[1],), (1, out[1]), (), (1,)]
    if not x.is_open:
        shapes += [out, (out[0], 1)]
    operands = [weight, x.name] if is_left else [x.name, weight]
    # Before opset 11, a Gemm has its third operand.
    if d.opset < 11 or d.pick(True, False):
        operands.append(d.small(*d.pick(*shapes)))
    first, second = (flipped, turned) if is_left else (turned, flipped)
    attributes: dict[str, Any] = {"transA": int(first) or None, "transB": int(second) or None}
    if d.rarely(3):
        attributes |= {"alpha": 0.5, "beta": 2.0}
    if d.kind == "float" and d.rarely(6):
        attributes["activation"] = d.pick("Relu", "Tanh")
        name = d.node("FusedGemm", operands, domain="com.microsoft", **attributes)
    else:
        name = d.node("Gemm", operands, **attributes)
    return Value(name, out, x.is_open)


def matmul(d: Draft, x: Value) -> Value:
    *lead, inner = x.shape
    features = d.size(4, 16)
    if x.rank > 1 and not (x.is_open and x.rank == 2) and d.rarely():
        # On the left, the weight is summed over the axis before the last one.
        *lead, inner, columns = x.shape
        name = d.node("MatMul", [d.weight(features, inner, fan=inner), x.name])
        return Value(name, (*lead, features, columns), x.is_open)
    if d.kind == "float" and x.rank > 1 and d.rarely(6):
        turned = d.pick(0, 1)
        weight = d.weight(*((features, inner) if turned else (inner, features)), fan=inner)
        name = d.node("FusedMatMul", [x.name, weight], domain="com.microsoft", transB=turned, alpha=0.5)
        return Value(name, (*lead, features), x.is_open)
    batch: tuple[int, ...] = ()
    if x.rank > 2 and not (x.is_open and x.rank == 3) and d.rarely():
        batch = d.pick((x.shape[-3],), (1,))
    name = d.node("MatMul", [x.name, d.weight(*batch, inner, features, fan=inner)])
    y = Value(name, (*lead, features), x.is_open)
    if not lead:
        return y
    return Value(d.node("Add", [name, d.small(features)]), y.shape, y.is_open) if d.pick(True, False) else y


def einsum(d: Draft, x: Value) -> Value:
    *lead, inner = x.shape
    features = d.size(4, 16)
    letters = "abgh"[: len(lead)]
    if len(lead) > 1 and d.rarely():
        # The last of the leading axes is one of groups.
        group = letters[-1]
        weight = d.weight(lead[-1], inner, features, fan=inner)
        text = f"{letters}c,{group}cd->{letters}d"
    else:
        turned = d.pick(False, True)
        weight = d.weight(*((features, inner) if turned else (inner, features)), fan=inner)
        read = d.pick(letters, "...")
        text = f"{read}c,{'dc' if turned else 'cd'}->{read}d"
    return Value(d.node("Einsum", [x.name, weight], equation=text), (*lead, features), x.is_open)


def recurrent(d: Draft, x: Value) -> Value:
    steps, batch, inner = x.shape
    op, gates = d.pick(("LSTM", 4), ("GRU", 3), ("RNN", 1))
    direction, ways = d.pick(("forward", 1), ("reverse", 1), ("bidirectional", 2))
    hidden = d.size(3, 6)
    operands = [
        x.name,
        d.weight(ways, gates * hidden, inner, fan=inner),
        d.keep((0.3 * d.rng.standard_normal((ways, gates * hidden, hidden))).astype(d.dtype)),
        d.small(ways, 2 * gates * hidden) if d.pick(True, False) else "",
    ]
    sequence, state = d.node(
        op, operands if operands[-1] else operands[:-1], 2, hidden_size=hidden, direction=direction
    )
    if d.rarely(3):
        return Value(state, (ways, batch, hidden))
    joined = d.node("Transpose", [sequence], perm=[0, 2, 1, 3])
    name = d.node("Reshape", [joined, d.integers(0, 0, ways * hidden)])
    return Value(name, (steps, batch, ways * hidden), x.is_open)


def attention(d: Draft, x: Value) -> Value:
    batch, tokens, inner = x.shape
    heads, size = d.size(1, 2), d.size(2, 4)
    width = heads * size
    weight = d.weight(inner, 3 * width, fan=inner)
    name = d.node("Attention", [x.name, weight, d.small(3 * width)], domain="com.microsoft", num_heads=heads)
    return Value(name, (batch, tokens, width), x.is_open)


def quantized(d: Draft, x: Value) -> Value:
    """A MatMul whose weight is quantized, which is left alone."""
    inner, features = x.shape[-1], d.size(2, 8)
    stored = d.keep(d.rng.integers(-9, 9, (inner, features)).astype(np.int8))
    weight = d.node("DequantizeLinear", [stored, d.keep(np.float32(0.05))])
    return Value(d.node("MatMul", [x.name, weight]), (*x.shape[:-1], features), x.is_open)


def square(d: Draft, x: Value) -> Value:
    """A weight that keeps the shape: what the bodies of If and Loop need."""
    if x.rank > 2 and d.pick(False, True):
        channels, around = x.shape[1], [1] * (x.rank - 2)
        weight = d.weight(channels, channels, *(3 * n for n in around), fan=3 * channels)
        name = d.node("Conv", [x.name, weight, d.small(channels)], pads=around * 2)
    elif x.rank == 2 and d.pick(False, True):
        weight = d.weight(x.shape[1], x.shape[1], fan=x.shape[1])
        name = d.node("Gemm", [x.name, weight, d.small(x.shape[1])], transB=1)
    else:
        name = d.node("MatMul", [x.name, d.weight(x.shape[-1], x.shape[-1], fan=x.shape[-1])])
    return Value(name, x.shape, x.is_open)


def weighted(d: Draft, x: Value) -> list[Block]:
    """The blocks with a weight that a value can enter."""
    found: list[Block] = [matmul]
    if x.rank == 2:
        found.append(gemm)
    if d.opset >= 12 and d.kind != "bfloat16" and x.rank > 1:
        found.append(einsum)
    if x.rank >= 3:
        found += [convolution, convolution]
        if prod(x.shape) < LARGEST:
            found.append(transposed_convolution)
    if x.rank == 3 and d.kind != "bfloat16":
        found.append(recurrent)
    if x.rank == 3 and d.kind == "float":
        found.append(attention)
    if d.kind == "float" and d.opset >= 10 and x.rank > 1:
        found.append(quantized)
    return found
