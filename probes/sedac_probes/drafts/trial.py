"""A trial of a draft in the engine that will serve, in a process of its own: what passes and steps take, what is accepted.

`run_trial` starts `python -m sedac_probes.drafts.trial JOB RESULT`, because a process has one engine. Every request has the engine for itself;
rounds without drafts and with one, two .. drafts follow one another in turn, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sedac.contract.stats import DraftingStats
from sedac.errors import ConfigError
from sedac.policy.model import Policy, Speculation

_MAX_ERROR = 600


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to try."""

    model: str
    draft: str
    """Directory of the draft."""
    probe_set: str = ""
    """Directory of the probe set. If empty, none is attached."""
    prompts: Sequence[Sequence[int]]
    num_tokens: int
    """Output tokens per prompt."""
    lengths: Sequence[int]
    """Limits of drafts per step. Each is tried beside none."""
    min_confidence: float = 0.0
    num_rounds: int = 3
    dtype: str = "auto"
    is_eager: bool = False


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Totals of the decode steps under one number of drafts; prompts' steps are not in them."""

    num_steps: int
    num_tokens: int
    num_drafted: int
    accepted_at: tuple[int, ...]
    """Drafts accepted, by position."""
    reached_at: tuple[int, ...]
    """Drafts verified, by position."""
    num_passes: int
    draft_seconds: float
    seconds: float
    """Seconds of the steps, drafting included."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was measured."""

    decodings: dict[int, Decoding]
    """Totals by limit of drafts per step. 0 means none."""

    @property
    def plain(self) -> float:
        """Seconds of a step without drafts."""
        return self.decodings[0].seconds / self.decodings[0].num_steps

    @property
    def draft_pass(self) -> float:
        """Seconds of a draft pass."""
        drafting = [d for length, d in self.decodings.items() if length]
        return sum(d.draft_seconds for d in drafting) / max(1, sum(d.num_passes for d in drafting))

    @property
    def verify(self) -> float:
        """Seconds of a step that verifies drafts, less what each of them adds."""
        return self._fit_steps()[0]

    @property
    def row(self) -> float:
        """Seconds that each verified draft adds."""
        return self._fit_steps()[1]

    def _fit_steps(self) -> tuple[float, float]:
        drafting = [d for length, d in self.decodings.items() if length]
        seconds = np.array([(d.seconds - d.draft_seconds) / d.num_steps for d in drafting])
        drafted = np.array([d.num_drafted / d.num_steps for d in drafting])
        if len(drafting) == 1 or np.ptp(drafted) == 0:
            return float(seconds.mean()), 0.0
        row, verify = np.polyfit(drafted, seconds, 1).tolist()
        return (verify, row) if row > 0 else (float(seconds.mean()), 0.0)

    def get_speedup(self, length: int) -> float:
        """Return tokens per second with up to `length` drafts over tokens per second without, in the same engine."""
        plain, drafting = self.decodings[0], self.decodings[length]
        return (drafting.num_tokens / drafting.seconds) / (plain.num_tokens / plain.seconds)

    def get_acceptance(self, length: int) -> tuple[float, ...]:
        """Return, by position, the share of drafts accepted where those before were; where fewer drafts than `length` were made, those count
        as refused."""
        found = self.decodings[length]
        before = (found.reached_at[0], *found.accepted_at)
        return tuple(a / b if b else 0.0 for a, b in zip(found.accepted_at[:length], before, strict=False))


def run_trial(job: Job) -> Trial:
    """Start an engine with the draft, measure, end it.

    Raises:
        ConfigError: the engine did not start, or ended with an error; the end of its output is in the message.
    """
    with tempfile.TemporaryDirectory() as directory:
        job_path, result_path = Path(directory) / "job.json", Path(directory) / "result.json"
        job_path.write_text(json.dumps(asdict(job)))
        command = [sys.executable, "-m", "sedac_probes.drafts.trial", str(job_path), str(result_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"no engine could try the draft {job.draft}: {(done.stdout + done.stderr).strip()[-_MAX_ERROR:]}")
        return from_dict(json.loads(result_path.read_text()))


def from_dict(data: dict[str, Any]) -> Trial:
    """Build from `dataclasses.asdict`'s form, also after JSON."""
    decodings = {}
    for length, fields in data["decodings"].items():
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        decodings[int(length)] = Decoding(**values)
    return Trial(decodings=decodings)


def _measure(job: Job) -> Trial:
    """Run the job in this process."""
    from vllm import SamplingParams

    from sedac_probes.collecting.recording import start_engine

    longest = max(len(p) for p in job.prompts) + job.num_tokens
    llm = start_engine(
        job.model, probe_set=Path(job.probe_set) if job.probe_set else None, dtype=job.dtype, max_length=longest,
        draft=Path(job.draft), num_draft_tokens=max(job.lengths), is_eager=job.is_eager,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=job.num_tokens, ignore_eos=True, detokenize=False)

    def get_totals() -> DraftingStats:
        """Return the engine's totals of drafting."""
        return DraftingStats.from_dict(llm.collective_rpc("sedac_get_stats")[0]["drafting"])

    def decode(length: int, prompts: Sequence[Sequence[int]]) -> DraftingStats:
        """Answer the prompts with up to so many drafts per step, and return what that added to the totals."""
        knobs = Speculation(enabled=length > 0, max_tokens=length, min_confidence=job.min_confidence, adaptive=False)
        answer = llm.collective_rpc("sedac_apply", args=(Policy(speculation=knobs).to_dict(), 1))[0]
        assert not answer["violations"], answer
        before = get_totals()
        for prompt in prompts:
            llm.generate([{"prompt_token_ids": list(prompt)}], params, use_tqdm=False)
        return get_totals().since(before)

    lengths = (0, *job.lengths)
    for length in lengths:
        decode(length, job.prompts[:1])  # what is compiled or allocated late
    totals: dict[int, DraftingStats] = {}
    for _ in range(job.num_rounds):
        for length in lengths:
            found = decode(length, job.prompts)
            totals[length] = totals[length].plus(found) if length in totals else found
    return Trial(decodings={length: _sum_up(total, job.num_rounds * len(job.prompts)) for length, total in totals.items()})


def _sum_up(total: DraftingStats, num_requests: int) -> Decoding:
    return Decoding(
        num_steps=sum(total.lengths) - num_requests,  # a request's first token comes from its prompt
        num_tokens=sum(total.lengths) + total.num_accepted - num_requests,
        num_drafted=total.num_drafted,
        accepted_at=total.accepted_at,
        reached_at=total.drafted_at,
        num_passes=total.num_passes,
        draft_seconds=total.draft_seconds,
        seconds=total.step_seconds,
    )


if __name__ == "__main__":
    done = _measure(Job(**json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps(asdict(done)))
