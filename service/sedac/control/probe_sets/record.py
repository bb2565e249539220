"""One stored probe set, as its row of the database tells of it."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Self

from sedac.contract.v1 import probe_sets_pb2
from sedac.policy.layout import ProbeSetSummary
from sedac.probe.manifest import FORMAT, parse_manifest
from sedac.probe.verify import Verified

COLUMNS = "name, sha256, size_bytes, manifest, manifest_sha256, levels_sha256, author, created, deleted"
Row = tuple[str, str, int, bytes, str, str, str, float, float | None]
"""The values of COLUMNS."""


@dataclass(frozen=True, kw_only=True)
class StoredProbeSet:
    """One set that can be named."""

    summary: ProbeSetSummary
    manifest_sha256: str
    model: str
    levels: tuple[str, ...]
    author: str
    created: datetime.datetime
    """Time of its creation, in UTC."""

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Read a row whose set is still there."""
        name, _, size_bytes, manifest, manifest_sha256, levels_sha256, author, created, _ = row
        made = parse_manifest(manifest, f"manifest of probe set {name}")
        verified = Verified(manifest=made, size_bytes=size_bytes, levels_sha256=levels_sha256)
        return cls(
            summary=verified.summary,
            manifest_sha256=manifest_sha256,
            model=made.model,
            levels=tuple(level.name for level in made.levels),
            author=author,
            created=datetime.datetime.fromtimestamp(created, datetime.UTC),
        )

    @property
    def content(self) -> tuple[str, str]:
        """Digests of its weights and of its manifest."""
        return self.summary.sha256, self.manifest_sha256

    def to_proto(self) -> probe_sets_pb2.ProbeSet:
        """Write what belongs to the set itself; who can load and who names it is the fleet's."""
        summary = self.summary
        message = probe_sets_pb2.ProbeSet(
            name=summary.name,
            sha256=summary.sha256,
            size_bytes=summary.size_bytes,
            format=FORMAT,
            state=probe_sets_pb2.PROBE_SET_STATE_VERIFIED,
            author=self.author,
            model=self.model,
            num_layers=summary.num_layers,
            hidden_size=summary.hidden_size,
            rank=summary.rank,
            checkpoint_layers=summary.checkpoint_layers,
            levels=self.levels,
        )
        message.create_time.FromDatetime(self.created)
        return message
