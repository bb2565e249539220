"""SEDAC's metrics on the engine's own /metrics, beside `vllm:*` and with the same labels `model_name` and `engine`.

Ordinary prometheus_client objects fed with differences of the workers' totals, so they also appear in multi-process mode.
Label sets are closed and pre-created: a revision is a value, never a label; tiers are `exact`, those of the policies seen, and
`_other` from the 33rd on.
"""

from __future__ import annotations

import math
import os

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector

from sedac.agent.drafting_metrics import DraftingMetrics
from sedac.agent.evidence_metrics import EvidenceMetrics
from sedac.contract.stats import DraftingStats, Stats, TierStats
from sedac.policy.layout import Layout
from sedac.policy.model import EXACT, Policy

_LABELS = ["model_name", "engine"]
_APPLY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0)

_EXITED = Counter("sedac_exited_tokens", "Tokens that exited at this checkpoint.", [*_LABELS, "checkpoint"])
_EVALUATED = Counter("sedac_probe_evaluations", "Tokens whose risk was computed at this checkpoint.", [*_LABELS, "checkpoint"])
_THRESHOLD = Gauge(
    "sedac_threshold", "Risk below it counts as confident, adapted where adaptation is on; 0 turns the checkpoint off.", [*_LABELS, "checkpoint"]
)
_EXIT_RATE = Gauge("sedac_exit_rate", "Moving average of exits over the tokens evaluated at this checkpoint.", [*_LABELS, "checkpoint"])
_TARGET_EXIT_RATE = Gauge("sedac_target_exit_rate", "Exit rate that adaptation steers to; NaN while it is off or frozen.", [*_LABELS, "checkpoint"])
_ADAPTATIONS = Counter("sedac_adaptations", "Changes of thresholds by adaptation.", _LABELS)
_LAYERS = Gauge("sedac_layers", "Decoder layers, each with one MLP per token.", _LABELS)
_TIER_TOTALS = {
    "num_tokens": Counter("sedac_tier_tokens", "Tokens computed for requests of this tier.", [*_LABELS, "tier"]),
    "num_exited": Counter("sedac_tier_exited_tokens", "Tokens of this tier that exited.", [*_LABELS, "tier"]),
    "num_mlp_blocks_computed": Counter(
        "sedac_tier_mlp_blocks_computed", "MLPs of single tokens computed for this tier, a reduced one by its share.", [*_LABELS, "tier"]
    ),
}
_MAX_TIERS = 32
_OTHER = "_other"
_TOTALS = {
    "num_tokens": Counter("sedac_tokens", "Tokens computed.", _LABELS),
    "num_decode_tokens": Counter("sedac_decode_tokens", "Tokens that were allowed to exit.", _LABELS),
    "num_mlp_blocks_computed": Counter("sedac_mlp_blocks_computed", "MLPs of single tokens that were computed, a reduced one by its share.", _LABELS),
    "num_mlp_blocks_skipped": Counter("sedac_mlp_blocks_skipped", "MLPs of single tokens that were skipped.", _LABELS),
    "num_steps": Counter("sedac_steps", "Forward passes with at least one request.", _LABELS),
    "num_torn_steps": Counter("sedac_torn_steps", "Forward passes that saw two policy revisions; anything but 0 is a bug.", _LABELS),
}
_REVISION = Gauge("sedac_policy_revision", "Policy revision in force in every worker; 0 is the one the engine started with.", _LABELS)
_ENABLED = Gauge("sedac_policy_enabled", "1 while the policy in force lets tokens exit.", _LABELS)
_CERTIFIED = Gauge("sedac_policy_certified", "1 while the policy in force carries a certificate, which then fits this engine.", _LABELS)
_UPDATES = Counter("sedac_policy_updates", "Policies pushed by the control service and applied (ack) or refused (nack).", [*_LABELS, "result"])
_APPLY_SECONDS = Histogram("sedac_policy_apply_seconds", "Time from a pushed policy to its being in force.", _LABELS, buckets=_APPLY_BUCKETS)
_CONNECTED = Gauge("sedac_control_connected", "1 while the control service is connected; 0 means the policy may be stale.", _LABELS)
_ACCEPTANCE = Gauge("sedac_draft_acceptance_rate", "AR: accepted / proposed draft tokens since the engine started; NaN before the first.", _LABELS)
_TOKEN_RATIO = Gauge("sedac_draft_token_ratio", "TRR: accepted draft tokens / output tokens since the engine started; NaN before the first.", _LABELS)
_LAST_CONTACT = Gauge("sedac_control_last_contact_timestamp_seconds", "Unix time of the last message from the control service.", _LABELS)


_SPECULATION = ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "generation_tokens")
"""Names of vLLM's counters (v1/spec_decode/metrics.py and v1/metrics/loggers.py, 0.32)."""


