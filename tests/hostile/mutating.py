"""Mutations of files: of their bytes, of the fields of protobuf messages, and of the values of JSON texts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    -(2**31),
    -(2**63),
)
FLOATS = (0.0, -1.0, 0.5, float("nan"), float("inf"), 1e38, 1e-45, 1e308)
TEXTS = (
    "",
    "x",
    "w",
    "../../etc/passwd",
    "\x1b[31m\r\n",
    "\u202e\u2066",
    "a" * 300,
    "0",
    "MatMul",
    "If",
    "Constant",
    "com.microsoft",
    "🙂",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**63,
    10**400,
    0.5,
    float("nan"),
    -float("inf"),
    *TEXTS,
    [],
    {},
    [[]],
    {"id": 1},
)


def bytes_mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """Change a few bytes, most of them near the start or the end, where the structure of most files is."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = _place(rng, len(changed))
        match rng.integers(0, 7):
            case 0:
                changed[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                changed[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(0, 256))]))
            case 2:
                del changed[at : at + int(rng.integers(1, 16))]
            case 3:
                changed[at:at] = rng.bytes(int(rng.integers(1, 16)))
            case 4:
                other = _place(rng, len(changed))
                changed[at:at] = changed[other : other + int(rng.integers(1, 64))]
            case 5:
                changed[at : at + 8] = b"\xff" * 8
            case _:
                del changed[at:]
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def _place(rng: np.random.Generator, length: int) -> int:
    near = min(length, 400)
    return int(rng.choice([rng.integers(length), rng.integers(near), length - 1 - rng.integers(near)]))


def message_mutated(rng: np.random.Generator, message: Message, times: int = 3) -> None:
    """Change a few fields of a message, and of the messages in it, in place."""
    for _ in range(int(rng.integers(1, times + 1))):
        found = [message]
        _collect(message, found)
        _change(rng, found[int(rng.integers(len(found)))])


def _collect(message: Message, found: list[Message]) -> None:
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in (value,) if isinstance(value, Message) else value:
                found.append(child)
                _collect(child, found)


def _change(rng: np.random.Generator, message: Message) -> None:
    present = [field for field, _ in message.ListFields()]
    everything = list(message.DESCRIPTOR.fields)
    # Most changes are of fields that are there; a field that is not is often of no consequence.
    pool = present if present and rng.integers(4) else everything
    field = pool[int(rng.integers(len(pool)))]
    if rng.integers(12) == 0:
        message.ClearField(field.name)
    elif hasattr(value := getattr(message, field.name), "MergeFrom") and not isinstance(value, Message):
        _change_list(rng, value, field)
    elif field.message_type is None:
        setattr(message, field.name, _scalar(rng, field, value))
    else:
        value.SetInParent()


def _change_list(rng: np.random.Generator, values: Any, field: FieldDescriptor) -> None:
    if not values:
        if field.message_type is not None:
            values.add()
        else:
            values.append(_scalar(rng, field, None))
        return
    one, other = (int(n) for n in rng.integers(len(values), size=2))
    match rng.integers(0, 5):
        case 0:
            del values[one]
        case 1:
            values.insert(one, values[other])
        case 2 if field.message_type is not None:
            values[one].CopyFrom(type(values[one]).FromString(values[other].SerializeToString()))
        case 2:
            values[one] = values[other]
        case 3 if field.message_type is not None:
            values[one].Clear()
        case 4 if field.message_type is not None:
            values.append(values[one])
        case _:
            values[one] = _scalar(rng, field, values[one])


def _scalar(rng: np.random.Generator, field: FieldDescriptor, old: Any) -> Any:
    kinds = FieldDescriptor
    if field.type == kinds.TYPE_STRING:
        return _text(rng, old or "")
    if field.type == kinds.TYPE_BYTES:
        return bytes_mutated(rng, old) if old else b"\xff\0"
    if field.type in (kinds.TYPE_FLOAT, kinds.TYPE_DOUBLE):
        return (
            float(rng.choice(FLOATS))
            if field.type == kinds.TYPE_DOUBLE
            else float(np.float32(0.5) * rng.integers(9))
        )
    if field.type == kinds.TYPE_ENUM:
        return int(rng.choice(list(field.enum_type.values_by_number)))
    near = [old + step for step in (-1, 1)] if isinstance(old, int) else []
    number = int(rng.choice(np.array([*INTEGERS, *near], object)))
    if field.type == kinds.TYPE_INT32:
        return (number + 2**31) % 2**32 - 2**31
    return number % 2**64 if field.type == kinds.TYPE_UINT64 else max(-(2**63), min(number, 2**63 - 1))


def _text(rng: np.random.Generator, old: str) -> str:
    text = TEXTS[int(rng.integers(len(TEXTS)))]
    return (text, old + text, old[:-1])[int(rng.integers(3))]


def json_mutated(rng: np.random.Generator, text: str) -> str:
    """Change a few values of a JSON text; now and then, its bytes."""
    if rng.integers(6) == 0:
        return bytes_mutated(rng, text.encode()).decode("latin-1")
    value = json.loads(text)
    for _ in range(int(rng.integers(1, 4))):
        holders: list[Any] = []
        _holders(value, holders)
        if holders:
            _change_holder(rng, holders[int(rng.integers(len(holders)))])
    return json.dumps(value)


def _holders(value: Any, found: list[Any]) -> None:
    if isinstance(value, dict | list) and value:
        found.append(value)
        for child in value.values() if isinstance(value, dict) else value:
            _holders(child, found)


def _change_holder(rng: np.random.Generator, holder: Any) -> None:
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    key, other = (keys[int(n)] for n in rng.integers(len(keys), size=2))
    match rng.integers(0, 5):
        case 0:
            del holder[key]
        case 1:
            holder[key] = holder[other]
        case 2 if isinstance(holder, dict):
            holder[TEXTS[int(rng.integers(len(TEXTS)))]] = holder[key]
        case 2:
            holder.append(holder[key])
        case 3 if type(holder[key]) in (int, float):
            holder[key] += [-1, 1, 0.5, 1000][int(rng.integers(4))]
        case _:
            holder[key] = VALUES[int(rng.integers(len(VALUES)))]
