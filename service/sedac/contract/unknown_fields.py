"""Fields of a newer contract in a message: found by number, so that a policy is refused instead of applied in part."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from sedac import __version__
from sedac.errors import FieldViolation, PolicyInvalid


def check_known(message: Message, who: str, prefix: str = "") -> None:
    """Check that every field of a message, and of the messages in it, is one of this version's contract.

    Args:
        message: a policy or a candidate, as it came.
        who: that must be updated, such as "engine".
        prefix: of the fields' names in the refusal, such as "candidate.".

    Raises:
        PolicyInvalid: one is not; each is named by its path and number, such as "speculation.22".
    """
    told = f"is the number of a field that this {who}'s SEDAC {__version__} does not know; update the {who}, or leave that knob out"
    bad = [FieldViolation(f"{prefix}{path}", told) for path in _find_unknown(message)]
    if bad:
        raise PolicyInvalid(bad)


def _find_unknown(message: Message, path: str = "") -> Iterator[str]:
    unknown = UnknownFieldSet(message)
    for number in sorted({unknown[i].field_number for i in range(len(unknown))}):
        yield f"{path}{number}"
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.is_repeated:
            for index, item in enumerate(value):
                yield from _find_unknown(item, f"{path}{field.name}[{index}].")
        else:
            yield from _find_unknown(value, f"{path}{field.name}.")