class EngineMetrics:
    """Feeds the metrics of one engine."""

    def __init__(self, *, model_name: str, layout: Layout, engine: str = "0", is_speculating: bool = False) -> None:
        self.is_speculating = is_speculating
        self.evidence = EvidenceMetrics(model_name=model_name, engine=engine)
        self._drafting = DraftingMetrics(model_name=model_name, engine=engine)
        self._labels = (model_name, engine)
        self._last = Stats()
        self._tiers: set[str] = set()
        self._revision, self._is_adapting = 0, False
        for layer in layout.checkpoint_layers:
            for metric in (_EXITED, _EVALUATED, _THRESHOLD, _EXIT_RATE, _TARGET_EXIT_RATE):
                metric.labels(*self._labels, str(layer))
        for total in (*_TOTALS.values(), _ADAPTATIONS):
            total.labels(*self._labels)
        self._add_tier(EXACT)
        _LAYERS.labels(*self._labels).set(layout.num_layers)
        for result in ("ack", "nack"):
            _UPDATES.labels(*self._labels, result)
        for gauge in (_REVISION, _ENABLED, _CERTIFIED, _CONNECTED, _LAST_CONTACT):
            gauge.labels(*self._labels)
        _APPLY_SECONDS.labels(*self._labels)
        if layout.draft:
            zeros = (0,) * layout.max_draft_tokens
            self._drafting.add(DraftingStats(kind=layout.draft, lengths=(0, *zeros), accepted_at=zeros))
        if is_speculating:  # else both are absent: a rate of nothing is no figure
            self._show_speculation(0, 0, 0)

    def set_policy(self, policy: Policy, revision: int, layout: Layout) -> None:
        """Show the policy in force."""
        _REVISION.labels(*self._labels).set(revision)
        _ENABLED.labels(*self._labels).set(policy.enabled)
        _CERTIFIED.labels(*self._labels).set(policy.certificate is not None)
        thresholds, targets = {c.layer: c.threshold for c in policy.checkpoints}, get_target_exit_rates(policy)
        was_adapting, self._is_adapting = self._is_adapting, policy.enabled and policy.adaptation.enabled
        self._revision = revision
        for layer in layout.checkpoint_layers:
            if not (was_adapting and self._is_adapting):  # else the next reading tells; the policy's own would show as a spike
                _THRESHOLD.labels(*self._labels, str(layer)).set(thresholds.get(layer, 0.0))
            _TARGET_EXIT_RATE.labels(*self._labels, str(layer)).set(targets.get(layer, math.nan))
        for tier in policy.get_tiers():
            self._add_tier(tier.name)

    def count_update(self, *, accepted: bool, seconds: float) -> None:
        """Count one pushed policy and the time it took."""
        _UPDATES.labels(*self._labels, "ack" if accepted else "nack").inc()
        _APPLY_SECONDS.labels(*self._labels).observe(seconds)

    def set_connected(self, connected: bool, now: float) -> None:
        """Show the connection to the control service; `now` in Unix seconds counts as contact while connected."""
        _CONNECTED.labels(*self._labels).set(connected)
        if connected:
            _LAST_CONTACT.labels(*self._labels).set(now)

    def add(self, stats: Stats) -> None:
        """Add what came since the last call; `stats` are totals since the worker started."""
        for name, counter in _TOTALS.items():
            counter.labels(*self._labels).inc(max(0, getattr(stats, name) - getattr(self._last, name)))
        before = {c.layer: c for c in self._last.checkpoints}
        for now in stats.checkpoints:
            labels, last = (*self._labels, str(now.layer)), before.get(now.layer)
            _EXITED.labels(*labels).inc(now.num_exited - (last.num_exited if last else 0))
            _EVALUATED.labels(*labels).inc(now.num_evaluated - (last.num_evaluated if last else 0))
            _EXIT_RATE.labels(*labels).set(now.exit_rate)
            if self._is_adapting and stats.active_revision == self._revision:
                _THRESHOLD.labels(*labels).set(now.threshold)
        self._add_tiers(stats.tiers)
        if stats.drafting:
            self._drafting.add(stats.drafting)
        done, known = stats.num_adaptations, self._last.num_adaptations
        _ADAPTATIONS.labels(*self._labels).inc(done - known if done >= known else done)  # fewer: adaptation was reset in between
        self._last = stats

    def read_speculation(self) -> None:
        """Take AR and TRR from vLLM's own counters; may take milliseconds and block."""
        proposed, accepted, generated = (sum_samples(f"vllm:{name}_total", self._labels[0]) for name in _SPECULATION)
        self._show_speculation(proposed, accepted, generated)

    def _show_speculation(self, proposed: float, accepted: float, generated: float) -> None:
        _ACCEPTANCE.labels(*self._labels).set(accepted / proposed if proposed else math.nan)
        _TOKEN_RATIO.labels(*self._labels).set(accepted / generated if generated else math.nan)

    def _add_tiers(self, tiers: tuple[TierStats, ...]) -> None:
        before = {t.name: t for t in self._last.tiers}
        for now in tiers:
            label = now.name if now.name in self._tiers else _OTHER
            for name, counter in _TIER_TOTALS.items():
                last = getattr(before[now.name], name) if now.name in before else 0
                counter.labels(*self._labels, label).inc(max(0, getattr(now, name) - last))

    def _add_tier(self, name: str) -> None:
        if name not in self._tiers and len(self._tiers) < _MAX_TIERS:
            self._tiers.add(name)
            for counter in _TIER_TOTALS.values():
                counter.labels(*self._labels, name)


def sum_samples(name: str, model_name: str) -> float:
    """Return the sum of a metric's samples for one model over engines, and over processes in multi-process mode; 0 where there are none."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        families = registry.collect()
    else:
        families = REGISTRY.restricted_registry([name]).collect()
    return sum(s.value for family in families for s in family.samples if s.name == name and s.labels.get("model_name") == model_name)


def get_target_exit_rates(policy: Policy) -> dict[int, float]:
    """Return by layer the exit rates that adaptation steers to; nothing while it is off or frozen."""
    knobs = policy.adaptation
    if not policy.enabled or not knobs.enabled or knobs.frozen:
        return {}
    return {c.layer: rate for c, rate in zip(policy.checkpoints, knobs.target_exit_rates, strict=True)}
