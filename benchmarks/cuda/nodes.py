"""Whether IF nodes work on this card: what decides between captured graphs and eager launches for all rows that follow."""

from __future__ import annotations

from typing import Any

from sedac.engine.backends.cuda import if_nodes


def run_row(spec: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Return why they don't work, "" where they do; where nothing is captured they are not asked."""
    if context["is_check"]:
        return {"if nodes": "not asked: nothing is captured without a GPU"}
    return {"if nodes": if_nodes.check(), "source": if_nodes.get_source()}
