"""Numbers and names as the terminal shows them."""

from __future__ import annotations

from collections.abc import Iterable
from os.path import commonprefix

_NAMES_SHOWN = 3


def error(value: float | None) -> str:
    """A number that may be unknown."""
    return "–" if value is None else number(value)


def number(value: float) -> str:
    """Three digits, or two with an exponent."""
    return "0" if value == 0 else f"{value:.3g}" if 1e-3 <= abs(value) < 1e3 else f"{value:.1e}"


def exact(value: int | None) -> str:
    """All digits."""
    return "unknown" if value is None else f"{value:,}"


def short(value: int | None) -> str:
    """Three digits: 36.9k, 2.36M."""
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


def distinct(names: list[str], room: int) -> tuple[str, ...]:
    """Names that are too long lose the folders and the ending that all of them share, then their middle.

    Where that makes two names one, another part than the middle goes: exporters name nodes by paths that
    differ in one folder (`/layer1/layer1.0/conv1/Conv`).
    """
    if max(map(len, names), default=0) <= room:
        return tuple(names)
    different = len(set(names))
    if different > 1:
        shared = _shared(names)
        head = 1 + max(shared.rfind(separator) for separator in "/.:")
        tail = min(len(_shared([name[::-1] for name in names])), min(map(len, names)) - len(shared))
        names = [("…" if head else "") + name[head : len(name) - tail] for name in names]
    best: tuple[str, ...] = ()
    for end in sorted(range(room), key=lambda end: abs(end - room // 2)):
        cut = tuple(_cut(name, room, end) for name in names)
        if len(set(cut)) > len(set(best)):
            best = cut
        if len(set(best)) == different:
            break
    return best


def _shared(names: list[str]) -> str:
    """What all names begin with."""
    return commonprefix(names)  # noqa: RUF071 - characters are meant: names are no paths


def middle(name: str, room: int) -> str:
    """A name cut in its middle, as both of its ends tell layers apart."""
    return _cut(name, room, room // 2)


def _cut(name: str, room: int, end: int) -> str:
    """A name of at most `room` characters, of which `end` are the name's last ones."""
    if len(name) <= room:
        return name
    return f"{name[: room - 1 - end]}…{name[len(name) - end :]}"


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = len(listed) - _NAMES_SHOWN
    shown = ", ".join(middle(name, 40) for name in listed[:_NAMES_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown


def percent(value: float | None) -> str:
    """A share to three digits or so; what there is at all is never shown as nothing."""
    if value is None:
        return "–"
    if 0 < value < 1e-4:
        return "<0.01%"
    return f"{value:.2%}" if value < 0.1 else f"{value:.1%}" if value < 10 else f"{100 * value:.0e}%"
