"""What belongs to a knob beside its type and default: limits, unit, help, and its names in `sedac ctl` and in the environment.

A class of sedac.policy.model carries one `Knob` per field, in the field's annotation. The limits, the wire form, the options, the variables
and the reference page are read from there by `list_fields`; what holds across several fields is sedac.policy.check's.

The limits are not pydantic's own: a policy out of limits can be made, so that `find_violations` can name all that is wrong with it at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict

from sedac.errors import FieldViolation

FORBID_UNKNOWN = ConfigDict(extra="forbid")
"""Configuration of the classes that have knobs: a name that is none of their fields is refused."""
_UNREADABLE = 2**53
"""From here on an upper limit is a size of storage, which no message spells out."""
_MAX_SHOWN_CHARS = 80


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knob:
    """One knob; limits of a list of numbers or words hold for each of its entries, lengths for the list."""

    help: str
    """A sentence or part of one for people, in which {limits}, {Limits} and {default} are filled in."""
    unit: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    min_length: int = 0
    max_length: int | None = None
    """Most characters of a word, or most entries of a list."""
    pattern: str = ""
    """Pattern of the whole word."""
    check: Callable[[Any], str] | None = None
    """Returns what else is wrong with a value, with the remedy. Empty means nothing."""
    wrong: str = ""
    """What is said of a value out of limits where its range says too little, such as `is no sha256`."""
    remedy: str = ""
    """What to do about a value out of limits, or which value is usual."""
    entries: str = ""
    """What the entries of a list are called. If empty, they are called as the field is."""
    option: str | None = None
    """Flags of `sedac ctl policy set`. If None, they are made of the field's name. If empty, there are none."""
    form: str = ""
    """Help of the option where it takes another form than the value's, with {help} and {limits} in it."""
    panel: str = ""
    """Panel of the options in the help. In the knob of a part, the panel of all its knobs."""
    help_for_all: str = ""
    """For a tier's knob: help of an option that sets it in every tier. If empty, there is no such option."""
    word_for_none: str = ""
    """Word that the option takes for None."""
    variable_help: str = ""
    """Help of the variable where it does more than the option or takes another form, with {help} in it. If empty, it is the help."""
    variable: str = ""
    """Environment variable, without SEDAC_, that sets it in an engine's first policy. If empty, none does."""
    earlier: tuple[str, ...] = ()
    """Names of the variable in earlier versions. All of them are read."""
    published: str = ""
    """Default in earlier versions, where it is known."""
    first: Any = None
    """Default of the first policy made from variables, where it is not the policy's."""
    decides: bool = True
    """Whether it decides how a request is computed, so that certificates are for its value."""
    since: str = ""
    """Version of SEDAC that brought it. If empty, it was there before certificates. At its default it is in no digest."""

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the variables, without SEDAC_, the usual one first."""
        return tuple(dict.fromkeys((self.variable, *self.earlier))) if self.variable else ()

    @property
    def limits(self) -> str:
        """The range for people: `0 to 1`, `over 0 to 1`, `0.5 to below 1`, `at least 0`; empty: none."""
        low = f"over {show(self.gt)}" if self.gt is not None else "" if self.ge is None else show(self.ge)
        if self.le is not None and self.le < _UNREADABLE:
            return f"{low} to {show(self.le)}"
        if self.lt is not None:
            return f"{low}, below {show(self.lt)}" if self.gt is not None else f"{low} to below {show(self.lt)}"
        return low if self.gt is not None or not low else f"at least {low}"

    def describe_option(self, default: object = "") -> str:
        """Return the help of the option."""
        return self.form.format(help=self.describe(default), limits=self.limits) if self.form else self.describe(default)

    def describe_variable(self, default: object = "") -> str:
        """Return the help of the variable, in which None is an unset one."""
        text = self.describe(default)
        if self.word_for_none:
            text = text.replace(f"{self.word_for_none}:", "unset:")
        return self.variable_help.format(help=text) if self.variable_help else text

    def describe(self, default: object = "") -> str:
        """Return the help with limits and default filled in."""
        return self.help.format(limits=self.limits, Limits=self.limits[:1].upper() + self.limits[1:], default=default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a class, as its annotation says it."""

    name: str
    type: Any
    """Type without list and None. It is str where there are `words`."""
    words: tuple[str, ...] = ()
    """Values that it may have. If empty, any."""
    is_optional: bool = False
    is_list: bool = False
    default: Any = dataclasses.MISSING
    knob: Knob | None = None

    @property
    def is_part(self) -> bool:
        """Whether its type has fields of its own."""
        return dataclasses.is_dataclass(self.type)

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is dataclasses.MISSING


def list_fields(kind: type) -> tuple[Field, ...]:
    """Return the fields of a dataclass, in its order."""
    return _list_fields(kind)


@functools.cache
def _list_fields(kind: Hashable) -> tuple[Field, ...]:
    assert isinstance(kind, type)
    hints = get_type_hints(kind, include_extras=True)
    return tuple(_read(field, hints[field.name]) for field in dataclasses.fields(kind))


