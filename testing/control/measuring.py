"""An engine on the discovery stream that takes candidates too and reports evidence of both sides, as it is told to measure it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sedac.contract.v1 import control_pb2, evidence_pb2

from testing.control.engines import FakeEngine

STABLE, CANDIDATE = evidence_pb2.SIDE_STABLE, evidence_pb2.SIDE_CANDIDATE


@dataclass
class Measured:
    """What every request of a side is measured to have."""

    mismatch: int = 10
    """In thousandths."""
    nll_difference: int = 5
    """In thousandths."""
    token_seconds: float = 0.02
    error_every: int = 0
    """0: no request ends in an error"""
    rate: int = 5
    """Requests that finish between two reports."""


class MeasuringEngine(FakeEngine):
    """Reports every 20 ms; its counts grow while a side's policy stays in force."""

    def __init__(self, address: str, engine_id: str = "e1", *, stable: Measured | None = None, candidate: Measured | None = None, **more) -> None:
        self.sides = {STABLE: stable or Measured(), CANDIDATE: candidate or Measured()}
        self.in_force: dict[int, int] = {}
        """What each side has in force: the revision of the stable one, the number of the roll-out of the other."""
        self.counts: dict[int, int] = {}
        """Finished requests, by side."""
        self.poison: Callable[[evidence_pb2.Evidence], None] = lambda evidence: None
        self.silent = False
        self.refuse_candidate = ""
        self._lock, self._over = threading.Lock(), threading.Event()
        super().__init__(address, engine_id, **more)
        self._reporter = threading.Thread(target=self._report, daemon=True)
        self._reporter.start()

    def answer(self, push: control_pb2.PolicyPush) -> None:
        if push.HasField("candidate") and self.refuse_candidate:
            answer = control_pb2.PolicyAnswer(nonce=push.nonce, revision=self.in_force.get(STABLE, 0))
            answer.error.code, answer.error.message = 3, self.refuse_candidate
            self.send(control_pb2.EngineMessage(answer=answer))
            return
        with self._lock:
            for side, number in ((STABLE, push.policy.revision), (CANDIDATE, push.candidate.rollout)):
                if self.in_force.get(side) != number:
                    self.in_force[side], self.counts[side] = number, 0
        answer = control_pb2.PolicyAnswer(nonce=push.nonce, revision=push.policy.revision, rollout=push.candidate.rollout)
        self.send(control_pb2.EngineMessage(answer=answer))

    def _report(self) -> None:
        while not self._over.wait(0.02):
            if not self.silent:
                with self._lock:
                    evidence = [self._measure(side) for side, number in self.in_force.items() if number]
                self.send(control_pb2.EngineMessage(report=control_pb2.EngineReport(evidence=evidence)))

    def _measure(self, side: int) -> evidence_pb2.Evidence:
        measured = self.sides[side]
        self.counts[side] += measured.rate
        count, seconds = self.counts[side], measured.token_seconds
        evidence = evidence_pb2.Evidence(side=side, tier="balanced", num_requests=count)
        if side == STABLE:
            evidence.revision = self.in_force[side]
        else:
            evidence.rollout = self.in_force[side]
        evidence.num_errors = count // measured.error_every if measured.error_every else 0
        evidence.token_seconds.count, evidence.token_seconds.sum = count, count * seconds
        evidence.token_seconds.sum_squares = count * seconds**2 * 1.01
        evidence.num_audited_tokens = 16 * count
        if count:
            evidence.mismatch_counts[measured.mismatch] = count
            evidence.nll_difference_counts[measured.nll_difference] = count
        if side == CANDIDATE:
            self.poison(evidence)
        return evidence

    def close(self) -> None:
        self._over.set()
        self._reporter.join(5)
        super().close()


def wait_for(found: Callable[[], object], what: str, seconds: float = 20.0):
    """Return what `found` returns once that is true; fails with `what` after a long while."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.02)
    return result
