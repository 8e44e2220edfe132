"""The protocol of a source: a path, the user's options and the model's inputs give samples."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from onnx_lowrank.engines.inputs import Spec
from onnx_lowrank.errors import InputError

if TYPE_CHECKING:
    from onnx_lowrank.calibrate.feeds import Feeds
    from onnx_lowrank.calibrate.table import Table


class Claim(IntEnum):
    """How surely a path belongs to a kind of source; REST takes what no other kind takes."""

    NONE = 0
    REST = 1
    SURE = 2


@dataclass(frozen=True, slots=True)
class Options:
    """The user's options for reading sources; each field has the name of its option.

    Attributes:
        tokenizer: The tokenizer of a text, a file of the library `tokenizers`.
        mean: The mean of each channel of an image, whose values are scaled to 0..1.
        std: The standard deviation of each channel.
    """

    tokenizer: Path | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the options that the user gives."""
        return tuple(each.name for each in fields(self) if getattr(self, each.name) is not None)


@dataclass(frozen=True, slots=True)
class Need:
    """The needs of a model that a source must meet.

    Attributes:
        specs: The model's inputs.
        limits: The number of entries that ids select from, by input (`engines.id_limits`).
        shapes: Shapes of inputs that the user gives, by name.
        most: The most samples to use, evenly spaced; None leaves the number to the source.
        options: What the user gives to read the source.
        purpose: The name of the option that takes the source, for messages.
    """

    specs: tuple[Spec, ...]
    limits: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    most: int | None = None
    options: Options = field(default_factory=Options)
    purpose: str = "calibration"

    @property
    def title(self) -> str:
        """The source in messages, at the start of a sentence."""
        return f"The {self.purpose} data"


def _nothing(path: Path, options: Options) -> None:
    """The check of a kind that needs no option."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of source.

    Attributes:
        what: The kind in words, with its article.
        claim: Tells how surely a path belongs to this kind; reads little of it.
        read: Reads a source, checked against the model. The stack closes its temporary files.
        options: The names of the options that it uses.
        check: Raises an InputError if the source cannot be read with the options, before a model is loaded.
        is_made: Whether its samples are made of something else, such as texts or images. Then --inputs and
            --check read it as --calibration does, and take a limited number of samples.
    """

    what: str
    claim: Callable[[Path], Claim]
    read: Callable[[Path, Need, ExitStack], Table | Feeds]
    options: tuple[str, ...] = ()
    check: Callable[[Path, Options], None] = _nothing
    is_made: bool = False


def library(module: str, name: str, extra: str, path: Path) -> ModuleType:
    """Import an optional library.

    Args:
        module: The module to import.
        name: The name of the library.
        extra: The extra of this package that installs it.
        path: The source that needs it.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f'{path} needs the library {name}, which is not installed: pip install "onnx-lowrank[{extra}]".'
        ) from error
