"""One operator who changes the policy and swaps probe sets, each change in force before the next."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from pathlib import Path

import torch
from sedac.client.client import ControlClient
from sedac.contract import wire
from sedac.contract.v1 import control_pb2
from sedac.errors import NotSynced, SedacError
from sedac.policy.model import Checkpoint, Policy
from sedac.probe import artifact

from benchmarks.control.results import ROOT


def make_sets(directory: Path, count: int) -> list[Path]:
    """Write the demo's probe set `count` times, each with its weights a little off, without levels of its own."""
    demo = artifact.load(ROOT / "probes" / "sedac_demo" / "probe-set")
    made = []
    for number in range(count):
        torch.manual_seed(number)
        for probe in demo.probes.values():
            with torch.no_grad():
                for weight in probe.parameters():
                    weight.mul_(1 + 0.001 * torch.randn_like(weight))
        manifest = dataclasses.replace(demo.manifest, name=f"swap-{number}", levels=(), tiers=(), intermediate_size=0, activation="")
        made.append(directory / manifest.name)
        artifact.save(made[-1], manifest, demo.probes)
    return made


class Watcher:
    """Follows the one engine by WatchEngines, in a thread of its own until the client closes; asking again and again would load both."""

    def __init__(self, client: ControlClient) -> None:
        self._client, self._changed, self._revision = client, threading.Condition(), 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        with contextlib.suppress(SedacError):
            for answer in self._client.watch_engines():
                with self._changed:
                    self._revision = max([e.active_revision for e in answer.engines if e.state == control_pb2.ENGINE_STATE_SYNCED], default=0)
                    self._changed.notify_all()

    def wait_until_synced(self, revision: int, timeout_seconds: float) -> None:
        """Return once the engine runs `revision` or a newer one."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._revision >= revision, timeout_seconds):
                raise NotSynced(f"revision {revision} is not in force after {timeout_seconds:g} s")


class Changer:
    """Makes changes one after the other; each is in force in the engine, or replaced, before the next."""

    def __init__(self, client: ControlClient, sets: list[Path], num_changes: int) -> None:
        self._client, self._sets, self._watcher = client, sets, Watcher(client)
        self._every = num_changes // len(sets) if sets else num_changes + 1
        self._policy: Policy = wire.policy_from_proto(client.get_policy())
        self.num_changes = self.num_swaps = 0
        self.seconds: list[float] = []
        """The time of each change, from asking for it until the operator saw it in force."""
        self.swap_seconds: list[float] = []

    def change(self) -> None:
        """Turn a threshold; with every so many changes upload and name another probe set, and delete the last but one."""
        started, self.num_changes = time.monotonic(), self.num_changes + 1
        is_swap = self.num_changes % self._every == 0 and self.num_swaps < len(self._sets)
        policy = self._policy
        if is_swap:
            self._client.upload_probe_set(self._sets[self.num_swaps])
            policy, self.num_swaps = dataclasses.replace(policy, probe_set=self._sets[self.num_swaps].name), self.num_swaps + 1
        scale = 0.9 + 0.2 * (self.num_changes % 7) / 6
        self._policy = policy
        turned = tuple(Checkpoint(**{**vars(c), "threshold": c.threshold * scale}) for c in policy.checkpoints)
        revision = self._client.update_policy(dataclasses.replace(policy, checkpoints=turned, certificate=None)).revision
        self._watcher.wait_until_synced(revision, 60)
        (self.swap_seconds if is_swap else self.seconds).append(time.monotonic() - started)
        if is_swap and self.num_swaps > 2:
            self._client.delete_probe_set(self._sets[self.num_swaps - 3].name)

    def run_until(self, end: float, target: int) -> None:
        """Make changes at an even pace, so that `target` of them are made by `end` on the monotonic clock."""
        missing = target - self.num_changes
        begin, first = time.monotonic(), self.num_changes
        while self.num_changes < target and time.monotonic() < end:
            self.change()
            due = begin + (end - begin) * (self.num_changes - first) / missing
            time.sleep(max(0.0, due - time.monotonic()))
        time.sleep(max(0.0, end - time.monotonic()))
