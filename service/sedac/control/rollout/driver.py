"""The loop that drives the roll-out under way: after each interval it analyses the evidence, then advances, promotes, aborts or pauses.

An interval begins when every engine has confirmed the step. Whatever goes wrong on the way to a verdict pauses: engines that refuse the
candidate, are away or say nothing, evidence that can't be read or is broken. Only a pass promotes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from sedac.contract.v1 import control_pb2, rollouts_pb2
from sedac.control.fleet.engine import Engine
from sedac.control.fleet.fleet import Fleet
from sedac.control.fleet.pooling import CANDIDATE, STABLE, Evidence, pool
from sedac.control.rollout.bounds import Baseline
from sedac.control.rollout.changes import ROLLOUT, Changes
from sedac.control.rollout.estimates import to_tier_evidence
from sedac.control.rollout.judge import Verdict, judge
from sedac.control.rollout.metrics import RolloutMetrics
from sedac.control.rollout.rollout import Rollout
from sedac.errors import PolicyInvalid, StoreFailed

_log = logging.getLogger(__name__)
_SETTLE_SECONDS = 0.05
"""Changes of the fleet within this time are looked at together."""
_RETRY_SECONDS = 1.0


class RolloutDriver:
    """Drives one roll-out at a time; `run` until the fleet closes."""

    def __init__(self, changes: Changes, fleet: Fleet, metrics: RolloutMetrics) -> None:
        self._changes, self._fleet, self._metrics = changes, fleet, metrics
        self.read: Callable[[], Awaitable[Evidence]] = self._read
        """Where the evidence comes from."""
        self.read_seconds = 10.0
        """How long reading and judging the evidence may take, in seconds."""
        self.patience_seconds = 30.0
        """How long engines have to confirm a step, in seconds; an interval where that is longer."""
        self.silence_seconds = 10.0
        """After how many seconds without a report an engine counts as unheard; an interval where that is longer."""
        self._timed: tuple[int, int, int] | None = None
        self._began = 0.0
        self._due: float | None = None

    async def run(self) -> None:
        """Drive until the fleet closes."""
        seen = -1
        while not self._fleet.closing:
            try:
                wait = await self._look()
            except StoreFailed as error:
                _log.error("the roll-out stays where it is: %s", error)
                wait = _RETRY_SECONDS
            except Exception:  # noqa: BLE001  a loop that is dead looks like one that waits
                _log.exception("the roll-out stays where it is")
                wait = _RETRY_SECONDS
            await asyncio.sleep(_SETTLE_SECONDS)
            seen = await self._fleet.wait(seen, wait)

    def list_engines(self) -> tuple[str, ...]:
        """Return the connected engines, which a step that begins now must hear of."""
        return tuple(engine.id for engine in self._fleet.list_engines() if engine.connected)

    async def _look(self) -> float:
        """Do what is due now; returns after how many seconds to look again at the latest."""
        async with self._changes.lock:
            rollout = self._changes.rollout
            if rollout is None or rollout.state != "progressing":
                self._timed = None
                return 60.0
            now, key = time.monotonic(), (rollout.number, rollout.step, rollout.attempt)
            if key != self._timed:
                self._timed, self._began, self._due = key, now, None
            if refusal := self._find_refusal():
                await self._pause(rollout, refusal)
                return 0.0
            if self._due is None:
                return await self._wait_for_engines(rollout, now)
            if now < self._due:
                return self._due - now
        await self._analyse(rollout)  # without the lock, so that slow evidence keeps nobody from switching off
        return 0.0

    async def _wait_for_engines(self, rollout: Rollout, now: float) -> float:
        late = list(self._find_late(rollout))
        if not late:
            self._due = now + rollout.interval_seconds
            return rollout.interval_seconds
        left = self._began + max(self.patience_seconds, rollout.interval_seconds) - now
        if left <= 0:
            await self._pause(rollout, "; ".join(late))
        return max(0.0, left)

    def _find_refusal(self) -> str:
        for engine in self._fleet.engines.values():
            if engine.find_state(self._fleet.target) == control_pb2.ENGINE_STATE_NACKED and engine.error:
                return f"engine {engine.id} refused: {engine.error.message}"
        return ""

    def _find_late(self, rollout: Rollout) -> Iterable[str]:
        """Say which engines the step needs and has not been confirmed by."""
        for engine_id in rollout.engines:
            engine = self._fleet.engines.get(engine_id)
            if engine is None or not engine.connected:
                yield f"engine {engine_id} is not connected"
            elif engine.find_state(self._fleet.target) != control_pb2.ENGINE_STATE_SYNCED:
                yield f"engine {engine_id} has not confirmed the candidate"

    def _find_unheard(self, rollout: Rollout) -> Iterable[str]:
        connected = [engine for engine in self._fleet.list_engines() if engine.connected]
        if not connected:
            yield "no engine is connected"
            return
        yield from self._find_late(rollout)
        yield from (f"engine {e.id} has not reported for {_get_silence(e):.0f} s" for e in connected if _get_silence(e) > self._get_patience(rollout))

    def _get_patience(self, rollout: Rollout) -> float:
        return max(self.silence_seconds, rollout.interval_seconds)

    async def _read(self) -> Evidence:
        return await asyncio.to_thread(pool, self._fleet.book.list())

    async def _analyse(self, rollout: Rollout) -> None:
        evidence, verdict, shown = await self._find_verdict(rollout)
        async with self._changes.lock:
            if self._changes.rollout is rollout:  # else somebody changed it meanwhile
                await self._act(rollout, evidence, verdict, shown)

    async def _find_verdict(self, rollout: Rollout) -> tuple[Evidence, Verdict, bytes]:
        try:
            async with asyncio.timeout(self.read_seconds):
                evidence = await self.read()
                return evidence, *await asyncio.to_thread(self._judge, rollout, evidence, tuple(self._find_unheard(rollout)))
        except TimeoutError:
            return Evidence(tiers={}), Verdict("none", f"the analysis took longer than {self.read_seconds:g} s"), b""
        except Exception as error:  # noqa: BLE001  whatever broke, nothing may be promoted
            _log.exception("the analysis of %s failed", rollout.name)
            return Evidence(tiers={}), Verdict("none", f"the analysis failed: {error!r}"), b""

    async def _act(self, rollout: Rollout, evidence: Evidence, verdict: Verdict, shown: bytes) -> None:
        self._metrics.analyses.labels(verdict.kind).inc()
        judged = replace(rollout, evidence=shown)
        if verdict.kind == "breach":
            _log.warning("%s aborted: %s", rollout.name, verdict.reason)
            await self._changes.change_rollout(rollout, judged.end("aborted", verdict.reason), "AbortRollout", ROLLOUT, verdict.reason)
        elif verdict.kind == "none":
            await self._pause(judged, verdict.reason)
        elif rollout.step + 1 < len(rollout.shares):
            reason = f"{rollout.share:.4g} of the requests passed: {verdict.reason}"
            advanced = judged.advance(reason, self.list_engines(), get_baseline(evidence, rollout.baseline))
            _log.info("%s goes on to %.4g of the requests: %s", rollout.name, advanced.share, reason)
            await self._changes.change_rollout(rollout, advanced, "AdvanceRollout", ROLLOUT, reason)
        else:
            await self._promote(judged, f"every step passed: {verdict.reason}")

    def _judge(self, rollout: Rollout, evidence: Evidence, unheard: tuple[str, ...]) -> tuple[Verdict, bytes]:
        confidence = rollout.limit_confidence
        verdict = judge(
            evidence,
            rollout.bounds,
            confidence,
            side=CANDIDATE,
            together=True,
            baseline=rollout.baseline,
            min_requests=rollout.min_requests,
            unheard=unheard,
        )
        shown = to_tier_evidence(evidence, confidence, confidence)
        return verdict, rollouts_pb2.Rollout(evidence=shown).SerializeToString()

    async def _promote(self, rollout: Rollout, reason: str) -> None:
        try:
            self._changes.check(rollout.policy)
        except PolicyInvalid as error:
            await self._pause(rollout, f"passed, but the candidate can't be promoted: {error}")
            return
        made = await self._changes.append(
            rollout.policy,
            action="PromoteRollout",
            caller=ROLLOUT,
            comment=f"{rollout.name}: {reason}"[:1024],
            promoted=replace(rollout, reason=reason),
        )
        _log.info("%s promoted as revision %d: %s", rollout.name, made.revision, reason)

    async def _pause(self, rollout: Rollout, reason: str) -> None:
        _log.warning("%s paused at %.4g of the requests: %s", rollout.name, rollout.share, reason)
        await self._changes.change_rollout(rollout, rollout.pause(reason), "PauseRollout", ROLLOUT, reason)


def get_baseline(evidence: Evidence, before: Baseline | None = None) -> Baseline:
    """Return what has been counted by now; of the policy in force, what had been when the roll-out began."""
    candidate, stable = evidence.get_side(CANDIDATE), evidence.get_side(STABLE).token_seconds
    return Baseline(
        num_finished=candidate.num_requests,
        num_mismatch=candidate.mismatch.num_requests,
        num_nll_difference=candidate.nll_difference.num_requests,
        stable_token_seconds=before.stable_token_seconds if before else (stable.count, stable.sum, stable.sum_squares),
    )


def _get_silence(engine: Engine) -> float:
    return time.monotonic() - engine.reported
