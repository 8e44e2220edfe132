"""Calibration data in arrays with samples on their first axis, from which batches of any size are cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate import checks
from onnx_lowrank.calibrate.shares import HOLD_EVERY, Batch, counted, held_out, spaced
from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.engines.inputs import Spec
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.arrays import Column, bounded

_CHECKED_BYTES = 2**25


@dataclass(frozen=True, slots=True)
class Table:
    """Arrays that have been checked against the model.

    Attributes:
        where: The name of their origin in errors.
        columns: The inputs that have samples on their first axis, with their arrays.
        alone: The names of those that go to the model one sample at a time, without that axis.
        every: The arrays that go with every sample, in the model's dtypes.
        unit: Number of samples that the model takes at once; None if it takes any number.
        chosen: The numbers of the samples used, ascending.
        held: For each of them, whether it is held out.
        extent: The number of samples, in words.
        warnings: Warnings about the data, sentences.
    """

    where: str
    columns: tuple[tuple[Spec, Column], ...]
    alone: frozenset[str]
    every: Feed
    unit: int | None
    chosen: NDArray[np.intp]
    held: NDArray[np.bool_]
    extent: str
    warnings: tuple[str, ...]

    def batches(self, size: int) -> Iterator[Batch]:
        """One pass over the samples in batches of at most `size`, or of `unit`."""
        step = self.unit or size
        # Five batches at a time, of which one is held out.
        for start, block in self._blocks(HOLD_EVERY * step):
            held = self.held[start : start + HOLD_EVERY * step]
            for share in (False, True):
                rows = np.flatnonzero(held == share)
                for first in range(0, len(rows), step):
                    yield Batch(self._feed(block, rows[first : first + step]), share)

    def feed(self) -> Feed:
        """All samples in one feed, or the first `unit` of them."""
        number = self.unit or len(self.chosen)
        _, block = next(self._blocks(number))
        return self._feed(block, np.arange(number))

    def _blocks(self, length: int) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """Blocks of `length` used samples of all columns, in the model's dtypes, each with its start."""
        with ExitStack() as readers:
            takes = [(spec, readers.enter_context(column.reader())) for spec, column in self.columns]
            for start in range(0, len(self.chosen), length):
                numbers = self.chosen[start : start + length]
                yield (
                    start,
                    {
                        spec.name: checks.cast(spec, take(numbers), self.where, numbers)
                        for spec, take in takes
                    },
                )

    def _feed(self, block: Mapping[str, NDArray[Any]], rows: NDArray[np.intp]) -> Feed:
        sampled = {
            name: np.asarray(values[rows[0]]) if name in self.alone else values[rows]
            for name, values in block.items()
        }
        return {**self.every, **sampled}

    def _variation(self) -> list[str]:
        """Read all samples once, which checks their values; returns warnings if they do not vary."""
        variation = checks.Variation()
        for _, block in self._blocks(max(1, _CHECKED_BYTES // max(_row_bytes(self.columns), 1))):
            for name, values in block.items():
                variation.see(name, values)
        return variation.warnings(len(self.chosen))


def table(columns: Mapping[str, Column], wanted: tuple[Spec, ...], most: int | None, where: str) -> Table:
    """Check arrays, with the values of the used samples, against the model.

    Args:
        columns: The arrays by name.
        wanted: The model's inputs.
        most: The most samples to use, evenly spaced; None for all.
        where: The name of the arrays' origin in errors.

    Raises:
        InputError: An array does not fit the model.
    """
    _check(columns, wanted, where)
    shapes = {name: column.shape for name, column in columns.items()}
    total, alone, constant = _roles(shapes, wanted, where)
    sampled = tuple((spec, columns[spec.name]) for spec in wanted if spec.name not in constant)
    fixed = tuple((spec, columns[spec.name]) for spec in wanted if spec.name in constant)
    bounded(_row_bytes(sampled) + sum(_bytes(spec, c.shape, c) for spec, c in fixed), f"{where}: one sample")
    unit = _unit([spec for spec, _ in sampled], [spec for spec, _ in fixed], alone, where)
    chosen, left = _filling(spaced(total, most), unit or 1, where)
    result = Table(
        where=where,
        columns=sampled,
        alone=alone,
        every={spec.name: checks.cast(spec, column.read(), where) for spec, column in fixed},
        unit=unit,
        chosen=chosen,
        held=held_out(len(chosen) // (unit or 1)).repeat(unit or 1),
        extent=f"{len(chosen)} of " * (len(chosen) < total) + counted(total, "sample"),
        warnings=tuple(
            warning
            for spec in wanted
            if (warning := checks.narrowed(spec, columns[spec.name].dtype)) is not None
        ),
    )
    dropped = [f"The last samples do not fill a batch of {unit}: {left} left out."] if left else []
    return replace(result, warnings=(*result.warnings, *dropped, *result._variation()))


def only(column: Column, wanted: tuple[Spec, ...], where: str) -> dict[str, Column]:
    """Name the array of a model with one input.

    Raises:
        InputError: The model has several inputs.
    """
    if len(wanted) > 1:
        names = ", ".join(repr(spec.name) for spec in wanted)
        raise InputError(
            f"{where} is one array, but the model has the inputs {names}: name arrays in an .npz."
        )
    return {wanted[0].name: column}


def _check(columns: Mapping[str, Column], wanted: tuple[Spec, ...], where: str) -> None:
    """Compare names and dtypes with the model's, and check that there are samples."""
    checks.check_names(columns, wanted, where)
    for spec in wanted:
        checks.check_dtype(spec, columns[spec.name].dtype, where)
    checks.check_samples({spec.name: columns[spec.name].shape for spec in wanted}, where)


def _filling(chosen: NDArray[np.intp], unit: int, where: str) -> tuple[NDArray[np.intp], int]:
    """The samples that fill batches of `unit`, and the number of samples left over."""
    left = len(chosen) % unit
    if left == len(chosen):
        raise InputError(
            f"{where} gives {left} samples, but the model takes {unit} at once: give {unit} or more."
        )
    return chosen[: len(chosen) - left], left


def _roles(
    shapes: Mapping[str, tuple[int, ...]], wanted: tuple[Spec, ...], where: str
) -> tuple[int, frozenset[str], frozenset[str]]:
    """Number of samples, the inputs given one sample at a time, and those given with every sample."""
    counts: dict[str, int] = {}
    alone, whole = set(), set()
    for spec in wanted:
        shape = shapes[spec.name]
        rank = len(shape) if spec.shape is None else len(spec.shape)
        if len(shape) == rank + 1 and checks.fits(shape[1:], spec):
            alone.add(spec.name)
        elif not checks.fits(shape, _any_number(spec)):
            raise checks.shape_error(spec, shape, where)
        elif rank == 0 or (spec.shape and isinstance(spec.shape[0], int) and shape[0] == spec.shape[0]):
            whole.add(spec.name)
        if shape:
            counts[spec.name] = shape[0]
    sampled = {name: number for name, number in counts.items() if name not in whole}
    total = max((sampled or counts).values(), default=1)
    every = {name for name in whole if alone or counts.get(name) != total}
    for name, number in counts.items():
        if name not in every and number != total:
            most = next(other for other, n in (sampled or counts).items() if n == total)
            raise InputError(
                f"{where}: the input {name!r} has {number} samples, but {most!r} has {total}: "
                "give the same number of each, on the first axis."
            )
    return total, frozenset(alone), frozenset(every)


def _any_number(spec: Spec) -> Spec:
    """The input, with a free first axis."""
    return replace(spec, shape=(None, *spec.shape[1:])) if spec.shape else spec


def _unit(sampled: list[Spec], every: list[Spec], alone: frozenset[str], where: str) -> int | None:
    """Number of samples that the model takes at once; None if it takes any number."""
    fixed = {
        spec.shape[0]: spec.name
        for spec in sampled
        if spec.name not in alone and spec.shape and isinstance(spec.shape[0], int)
    }
    sizes = sorted({*fixed, 1} if alone else fixed)
    if len(sizes) > 1:
        raise InputError(
            f"{where}: the input {fixed[sizes[-1]]!r} takes {sizes[-1]} samples at once, "
            f"but others take {sizes[0]}: give every array one more axis in front, which counts whole feeds."
        )
    if sizes:
        return int(sizes[0])
    # An array that goes with every sample can have its own batch axis.
    free = any(spec.shape is None or not all(isinstance(n, int) for n in spec.shape) for spec in every)
    return 1 if alone or free else None


def _row_bytes(columns: tuple[tuple[Spec, Column], ...]) -> int:
    """Bytes of one sample."""
    return sum(_bytes(spec, column.shape[1:], column) for spec, column in columns)


def _bytes(spec: Spec, shape: tuple[int, ...], column: Column) -> int:
    """Bytes of an array in its stored dtype or in the model's, whichever is more."""
    return prod(shape) * max(column.dtype.itemsize, np.dtype(spec.dtype).itemsize)
