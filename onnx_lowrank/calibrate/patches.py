"""The vectors that a layer's weight multiplies, cut out of the activations that its node reads.

For every operator the identity is the same: with W the layer's canonical weight and x one row of
`patches`, group i of the output at this position is W[i].reshape(f / g, p) @ x[i], without the bias and
without a BatchNorm behind. `outputs` brings the node's results into the same order of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk, attribute_of
from onnx_lowrank.graph.weights import viewed
from onnx_lowrank.layers.find import Binding
from onnx_lowrank.operators.chains import spatial

CHUNK = 2**25
"""Bytes that a chunk of rows takes at most; one line of positions is never split."""


@dataclass(frozen=True, slots=True)
class Window:
    """What a Conv or ConvTranspose does along its spatial axes.

    Attributes:
        groups: Operator groups.
        kernel: Size of the kernel.
        strides: Strides.
        dilations: Dilations.
        pads: Padding, all axes' begins, then all their ends.
        auto_pad: How padding is chosen instead: NOTSET, VALID, SAME_UPPER or SAME_LOWER.
        transposed: Whether it is a ConvTranspose.
        output_padding: Of a ConvTranspose.
        output_shape: Of a ConvTranspose; () where it follows from the padding.
    """

    groups: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str
    transposed: bool
    output_padding: tuple[int, ...]
    output_shape: tuple[int, ...]

    def spans(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        """Padding before, and number of positions, of every axis of inputs of these sizes.

        The input of a ConvTranspose is thought of as spread by its stride, and its padding as that of
        the Conv with the flipped kernel; it is negative where the spread input is cropped.
        """
        span = self._transposed_span if self.transposed else self._span
        return [span(axis, size) for axis, size in enumerate(sizes)]

    def extent(self, axis: int) -> int:
        """Positions between the first and the last element of the kernel."""
        return (self.kernel[axis] - 1) * self.dilations[axis]

    def _span(self, axis: int, size: int) -> tuple[int, int]:
        # ONNX operator specification, Conv: auto_pad.
        stride, extent = self.strides[axis], self.extent(axis)
        if self.auto_pad.startswith("SAME"):
            count = -(-size // stride)
            total = max((count - 1) * stride + extent + 1 - size, 0)
            return (total + (self.auto_pad == "SAME_LOWER")) // 2, count
        before, after = self._pads(axis)
        return before, (size + before + after - extent - 1) // stride + 1

    def _transposed_span(self, axis: int, size: int) -> tuple[int, int]:
        # ONNX operator specification, ConvTranspose: output_shape and auto_pad.
        extent, upper = self.extent(axis), self.auto_pad == "SAME_UPPER"
        full = (size - 1) * self.strides[axis] + self.output_padding[axis] + extent + 1
        if self.output_shape or self.auto_pad.startswith("SAME"):
            # Where size · stride is more than there is, ONNX Runtime gives what there is.
            count = self.output_shape[axis] if self.output_shape else min(size * self.strides[axis], full)
            total = max(full - count, 0)
            return extent - (total + (not upper)) // 2, count
        before, after = self._pads(axis)
        return extent - before, full - before - after

    def _pads(self, axis: int) -> tuple[int, int]:
        if self.auto_pad == "VALID":
            return 0, 0
        return self.pads[axis], self.pads[axis + len(self.kernel)]


@dataclass(frozen=True, slots=True)
class Matrix:
    """How a Gemm, MatMul or Gather lays out the vectors that it multiplies.

    Attributes:
        batch: Leading axes of the weight, whose product is the number of groups.
        reads_columns: Whether the vectors are the columns of the activation.
        gives_columns: Whether the results are columns.
        scale: What a Gemm multiplies the product by (alpha).
    """

    batch: tuple[int, ...]
    reads_columns: bool = False
    gives_columns: bool = False
    scale: float = 1.0


Geometry = Window | Matrix
"""Which elements of an activation meet the weight together; hashable."""


def geometry(model: Model, walk: Walk, binding: Binding, index: int) -> Geometry:
    """The geometry of one use of a layer.

    Args:
        model: The model.
        walk: Its walk.
        binding: The layer.
        index: Number of the use.
    """
    layer, use = binding.layer, binding.layer.uses[index]
    node = walk.node(Place(use.scope, use.node))
    if layer.kernel:
        n = len(layer.kernel)
        output_shape = spatial(node, "output_shape")
        return Window(
            groups=layer.groups,
            kernel=layer.kernel,
            strides=tuple(spatial(node, "strides") or [1] * n),
            dilations=tuple(spatial(node, "dilations") or [1] * n),
            pads=tuple(spatial(node, "pads") or [0] * 2 * n),
            auto_pad=attribute_of(node, "auto_pad", "NOTSET"),
            transposed=use.op == "ConvTranspose",
            output_padding=tuple(spatial(node, "output_padding") or [0] * n),
            output_shape=tuple(output_shape),
        )
    value = viewed(walk, model, binding.stored)
    batch = () if value is None else value.shape[:-2]
    on_left = use.op != "Gather" and use.operand == 0
    if use.op != "Gemm":
        return Matrix(batch, on_left, on_left)
    flipped = bool(attribute_of(node, "transB" if on_left else "transA", 0))
    return Matrix(batch, on_left != flipped, on_left, attribute_of(node, "alpha", 1.0))


def patches(geometry: Geometry, value: NDArray[Any], depth: int = 0) -> Iterator[NDArray[Any]]:
    """The rows that meet a layer's weight, in chunks of at most `CHUNK` bytes.

    A row that meets several groups of a batched weight (it broadcasts) is in all of them. The scale of
    a Gemm is in its rows; for a transposed use the identity holds with the transpose of W[i].

    Args:
        geometry: How the node reads its input.
        value: The node's activation, a float array; none of a Gather.
        depth: Number of axes that stack the activations of several runs; empty arrays have no rows.

    Yields:
        Arrays of shape (rows, g, p), p = c / g · prod(kernel) in the order (c / g, *kernel), of dtype
        float64 where the activation is, else float32; not to be written to. Rows go by the axes of the
        output before its features (batch), then those behind (positions).
    """
    for single in _unstacked(value, depth):
        if isinstance(geometry, Window):
            yield from _windows(geometry, single)
        else:
            for chunk in _vectors(geometry.batch, single, geometry.reads_columns):
                yield chunk if geometry.scale == 1 else chunk * chunk.dtype.type(geometry.scale)


def outputs(geometry: Geometry, value: NDArray[Any], depth: int = 0) -> Iterator[NDArray[Any]]:
    """What a layer gives, in the order of the rows of `patches`, in chunks of at most `CHUNK` bytes.

    Args:
        geometry: How the node lays out its result.
        value: The node's result, a float array.
        depth: Number of axes that stack the results of several runs.

    Yields:
        Arrays of shape (rows, g, f / g), of dtype float64 where the result is, else float32; not to
        be written to.
    """
    for single in _unstacked(value, depth):
        if isinstance(geometry, Window):
            n, f, *sizes = single.shape
            grouped = single.reshape(n, geometry.groups, f // geometry.groups, *sizes)
            yield from _channel_major(np.moveaxis(grouped, (1, 2), (-2, -1)), 1 + len(sizes))
        else:
            yield from _vectors(geometry.batch, single, geometry.gives_columns)


def _unstacked(value: NDArray[Any], depth: int) -> Iterator[NDArray[Any]]:
    """The activations of single runs; none where the node did not run."""
    if value.size:
        yield from value.reshape(-1, *value.shape[depth:]) if depth else (value,)


def _windows(window: Window, value: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Patches of a convolution: im2col of the padded (and spread) input, a few samples at a time."""
    spans = window.spans(value.shape[2:])
    if any(count <= 0 for _, count in spans):
        return
    sample = prod(count for _, count in spans) * value[0].size // prod(value.shape[2:]) * prod(window.kernel)
    step = max(1, CHUNK // (sample * _width(value)))
    for start in range(0, len(value), step):
        padded = _padded(window, value[start : start + step], spans)
        yield from _channel_major(_view(window, padded, [count for _, count in spans]), 1 + len(spans))


def _padded(window: Window, value: NDArray[Any], spans: list[tuple[int, int]]) -> NDArray[Any]:
    """The input with its padding: every element that a window covers, and no other."""
    spread = window.strides if window.transposed else (1,) * len(spans)
    steps = (1,) * len(spans) if window.transposed else window.strides
    shape, source, target = list(value.shape[:2]), [slice(None)] * 2, [slice(None)] * 2
    for axis, (before, count) in enumerate(spans):
        length = (count - 1) * steps[axis] + window.extent(axis) + 1
        size, factor = value.shape[2 + axis], spread[axis]
        first = max(0, -(before // factor))  # the first element that is not cropped
        last = min(size - 1, (length - 1 - before) // factor)
        shape.append(length)
        source.append(slice(first, max(first, last + 1)))
        begin = before + first * factor
        target.append(slice(begin, begin + max(0, last - first + 1) * factor, factor))
    padded = np.zeros(shape, _dtype(value))
    padded[tuple(target)] = value[tuple(source)]
    return padded


def _view(window: Window, padded: NDArray[Any], counts: list[int]) -> NDArray[Any]:
    """All windows on an input as a view: (n, *positions, g, c / g, *kernel)."""
    n, c = padded.shape[:2]
    sample, channel, *axes = padded.strides
    steps = (1,) * len(axes) if window.transposed else window.strides
    per_group = c // window.groups
    view = as_strided(
        padded,
        (n, *counts, window.groups, per_group, *window.kernel),
        (
            sample,
            *(stride * step for stride, step in zip(axes, steps, strict=True)),
            channel * per_group,
            channel,
            *(stride * dilation for stride, dilation in zip(axes, window.dilations, strict=True)),
        ),
        writeable=False,
    )
    # A ConvTranspose is the Conv of the spread input with the flipped kernel.
    return np.flip(view, tuple(range(-len(axes), 0))) if window.transposed else view


def _vectors(batch: tuple[int, ...], value: NDArray[Any], columns: bool) -> Iterator[NDArray[Any]]:
    """Vectors of a matrix product: the axes that the weight has, too, become groups, the others rows."""
    if value.ndim == 1:
        value = value[None]
    elif columns:
        value = value.swapaxes(-1, -2)
    *leading, m, n = value.shape
    shape = np.broadcast_shapes(tuple(leading), batch)
    value = np.broadcast_to(value, (*shape, m, n))
    own = [axis for axis, size in enumerate(batch, len(shape) - len(batch)) if size > 1]
    rows = [axis for axis in range(len(shape)) if axis not in own]
    view = value.transpose(*rows, len(shape), *own, len(shape) + 1)
    for part, _ in _parts(view, len(rows) + 1):
        yield part.reshape(-1, prod(batch), n).astype(_dtype(view), copy=False)


def _channel_major(view: NDArray[Any], lead: int) -> Iterator[NDArray[Any]]:
    """Chunks of a view (*rows, g, *n), of which `lead` axes count rows, laid out with the rows last.

    So every copy goes along the lines of the input, which is several times as fast as row by row.
    """
    for part, axes in _parts(view, lead):
        groups, *features = part.shape[axes:]
        chunk = np.empty((groups, *features, *part.shape[:axes]), _dtype(view))
        chunk[...] = np.moveaxis(part, tuple(range(axes)), tuple(range(-axes, 0)))
        yield chunk.reshape(groups, prod(features), -1).transpose(2, 0, 1)


def _parts(view: NDArray[Any], lead: int) -> Iterator[tuple[NDArray[Any], int]]:
    """Cut a view along its leading axes until each part takes at most `CHUNK` bytes."""
    step = CHUNK // max(1, view[:1].size * _width(view))
    if step or lead == 1:
        for start in range(0, len(view), max(1, step)):
            yield view[start : start + max(1, step)], lead
    else:
        for entry in view:
            yield from _parts(entry, lead - 1)


def _dtype(value: NDArray[Any]) -> type[np.floating[Any]]:
    """The dtype in which rows are handed out: BLAS knows no other."""
    return np.float64 if value.dtype == np.float64 else np.float32


def _width(value: NDArray[Any]) -> int:
    return np.dtype(_dtype(value)).itemsize
