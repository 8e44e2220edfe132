"""Windows of tokens from a text, evenly spread over it; memory and time grow with the windows asked for."""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.shares import spaced
from onnx_lowrank.calibrate.sources.source import library
from onnx_lowrank.errors import InputError

_TOKENIZER_BYTES = 2**26
_TEXT_BYTES = 2**26  # The most bytes of a text that are read.
_BLOCK_BYTES = 2**13  # Tokenizers take a time that can grow faster than the length of a block.
_USUAL_BYTES = 8  # A token of usual text is shorter than this.
_MOST_BYTES = 64  # A text with longer tokens is too short.
_PROBES = ("a", "1", "一")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer that neither pads nor truncates.

    Attributes:
        path: Its file.
        encode: Gives the ids of a text, without special tokens.
        token: Gives the token of an id.
        before: The ids of the special tokens before a text.
        after: Those after a text.
        types: The token types of `before`, of the text, and of `after`.
    """

    path: Path
    encode: Callable[[str], list[int]]
    token: Callable[[int], str | None]
    before: tuple[int, ...]
    after: tuple[int, ...]
    types: tuple[tuple[int, ...], int, tuple[int, ...]]

    def sample(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Put the special tokens around windows of shape (number, tokens)."""
        parts = [np.array(ids, np.int64) for ids in (self.before, self.after)]
        before, after = (np.broadcast_to(part, (len(windows), len(part))) for part in parts)
        return np.concatenate([before, windows, after], axis=1)

    def sample_types(self, tokens: int) -> NDArray[np.int64]:
        """The token types of a sample with this number of tokens from the text."""
        before, inside, after = self.types
        return np.array([*before, *[inside] * tokens, *after], np.int64)


def tokenizer(path: Path, text: Path) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: A JSON file of the library `tokenizers`.
        text: The text that needs it.

    Raises:
        InputError: The library is not installed, or the file is no tokenizer.
    """
    made = library("tokenizers", "tokenizers", "text", text).Tokenizer
    try:
        size = path.stat().st_size
        if not path.is_file() or size > _TOKENIZER_BYTES:
            what = f"has {size / 2**20:.0f} MiB" if path.is_file() else "is no file"
            raise InputError(f"The tokenizer {path} {what}: pass the tokenizer.json of the model.")
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"The tokenizer {path} cannot be read ({reason}): check the file.") from error
    with _guarded(f"{path} is no tokenizer", "pass the tokenizer.json of the model"):
        found = made.from_str(content.decode())
        found.no_padding()
        found.no_truncation()
        words = ((word, found.encode(word, add_special_tokens=False)) for word in _PROBES)
        word, bare = next((pair for pair in words if pair[1].ids), ("", found.encode("")))
        probe = found.encode(word)
    start = _place(bare.ids, probe.ids)
    stop = start + len(bare.ids)
    types = (tuple(probe.type_ids[:start]), (probe.type_ids[start:stop] or [0])[0])

    def encode(block: str) -> list[int]:
        with _guarded(f"The tokenizer {path} fails on {text}", "check both files"):
            ids: list[int] = found.encode(block, add_special_tokens=False).ids
        return ids

    return Tokenizer(
        path=path,
        encode=encode,
        token=found.id_to_token,
        before=tuple(probe.ids[:start]),
        after=tuple(probe.ids[stop:]),
        types=(*types, tuple(probe.type_ids[stop:])),
    )


def windows(path: Path, encode: Callable[[str], list[int]], length: int, most: int) -> NDArray[np.int64]:
    """Consecutive windows of a text; of a text that is larger than needed, windows evenly spread over it.

    Windows of a larger text start after the line break, or the space, that follows their place.

    Args:
        path: The text, in UTF-8.
        encode: Gives the ids of a block of text.
        length: Number of tokens in a window.
        most: The most windows that are wanted; a text that is read as a whole can give more.

    Returns:
        Ids of shape (windows, length).

    Raises:
        InputError: The text cannot be read, or is not UTF-8.
    """
    total = _size(path)
    if total <= min(most * length * _USUAL_BYTES, _TEXT_BYTES):
        ids = _ids(path, encode, 0, total, None)
        number = len(ids) // length
        return ids[: number * length].reshape(number, length)
    reach = min(length * _MOST_BYTES, total, _TEXT_BYTES)
    count = max(1, min(most, total // (length * _USUAL_BYTES), _TEXT_BYTES // reach))
    found = []
    for number in spaced(total, count):
        start = int(number)
        ids = _ids(path, encode, start, min(start + reach, total), length)
        if len(ids) == length:
            found.append(ids)
    return np.array(found, np.int64).reshape(len(found), length)


def is_text(path: Path) -> bool:
    """Whether a file seems to be a text: UTF-8 at its start, with no byte of 0."""
    try:
        with path.open("rb") as file:
            start = file.read(_BLOCK_BYTES)
    except OSError:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return b"\0" not in start


def _size(path: Path) -> int:
    with _readable(path):
        return path.stat().st_size


def _ids(
    path: Path, encode: Callable[[str], list[int]], start: int, stop: int, most: int | None
) -> NDArray[np.int64]:
    """The ids of a part of a text, at most `most` of them."""
    found = array("q")
    size = _BLOCK_BYTES if most is None else min(_BLOCK_BYTES, most * _USUAL_BYTES)
    for block in _blocks(path, start, stop, size):
        found.extend(encode(block))
        if most is not None and len(found) >= most:
            break
    return np.array(found, np.int64)[:most]


def _blocks(path: Path, start: int, stop: int, size: int) -> Iterator[str]:
    """The text between two bytes, in blocks of about `size` bytes that end after a space if they have one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    with _readable(path), path.open("rb") as file:
        file.seek(start)
        place, is_cut = start, start > 0
        while place < stop and (data := file.read(min(size, stop - place))):
            place += len(data)
            if is_cut:
                data = data[_cut(data) :]
            try:
                text = rest + decoder.decode(data)
            except UnicodeDecodeError as error:
                where = f"in the bytes {place - len(data)} to {place}"
                raise InputError(f"{path} is no text in UTF-8 ({where}): save it as UTF-8.") from error
            if is_cut:
                text = text[_first_end(text) :]
            is_cut = False
            end = 1 + max(text.rfind("\n"), text.rfind(" ")) or len(text)
            rest = text[end:]
            yield text[:end]
    if rest:
        yield rest


def _cut(data: bytes) -> int:
    """Number of bytes at the start that belong to a character whose first byte is not there: at most 3."""
    return next((place for place, byte in enumerate(data[:3]) if not 0x80 <= byte < 0xC0), min(3, len(data)))


def _first_end(text: str) -> int:
    """The end of the first line, if it ends in the first quarter; else of the first word; 0 without one."""
    return text.find("\n", 0, len(text) // 4) + 1 or text.find(" ") + 1


def _place(part: list[int], whole: list[int]) -> int:
    """Where a list stands in a longer one; 0 if it does not."""
    for start in range(len(whole) - len(part) + 1):
        if whole[start : start + len(part)] == part:
            return start
    return 0


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the file.") from error


@contextmanager
def _guarded(what: str, advice: str) -> Iterator[None]:
    """Turn every failure of the library, its panics too, into an InputError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{what} ({reason}): {advice}.") from error
