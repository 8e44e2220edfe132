"""The windows of a convolution along its spatial axes, and the patches in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Self

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from onnx_lowrank.operators.geometry import CHUNK, channel_major, row_dtype, row_width

_SPARSEST = 8
"""At least every eighth position along an axis counts."""

_PATTERNS = 16
"""So many samples in a row have other positions."""

Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Window:
    """The geometry of a Conv or ConvTranspose along its spatial axes.

    Attributes:
        groups: Number of groups.
        kernel: Size of the kernel.
        strides: Strides.
        dilations: Dilations.
        pads: Padding: the begins of all axes, then the ends of all axes.
        auto_pad: NOTSET to use `pads`; otherwise VALID, SAME_UPPER or SAME_LOWER.
        transposed: Whether it is a ConvTranspose.
        output_padding: The attribute of a ConvTranspose.
        output_shape: The attribute of a ConvTranspose; () if it follows from the padding.
        needed: The least number of positions of a picture that count, if it has more; 0 for all positions.
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
    needed: int = 0

    def thinned(self, needed: int) -> Self:
        """Fewer positions along every axis; all positions of a sequence, whose tokens are few."""
        return replace(self, needed=needed) if len(self.kernel) > 1 else self

    def rows(self, value: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """The patches of the positions that count."""
        yield from _windows(self, value)

    def results(self, value: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """The features at the positions that count."""
        n, f, *sizes = value.shape
        grouped = value.reshape(n, self.groups, f // self.groups, *sizes)
        chosen = self.chosen(sizes)
        if not chosen:
            yield from channel_major(np.moveaxis(grouped, (1, 2), (-2, -1)), 1 + len(sizes))
            return
        step = max(1, CHUNK // (max(1, value[:1].size) * row_width(value)))
        for start in range(0, n, step):
            once = [np.zeros(1, np.intp)] * len(sizes)
            yield _sampled(grouped[start : start + step], start, chosen, once, [1] * len(sizes))

    def chosen(self, sizes: Sequence[int]) -> list[tuple[Indices, ...]]:
        """The positions that count, along every axis, for every n-th sample; empty if all positions count.

        They are drawn, one from each of the parts into which they cut an axis, so that neither borders nor
        the phases of a grid (behind a transposed convolution or a Resize) count more than their share.

        Args:
            sizes: The number of positions along every axis.
        """
        every = min(_SPARSEST, *sizes) if self.needed else 1
        while every > 1 and prod(size // every for size in sizes) < self.needed:
            every -= 1
        if every <= 1:
            return []
        rng = np.random.default_rng(0)
        return [tuple(_drawn(rng, size, size // every) for size in sizes) for _ in range(_PATTERNS)]

    def spans(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        """For every axis, the padding before it and the number of positions, for an input of these sizes.

        A ConvTranspose counts as the Conv with the flipped kernel on an input that is spread by the stride.
        The padding is that of this Conv; it is negative if the spread input is cropped.
        """
        span = self._transposed_span if self.transposed else self._span
        return [span(axis, size) for axis, size in enumerate(sizes)]

    def extent(self, axis: int) -> int:
        """Distance of the first and the last element of the kernel, in positions."""
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
            # If size · stride exceeds the full size, ONNX Runtime gives the full size.
            count = self.output_shape[axis] if self.output_shape else min(size * self.strides[axis], full)
            total = max(full - count, 0)
            return extent - (total + (not upper)) // 2, count
        before, after = self._pads(axis)
        return extent - before, full - before - after

    def _pads(self, axis: int) -> tuple[int, int]:
        if self.auto_pad == "VALID":
            return 0, 0
        return self.pads[axis], self.pads[axis + len(self.kernel)]


def _drawn(rng: np.random.Generator, size: int, number: int) -> Indices:
    """So many places on an axis, one from each of as many parts of like size, ascending.

    The places within their parts are spread evenly, too, as in a Latin hypercube (McKay, Beckman and
    Conover, 1979).
    """
    edges = np.arange(number + 1) * size // number
    share = (rng.permutation(number) + rng.random(number)) / number
    places: Indices = edges[:-1] + (share * np.diff(edges)).astype(np.intp)
    return places


def _windows(window: Window, value: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Patches of a convolution: im2col of the padded (and spread) input, a few samples at a time."""
    spans = window.spans(value.shape[2:])
    counts = [count for _, count in spans]
    if any(count <= 0 for count in counts):
        return
    chosen = window.chosen(counts)
    length = value[0].size // prod(value.shape[2:]) * prod(window.kernel)
    rows = prod(map(len, chosen[0])) if chosen else prod(counts)
    padded_size = _padded(window, value[:1], spans).size if chosen else 0
    step = max(1, CHUNK // (max(rows * length, padded_size) * row_width(value)))
    for start in range(0, len(value), step):
        padded = _padded(window, value[start : start + step], spans)
        if not chosen:
            yield from channel_major(_view(window, padded, counts), 1 + len(spans))
            continue
        n, c, *sizes = padded.shape
        grouped = padded.reshape(n, window.groups, c // window.groups, *sizes)
        steps = [1] * len(spans) if window.transposed else list(window.strides)
        yield _sampled(grouped, start, chosen, _taps(window), steps)


def _taps(window: Window) -> list[Indices]:
    """For every axis, the distances of the elements of the kernel from the first element of a position."""
    taps = [np.arange(k) * dilation for k, dilation in zip(window.kernel, window.dilations, strict=True)]
    # A ConvTranspose is the Conv of the spread input with the flipped kernel.
    return [np.flip(axis) for axis in taps] if window.transposed else taps


def _sampled(
    value: NDArray[Any],
    start: int,
    chosen: Sequence[tuple[Indices, ...]],
    taps: Sequence[Indices],
    steps: Sequence[int],
) -> NDArray[Any]:
    """The rows at the positions that count, in the order of the samples: shape (rows, g, p).

    Args:
        value: Samples, shape (n, g, channels, *sizes).
        start: The number of the first one.
        chosen: The positions, as `Window.chosen` gives them.
        taps: For every axis, the distances of the elements of a row from the position.
        steps: The distance of positions along every axis.
    """
    n, g, channels = value.shape[:3]
    kernel, counts = [len(axis) for axis in taps], [len(axis) for axis in chosen[0]]
    chunk = np.empty((g, channels, *kernel, n, *counts), row_dtype(value))
    axes = range(len(taps))
    order = (1, 2, *(3 + 2 * axis for axis in axes), 0, *(4 + 2 * axis for axis in axes))
    for number, positions in enumerate(chosen):
        samples = slice((number - start) % len(chosen), None, len(chosen))
        own = value[samples]
        for axis in axes:
            index = positions[axis] * steps[axis] + taps[axis][:, None]
            own = own.take(index.ravel(), axis=3 + axis)
        cut = own.reshape(-1, g, channels, *(n for pair in zip(kernel, counts, strict=True) for n in pair))
        target: Any = (slice(None),) * (2 + len(taps)) + (samples,)
        chunk[target] = cut.transpose(order)
    return chunk.reshape(g, channels * prod(kernel), -1).transpose(2, 0, 1)


def _padded(window: Window, value: NDArray[Any], spans: list[tuple[int, int]]) -> NDArray[Any]:
    """The input with its padding, without elements that no window covers."""
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
    padded = np.zeros(shape, row_dtype(value))
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
