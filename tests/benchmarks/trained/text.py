"""Text that every Python has: its reference manual, and as another kind the docstrings of packages.

The manual is `pydoc_data.topics`. A third of its topics is for calibration, the others are for tests. Some
topics repeat paragraphs of others; a test never has a paragraph or a sentence that calibration may see.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

Part = Literal["calibration", "test", "other"]

_EVERY, _FIRST = 3, 1  # the topics for calibration, by their place in the alphabet
_DOCUMENTED = ("numpy.lib", "numpy.linalg", "scipy.optimize", "scipy.signal", "scipy.stats")
_NO_PROSE = re.compile(r"[*=\-~^]{4}|::|>>>|\.\. ")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"(])")
_LEAST_WORDS = 6


@cache
def paragraphs(part: Part) -> tuple[str, ...]:
    """The distinct paragraphs of a part, in their order."""
    if part == "other":
        return _distinct(p for text in _docstrings() for p in _split(text))
    for_calibration = set(sorted(topics)[_FIRST::_EVERY])
    own = (name for name in sorted(topics) if (name in for_calibration) == (part == "calibration"))
    found = _distinct(p for name in own for p in _split(topics[name]))
    return found if part == "calibration" else _without(found, paragraphs("calibration"))


@cache
def sentences(part: Part) -> tuple[str, ...]:
    """The distinct sentences of prose in a part, in their order."""
    found = _distinct(s for p in paragraphs(part) if not _NO_PROSE.search(p) for s in _prose(p))
    return found if part == "calibration" else _without(found, sentences("calibration"))


def _split(text: str) -> Iterator[str]:
    return (paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())


def _prose(paragraph: str) -> Iterator[str]:
    """Sentences of which most words are words."""
    for sentence in _SENTENCE_END.split(" ".join(paragraph.removeprefix("* ").split())):
        words = sentence.split()
        plain = sum(word.strip("\"',.()").isalpha() for word in words)
        if len(words) >= _LEAST_WORDS and plain >= 0.6 * len(words) and sentence[-1] in ".!?:":
            yield sentence


def _docstrings() -> Iterator[str]:
    """Docstrings of installed packages, read from their sources."""
    for name in _DOCUMENTED:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        for path in sorted(Path(spec.origin).parent.glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                    yield inspect.cleandoc(text)


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _without(texts: Iterable[str], seen: Iterable[str]) -> tuple[str, ...]:
    known = set(seen)
    return tuple(text for text in texts if text not in known)
