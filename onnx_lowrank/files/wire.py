"""The wire format of protobuf: messages in files, walked without reading the bytes of large tensors.

A walk cuts a serialized message into pieces: ranges of bytes that stay as they are, tensors that a function
changes, and the messages around these tensors, whose lengths change. The bytes are untrusted: every length is
checked against the end of the message around it, and depth and number of fields are bounded.

Source of the format: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, BinaryIO

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from onnx import TensorProto

from onnx_lowrank.files.regions import Region
from onnx_lowrank.files.tensors import tensor_fields

_VARINT, _I64, LENGTH, _GROUP, _GROUP_END, _I32 = range(6)
_FIXED = {_I64: 8, _I32: 4}
_MOST_VARINT = 10  # bytes
_MOST_DEPTH = 100  # protobuf's
_MOST_FIELDS = 1 << 22


class WireError(Exception):
    """The bytes are no message, or a message that is not walked; protobuf itself has to parse it."""


@dataclass(frozen=True, slots=True)
class Field:
    """The place of a field.

    Attributes:
        number: Its number.
        kind: Its wire type.
        begin: Position of its tag.
        content: Position of its content, behind the tag and the length.
        end: Position behind its content.
    """

    number: int
    kind: int
    begin: int
    content: int
    end: int


@dataclass(frozen=True, slots=True)
class Nested:
    """A field that holds a message of pieces.

    Attributes:
        tag: The bytes of its tag.
        pieces: The pieces of the message. A range is one of the walked file.
    """

    tag: bytes
    pieces: tuple[Piece, ...]


Piece = range | Region | bytes | Nested
"""A range of the walked file, a region of another file, bytes, or a field of pieces."""

Change = Callable[["Walker", int, int], tuple[Piece, ...] | None]
"""Takes a walker, the begin and the end of a serialized tensor; returns its new pieces, or None."""


class Walker:
    """Reads the fields of messages in an open file.

    Attributes:
        file: The file.
    """

    def __init__(self, file: BinaryIO, most: int = _MOST_FIELDS) -> None:
        """Begin a walk.

        Args:
            file: The file.
            most: The number of fields to read; more are an error.
        """
        self.file = file
        self._left = most

    def fields(self, begin: int, end: int) -> Iterator[Field]:
        """The fields of a message, in the order of the file.

        Args:
            begin: Position of the message.
            end: Position behind it.

        Raises:
            WireError: A field leaves the message or is of an unknown type, or there are too many, or groups
                are too deep or have no end.
        """
        position = begin
        while position < end:
            field = self._field(position, end)
            if field.kind == _GROUP:
                field = replace(field, end=self._group_end(field, end))
            elif field.kind == _GROUP_END:
                raise WireError
            yield field
            position = field.end

    def _field(self, position: int, end: int) -> Field:
        """The field at a position of a message; of a group, its start alone."""
        self._left -= 1
        if self._left < 0:
            raise WireError
        head = self.read(position, min(position + 2 * _MOST_VARINT, end))
        tag, used = _varint(head, 0)
        number, kind = tag >> 3, tag & 7
        content = position + used
        if kind == LENGTH:
            length, used = _varint(head, used)
            content = position + used
            stop = content + length
        elif kind == _VARINT:
            stop = position + _varint(head, used)[1]
        elif kind in (_GROUP, _GROUP_END):
            stop = content
        elif kind in _FIXED:
            stop = content + _FIXED[kind]
        else:
            raise WireError
        if not number or stop > end:
            raise WireError
        return Field(number, kind, position, content, stop)

    def _group_end(self, start: Field, end: int) -> int:
        """The position behind a group: an old kind of field that stands between two tags."""
        open_groups, position = [start.number], start.content
        while open_groups:
            if position >= end or len(open_groups) > _MOST_DEPTH:
                raise WireError
            field = self._field(position, end)
            position = field.end
            if field.kind == _GROUP:
                open_groups.append(field.number)
            elif field.kind == _GROUP_END and open_groups.pop() != field.number:
                raise WireError
        return position

    def read(self, begin: int, end: int) -> bytes:
        """The bytes between two positions.

        Raises:
            WireError: The file ends before.
        """
        self.file.seek(begin)
        data = self.file.read(end - begin)
        if len(data) < end - begin:
            raise WireError
        return data

    def pieces(
        self, descriptor: Any, begin: int, end: int, least: int, change: Change, depth: int = 0
    ) -> tuple[Piece, ...] | None:
        """Cut a message into pieces; None if no tensor in it changes.

        Args:
            descriptor: The type of the message.
            begin: Position of the message.
            end: Position behind it.
            least: Shorter messages are not looked into.
            change: Gives the pieces of a tensor.
            depth: The number of messages around it.

        Raises:
            WireError: The bytes are no message, it is too deep, or a field that may stand once stands twice:
                protobuf merges the two.
        """
        if depth > _MOST_DEPTH:
            raise WireError
        deep = _deep(descriptor)
        found: list[Piece] = []
        seen: set[int] = set()
        kept = begin
        for field in self.fields(begin, end):
            if field.number not in deep or field.kind != LENGTH:
                continue
            inside, is_single = deep[field.number]
            if is_single and field.number in seen:
                raise WireError
            seen.add(field.number)
            if field.end - field.content < least:
                continue
            if inside.full_name == TensorProto.DESCRIPTOR.full_name:
                new = change(self, field.content, field.end)
            else:
                new = self.pieces(inside, field.content, field.end, least, change, depth + 1)
            if new is not None:
                found += [range(kept, field.begin), Nested(encoded(field.number << 3 | LENGTH), new)]
                kept = field.end
        return (*found, range(kept, end)) if found else None


@cache
def _deep(descriptor: Any) -> dict[int, tuple[Any, bool]]:
    """The type of every field of a message type that can contain tensors, and whether it may stand once."""
    empty = GetMessageClass(descriptor)()
    names = tensor_fields(descriptor)
    fields = [field for field in descriptor.fields if field.name in names]
    return {f.number: (f.message_type, isinstance(getattr(empty, f.name), Message)) for f in fields}


def size(pieces: tuple[Piece, ...]) -> int:
    """Number of bytes of pieces."""
    return sum(map(_size, pieces))


def _size(piece: Piece) -> int:
    if isinstance(piece, Region):
        return piece.length
    if isinstance(piece, Nested):
        inner = size(piece.pieces)
        return len(piece.tag) + len(encoded(inner)) + inner
    return len(piece)


def write(pieces: tuple[Piece, ...], source: Walker, out: BinaryIO) -> None:
    """Write pieces to a file, at its position.

    Args:
        pieces: The pieces.
        source: The walker that found them.
        out: The other file.

    Raises:
        InputError: A region cannot be read.
        WireError: The walked file has become shorter.
        OSError: The file cannot be written.
    """
    for piece in pieces:
        if isinstance(piece, Nested):
            out.write(piece.tag + encoded(size(piece.pieces)))
            write(piece.pieces, source, out)
        elif isinstance(piece, Region):
            piece.copy(out)
        else:
            out.write(source.read(piece.start, piece.stop) if isinstance(piece, range) else piece)


def encoded(number: int) -> bytes:
    """A number as a varint."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _varint(data: bytes, begin: int) -> tuple[int, int]:
    """The number that begins at a byte, and the byte behind it."""
    number = 0
    for position in range(begin, min(begin + _MOST_VARINT, len(data))):
        number |= (data[position] & 0x7F) << 7 * (position - begin)
        if data[position] < 0x80:
            return number, position + 1
    raise WireError
