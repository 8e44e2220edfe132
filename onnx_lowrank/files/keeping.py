"""Values in a store, found again by the digest of all that they depend on.

A value may be a dataclass, a mapping, a sequence, an array of numbers, a text or a number, nested in any way.
It is read as the type that the caller expects; an entry of another type counts as absent. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.files.store import USUAL, Entry, Store
from onnx_lowrank.hardware import processor

_log = logging.getLogger(__name__)

_LIBRARIES = ("numpy", "scipy", "onnx", "onnxruntime", "onnxruntime-gpu", "cupy-cuda13x")
_SIMPLE = (NoneType, bool, int, float, str, bytes, Enum, np.generic)


def environment(provider: str, device: str) -> Mapping[str, str]:
    """All that the bits of results depend on, beside the data: code, libraries and hardware.

    Args:
        provider: ONNX Runtime's execution provider.
        device: The device of the linear algebra, "cpu" or "cuda".
    """
    gpu = "CUDAExecutionProvider"
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "code": _code(),
        **{name: _version(name) for name in _LIBRARIES},
        "blas": f"{blas.get('name')} {blas.get('version')}",
        "provider": provider,
        "device": device,
        "processor": processor(gpu if device == "cuda" else provider),
    }


@cache
def _code() -> str:
    """A digest of the sources of this package."""
    root = Path(__file__).parents[1]
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return digest([(path, (root / path).read_bytes()) for path in paths])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def digest(*parts: Any) -> str:
    """A digest of values, 64 hexadecimal digits.

    A class may have a property `content`, which stands for its instances: a reference to data gives the data.

    Args:
        parts: Texts, numbers, arrays, dtypes, dataclasses, and mappings, sequences and sets of such values.

    Raises:
        TypeError: A value is of another type.
    """
    made = hashlib.sha256()
    _add(parts, made.update)
    return made.hexdigest()


def _add(value: Any, update: Callable[[Any], object]) -> None:
    """Add a value to a digest, with its type and length, so that different values differ as bytes."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        update(f"array {value.dtype.str} {value.shape}\n".encode())
        update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, (*_SIMPLE, np.dtype)):
        text = repr(value).encode(errors="surrogatepass")
        update(f"{type(value).__name__} {len(text)}\n".encode() + text)
    elif hasattr(type(value), "content"):
        _add((type(value).__name__, value.content), update)
    elif isinstance(value, Mapping):
        _add([type(value).__name__, *value.items()], update)
    elif isinstance(value, Set):
        _add(["set", *sorted(digest(item) for item in value)], update)
    elif isinstance(value, np.ndarray):
        _add(("array of objects", value.shape, value.ravel().tolist()), update)
    elif isinstance(value, Sequence):
        update(f"sequence {len(value)}\n".encode())
        for item in value:
            _add(item, update)
    elif is_dataclass(value):
        _add((type(value).__name__, [getattr(value, field.name) for field in fields(value)]), update)
    else:
        raise TypeError(f"a {type(value).__name__} has no digest")


class Keeper:
    """Keeps the values of a run in a store."""

    def __init__(self, store: Store, *parts: Any) -> None:
        """Use a store.

        Args:
            store: The store.
            parts: All that every value depends on.
        """
        self._store = store
        self._base = digest(*parts)

    def of(self, *parts: Any) -> Keeper:
        """The same for values that depend on more."""
        return Keeper(self._store, self._base, *parts)

    def key(self, *parts: Any) -> str:
        """The key of a value that depends on this and on more."""
        return digest(self._base, *parts)

    def get(self, key: str, kind: Any, largest: int = USUAL) -> Any:
        """Read a value; None if it is absent, damaged or of another type.

        Args:
            key: Its key.
            kind: Its type, with those of its parts. A part of an abstract class is of a direct subclass; no
                two of them have fields of the same names.
            largest: The most bytes that it takes.
        """
        entry = self._store.get(key, largest)
        if entry is None:
            return None

        def made(part: Any, value: Any) -> Any:
            if get_origin(part) is np.ndarray:
                return _typed(entry.arrays[value], part)
            if isinstance(part, type) and issubclass(part, ABC):
                known = {frozenset(f.name for f in fields(k)): k for k in _subclasses(part)}
                return msgspec.convert(value, known[frozenset(value)], dec_hook=made)
            raise TypeError(f"values of the type {part} are not kept")

        try:
            return msgspec.msgpack.decode(entry.text, type=kind, dec_hook=made)
        except (msgspec.DecodeError, LookupError, TypeError, ValueError, RecursionError) as error:
            _log.debug("the entry %s counts as absent: %s", key, error)
            return None

    def put(self, key: str, value: Any) -> None:
        """Write a value; a folder that cannot be written is no error."""
        arrays: list[NDArray[Any]] = []

        def number(part: Any) -> int:
            if not isinstance(part, np.ndarray):
                raise TypeError(f"values of the type {type(part)} are not kept")
            arrays.append(part)
            return len(arrays) - 1

        text = msgspec.msgpack.encode(value, enc_hook=number)
        self._store.put(key, Entry(text, arrays))


def _subclasses(kind: type) -> Sequence[Any]:
    return kind.__subclasses__()


def _typed(array: NDArray[Any], kind: Any) -> NDArray[Any]:
    """An array, if it has the dtype of a type.

    Raises:
        TypeError: It has another one.
    """
    (wanted,) = get_args(get_args(kind)[1])
    if wanted is not Any and not np.issubdtype(array.dtype, wanted):
        raise TypeError(f"an array has the dtype {array.dtype}, not {wanted.__name__}")
    return array
