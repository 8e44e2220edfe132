"""The differences between the outputs of two models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import hypot, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.outcome import OutputError
from onnx_lowrank.engines.classes import Classes
from onnx_lowrank.engines.embedding import Embedding
from onnx_lowrank.engines.noise import Noise
from onnx_lowrank.engines.padding import NO_PADDING, Padding
from onnx_lowrank.engines.spread import Spread, is_batched
from onnx_lowrank.errors import ValidationError

_EMPTY = "It has no elements."


def compare(
    wanted: Mapping[str, Any],
    got: Mapping[str, Any],
    feed: Mapping[str, NDArray[Any]],
    padding: Padding = NO_PADDING,
) -> tuple[OutputError, ...]:
    """Compare the outputs of the input model with the compressed model's, on one feed.

    Sequences and maps are compared element by element. But a sequence of maps from the same keys to numbers
    is one matrix: classifiers give their probabilities like this. An optional that is empty in both models is
    left out.

    Args:
        wanted: The input model's outputs by name.
        got: The compressed model's outputs by name.
        feed: The inputs of both models; their lengths tell which axes of the outputs count samples.
        padding: The padding of the inputs; errors there do not count.

    Raises:
        ValidationError: The compressed model gives NaN or Inf where the input model does not.
    """
    comparison = Comparison(padding)
    comparison.add(wanted, got, feed)
    return comparison.errors()


class Comparison:
    """The differences between the outputs of two models over many feeds."""

    def __init__(self, padding: Padding = NO_PADDING) -> None:
        """Start without outputs.

        Args:
            padding: The padding of the inputs; errors there do not count.
        """
        self._padding = padding
        self._sums: dict[str, _Sums] = {}

    def add(
        self, wanted: Mapping[str, Any], got: Mapping[str, Any], feed: Mapping[str, NDArray[Any]]
    ) -> None:
        """Add the outputs on one feed; see `compare`.

        Raises:
            ValidationError: The compressed model gives NaN or Inf where the input model does not.
        """
        for name, value in wanted.items():
            ours, theirs = dict(_leaves(name, value)), dict(_leaves(name, got.get(name)))
            for leaf in ours:
                if leaf in theirs:
                    self._sums_of(leaf).add(ours[leaf], theirs[leaf], feed, self._padding)
            if ours.keys() != theirs.keys():
                self._sums_of(name).fault = f"It has {len(theirs)} elements, the input model's {len(ours)}."

    def errors(self) -> tuple[OutputError, ...]:
        """One error per output."""
        known = [sums.classes for sums in self._sums.values() if not sums.is_exact]
        return tuple(sums.error(has_classes=sums.classes.are_classes(known)) for sums in self._sums.values())

    def _sums_of(self, name: str) -> _Sums:
        return self._sums.setdefault(name, _Sums(name))


@dataclass(slots=True)
class _Sums:
    """The sums over one output.

    Attributes:
        name: The name of the output.
        size: Its number of elements.
        compared: The number of compared elements.
        norm: ‖y‖.
        residual: ‖y − ŷ‖.
        largest: Largest |y − ŷ|.
        rows: The number of rows, or of elements, that were checked for agreement.
        agreeing: The number of them that agree.
        fault: The reason why the outputs cannot be compared at all; "" if they can.
        is_text: Whether it holds texts.
        is_exact: Whether it holds texts, integers or booleans.
        spread: Its variation over the samples.
        noise: The sampling noise of its error.
        classes: The evidence that its rows stand for classes.
        embedding: The comparison of its rows as directions.
    """

    name: str
    size: int = 0
    compared: int = 0
    norm: float = 0.0
    residual: float = 0.0
    largest: float = 0.0
    rows: int = 0
    agreeing: int = 0
    fault: str = ""
    is_text: bool = False
    is_exact: bool = False
    spread: Spread = field(default_factory=Spread)
    noise: Noise = field(default_factory=Noise)
    classes: Classes = field(default_factory=Classes)
    embedding: Embedding = field(default_factory=Embedding)

    def add(
        self, y: NDArray[Any], z: NDArray[Any], feed: Mapping[str, NDArray[Any]], padding: Padding
    ) -> None:
        if y.shape != z.shape:
            self.fault = self.fault or f"Its shape is {z.shape}, the input model's {y.shape}."
            return
        self.size += y.size
        if y.dtype.kind in "OSU":
            self.is_text = self.is_exact = True
            self._agree(y == z)
            return
        self.is_exact = y.dtype.kind in "biu" or y.dtype.name.startswith(("int", "uint"))
        y, z = _wide(y), _wide(z)
        y, given = padding.hide(self.name, y, feed), y
        if y is not given:
            self.size -= int(np.count_nonzero(np.isnan(y) & ~np.isnan(given)))
        finite, kept = np.isfinite(y), np.isfinite(z)
        # Logits of a language model are gigabytes: the usual case takes no masked copies of them.
        is_whole = bool(finite.all())
        lost = 0 if kept.all() else int(np.count_nonzero(finite & ~kept))
        if lost:
            raise ValidationError(
                f"The compressed model gives NaN or Inf in {lost} of {y.size} elements of {self.name!r}, "
                "where the input model gives none: choose a larger ratio, or a wider dtype than the weights "
                "have now."
            )
        with np.errstate(over="ignore", invalid="ignore"):
            shown = y if is_whole else np.where(finite, y, 0.0)
            difference = y - z if is_whole else np.where(finite, y - z, 0.0)
        self.compared += y.size if is_whole else int(np.count_nonzero(finite))
        self.norm = hypot(self.norm, float(np.linalg.norm(shown)))
        self.residual = hypot(self.residual, float(np.linalg.norm(difference)))
        self.largest = max(self.largest, _largest(difference))
        batched = is_batched(feed, y)
        self.spread.add(y, batched=batched)
        if self.is_exact:
            self._agree((y == z)[finite])
            return
        self.noise.add(difference, shown, batched=batched)
        self.classes.add(y, feed)
        if _has_rows(y):
            self._agree(_top1(y, z))
            self.embedding.add(y, z)

    def _agree(self, agreement: NDArray[np.bool_]) -> None:
        self.rows += agreement.size
        self.agreeing += int(np.count_nonzero(agreement))

    def error(self, *, has_classes: bool) -> OutputError:
        if self.fault:
            return OutputError(self.name, float("inf"), None, None, self.fault)
        is_known = self.is_exact or (has_classes and not self.embedding.is_embedding)
        agreement = self.agreeing / self.rows if self.rows and is_known else None
        if self.is_text:
            note = "It holds texts." if self.size else _EMPTY
            return OutputError(self.name, None, None, agreement, note, is_exact=True)
        hidden = self.size - self.compared
        note = f"{hidden} of {self.size} elements are NaN or Inf in the input model, too." if hidden else ""
        if not self.compared:
            return OutputError(self.name, None, None, None, note or _EMPTY, is_exact=self.is_exact)
        relative = self.residual / self.norm if self.norm else float("inf") if self.residual else 0.0
        return OutputError(
            self.name,
            relative,
            self.largest,
            agreement,
            note,
            self._centred(),
            is_exact=self.is_exact,
            cosine=self.embedding.cosine,
            neighbours=self.embedding.neighbours,
            noise=self.noise.error,
        )

    def _centred(self) -> float | None:
        """‖y − ŷ‖ / ‖y − ȳ‖, or None for exact types and for outputs that do not vary."""
        power = None if self.is_exact else self.spread.power()
        return None if power is None else self.residual / sqrt(power)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    """The arrays in an output, which may be a tensor, a sequence, a map or an empty optional."""
    rows = _rows(value)
    if rows is not None:
        yield name, rows
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}[{index}]", item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}[{key!r}]", item)
    elif value is not None:
        yield name, np.asarray(value)


def _rows(value: Any) -> NDArray[Any] | None:
    """The matrix of a sequence of maps, a row for each; None unless all have the same keys, for numbers."""
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        return None
    keys = sorted(value[0])
    if any(item.keys() != value[0].keys() for item in value):
        return None
    matrix = np.array([[item[key] for key in keys] for item in value])
    return matrix if matrix.ndim == 2 and matrix.dtype.kind in "biuf" else None


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _largest(values: NDArray[Any]) -> float:
    """The largest absolute value; 0 of none."""
    if values.dtype.kind == "c":
        return float(np.abs(values).max(initial=0.0))
    return float(max(values.max(initial=0.0), -values.min(initial=0.0)))


def _has_rows(y: NDArray[Any]) -> bool:
    """Whether its rows have a largest element."""
    return y.ndim >= 2 and y.shape[-1] >= 2 and y.size > 0 and y.dtype.kind != "c"


def _top1(y: NDArray[Any], z: NDArray[Any]) -> NDArray[np.bool_]:
    """For every finite row, whether both models have its largest element at the same place."""
    rows = np.isfinite(y).all(-1)
    same: NDArray[np.bool_] = y.argmax(-1)[rows] == z.argmax(-1)[rows]
    return same
