"""The principals file: who may call, by which token or certificate, in which role. One JSON object per line:

    {"name": "alice", "role": "operator", "token_sha256": "9f86d0...", "expires": "2027-01-01T00:00:00Z"}
    {"name": "ops", "role": "admin", "certificate": "ops.example.com"}
    {"name": "e1", "role": "engine", "token_sha256": "60303a...", "engine_id": "e1"}

`certificate` is the common name or a DNS or URI alternative name. Two lines may share a name while a token is being replaced. The
file holds digests, never tokens (`sedac control token` makes both), and nothing of a line is ever quoted in an error.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from sedac.errors import ConfigError

Role = Literal["viewer", "operator", "admin", "engine"]


class Entry(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._@-]{0,63}$")
    role: Role
    token_sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    """The digest of the token, in hexadecimal digits."""
    certificate: str = Field(default="", max_length=256)
    """The common name of the certificate, or a DNS or URI alternative name of it."""
    expires: AwareDatetime | None = None
    """The principal is refused from then on."""
    engine_id: str = Field(default="", max_length=128)
    """The only engine that a principal of the role engine may speak for; empty: any."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.token_sha256) == bool(self.certificate):
            raise ValueError("needs either token_sha256 or certificate")
        if self.engine_id and self.role != "engine":
            raise ValueError("engine_id belongs to role engine alone")
        return self

    def is_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and self.expires <= datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class Principals:
    """The lines of one file."""

    entries: tuple[Entry, ...]

    def find_token(self, token: str) -> Entry | None:
        """Return the line of a token that has not expired; takes the same time whatever the token is."""
        digest, found = digest_token(token), None
        for entry in self.entries:
            if hmac.compare_digest(entry.token_sha256, digest):
                found = entry
        return None if found is None or found.is_expired() else found

    def find_certificate(self, names: Collection[str]) -> list[Entry]:
        """Return the lines that name a certificate with these names and have not expired."""
        return [entry for entry in self.entries if entry.certificate and entry.certificate in names and not entry.is_expired()]

    def holds(self, entry: Entry) -> bool:
        """Whether a line is still there, word for word, and has not expired."""
        return entry in self.entries and not entry.is_expired()


def read_principals(path: Path, *, certificates: bool) -> Principals:
    """Read the file; `certificates` tells whether the service asks callers for theirs.

    Raises:
        ConfigError: names the line and the field, never what is in it.
    """
    where = f"SEDAC_CONTROL_PRINCIPALS {path}"
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{where} can't be read: {reason}; name a file with one JSON object per line") from None
    entries: list[Entry] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        entry = _parse(line, f"{where}, line {number}")
        if entry.certificate and not certificates:
            raise ConfigError(f"{where}, line {number}: certificate needs SEDAC_CONTROL_TLS_CLIENT_CA, or nobody is asked for one; set it")
        for other in entries:
            if entry.token_sha256 and other.token_sha256 == entry.token_sha256:
                raise ConfigError(f"{where}, line {number}: the same token as {other.name!r}; make another with `sedac control token`")
            if other.name == entry.name and (other.role, other.engine_id) != (entry.role, entry.engine_id):
                raise ConfigError(f"{where}, line {number}: {entry.name!r} has another role or engine_id above; give it one")
        entries.append(entry)
    if not entries:
        raise ConfigError(f"{where} names nobody; add a line that `sedac control token` prints")
    return Principals(tuple(entries))


def _parse(line: str, where: str) -> Entry:
    try:
        found: Any = json.loads(line)
        return Entry.model_validate(found)
    except ValidationError as error:  # a ValueError too, so it comes first
        first = error.errors(include_input=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"])) or "the line"
        raise ConfigError(f"{where}: {field[:80]}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{where} is not a JSON object; one object stands on each line") from None


def digest_token(token: str) -> str:
    """Return a token's hex digest, as the file holds it. Tokens are random, so a plain digest is enough."""
    return hashlib.sha256(token.encode()).hexdigest()


def make_token(name: str, role: str, *, expires_days: float | None = None, engine_id: str = "") -> tuple[str, str]:
    """Make a random token; returns it and its line of the file.

    Raises:
        ConfigError: the name or another field is not allowed.
    """
    token = f"sedac_{secrets.token_urlsafe(32)}"
    expires = "" if expires_days is None else (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=expires_days)).isoformat("T", "seconds")
    fields = {"name": name, "role": role, "token_sha256": digest_token(token), "expires": expires, "engine_id": engine_id}
    line = json.dumps({key: value for key, value in fields.items() if value})
    _parse(line, "this principal")
    return token, line


def write_token(path: Path, token: str) -> None:
    """Write a token into a new file that its owner alone may read.

    Raises:
        ConfigError: the file exists already, or can't be made.
    """
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token + "\n")
    except OSError as error:
        raise ConfigError(f"token file {path} can't be made: {error.strerror}; name a new file") from None
