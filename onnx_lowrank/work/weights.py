"""References to weights: small values from which any process can read the weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import read


@dataclass(frozen=True, slots=True, eq=False)
class WeightRef:
    """A reference to a canonical weight, in a data file or in the model, and its BatchNorm.

    The strides describe how the model's views (transposed, split in groups) show the stored bytes. They are
    part of the reference because linear algebra sums in the order of the layout: another layout gives other
    bits.

    Attributes:
        source: The data file that holds the weight; or the weight's bytes, shape (n,), if the model holds it.
        offset: Bytes of the source before the first element.
        dtype: The stored dtype.
        shape: Its canonical shape, (g, f / g, c / g, *kernel).
        strides: Bytes from one element to the next along every axis.
        scale: The folded BatchNorm's factors of the output features, shape (f,); None without one.
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
        """Bytes that reading takes: the stored bytes, and a float64 copy if a BatchNorm scales the weight."""
        return self.size * (self.dtype.itemsize + (0 if self.scale is None else 8))

    @property
    def content(self) -> object:
        """All that determines the weight and its layout; another place of equal bytes changes nothing."""
        return self._bytes(), self.dtype, self.shape, self.strides, self.scale

    def read(self) -> NDArray[Any]:
        """Read the weight; a float64 copy if a BatchNorm scales it.

        Raises:
            InputError: The data file has changed.
        """
        weight: NDArray[Any] = np.ndarray(self.shape, self.dtype, self._bytes(), 0, self.strides)
        if self.scale is None:
            return weight
        scale = self.scale.reshape(*self.shape[:2], *[1] * len(self.shape[2:]))
        return weight.astype(np.float64) * scale

    def loaded(self) -> WeightRef:
        """The same with the bytes in place of the file.

        Raises:
            InputError: The data file has changed.
        """
        return replace(self, source=np.array(self._bytes()), offset=0)

    def _bytes(self) -> NDArray[np.uint8]:
        """The bytes from the first element to the last."""
        steps = zip(self.shape, self.strides, strict=True)
        length = sum((number - 1) * stride for number, stride in steps) + self.dtype.itemsize
        if not isinstance(self.source, Path):
            return self.source[self.offset : self.offset + length]
        # Not mapped: if a mapped file becomes shorter, the system kills the process.
        advice = "restore it as it was, and run again."
        try:
            data = np.fromfile(self.source, np.uint8, length, offset=self.offset)
        except OSError as error:
            raise InputError(f"{self.source} cannot be read ({error.strerror}): {advice}") from error
        if len(data) < length:
            raise InputError(f"{self.source} cannot be read to byte {self.offset + length}: {advice}")
        return data


def reference(model: Model, walk: Walk, binding: Binding) -> WeightRef:
    """Refer to the weight of a layer.

    Raises:
        InputError: A data file has changed.
    """
    norm = binding.layer.batchnorm
    return refer(read(model, walk, binding), None if norm is None else norm.scale)


def refer(weight: NDArray[Any], scale: NDArray[np.float64] | None = None) -> WeightRef:
    """Refer to an array: to its file if it is mapped from one, else to its bytes.

    Args:
        weight: A canonical weight that is not empty.
        scale: The factors by which to multiply the output features, shape (f,).
    """
    order = sorted(range(weight.ndim), key=lambda axis: -weight.strides[axis])
    if not weight.transpose(order).flags.c_contiguous:
        # Only views that omit or repeat elements get here, so the copy never changes a weight's layout.
        order, weight = list(range(weight.ndim)), np.ascontiguousarray(weight)
    mapped = _mapped(weight)
    if mapped is not None and mapped.filename is not None:
        offset = int(mapped.offset) + _address(weight) - _address(mapped)
        return WeightRef(Path(mapped.filename), offset, weight.dtype, weight.shape, weight.strides, scale)
    data = weight.transpose(order).reshape(-1).view(np.uint8)
    return WeightRef(data, 0, weight.dtype, weight.shape, weight.strides, scale)


def _mapped(array: NDArray[Any]) -> np.memmap[Any, Any] | None:
    """The mapped file that provides an array's memory; None if the array has its own memory."""
    # The first memmap may be a view: a view of a memmap is a memmap, too, and copies the offset of its base.
    owner: object = array
    while isinstance(owner, np.ndarray):
        if isinstance(owner, np.memmap) and not isinstance(owner.base, np.ndarray):
            return owner
        owner = owner.base
    return None


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
