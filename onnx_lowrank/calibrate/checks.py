"""Check that calibration data fits a model: names, dtypes, shapes and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.engines.inputs import Spec, same_bits, shape_text
from onnx_lowrank.engines.inputs import fits as fits_shape
from onnx_lowrank.errors import InputError


def check_names(given: Iterable[str], wanted: tuple[Spec, ...], where: str) -> None:
    """Compare names with the model's inputs.

    Raises:
        InputError: A name is unknown, or an input is missing.
    """
    names = [spec.name for spec in wanted]
    given = list(given)
    for name in given:
        if name not in names:
            raise InputError(
                f"{where}: the model has no input {name!r}: name the arrays {', '.join(map(repr, names))}."
            )
    for name in names:
        if name not in given:
            raise InputError(
                f"{where} lacks the input {name!r}: give an array for each of {', '.join(map(repr, names))}."
            )


def check_dtype(spec: Spec, given: np.dtype[Any], where: str) -> None:
    """Check that arrays of a dtype can be cast to the dtype of an input.

    Raises:
        InputError: The dtypes differ, and they are not floats for floats, integers or booleans for integers,
            or strings for strings.
    """
    wanted = np.dtype(spec.dtype)
    if wanted == given or same_bits(wanted, given):
        return
    if (_is_float(wanted) and given.kind == "f") or (wanted.kind in "iu" and given.kind in "iub"):
        return
    if wanted.kind == "O" and given.kind == "U":
        return
    what = (
        "apply the model's own preprocessing first"
        if _is_float(wanted) and given.kind in "iub"
        else "convert it"
    )
    raise InputError(
        f"{where}: the input {spec.name!r} is {wanted.name} in the model, but {given.name} was given: {what}."
    )


def check_shape(spec: Spec, shape: tuple[int, ...], where: str) -> None:
    """Check that the array of a whole feed has a shape that its input takes.

    Raises:
        InputError: The shape does not fit.
    """
    if not fits(shape, spec):
        raise shape_error(spec, shape, where)


def check_samples(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Check that every input has samples on its first axis.

    Another axis may have length 0, like the past of a decoder at its first call, but not in all inputs.

    Raises:
        InputError: An input has no samples, or no input has elements.
    """
    is_empty = all(0 in shape for shape in shapes.values())
    for name, shape in shapes.items():
        if is_empty or 0 in shape[:1]:
            raise InputError(
                f"{where}: the input {name!r} is empty: give samples, not the shape {shape_text(shape)}."
            )


def fits(shape: tuple[int, ...], spec: Spec) -> bool:
    """Whether an array of this shape can be given to an input as it is."""
    return spec.shape is None or fits_shape(shape, spec.shape)


def shape_error(spec: Spec, shape: tuple[int, ...], where: str) -> InputError:
    """The error for a shape that does not fit an input."""
    return InputError(
        f"{where}: the input {spec.name!r} has the shape {shape_text(spec.shape or ())} in the model, "
        f"but {shape_text(shape)} was given: reshape it, samples on its first axis."
    )


def cast(
    spec: Spec, values: NDArray[Any], where: str, numbers: Sequence[int] | NDArray[np.intp] | None = None
) -> NDArray[Any]:
    """Cast an array to the input's dtype, in native byte order and C order.

    Args:
        spec: The input.
        values: The array; `check_dtype` has accepted its dtype.
        where: The name of its origin in errors.
        numbers: The numbers of the samples on its first axis; None if the array is not split into samples.

    Raises:
        InputError: A value is NaN or Inf, or outside the range of the input's integer type.
    """
    wanted = np.dtype(spec.dtype)
    if same_bits(wanted, values.dtype):
        values = values.view(wanted)
    if wanted.kind == "O" and values.dtype.kind == "O" and not all(isinstance(v, str) for v in values.flat):
        raise InputError(f"{where}: the input {spec.name!r} has an element that is no string: give strings.")
    bad = None
    if wanted.kind in "iu" and values.dtype != wanted:
        info = np.iinfo(wanted)
        bad = np.zeros(values.shape, bool)
        if values.size and (int(values.min()) < info.min or int(values.max()) > info.max):
            bad = (values < info.min) | (values > info.max)
    with np.errstate(over="ignore"):  # the check below finds overflow
        result = np.asarray(values, wanted, order="C")
    if _is_float(wanted) or wanted.kind == "c":
        bad = ~np.isfinite(result)
    if bad is not None and bad.any():
        raise _value_error(spec, bad, where, numbers)
    return result


def _value_error(
    spec: Spec, bad: NDArray[np.bool_], where: str, numbers: Sequence[int] | NDArray[np.intp] | None
) -> InputError:
    wanted = np.dtype(spec.dtype)
    what = f"a value outside {wanted.name}" if wanted.kind in "iu" else f"NaN or Inf (as {wanted.name})"
    if numbers is None:
        return InputError(f"{where}: the input {spec.name!r} has {what}: correct it.")
    first = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
    return InputError(
        f"{where}: sample {numbers[first]} of the input {spec.name!r} has {what}: correct it or leave it out."
    )


def fitted(feed: Mapping[str, NDArray[Any]], wanted: tuple[Spec, ...], where: str) -> dict[str, NDArray[Any]]:
    """Cast a whole feed to the model's dtypes, with the inputs in the model's order.

    Raises:
        InputError: A name, dtype, shape or value does not fit the model.
    """
    check_names(feed, wanted, where)
    for spec in wanted:
        check_dtype(spec, feed[spec.name].dtype, where)
        check_shape(spec, feed[spec.name].shape, where)
    check_samples({spec.name: feed[spec.name].shape for spec in wanted}, where)
    return {spec.name: cast(spec, feed[spec.name], where) for spec in wanted}


def narrowed(spec: Spec, given: np.dtype[Any]) -> str | None:
    """The warning for an array that loses digits in the cast; None if it loses none."""
    wanted = np.dtype(spec.dtype)
    if not (_is_float(wanted) and given.kind == "f" and given.itemsize > wanted.itemsize):
        return None
    return f"The input {spec.name!r} is given as {given.name} and rounded to the model's {wanted.name}."


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


class Variation:
    """Tells whether inputs vary over the samples: statistics of constant data are of little use."""

    def __init__(self) -> None:
        self._first: dict[str, NDArray[Any]] = {}
        self._varies: set[str] = set()
        self._uneven: set[str] = set()

    def see(self, name: str, samples: NDArray[Any]) -> None:
        """Record samples of an input, on the first axis."""
        if len(samples) == 0:
            return
        first = self._first.setdefault(name, samples[0].copy())
        if name not in self._varies and (samples.shape[1:] != first.shape or (samples != first).any()):
            self._varies.add(name)
        if name not in self._uneven and (first.size < 2 or (samples != first.flat[0]).any()):
            self._uneven.add(name)

    def warnings(self, count: int) -> list[str]:
        """Warnings if the `count` samples, or the elements of an input, are all the same."""
        if count > 1 and self._first and not self._varies:
            return [f"All {count} samples are the same: give different ones."]
        return [
            f"The input {name!r} is {first.flat[0]:g} everywhere in all samples: check the data."
            for name, first in self._first.items()
            if name not in self._uneven and _is_float(first.dtype)
        ]
