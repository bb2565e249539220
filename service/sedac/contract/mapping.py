"""One mapping between messages and classes of plain Python, driven by the class's fields and the message's descriptor.

A field of a class is the message's field of that name. What a message leaves unset keeps the class's default: an optional field or a part
that is not there, a plain field at proto's zero. A word is the name of an enum's value without the enum's own name before it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from sedac.errors import FieldViolation
from sedac.policy.knob import Field, list_fields

_M = TypeVar("_M", bound=Message)
_T = TypeVar("_T")
UNKNOWN = "unknown"
"""The word for an enum's number that this version does not know, in fields that take any word."""


@dataclass(frozen=True, kw_only=True)
class _Way:
    """How one field goes to the message and back, looked up once."""

    name: str
    field: Field
    is_list: bool
    is_map: bool
    is_part: bool
    """Whether the field holds another message, or a list of them."""
    has_presence: bool
    words: dict[int, str]
    """Words for the numbers of an enum. Empty where the field is none."""
    numbers: dict[str, int]
    enum_names: tuple[str, ...]


def write(model: Any, message: _M) -> _M:
    """Write every field of a model into a message, and return that."""
    for way in _match(type(model), message.DESCRIPTOR):
        value = getattr(model, way.name)
        if value is None:
            continue
        if way.is_map:
            getattr(message, way.name).update(value)
        elif way.is_list and way.is_part:
            entries = getattr(message, way.name)
            for entry in value:
                write(entry, entries.add())
        elif way.is_list:
            getattr(message, way.name).extend(value)
        elif way.is_part:
            part = getattr(message, way.name)
            part.SetInParent()
            write(value, part)
        else:
            setattr(message, way.name, way.numbers[value] if way.words else value)
    return message


def read(kind: type[_T], message: Message, bad: list[FieldViolation], path: str = "") -> _T:
    """Make an object of a message; values are not validated beyond the enums.

    A number that is none of the words a field may have goes to `bad`, with `path` before its name.
    """
    found: dict[str, Any] = {}
    for way in _match(kind, message.DESCRIPTOR):
        if way.has_presence and not way.field.is_required and not message.HasField(way.name):
            continue
        value = getattr(message, way.name)
        if way.is_map:
            value = way.field.type(dict(value))
        elif way.is_list and way.is_part:
            value = tuple(read(way.field.type, part, bad, f"{path}{way.name}[{i}].") for i, part in enumerate(value))
        elif way.is_list:
            value = tuple(value)
        elif way.is_part:
            value = read(way.field.type, value, bad, f"{path}{way.name}.")
        elif way.words:
            value = _read_word(way, value, bad, path)
        if value or way.has_presence or way.field.is_required:
            found[way.name] = value
    return kind(**found)


def _read_word(way: _Way, number: int, bad: list[FieldViolation], path: str) -> str:
    """Return the word; empty where the field keeps its default."""
    if number in way.words:
        return way.words[number]
    if not way.field.words:
        return UNKNOWN
    if number:
        bad.append(FieldViolation(path + way.name, f"{number} is unknown; use {' or '.join(way.enum_names)}"))
    return ""


def _match(kind: type, message: Any) -> tuple[_Way, ...]:
    return _look_up(kind, message)


@functools.cache
def _look_up(kind: Hashable, message: Descriptor) -> tuple[_Way, ...]:
    assert isinstance(kind, type)
    missing = [field.name for field in list_fields(kind) if field.name not in message.fields_by_name]
    assert not missing, f"{message.full_name} has no field {', '.join(missing)} of {kind.__name__}; add it to the contract and run `make proto`"
    return tuple(_make_way(field, message.fields_by_name[field.name]) for field in list_fields(kind))


def _make_way(field: Field, described: FieldDescriptor) -> _Way:
    part, enum = described.message_type, described.enum_type
    numbers = _read_numbers(enum) if enum else {}
    return _Way(
        name=field.name,
        field=field,
        is_list=described.is_repeated,
        is_map=part is not None and bool(part.GetOptions().map_entry),
        is_part=part is not None,
        has_presence=described.has_presence,
        words={number: word for word, number in numbers.items()},
        numbers=numbers,
        enum_names=tuple(value.name for value in enum.values if value.number) if enum else (),
    )


def _read_numbers(enum: EnumDescriptor) -> dict[str, int]:
    """Return the number of each word: GUARD_ACTION_EXACT of GuardAction is `exact`; the unspecified one has none."""
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.name).upper() + "_"
    return {value.name.removeprefix(prefix).lower(): value.number for value in enum.values if value.number}
