"""Pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from onnx_lowrank.distil.forms.form import Call, form
from onnx_lowrank.distil.forms.products import ends, padded

_MEANS: tuple[Callable[..., Tensor], ...] = (
    functional.avg_pool1d,
    functional.avg_pool2d,
    functional.avg_pool3d,
)
_MAXIMA: tuple[Callable[..., Tensor], ...] = (
    functional.max_pool1d,
    functional.max_pool2d,
    functional.max_pool3d,
)


@dataclass(frozen=True, slots=True)
class _Window:
    """Where a kernel moves.

    Attributes:
        kernel: Its sizes.
        strides: Its steps.
        dilations: The distances of its elements.
        begin: The padding before every axis.
        end: The padding behind every axis.
        last: The padding behind every axis with which the kernel ends at the last element; below 0, it
            leaves out elements.
        counts: The positions on every axis.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]
    last: list[int]
    counts: list[int]


def _window(call: Call, size: Sequence[int]) -> _Window:
    kernel = list(call.get("kernel_shape"))
    rank = len(kernel)
    strides, dilations = call.get("strides", [1] * rank), call.get("dilations", [1] * rank)
    begin, end = ends(call, size, kernel)
    counts, last = [], []
    for n, k, s, d, before, behind in zip(size, kernel, strides, dilations, begin, end, strict=True):
        span = (k - 1) * d + 1
        count = (n + before + behind - span) // s + 1
        if call.get("ceil_mode", 0):
            count = -(-(n + before + behind - span) // s) + 1
            count -= (count - 1) * s >= n + before  # No position begins behind the input.
        counts.append(count)
        last.append((count - 1) * s + span - n - before)
    return _Window(kernel, list(strides), list(dilations), begin, end, last, counts)


@form("AveragePool")
def _average(call: Call) -> Tensor:
    x = call.tensor(0)
    window, counted = _window(call, x.shape[2:]), bool(call.get("count_include_pad", 0))
    plain = window.begin == window.end == [0] * len(window.kernel) and not call.get("ceil_mode", 0)
    if plain and max(window.dilations) == 1:
        return _MEANS[len(window.kernel) - 1](x, window.kernel, window.strides)
    ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if counted:
        ones = padded(
            ones, window.begin, [min(pair) for pair in zip(window.end, window.last, strict=True)], 1.0
        )
        rest = [max(0, last - end) for end, last in zip(window.end, window.last, strict=True)]
        ones = padded(ones, [0] * len(rest), rest)
    else:
        ones = padded(ones, window.begin, window.last)
    return _sums(padded(x, window.begin, window.last), window) / _sums(ones, window)


def _sums(x: Tensor, window: _Window) -> Tensor:
    """The sums under a kernel, of an input that is padded."""
    rank = len(window.kernel)
    if max(window.dilations) == 1:
        return _MEANS[rank - 1](x, window.kernel, window.strides) * prod(window.kernel)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for place in product(*map(range, window.kernel)):
        cuts = [slice(None), slice(None)]
        for at, s, d, count in zip(place, window.strides, window.dilations, window.counts, strict=True):
            cuts.append(slice(at * d, at * d + (count - 1) * s + 1, s))
        total = total + x[tuple(cuts)]
    return total


@form("MaxPool")
def _maximum(call: Call) -> Tensor:
    if call.outputs > 1:
        raise NotImplementedError("MaxPool with indices")
    x = call.tensor(0)
    window = _window(call, x.shape[2:])
    pool = _MAXIMA[len(window.kernel) - 1]
    return pool(
        padded(x, window.begin, window.last, -torch.inf), window.kernel, window.strides, 0, window.dilations
    )


@form("LpPool")
def _lp_pool(call: Call) -> Tensor:
    x, power = call.tensor(0), call.get("p", 2)
    window = _window(call, x.shape[2:])
    total = _sums(padded(x, window.begin, window.last).abs() ** power, window)
    return total.clamp(min=torch.finfo(x.dtype).tiny) ** (1 / power)  # The gradient of 0 is 0, not NaN.


@form("GlobalAveragePool")
def _global_average(call: Call) -> Tensor:
    return call.tensor(0).mean(dim=_spatial(call), keepdim=True)


@form("GlobalMaxPool")
def _global_maximum(call: Call) -> Tensor:
    return call.tensor(0).amax(dim=_spatial(call), keepdim=True)


@form("GlobalLpPool")
def _global_lp(call: Call) -> Tensor:
    return torch.linalg.vector_norm(call.tensor(0), call.get("p", 2), dim=_spatial(call), keepdim=True)


def _spatial(call: Call) -> tuple[int, ...]:
    return tuple(range(2, call.tensor(0).ndim))
