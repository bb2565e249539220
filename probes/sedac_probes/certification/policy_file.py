"""Policies as files: what `sedac ctl policy get --json` prints and `sedac ctl policy apply FILE` reads."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import json_format
from sedac.contract import wire
from sedac.contract.v1 import control_pb2
from sedac.errors import ConfigError
from sedac.policy.model import Policy


def write(path: Path, policy: Policy, comment: str) -> None:
    """Write a policy; `comment` is kept with the revision that it becomes."""
    message = wire.policy_to_proto(policy, comment=comment)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json_format.MessageToJson(message, preserving_proto_field_name=True) + "\n")
    temporary.rename(path)


def read(path: Path) -> Policy:
    """Read a policy.

    Raises:
        ConfigError: the file can't be read as one.
    """
    try:
        return wire.policy_from_proto(json_format.Parse(path.read_text(encoding="utf-8"), control_pb2.Policy()))
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        raise ConfigError(f"{path} can't be read as a policy: {error}; `sedac-probes certify` writes one") from error
