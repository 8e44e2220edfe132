"""Times that were measured before, on disk: one JSON file for every machine, runtime and setting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from sys import float_info
from typing import Self

from platformdirs import user_cache_path

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.atomic import replacing

VERSION = 2
"""Grows when what is measured changes, so that older times are not taken for it."""

_LARGEST = 64 * 2**20

Ratios = dict[str, dict[str, float]]
"""For each layer's digest: the time of its chains over its own, by option."""


class Cache:
    """The relative times of layers' chains that are known for one machine, runtime and setting."""

    def __init__(self, path: Path | None) -> None:
        """Read a cache file; what is missing, broken or no number is not in it. None keeps nothing."""
        self._path = path
        self._known = {} if path is None else _read(path)
        self._new = set[tuple[str, str]]()
        self._is_saved = True

    @classmethod
    def of(cls, environment: Mapping[str, str], folder: Path | None = None) -> Self:
        """The cache for an environment.

        Args:
            environment: All that times depend on, beside the layer and its chain.
            folder: Where the files lie; by default the user's cache folder.
        """
        text = json.dumps({"cache": VERSION, **environment}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        return cls((folder or user_cache_path("onnx-lowrank") / "latency") / f"{name}.json")

    def get(self, layer: str, option: str) -> float | None:
        """A relative time, or None where it is unknown."""
        return self._known.get(layer, {}).get(option)

    def put(self, layer: str, option: str, ratio: float) -> None:
        """Note a relative time."""
        self._known.setdefault(layer, {})[option] = ratio
        self._new.add((layer, option))
        self._is_saved = False

    def save(self) -> None:
        """Write what is new, together with what others have written meanwhile; a full disk is no error."""
        if self._path is None or self._is_saved:
            return
        table = _read(self._path)
        for layer, option in self._new:
            table.setdefault(layer, {})[option] = self._known[layer][option]
        self._write(self._path, table)
        self._is_saved = True

    def discard(self) -> None:
        """Take what is new out of the file again, where it turned out to be wrong."""
        if self._path is None or not self._new:
            return
        table = _read(self._path)
        for layer, option in self._new:
            table.get(layer, {}).pop(option, None)
        self._new.clear()
        self._is_saved = True
        self._write(self._path, table)

    @staticmethod
    def _write(path: Path, table: Ratios) -> None:
        with suppress(OSError, InputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as (file,):
                file.write(json.dumps(table).encode())


def _read(path: Path) -> Ratios:
    try:
        if path.stat().st_size > _LARGEST:
            return {}
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(table, dict):
        return {}
    return {
        layer: {option: float(ratio) for option, ratio in ratios.items() if _is_ratio(ratio)}
        for layer, ratios in table.items()
        if isinstance(ratios, dict)
    }


def _is_ratio(value: object) -> bool:
    # Whole numbers can be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= float_info.max
