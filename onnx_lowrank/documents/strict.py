"""Strict reading: a file's text becomes a `msgspec.Struct`, or an error of one sentence says what is wrong.

Unknown, missing and repeated keys are refused, and so are booleans and infinite values in place of numbers.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from onnx_lowrank.documents import wording
from onnx_lowrank.documents.wording import Place
from onnx_lowrank.errors import InputError

T = TypeVar("T", bound=msgspec.Struct)

_LARGEST = 2**26  # Plans and reports take a few hundred bytes per layer.


class _FaultError(Exception):
    """A fault of a document; the message is a clause of the final error."""


@dataclass(frozen=True, slots=True)
class Document(Generic[T]):
    """A kind of document.

    Attributes:
        word: Its name in messages.
        table: The type of its content.
        error: The error that is raised if it is wrong.
        advice: The advice to the user in that error.
        version: The key that holds its version, and the version that this program reads; None if it has none.
        largest: The most bytes of a file.
    """

    word: str
    table: type[T]
    error: type[InputError]
    advice: str
    version: tuple[str, int] | None = None
    largest: int = _LARGEST

    def text(self, path: str | os.PathLike[str]) -> str:
        """Read a file.

        Raises:
            InputError: It cannot be read, is not UTF-8 text, or is too large.
        """
        try:
            with Path(path).open("rb") as file:
                data = file.read(self.largest + 1)
            if len(data) <= self.largest:
                return data.decode("utf-8")
            largest = self.largest
            size = f"{largest >> 20} MiB" if largest >> 20 else f"{largest >> 10} KiB"
            reason = f"it has more than {size}"
        except UnicodeDecodeError:
            reason = "it is not UTF-8 text"
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        raise self.error(f"The {self.word} {path} cannot be read ({reason}): check the path.")

    def from_json(self, text: str, name: object) -> T:
        """Read JSON text.

        Args:
            text: The text.
            name: The document's name or path, for messages.

        Raises:
            InputError: It is not JSON, or has a wrong key or value.
        """
        return self._read(text, name, "JSON", _json)

    def from_toml(self, text: str, name: object) -> T:
        """Read TOML text, as `from_json` reads JSON text.

        Raises:
            InputError: It is not TOML, or has a wrong key or value.
        """
        return self._read(text, name, "TOML", tomllib.loads)

    def wrong(self, name: object, fault: object) -> InputError:
        """Make the error for a fault, which is a clause."""
        return self.error(f"The {self.word} {name} is wrong: {fault}; {self.advice}.")

    def _read(self, text: str, name: object, form: str, parse: Callable[[str], object]) -> T:
        try:
            value = parse(text)
            return self._converted(value)
        except _FaultError as error:
            raise self.wrong(name, error) from error
        except RecursionError as error:
            raise self.wrong(name, f"it is not valid {form} (it nests too deep)") from error
        except ValueError as error:
            raise self.wrong(name, f"it is not valid {form} ({str(error).rstrip('.')})") from error

    def _converted(self, value: object) -> T:
        if self.version is not None and isinstance(value, dict):
            key, wanted = self.version
            found = value.get(key, wanted)
            if found != wanted or isinstance(found, bool):
                raise _FaultError(f"{key} is {wording.shown(found)}, and this program reads version {wanted}")
        try:
            table = msgspec.convert(value, self.table)
        except msgspec.ValidationError as error:
            raise _FaultError(wording.in_words(error, value, self.table)) from error
        # msgspec accepts Infinity and NaN as numbers, and so do TOML and Python's JSON.
        for place in _not_finite(value, ()):
            raise _FaultError(wording.wrong_value(place, value, self.table))
        return table


def _json(text: str) -> object:
    value = json.loads(text, object_pairs_hook=_object)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # An escape can spell half of a surrogate pair, which is not UTF-8.
        half = wording.shown(error.object[error.start : error.end])
        raise _FaultError(f"a text in it has {half}, which is half of a character") from error
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _FaultError(f"the key {wording.shown(twice)} occurs twice in one object")
    return table


def _not_finite(value: object, place: Place) -> Iterator[Place]:
    """The places of all numbers that are not finite."""
    if isinstance(value, float) and not isfinite(value):
        yield place
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, (*place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _not_finite(item, (*place, index))
