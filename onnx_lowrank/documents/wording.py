"""Descriptions of the faults of a document: the place, its value, and the allowed values."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import inspect

Place = tuple[str | int, ...]
"""Keys and indices that lead from the whole document to a value."""

_LONGEST = 60  # characters of a value in a message
_SPELLED = {None: "null", True: "true", False: "false"}
_MESSAGE = re.compile(r"(?P<reason>.*?)(?: - at `\$(?P<path>[^`]*)`)?", re.DOTALL)
_STEP = re.compile(r"\.(?P<key>\w+)|\[(?P<index>[0-9]{1,9})\]|(?P<entry>\[\.\.\.\])")
_MISSING = re.compile(r"Object missing required field `(?P<key>\w+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>.*)`", re.DOTALL)


def in_words(error: msgspec.ValidationError, value: object, table: type[msgspec.Struct]) -> str:
    """Translate msgspec's message to one that gives the value and the allowed values.

    Args:
        error: The error that msgspec raised.
        value: The document.
        table: The type that the document should have.
    """
    message = _MESSAGE.fullmatch(str(error))
    reason, path = (message["reason"], message["path"] or "") if message else (str(error), "")
    kind = inspect.type_info(table)
    place: Place = ()
    for step in _STEP.finditer(path):
        named = int(step["index"]) if step["index"] else step["key"] or _entry(place, value, kind)
        place = (*place, named)
    if isinstance(error.__cause__, ValueError):  # A Struct's check of several keys raised it.
        return f"{_name(place, value)} has {reason}" if place else reason
    if missing := _MISSING.fullmatch(reason):
        return f"{_name(place, value)} lacks the key {missing['key']!r}"
    if unknown := _UNKNOWN.fullmatch(reason):
        keys = _keys(_type(place, kind))
        return f"{_name(place, value)} has an unknown key {shown(unknown['key'])}, the keys are {keys}"
    return wrong_value(place, value, table)


def wrong_value(place: Place, value: object, table: type[msgspec.Struct]) -> str:
    """Say that a value is not allowed, and which values are."""
    found, allowed = _at(place, value), _allowed(_type(place, inspect.type_info(table)))
    if not place:
        return f"it must be {allowed}"
    if isinstance(place[-1], int) or len(place) == 1:
        return f"{_name(place, value)} is {shown(found)}, but it must be {allowed}"
    return f"{_name(place[:-1], value)} has {_key(place[-1])} = {shown(found)}, but it must be {allowed}"


def shown(value: object) -> str:
    """A value for messages, spelled as in files; a long value is cut at its end."""
    text = _SPELLED[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _name(place: Place, value: object) -> str:
    """The name of a place: its keys and indices, and for an item of a list its own id or name."""
    if not place:
        return "it"
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{_key(step)}" for step in place)[1:]
    item = _at(place, value) if isinstance(place[-1], int) else None
    label = None
    if isinstance(item, dict):
        label = next((item[key] for key in ("id", "name") if key in item), None)
    return f"{path} ({shown(label)})" if isinstance(label, str) else path


def _key(step: str | int) -> str:
    """A key for messages; a key of a mapping can be any text, so it is quoted if it is no identifier."""
    return str(step) if str(step).isidentifier() else shown(step)


def _at(place: Place, value: Any) -> Any:
    """The value at a place; None if there is no such place, which a hostile key can make msgspec name."""
    for step in place:
        try:
            value = value[step]
        except (LookupError, TypeError):
            return None
    return value


def _type(place: Place, kind: inspect.Type) -> inspect.Type:
    """The type of a place; of the nearest known place if a hostile key makes msgspec name an unknown one."""
    for step in place:
        for candidate in _alternatives(kind):
            if isinstance(step, str) and isinstance(candidate, inspect.StructType):
                kind = next((field.type for field in candidate.fields if field.encode_name == step), kind)
            elif isinstance(step, str) and isinstance(candidate, inspect.DictType):
                kind = candidate.value_type
            elif isinstance(step, int) and isinstance(candidate, inspect.VarTupleType):
                kind = candidate.item_type
    return kind


def _entry(place: Place, value: object, kind: inspect.Type) -> str:
    """The first key of a mapping that has a wrong value; msgspec does not name it."""
    found = _at(place, value)
    for mapping in _alternatives(_type(place, kind)):
        if isinstance(mapping, inspect.DictType) and isinstance(found, dict):
            for key, item in found.items():
                if not any(_holds(item, one) for one in _alternatives(mapping.value_type)):
                    return str(key)
    return "…"


def _holds(value: object, kind: inspect.Type) -> bool:
    """Whether a value has a type, which is a Struct or null."""
    if not isinstance(kind, inspect.StructType):
        return value is None
    try:
        msgspec.convert(value, kind.cls)
    except msgspec.ValidationError:
        return False
    return True


def _alternatives(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    """The types of a union; for any other type, the type alone."""
    if isinstance(kind, inspect.Metadata):
        return _alternatives(kind.type)
    return kind.types if isinstance(kind, inspect.UnionType) else (kind,)


def _keys(kind: inspect.Type) -> str:
    """The keys that an object may have, for messages."""
    structs = (one for one in _alternatives(kind) if isinstance(one, inspect.StructType))
    return ", ".join(field.encode_name for one in structs for field in one.fields)


def _allowed(kind: inspect.Type) -> str:
    """The values that a type allows: its description, which every constrained type has, or general words."""
    match kind:
        case inspect.Metadata(extra_json_schema={"description": str(described)}):
            return described
        case inspect.Metadata(extra={"names": names}):
            return f"one of {', '.join(names())}"
        case inspect.UnionType(types=types):
            return " or ".join(_allowed(one) for one in types)
        case inspect.StructType():
            return f"an object with the keys {_keys(kind)}"
        case inspect.EnumType(cls=cls):
            return f"one of {', '.join(str(member.value) for member in cls)}"
        case inspect.LiteralType(values=values):
            return f"one of {', '.join(map(str, values))}"
    words = {
        inspect.NoneType: "null",
        inspect.BoolType: "true or false",
        inspect.IntType: "a whole number",
        inspect.FloatType: "a number",
        inspect.StrType: "a text",
        inspect.VarTupleType: "a list",
    }
    return words.get(type(kind), "an object")
