"""References to weights: a few numbers that travel, from which any process reads the weight."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.find import Binding, read


@dataclass(frozen=True, slots=True, eq=False)
class WeightRef:
    """A canonical weight with its BatchNorm, wherever its numbers lie.

    The layout tells how the views of the model (transposed, cut in groups) show the stored bytes. It is part
    of the reference, because linear algebra sums in the order of the layout: another one gives other bits.

    Attributes:
        source: The data file that holds it; or, where the model does, its bytes, shape (number,).
        offset: Bytes of the source in front of the first element.
        dtype: The dtype in which it is stored.
        shape: Its canonical shape, (g, f / g, c / g, *kernel).
        strides: Bytes from one element to the next along every axis.
        scale: What the folded BatchNorm multiplies every output feature by, shape (f,); None without.
    """

    source: Path | NDArray[np.uint8]
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    scale: NDArray[np.float64] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that reading it takes: as it is stored, and in float64 where a BatchNorm scales it."""
        return self.size * (self.dtype.itemsize + (0 if self.scale is None else 8))

    def read(self) -> NDArray[Any]:
        """The weight: mapped from its file without a copy, or float64 where a BatchNorm scales it.

        Raises:
            InputError: The data file has changed.
        """
        weight: NDArray[Any] = np.ndarray(self.shape, self.dtype, self._bytes(), 0, self.strides)
        if self.scale is None:
            return weight
        scale = self.scale.reshape(*self.shape[:2], *[1] * len(self.shape[2:]))
        return weight.astype(np.float64) * scale

    def _bytes(self) -> NDArray[np.uint8]:
        """The bytes from the first element to the last."""
        steps = zip(self.shape, self.strides, strict=True)
        length = sum((number - 1) * stride for number, stride in steps) + self.dtype.itemsize
        if not isinstance(self.source, Path):
            return self.source[self.offset : self.offset + length]
        try:
            return np.memmap(self.source, np.uint8, "r", self.offset, (length,))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.source} cannot be read ({error}): restore it as it was, and run again."
            ) from error


def reference(model: Model, walk: Walk, binding: Binding) -> WeightRef:
    """Refer to the weight of a layer.

    Raises:
        InputError: A data file has changed.
    """
    norm = binding.layer.batchnorm
    return refer(read(model, walk, binding), None if norm is None else norm.scale)


def refer(weight: NDArray[Any], scale: NDArray[np.float64] | None = None) -> WeightRef:
    """Refer to an array: to the file that it is mapped from, or else to its own bytes.

    Args:
        weight: A canonical weight that is not empty.
        scale: What to multiply every output feature by, shape (f,).
    """
    order = sorted(range(weight.ndim), key=lambda axis: -weight.strides[axis])
    if not weight.transpose(order).flags.c_contiguous:
        # Only views that leave elements out or show some twice get here, none that lay out a weight.
        order, weight = list(range(weight.ndim)), np.ascontiguousarray(weight)
    mapped = _mapped(weight)
    if mapped is not None and mapped.filename is not None:
        offset = int(mapped.offset) + _address(weight) - _address(mapped)
        return WeightRef(Path(mapped.filename), offset, weight.dtype, weight.shape, weight.strides, scale)
    data = weight.transpose(order).reshape(-1).view(np.uint8)
    return WeightRef(data, 0, weight.dtype, weight.shape, weight.strides, scale)


def _mapped(array: NDArray[Any]) -> np.memmap[Any, Any] | None:
    """The mapped file whose memory an array shows; None where it has memory of its own."""
    shown: object = array
    while isinstance(shown, np.ndarray):
        if isinstance(shown, np.memmap) and not isinstance(shown.base, np.ndarray):
            return shown
        shown = shown.base
    return None


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
