"""How far the outputs of two models lie apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.errors import ValidationError
from onnx_lowrank.types import OutputError

_EMPTY = "It has no elements."


def compare(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> tuple[OutputError, ...]:
    """Compare the outputs of the input model with the compressed model's.

    Sequences and maps are compared element by element; an optional that is empty in both is left out.

    Args:
        wanted: The input model's outputs by name.
        got: The compressed model's.

    Raises:
        ValidationError: An output has NaN or Inf where the input model's has none.
    """
    errors = []
    for name, value in wanted.items():
        ours, theirs = dict(_leaves(name, value)), dict(_leaves(name, got.get(name)))
        errors += [_compare(leaf, ours[leaf], theirs[leaf]) for leaf in ours if leaf in theirs]
        if ours.keys() != theirs.keys():
            note = f"It has {len(theirs)} elements, the input model's {len(ours)}."
            errors.append(OutputError(name, float("inf"), None, None, note))
    return tuple(errors)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays in an output, which may be a tensor, a sequence, a map or an empty optional."""
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}[{index}]", item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}[{key!r}]", item)
    elif value is not None:
        yield name, np.asarray(value)


def _compare(name: str, y: NDArray[Any], z: NDArray[Any]) -> OutputError:
    if y.shape != z.shape:
        note = f"Its shape is {z.shape}, the input model's {y.shape}."
        return OutputError(name, float("inf"), None, None, note)
    if y.dtype.kind in "OSU":
        equal = float(np.mean(y == z)) if y.size else None
        return OutputError(name, None, None, equal, "It holds texts." if y.size else _EMPTY)
    exact = y.dtype.kind in "biu" or y.dtype.name.startswith(("int", "uint"))
    y, z = _wide(y), _wide(z)
    finite = np.isfinite(y)
    lost = int(np.count_nonzero(finite & ~np.isfinite(z)))
    if lost:
        raise ValidationError(
            f"The compressed model gives NaN or Inf in {lost} of {y.size} elements of {name!r}, where the "
            "input model gives none: choose a larger ratio, or a wider dtype than the weights have now."
        )
    hidden = y.size - int(np.count_nonzero(finite))
    note = f"{hidden} of {y.size} elements are NaN or Inf in the input model, too." if hidden else ""
    if not finite.any():
        return OutputError(name, None, None, None, note or _EMPTY)
    difference = np.abs(y[finite] - z[finite])
    norm, residual = float(np.linalg.norm(y[finite])), float(np.linalg.norm(difference))
    relative = residual / norm if norm else float("inf") if residual else 0.0
    agreement = float(np.mean(y == z)) if exact else _top1(y, z)
    return OutputError(name, relative, float(difference.max()), agreement, note)


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _top1(y: NDArray[Any], z: NDArray[Any]) -> float | None:
    """Share of rows whose largest element is at the same place; None where the last axis holds no classes."""
    if y.ndim < 2 or y.shape[-1] < 2 or not y.size or y.dtype.kind == "c":
        return None
    rows = np.isfinite(y).all(-1)
    if not rows.any():
        return None
    return float(np.mean(y.argmax(-1)[rows] == z.argmax(-1)[rows]))
