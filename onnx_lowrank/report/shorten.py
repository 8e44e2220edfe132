"""Short forms of the names of layers that remain distinct."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from os.path import commonprefix

_FOLDER = re.compile(r"[^/.:…]+")
_MOST_FOLDERS = 12  # only the last folders of a name are considered
_MOST_NAMES = 2000  # more names are not shortened by folders: each name has a few hundred forms


def distinct(names: list[str], room: int) -> tuple[str, ...]:
    """Shorten names to `room` characters, and keep them distinct.

    1. Names lose the ending that all of them share, then the folders that they share, then their middle.
    2. If two names become equal, all names lose another part instead of the middle.
    3. If this does not help, as for `/layer.0/attention/self/query/MatMul`, each name keeps the folders that
       distinguish it.

    Names that no rule keeps distinct are cut by rule 2.
    """
    if max(map(len, names), default=0) <= room:
        return tuple(names)
    different = len(set(names))
    if different > 1:
        shared = _shared(names)
        head = 1 + max(shared.rfind(separator) for separator in "/.:")
        tail = min(len(_shared([name[::-1] for name in names])), min(map(len, names)) - len(shared))
        if max(map(len, names)) - tail <= room:
            return tuple(name[: len(name) - tail] for name in names)
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
    """The longest common beginning of all names."""
    return commonprefix(names)  # noqa: RUF071 - compares characters, because names are not paths


def _cut(name: str, room: int, end: int) -> str:
    """Cut a name to at most `room` characters, the last `end` of which are the end of the name."""
    if len(name) <= room:
        return name
    return f"{name[: room - 1 - end]}…{name[len(name) - end :]}"


def _folders(names: list[str], otherwise: tuple[str, ...], room: int) -> tuple[str, ...]:
    """Shorten each name to folders that no other name has together, else to a form that is still free."""
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
    """The forms of a name that keep one or two runs of its folders, the longest form first."""
    spans = [found.span() for found in _FOLDER.finditer(name)][-_MOST_FOLDERS:]
    runs = [(i, j) for i in range(len(spans)) for j in range(i, min(i + 3, len(spans)))]
    found = {form for run in runs for form in _with_second(name, spans, run, runs) if len(form) <= room}
    return sorted(found, key=lambda form: (-len(form), form))


def _with_second(
    name: str, spans: list[tuple[int, int]], first: tuple[int, int], runs: list[tuple[int, int]]
) -> Iterator[str]:
    """Forms with one run of folders, alone and with each later run that is not adjacent to it."""
    start = spans[first[0]][0]
    # A slash before the first folder belongs to it.
    before = name[:start] if len(name[:start]) <= 1 else "…"
    form = before + name[start : spans[first[1]][1]]
    yield form + "…" * (first[1] < len(spans) - 1)
    for i, j in runs:
        if i > first[1] + 1:
            yield f"{form}…{name[spans[i][0] : spans[j][1]]}{'…' * (j < len(spans) - 1)}"
