"""JSON texts that a terminal can show: names from a model may contain characters that control it."""

from __future__ import annotations

import json
import math
from typing import Any


def to_text(value: object, indent: int | None = None) -> str:
    """Write a value as JSON: characters that can be printed as they are, all others as escapes.

    Args:
        value: The value; its numbers are finite.
        indent: As for `json.dumps`.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return "\n".join(line if line.isprintable() else _escaped(line) for line in text.split("\n"))


def finite(value: Any) -> Any:
    """A copy with None in place of the numbers that JSON cannot hold, and with lists in place of tuples."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escaped(line: str) -> str:
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line)
