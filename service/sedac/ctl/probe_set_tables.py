"""Tables of probe sets and of the audit log."""

from __future__ import annotations

import json
from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sedac.client.diff import Change, find_changes
from sedac.contract.v1 import audit_log_pb2, probe_sets_pb2
from sedac.ctl.cells import format_bytes, format_time, name_enum

_STYLES = {"LOADABLE": "green", "VERIFIED": "yellow", "STAGED": "yellow"}
_NOISE = ("etag", "revision", "revision_create_time", "update_time", "author", "comment")
"""Fields that every change changes, or that have a column."""
_MAX_SHOWN = 4


def _make_state(probe_set: probe_sets_pb2.ProbeSet) -> Text:
    state = name_enum(probe_sets_pb2.ProbeSetState, probe_set.state, "PROBE_SET_STATE_")
    return Text(state, style=_STYLES.get(state, ""))


def make_probe_set_table(probe_set: probe_sets_pb2.ProbeSet) -> Table:
    """Show one probe set, a row per fact."""
    table = Table(show_header=False, box=None)
    table.add_row("probe set", escape(probe_set.name))
    table.add_row("state", _make_state(probe_set))
    table.add_row("sha256", probe_set.sha256)
    table.add_row("size", f"{format_bytes(probe_set.size_bytes)}, {escape(probe_set.format)}")
    table.add_row("model", f"{escape(probe_set.model) or '-'}: {probe_set.num_layers} layers, hidden size {probe_set.hidden_size}")
    table.add_row("probes", f"rank {probe_set.rank}, after layers {', '.join(map(str, probe_set.checkpoint_layers))}")
    table.add_row("levels", escape(", ".join(probe_set.levels)) or "none of its own")
    table.add_row("made", escape(f"{format_time(probe_set, 'create_time')} by {probe_set.author or '-'}"))
    table.add_row("used by", escape(", ".join(probe_set.referenced_by)) or "nothing")
    for engine in probe_set.engines:
        table.add_row(
            escape(f"engine {engine.engine_id}"), Text(engine.problem or "can load it without a restart", "red" if engine.problem else "green")
        )
    return table


def make_probe_sets_table(probe_sets: Iterable[probe_sets_pb2.ProbeSet]) -> Table:
    """Show probe sets by name."""
    table = Table("probe set", "state", "sha256", "size", "rank", "layers", "levels", "uploaded", "author", "used by", box=None)
    for p in probe_sets:
        layers, levels = " ".join(map(str, p.checkpoint_layers)), str(len(p.levels))
        words = (p.author, ", ".join(p.referenced_by) or "-")
        made = format_time(p, "create_time")
        table.add_row(
            escape(p.name), _make_state(p), p.sha256[:12], format_bytes(p.size_bytes), str(p.rank), layers, levels, made, *map(escape, words)
        )
    return table


def make_audit_table(entries: Iterable[audit_log_pb2.AuditEntry]) -> Table:
    """Show entries of the audit log, newest first, with the fields that each changed."""
    table = Table("number", "time", "who", "action", "resource", "comment", "changed", box=None)
    for e in entries:
        who = e.principal if e.author in ("", e.principal.partition(":")[2]) else f"{e.principal} ({e.author})"
        words = (who, e.action, e.resource, e.comment, _describe(find_entry_changes(e)))
        table.add_row(str(e.number), format_time(e, "time"), *map(escape, words))
    return table


def find_entry_changes(entry: audit_log_pb2.AuditEntry) -> tuple[Change, ...]:
    """Return what an entry's change changed, without what changes every time."""
    before, after = (json.loads(text) if text else {} for text in (entry.before_json, entry.after_json))
    return tuple(change for change in find_changes(before, after) if change.field not in _NOISE) if before and after else ()


def _describe(changes: tuple[Change, ...]) -> str:
    more = [f"{len(changes) - _MAX_SHOWN} more"] if len(changes) > _MAX_SHOWN else []
    return "; ".join([*map(str, changes[:_MAX_SHOWN]), *more])
