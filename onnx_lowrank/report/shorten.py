"""Names of layers in little room, and still distinct."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from os.path import commonprefix

_FOLDER = re.compile(r"[^/.:…]+")
_MOST_FOLDERS = 12  # the last ones of a name that are looked at
_MOST_NAMES = 2000  # for which ways to leave folders out are tried: there are some hundred for each


def middle(name: str, room: int) -> str:
    """A name cut in its middle, as both of its ends tell layers apart."""
    return _cut(name, room, room // 2)


def distinct(names: list[str], room: int) -> tuple[str, ...]:
    """Shorten names to `room` characters, and keep them apart.

    1. They lose the folders and the ending that all of them share, then their middle.
    2. Where that makes two names one, all names lose another part than the middle.
    3. Where that does not help, as in `/layer.0/attention/self/query/MatMul`, each keeps folders of its own.

    What no rule keeps apart is cut as by the second.
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
            return best
    if len(names) > _MOST_NAMES:
        return best
    return max(best, _folders(names, best, room), key=lambda shown: len(set(shown)))


def _shared(names: list[str]) -> str:
    """What all names begin with."""
    return commonprefix(names)  # noqa: RUF071 - characters are meant: names are no paths


def _cut(name: str, room: int, end: int) -> str:
    """A name of at most `room` characters, of which `end` are the name's last ones."""
    if len(name) <= room:
        return name
    return f"{name[: room - 1 - end]}…{name[len(name) - end :]}"


def _folders(names: list[str], otherwise: tuple[str, ...], room: int) -> tuple[str, ...]:
    """Shorten names to folders that no other name has together, else to a form that no other name takes."""
    forms = {name: [name] if len(name) <= room else _forms(name, room) for name in names}
    counts = Counter(form for several in forms.values() for form in several)
    shown = {
        name: next((form for form in several if counts[form] == 1), "") for name, several in forms.items()
    }
    taken = set(shown.values())
    for name, fallback in zip(names, otherwise, strict=True):
        if not shown[name]:
            shown[name] = next((form for form in (fallback, *forms[name]) if form not in taken), fallback)
            taken.add(shown[name])
    return tuple(shown[name] for name in names)


def _forms(name: str, room: int) -> list[str]:
    """The forms of a name in which one or two runs of its folders are left, the longest first."""
    spans = [found.span() for found in _FOLDER.finditer(name)][-_MOST_FOLDERS:]
    runs = [(i, j) for i in range(len(spans)) for j in range(i, min(i + 3, len(spans)))]
    found = {form for run in runs for form in _with_second(name, spans, run, runs) if len(form) <= room}
    return sorted(found, key=lambda form: (-len(form), form))


def _with_second(
    name: str, spans: list[tuple[int, int]], first: tuple[int, int], runs: list[tuple[int, int]]
) -> Iterator[str]:
    """A run of folders alone, and with each one behind it that leaves folders out between them."""
    start = spans[first[0]][0]
    # A slash in front of the first folder belongs to it.
    before = name[:start] if len(name[:start]) <= 1 else "…"
    one = before + name[start : spans[first[1]][1]]
    yield one + "…" * (first[1] < len(spans) - 1)
    for i, j in runs:
        if i > first[1] + 1:
            yield f"{one}…{name[spans[i][0] : spans[j][1]]}{'…' * (j < len(spans) - 1)}"
