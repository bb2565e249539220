"""The options of `sedac ctl policy set` for self-speculation, and what they change."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from sedac.ctl.completion import complete_tier
from sedac.ctl.options import parse_number_or
from sedac.policy.model import Policy

_PANEL = "Self-speculation: drafts that the whole model verifies, where engines have a draft"
_OWN = "own"

Speculate = Annotated[
    bool | None,
    typer.Option("--speculation/--no-speculation", help="Whether engines draft; answers stay the same.", rich_help_panel=_PANEL),
]
DraftTokens = Annotated[
    int | None,
    typer.Option(help="0 to 16: draft tokens of a sequence per step at most; 0: as many as the engine's draft proposes.", rich_help_panel=_PANEL),
]
DraftConfidence = Annotated[
    str | None,
    typer.Option(
        help="0 to 1: a sequence stops drafting when the product of its drafts' confidences falls below it; own: the draft's own.",
        rich_help_panel=_PANEL,
    ),
]
DraftAdaptive = Annotated[
    bool | None,
    typer.Option(
        "--draft-adaptive/--draft-fixed",
        help="Choose lengths from measured costs and acceptance, down to no drafting; or always draft by the two above.",
        rich_help_panel=_PANEL,
    ),
]
DraftTiers = Annotated[
    list[str] | None,
    typer.Option(
        "--draft-tier",
        help="Tier whose requests speculate, exact too; may be repeated. Empty: every tier.",
        rich_help_panel=_PANEL,
        autocompletion=complete_tier,
    ),
]


def change_speculation(policy: Policy, tiers: Sequence[str] | None, min_confidence: str | None, **knobs: Any) -> tuple[Policy, list[str]]:
    """Return the policy with these knobs of self-speculation, and the fields that were given; knobs of None stay as they are."""
    changes = {name: value for name, value in knobs.items() if value is not None}
    if min_confidence is not None:
        changes["min_confidence"] = parse_number_or(_OWN, "--draft-confidence", min_confidence)
    if tiers:
        changes["tiers"] = tuple(dict.fromkeys(name for name in tiers if name))
    changed = dataclasses.replace(policy, speculation=dataclasses.replace(policy.speculation, **changes))
    return changed, [f"speculation.{name}" for name in sorted(changes)]
