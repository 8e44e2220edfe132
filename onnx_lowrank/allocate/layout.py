"""The ranks and widths at which ONNX Runtime's CPU provider keeps convolutions in its blocked layout, NCHWc.

The provider computes two-dimensional float32 convolutions in blocks of channels. One that does not fit the
blocks falls back to a slower kernel, and its inputs and outputs are converted from the layout and back:
the layer may take several times as long as before (docs/latency.md). ONNX Runtime's `NchwcTransformer`
asks for

- a number of input channels below the block, or a multiple of 4;
- of a depthwise convolution, a multiple of 4 channels;
- of other grouped convolutions, whole blocks of input and output channels in every group.

The block has 16 channels with AVX-512 and on ARM, and 8 on other x86. The rules here take the smaller one, so
plans do not depend on the machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.layer import Layer

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

_BLOCK = 8
_STEP = 4
_AXES = 2
"""The spatial axes of the convolutions that have a blocked layout."""


def holds_ranks(layer: Layer, k: int, ranks: Ints) -> Mask:
    """Which ranks of a chain leave both of its convolutions in the layout; all, if the layer is not in it.

    All ranks of chains of several slices count, in the layout or not: few layers have whole blocks in every
    slice, and without slices ResNet-20 falls from .870 to .523 at half of its parameters, data-free.

    Args:
        layer: The layer.
        k: The number of slices.
        ranks: Ranks, at least 1.
    """
    if not _is_blocked(layer) or k * layer.groups > 1:
        return np.ones(ranks.shape, dtype=np.bool_)
    held: Mask = np.logical_or(ranks < _BLOCK, ranks % _STEP == 0)
    return held


def holds_widths(layer: Layer, widths: Ints) -> Mask:
    """Which widths leave a narrow convolution and its partners in the layout; all, if the layer is not in it.

    Args:
        layer: The layer, with its partners.
        widths: Widths, at least 1.
    """
    if not _is_blocked(layer):
        return np.ones(widths.shape, dtype=np.bool_)
    free = 0 if layer.beside.has_convolutions else _BLOCK
    held: Mask = np.logical_or(widths < free, widths % _STEP == 0)
    return held


def _is_blocked(layer: Layer) -> bool:
    return layer.op == "Conv" and len(layer.kernel) == _AXES and layer.dtype == "float32"
