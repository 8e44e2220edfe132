"""The ranks and widths at which ONNX Runtime's CPU provider keeps convolutions in its blocked layout, NCHWc.

The provider computes two-dimensional float32 convolutions in blocks of channels. One that does not fit the
blocks falls back to a slower kernel, and its inputs and outputs are converted from the layout and back:
the layer may take several times as long as before (docs/latency.md). ONNX Runtime's `NchwcTransformer`
asks for

- a number of input channels below the block, or a multiple of 4;
- of a depthwise convolution, a multiple of 4 channels;
- of other grouped convolutions, whole blocks of input and output channels in every group.

The block has 16 channels with AVX-512 and on ARM, and 8 on other x86. The rules here take the smaller one, so
plans do not depend on the machine. Convolutions of fewer channels than a block read the plain layout without
losing their fast kernel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.layer import Layer

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

_BLOCK = 8
_STEP = 4
_OPERATORS = frozenset({"Conv", "FusedConv"})
_AXES = 2
"""The spatial axes of the convolutions that have a blocked layout."""


def holds_ranks(layer: Layer, k: int, ranks: Ints) -> Mask:
    """Which ranks of a chain leave its convolutions without groups in the layout.

    The first convolution of several slices has groups. It is out of the layout unless every slice has whole
    blocks, as few layers have; without slices, ResNet-20 falls from .870 to .523 at half of its parameters,
    data-free. All ranks of other operators, dtypes and numbers of axes count.

    Args:
        layer: The layer.
        k: The number of slices.
        ranks: Ranks, at least 1.
    """
    if not _is_blocked(layer) or layer.groups > 1:
        return np.ones(ranks.shape, dtype=np.bool_)
    return _holds(k * ranks, _BLOCK)


def holds_widths(layer: Layer, widths: Ints) -> Mask:
    """Which widths leave the convolutions that read these channels in the layout; all, if there are none.

    Args:
        layer: The layer, with its partners.
        widths: Widths, at least 1.
    """
    if layer.beside.has_convolutions and any(map(_is_blocked, layer.partners)):
        return _holds(widths, 0)
    return _holds(widths, _BLOCK) if _is_blocked(layer) else np.ones(widths.shape, dtype=np.bool_)


def _holds(channels: Ints, fewer: int) -> Mask:
    """Whether numbers of channels are multiples of 4, or lie below another number."""
    held: Mask = np.logical_or(channels < fewer, channels % _STEP == 0)
    return held


def _is_blocked(layer: Layer) -> bool:
    return layer.op in _OPERATORS and len(layer.kernel) == _AXES and layer.dtype == "float32"
