"""Tab completion of live values: revisions, tiers, probe sets, roll-outs, engines, asked of the control service while the user types.

A service that is away or refuses completes nothing and says nothing: a shell's line must never be disturbed or held up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import typer
from rich.markup import escape

from sedac.client.client import ControlClient
from sedac.ctl.rollout_tables import get_state
from sedac.ctl.session import CONNECTION_NAMES, open_client, read_in_force
from sedac.errors import SedacError
from sedac.policy.model import EXACT

TIMEOUT_SECONDS = 1.0
_MAX_READ, _MAX_VALUES = 500, 50
_MAX_NOTE_CHARS = 60  # typer wraps longer notes, and shells take the second line for another word
Values = Iterable[tuple[str, str]]
"""Words and what they mean."""


def _complete(find_values: Callable[[ControlClient], Values]) -> Callable[[typer.Context, str], list[tuple[str, str]]]:
    def complete(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
        """Return the values that begin as typed, each with a note."""
        found: list[tuple[str, str]] = []
        with contextlib.suppress(SedacError), open_client(_find_options(ctx), timeout_seconds=TIMEOUT_SECONDS, num_retries=0) as client:
            values = islice(find_values(client), _MAX_READ)
            found += islice(((value, _make_note(note)) for value, note in values if value.startswith(incomplete)), _MAX_VALUES)
        return found

    return complete


def _make_note(text: str) -> str:
    """Return the text on one line, and without markup, which typer would read in it."""
    return escape(" ".join(text.split())[:_MAX_NOTE_CHARS])


def _find_options(ctx: typer.Context) -> dict[str, Any]:
    """Return the connection's options, from the line or from their environment variables."""
    return {name: ctx.params.get(name) for name in CONNECTION_NAMES}


@_complete
def complete_revision(client: ControlClient) -> Iterator[tuple[str, str]]:
    """The newest revisions with their comments."""
    for policy in client.list_revisions():
        yield str(policy.revision), f"{policy.author}: {policy.comment}" if policy.comment else policy.author


@_complete
def complete_tier(client: ControlClient) -> Iterator[tuple[str, str]]:
    """The tiers of the policy in force, `exact` among them."""
    policy, _ = read_in_force(client)
    yield EXACT, "plain vLLM"
    for tier in policy.get_tiers():
        yield tier.name, f"{tier.floor}, confident tokens {tier.level}"


@_complete
def complete_probe_set(client: ControlClient) -> Iterator[tuple[str, str]]:
    """The uploaded probe sets."""
    for probe_set in client.list_probe_sets():
        yield probe_set.name, f"{probe_set.model}, rank {probe_set.rank}"


@_complete
def complete_rollout(client: ControlClient) -> Iterator[tuple[str, str]]:
    """The roll-outs, by number."""
    for rollout in client.list_rollouts():
        yield str(rollout.number), f"{get_state(rollout)} {rollout.comment}".strip()
