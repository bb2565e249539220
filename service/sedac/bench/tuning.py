"""Sets knobs of a SEDAC server's policy before a row is measured, through the server's own control service."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sedac.bench.servers import Server
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.errors import ConfigError
from sedac.policy.model import Policy

_SYNC_SECONDS = 60.0


def set_knobs(server: Server, knobs: Mapping[str, Any]) -> None:
    """Make a server's policy its first one with these knobs, and wait until its engine runs it; nothing is sent where it does so already.

    Raises:
        ConfigError: there is no such knob.
        SedacError: the policy was refused, or the engine does not follow.
    """
    if dict(knobs) == server.knobs:
        return
    with ControlClient(f"127.0.0.1:{server.plan.control_port}", author="sedac bench", timeout_seconds=_SYNC_SECONDS) as client:
        if server.first_policy is None:
            server.first_policy = wire.policy_from_proto(client.get_policy())
        policy = server.first_policy
        for path, value in knobs.items():
            policy = with_knob(policy, path, value)
        made = client.update_policy(policy, comment=f"sedac bench: {dict(knobs) or 'as it was'}")
        client.wait_until_synced(made.revision, _SYNC_SECONDS)
    server.knobs = dict(knobs)


def with_knob(policy: Policy, path: str, value: Any) -> Policy:
    """Return a policy with one knob changed, named by its path, such as `speculation.enabled`.

    Raises:
        ConfigError: there is no such knob.
    """

    def change(part: Any, names: list[str]) -> Any:
        """Return a part of the policy with the knob at the end of these names changed."""
        known = [field.name for field in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else []
        if names[0] not in known:
            raise ConfigError(f"policy {path}: {names[0]!r} is no knob; known: {', '.join(known)}")
        inner = change(getattr(part, names[0]), names[1:]) if len(names) > 1 else value
        return dataclasses.replace(part, **{names[0]: inner})

    changed: Policy = change(policy, path.split("."))
    return changed
