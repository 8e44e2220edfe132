"""Numbers and lists of names as the terminal shows them."""

from __future__ import annotations

from collections.abc import Iterable

from onnx_lowrank.report.shorten import distinct

_NAMES_SHOWN = 3
_ROOM = 40


def error(value: float | None) -> str:
    """A number, or a dash if it is unknown."""
    return "–" if value is None else number(value)


def number(value: float) -> str:
    """A number to three digits, or to two with an exponent."""
    return "0" if value == 0 else f"{value:.3g}" if 1e-3 <= abs(value) < 1e3 else f"{value:.1e}"


def exact(value: int | None) -> str:
    """A whole number with all its digits."""
    return "unknown" if value is None else f"{value:,}"


def short(value: int | None) -> str:
    """A whole number to three digits: 36.9k, 2.36M."""
    if value is None:
        return "?"
    size, unit = float(value), ""
    for larger in ("k", "M", "G", "T"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{value}" if not unit else f"{size:.3g}{unit}"


def time(nanoseconds: int | None) -> str:
    """A time to three digits: 12.3 ms."""
    if nanoseconds is None:
        return "unknown"
    value, unit = nanoseconds / 1e3, "µs"
    for larger in ("ms", "s"):
        if value < 999.5:
            break
        value, unit = value / 1e3, larger
    return f"{value:.3g} {unit}"


def first_names(names: Iterable[str]) -> str:
    """The first names, and the number of the others."""
    listed = list(names)
    more = len(listed) - _NAMES_SHOWN
    shown = ", ".join(distinct(listed[:_NAMES_SHOWN], _ROOM))
    return f"{shown} and {more} more" if more > 0 else shown


def percent(value: float | None) -> str:
    """A share to about three digits; a share above 0 is never shown as 0."""
    if value is None:
        return "–"
    if 0 < value < 1e-4:
        return "<0.01%"
    return f"{value:.2%}" if value < 0.1 else f"{value:.1%}" if value < 10 else f"{100 * value:.0e}%"
