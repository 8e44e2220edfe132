"""The comparison of two outcomes of a case, field by field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

SHOWN = 6
"""So many differences of a case are printed; `--json` has them all."""

LONGEST = 100
"""Characters of a value that are printed."""

ABSENT = "absent"

Outcome = dict[str, Any]
"""Of one case: codes (one a command), stdout and stderr, and files, each as a text or by its digest."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One field that is not the same.

    Attributes:
        path: Of the field, as in report.layers[3].error.
        before: Its value at the other revision, as JSON, or `ABSENT`.
        after: Its value in the working tree, as JSON, or `ABSENT`.
    """

    path: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}: {_short(self.before)} → {_short(self.after)}"


def differences(before: Outcome, after: Outcome) -> list[Difference]:
    """All differences between two outcomes of a case; none if they are the same to the byte."""
    old, new = dict(_leaves(_fields(before))), dict(_leaves(_fields(after)))
    found = [
        Difference(path, old.get(path, ABSENT), new.get(path, ABSENT))
        for path in old | new
        if old.get(path) != new.get(path)
    ]
    named = {re.split(r"[.\[]", difference.path)[0] for difference in found}
    texts, others = _texts(before), _texts(after)
    return found + [
        Difference(name, "the same fields", "in other bytes")
        for name, text in texts.items()
        if name in others and name not in named and text != others[name]
    ]


def _fields(outcome: Outcome) -> dict[str, Any]:
    """An outcome with its texts as lines, and with JSON texts parsed."""
    parts = {"code": outcome["codes"]}
    parts |= {name: _parsed(text) for name, text in _texts(outcome).items()}
    binary = {name: file for name, file in outcome["files"].items() if "text" not in file}
    return parts | {name: f"{file['bytes']} bytes, sha256 {file['sha256']}" for name, file in binary.items()}


def _texts(outcome: Outcome) -> dict[str, str]:
    texts = {name.removesuffix(".json"): file.get("text") for name, file in outcome["files"].items()}
    written = {name: text for name, text in texts.items() if text is not None}
    return {"stdout": outcome["stdout"], "stderr": outcome["stderr"]} | written


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.splitlines()


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The paths of all leaves, and their values as JSON, which tells 1 from 1.0."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def is_allowed(case: str, difference: Difference, globs: Sequence[str]) -> bool:
    """Whether a glob over `case:field` matches a difference; the glob's brackets are literal."""
    return any(fnmatchcase(f"{case}:{difference.path}", glob.replace("[", "[[]")) for glob in globs)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the comparison of one case.

    Attributes:
        case: Its name.
        differs: The differences that are not allowed.
        allowed: The differences that --allow names.
    """

    case: str
    differs: tuple[Difference, ...]
    allowed: tuple[Difference, ...]

    @property
    def status(self) -> str:
        """One of same, allowed and differs."""
        return "differs" if self.differs else "allowed" if self.allowed else "same"

    def line(self) -> str:
        """The verdict in one line."""
        said = [
            f"{word}: {_listed(found)}"
            for word, found in (("differs", self.differs), ("allowed", self.allowed))
            if found
        ]
        return f"{self.case}: {'; '.join(said) or 'same'}"


def judged(case: str, before: Outcome, after: Outcome, allow: Sequence[str] = ()) -> Verdict:
    """Compare two outcomes of a case.

    Args:
        case: Its name.
        before: The outcome of the other revision.
        after: The outcome of the working tree.
        allow: Globs over `case:field` of differences that are expected.
    """
    found = differences(before, after)
    allowed = tuple(one for one in found if is_allowed(case, one, allow))
    return Verdict(case, tuple(one for one in found if one not in allowed), allowed)


def summary(verdicts: Sequence[Verdict]) -> str:
    """The number of cases of each status."""
    counts = {word: sum(one.status == word for one in verdicts) for word in ("same", "differs", "allowed")}
    allowed = f", {counts['allowed']} allowed" if counts["allowed"] else ""
    return f"{len(verdicts)} cases, {counts['same']} same, {counts['differs']} differ{allowed}"


def _listed(found: Sequence[Difference]) -> str:
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(map(str, found[:SHOWN])) + more
