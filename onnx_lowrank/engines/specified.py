"""Operators as their specification has them, where onnx's own reference implementation is wrong.

Its Conv and ConvTranspose fail, or err, for some groups, dilations and paddings. Its BatchNormalization takes
the statistics of the batch before opset 14, where a node with one output takes those that are stored.

Sums are in float64, and results are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun

_Array = NDArray[Any]


class Conv(OpRun):
    """A sum over the kernel's offsets."""

    def _run(
        self,
        x: _Array,
        w: _Array,
        b: _Array | None = None,
        auto_pad: str | None = None,
        dilations: Sequence[int] | None = None,
        group: int | None = None,
        kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[_Array]:
        kernel = w.shape[2:]
        n, group = len(kernel), group or 1
        strides, dilations = strides or [1] * n, dilations or [1] * n
        span = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        around = list(zip(pads[:n], pads[n:], strict=True)) if pads else [(0, 0)] * n
        if (auto_pad or "").startswith("SAME"):
            sizes = zip(x.shape[2:], strides, span, strict=True)
            around = [_halves(max((-(-i // s) - 1) * s + k - i, 0), auto_pad) for i, s, k in sizes]
        wide = np.pad(_wide(x), [(0, 0), (0, 0), *around])
        out = [(i - k) // s + 1 for i, k, s in zip(wide.shape[2:], span, strides, strict=True)]
        y: _Array = np.zeros((x.shape[0], group, w.shape[0] // group, *out))
        wide = wide.reshape(x.shape[0], group, -1, *wide.shape[2:])
        weight = _wide(w).reshape(group, -1, *w.shape[1:])
        for at, window in _windows(kernel, dilations, out, strides):
            y += np.einsum("ngc...,gfc->ngf...", wide[window], weight[at])
        return (_added(y.reshape(y.shape[0], -1, *out), b, x),)


class ConvTranspose(OpRun):
    """Every input is spread over the kernel's offsets."""

    def _run(
        self,
        x: _Array,
        w: _Array,
        b: _Array | None = None,
        auto_pad: str | None = None,
        dilations: Sequence[int] | None = None,
        group: int | None = None,
        kernel_shape: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[_Array]:
        kernel = w.shape[2:]
        n, group = len(kernel), group or 1
        strides, dilations, extra = strides or [1] * n, dilations or [1] * n, output_padding or [0] * n
        sizes = list(zip(x.shape[2:], strides, kernel, dilations, extra, strict=True))
        full = [(i - 1) * s + (k - 1) * d + 1 + e for i, s, k, d, e in sizes]
        cut = list(zip(pads[:n], pads[n:], strict=True)) if pads else [(0, 0)] * n
        if not output_shape and (auto_pad or "").startswith("SAME"):
            output_shape = [i * s for i, s in zip(x.shape[2:], strides, strict=True)]
        if output_shape:
            cut = [_halves(a - o, auto_pad) for a, o in zip(full, output_shape, strict=True)]
        y: _Array = np.zeros((x.shape[0], group, w.shape[1], *full))
        wide = _wide(x).reshape(x.shape[0], group, -1, *x.shape[2:])
        weight = _wide(w).reshape(group, -1, *w.shape[1:])
        for at, window in _windows(kernel, dilations, x.shape[2:], strides):
            y[window] += np.einsum("ngc...,gcf->ngf...", wide, weight[at])
        crop: Any = (..., *(slice(a, size - z) for (a, z), size in zip(cut, full, strict=True)))
        y = y[crop]
        return (_added(y.reshape(y.shape[0], -1, *y.shape[3:]), b, x),)


class BatchNormalization(OpRun):
    """The stored statistics, or those of the batch in training."""

    def _run(
        self,
        x: _Array,
        scale: _Array,
        bias: _Array,
        mean: _Array,
        var: _Array,
        epsilon: float | None = None,
        momentum: float | None = None,
        training_mode: int | None = None,
        spatial: int | None = None,
    ) -> tuple[_Array, ...]:
        outputs = len(self.onnx_node.output)
        used, kept = (mean, var), 0.9 if momentum is None else momentum
        if training_mode or outputs > 1:  # further outputs told the mode before opset 14
            axes = tuple(axis for axis in range(x.ndim) if axis != 1)
            used = tuple(measure(_wide(x), axis=axes) for measure in (np.mean, np.var))
        # Without `spatial`, opset 7 had statistics of every position.
        around = mean.shape if mean.ndim > 1 else (-1, *[1] * (x.ndim - 2))
        s, b, m, v = (_wide(each).reshape(around) for each in (scale, bias, *used))
        y = s * (_wide(x) - m) / np.sqrt(v + (1e-5 if epsilon is None else epsilon)) + b
        running = [kept * old + (1 - kept) * new for old, new in zip((mean, var), used, strict=True)]
        results = (y.astype(x.dtype), *(each.astype(mean.dtype) for each in (*running, *used)))
        return results[:outputs]


def _windows(
    kernel: Sequence[int], dilations: Sequence[int], counts: Sequence[int], strides: Sequence[int]
) -> Iterator[tuple[Any, Any]]:
    """The index of every offset of a kernel, and that of the positions which it meets."""
    for at in np.ndindex(*kernel):
        starts = zip(at, dilations, counts, strides, strict=True)
        yield (..., *at), (..., *(slice(a * d, a * d + (n - 1) * s + 1, s) for a, d, n, s in starts))


def _wide(array: _Array) -> _Array:
    return array.astype(np.float64)


def _halves(total: int, auto_pad: str | None) -> tuple[int, int]:
    """Padding before and after; SAME_LOWER has the larger half before."""
    return (total // 2, total - total // 2) if auto_pad == "SAME_UPPER" else (total - total // 2, total // 2)


def _added(y: _Array, bias: _Array | None, x: _Array) -> _Array:
    """The result with its bias, in the type of the input."""
    around = (-1, *[1] * (y.ndim - 2))
    return (y if bias is None else y + _wide(bias).reshape(around)).astype(x.dtype)


OPERATORS = (Conv, ConvTranspose, BatchNormalization)
"""The classes, as `ReferenceEvaluator` takes them."""