def list_knobs(kind: type, path: str = "") -> Iterator[tuple[str, Field]]:
    """Yield each knob of a class and of its parts with its path, such as `checkpoints.threshold`; a part comes before its knobs."""
    for field in list_fields(kind):
        if field.knob:
            yield path + field.name, field
            if field.is_part:
                yield from list_knobs(field.type, f"{path}{field.name}.")


def find_violations(model: Any, path: str = "") -> Iterator[FieldViolation]:
    """Yield each field out of its own limits; a list that is too long is not looked into. `path` comes before the names."""
    for field in list_fields(type(model)):
        value, knob = getattr(model, field.name), field.knob
        if knob is None or value is None:
            continue
        if field.is_list and knob.max_length is not None and len(value) > knob.max_length:
            remedy = knob.remedy or f"at most {knob.max_length}"
            yield FieldViolation(path + field.name, f"{len(value)} {knob.entries or field.name}; {remedy}")
            continue
        for i, entry in enumerate(value if field.is_list else (value,)):
            where = f"{path}{field.name}[{i}]" if field.is_list else path + field.name
            if field.is_part:
                yield from find_violations(entry, f"{where}.")
            elif problem := find_problem(field, entry):
                yield FieldViolation(where, problem)


def get_position(kind: type, path: str) -> tuple[int, ...]:
    """Return what sorts the paths of a class's fields, such as `checkpoints[1].threshold`, as the fields are listed."""
    position: list[int] = []
    for step in path.split("."):
        name, _, index = step.partition("[")
        number, field = next((i, field) for i, field in enumerate(list_fields(kind)) if field.name == name)
        position += [number, int(index[:-1]) if index else -1]
        kind = field.type
    return tuple(position)


def find_problem(field: Field, value: Any) -> str:
    """Return why a field can't have a value, or a list not this entry, with the limit and the remedy; empty: it can."""
    knob = field.knob
    assert knob, f"{field.name} has no limits to be held against"
    if field.words:
        has = f"{', '.join(field.words[:-1])} or {field.words[-1]}"
        return "" if value in field.words else f"{value!r} is unknown; use {has}"
    if knob.check and (problem := knob.check(value)):
        return problem
    if field.type is str:
        problem = _find_word_problem(field, knob, value)
    elif field.type in (int, float) and not _is_within(knob, value):
        problem = f"{value} {knob.wrong or _describe_range(field, knob, value)}"
    else:
        return ""
    return f"{problem}; {knob.remedy}" if problem and knob.remedy else problem


def _find_word_problem(field: Field, knob: Knob, value: str) -> str:
    if knob.pattern and not re.fullmatch(knob.pattern, value):
        return f"{value[:_MAX_SHOWN_CHARS]!r} {knob.wrong or f'does not fit {knob.pattern}'}"
    if not field.is_list and knob.max_length is not None and not knob.min_length <= len(value) <= knob.max_length:
        return f"{len(value)} characters; give {knob.min_length} to {knob.max_length}"
    return ""


def _is_within(knob: Knob, value: float) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    is_high_enough = (knob.ge is None or value >= knob.ge) and (knob.gt is None or value > knob.gt)
    return is_high_enough and (knob.le is None or value <= knob.le) and (knob.lt is None or value < knob.lt)


def _describe_range(field: Field, knob: Knob, value: float) -> str:
    low, high = (knob.gt if knob.ge is None else knob.ge), (knob.lt if knob.le is None else knob.le)
    if low is not None and high is not None and high < _UNREADABLE:
        if knob.gt is not None:
            return f"is outside ({show(low)}, {show(high)}{')' if knob.le is None else ']'}"
        return f"is outside {show(low)}..{show(high)}" if knob.lt is None else f"is outside {show(low)} to below {show(high)}"
    if field.type is int:
        return f"is below {show(low)}" if low is not None and value < low else f"is over {show(high)}"
    if low is None:
        return "is not a finite number"
    return f"is not a finite number {'>=' if knob.gt is None else 'over'} {show(low)}"


def show(number: float | None) -> str:
    """Write a limit as people do: 1, 0.5, 1000000."""
    assert number is not None
    return str(int(number)) if number == int(number) else f"{number:g}"


def _read(field: dataclasses.Field[Any], hint: Any) -> Field:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    knob = None
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        knob = next((extra for extra in extras if isinstance(extra, Knob)), None)
    is_optional = get_origin(hint) in (Union, types.UnionType)
    if is_optional:
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    is_list = get_origin(hint) is tuple
    if is_list:
        hint = get_args(hint)[0]
    words = get_args(hint) if get_origin(hint) is Literal else ()
    made = Field(name=field.name, type=str if words else hint, words=words, is_optional=is_optional, is_list=is_list, default=default, knob=knob)
    return made if get_origin(hint) is None or words else dataclasses.replace(made, type=get_origin(hint))
