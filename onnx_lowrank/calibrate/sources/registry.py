"""The choice of the kind of source for a path, and the check of the user's options."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import cast

from onnx_lowrank.calibrate import sources
from onnx_lowrank.calibrate.sources.source import Kind, Options
from onnx_lowrank.errors import InputError


def kind_of(path: Path) -> Kind:
    """The kind of source that a path belongs to; a path that does not exist belongs to one, too."""
    return max(_every(), key=lambda kind: kind.claim(path))


def options_of(tokenizer: object, mean: object, std: object) -> Options:
    """Check the user's options one by one; they may come from Python unparsed.

    Args:
        tokenizer: A path.
        mean: A number for each channel; a single number stands for a sequence of one.
        std: Likewise.

    Raises:
        InputError: An option is wrong.
    """
    if tokenizer is not None and (not isinstance(tokenizer, str | os.PathLike) or not str(tokenizer)):
        raise InputError(f"--tokenizer is {str(tokenizer)[:60]!r}: give the path of a tokenizer.json.")
    path = None if tokenizer is None else Path(tokenizer)
    options = Options(path, _numbers("mean", mean), _numbers("std", std))
    if options.std is not None and min(options.std) <= 0:
        raise InputError(f"--std has the value {min(options.std):g}: give values above 0.")
    return options


def check_sources(given: Sequence[object], options: Options) -> None:
    """Check before a model is loaded that the options fit the sources.

    Args:
        given: The user's sources; None, arrays and feeds need no options.
        options: The user's options.

    Raises:
        InputError: A source needs an option or a library that is missing, or no source uses an option.
    """
    paths = [Path(source) for source in given if isinstance(source, str | Path)]
    kinds = [kind_of(path) for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        kind.check(path, options)
    if not all(path.exists() for path in paths):
        return  # Reading tells that a path is missing.
    used = {name for kind in kinds for name in kind.options}
    for name in options.given:
        if name not in used:
            owner = next(kind for kind in _every() if name in kind.options)
            if all(source is None for source in given):
                what = "none of --calibration, --inputs and --check is given"
            else:
                what = f"{' and '.join(map(str, paths)) or 'the data'} is of another kind"
            raise InputError(f"--{name} is for {owner.what}, but {what}: leave --{name} out.")


def is_made(path: Path) -> bool:
    """Whether the samples of a path are made of something else (`Kind.is_made`)."""
    return kind_of(path).is_made


def _numbers(name: str, given: object) -> tuple[float, ...] | None:
    if given is None:
        return None
    values = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value):
            raise InputError(f"--{name} has the value {str(value)[:60]!r}: give one number for each channel.")
    if not values:
        raise InputError(f"--{name} is empty: give one number for each channel.")
    return tuple(map(float, values))


def _every() -> tuple[Kind, ...]:
    return cast("tuple[Kind, ...]", sources.found())
