"""Audits and sides on the running product: what is reported is what anybody can compute from the API, and no response shows it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from safetensors.torch import load_file, save_file
from sedac.contract import wire
from sedac.contract.v1 import rollouts_pb2, rollouts_pb2_grpc
from sedac.policy.model import Audit, Checkpoint, Policy, Speculation, Tier
from sedac_probes import corpus

pytestmark = pytest.mark.e2e

PROMPTS = corpus.cut_prompts(corpus.read_stdlib("heldout"), num_prompts=24, num_chars=160)
PROBE_SET = Path("probes/sedac_demo/probe-set")
WAIT_SECONDS = 60
NUM_TOKENS = 48


def _read_status(served) -> dict[str, Any]:
    with urllib.request.urlopen(f"{served.url}/sedac/status", timeout=30) as answer:
        status: dict[str, Any] = json.load(answer)
    return status


def _find_page(served, side: str = "stable", tier: str = "balanced") -> dict[str, Any]:
    return next(page for page in _read_status(served)["evidence"] if (page["side"], page["tier"]) == (side, tier))


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.1)


def _set_policy(control, served, threshold: float, audit_share: float, *, last_only: bool = False, drafts: bool = True) -> Policy:
    """Audit under one threshold for every checkpoint, or for the last while the others are off."""
    layers = _read_status(served)["layout"]["checkpoint_layers"]
    policy = Policy(
        enabled=True,
        strict=True,
        checkpoints=tuple(Checkpoint(layer=layer, threshold=threshold if layer == layers[-1] or not last_only else 0.0) for layer in layers),
        tiers=(Tier(name="balanced", level="skip"),),
        audit=Audit(share=audit_share),
        speculation=Speculation(enabled=drafts),
    )
    made = control.update_policy(policy)
    control.wait_until_synced(made.revision, 30)
    return policy


def _complete(served, prompt: Any, *, max_tokens: int = NUM_TOKENS, xargs: dict[str, Any] | None = None, **options: Any) -> Any:
    extra = {"ignore_eos": True, "return_token_ids": True, **options.pop("extra_body", {})} | ({"vllm_xargs": xargs} if xargs else {})
    return served.make_openai().completions.create(
        model="sedac-demo", prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=extra, **options
    )


def _score_in_full(served, prompt: list[int], answer: list[int]) -> tuple[list[bool], list[float]]:
    """Ask the API itself what the full model thinks of each token of an answer: whether it is no top choice, and its log-probability."""
    scored = _complete(
        served, prompt + answer, max_tokens=1, xargs={"sedac_tier": "exact"}, extra_body={"prompt_logprobs": 1, "cache_salt": "never seen before"}
    )
    positions = scored.choices[0].model_extra["prompt_logprobs"][len(prompt) :]
    own = [position[str(token)]["logprob"] for token, position in zip(answer, positions, strict=True)]
    best = [max(choice["logprob"] for choice in position.values()) for position in positions]
    return [top > found for top, found in zip(best, own, strict=True)], own


@pytest.mark.parametrize("last_only", [False, True])
def test_an_audit_finds_what_the_full_model_says_of_the_same_tokens(served, control, last_only):
    _set_policy(control, served, 1e9, 1.0, last_only=last_only)
    done = _complete(served, PROMPTS[0])
    _until(lambda: _find_page(served)["num_audited"] == 1)
    prompt, answer = done.choices[0].prompt_token_ids, done.choices[0].token_ids
    mismatches, in_full = _score_in_full(served, prompt, answer)
    page = _find_page(served)
    again = _complete(served, PROMPTS[0], logprobs=0)
    assert again.choices[0].token_ids == answer
    lost = (sum(again.choices[0].logprobs.token_logprobs) - sum(in_full)) / len(answer)
    print(f"\n{sum(mismatches)} of {len(answer)} mismatch, {lost:.4f} nats lost; reported {page['mismatch']}, {page['nll_difference']}")
    assert page["num_audited_tokens"] == len(answer) == NUM_TOKENS
    assert sum(mismatches) > 0
    assert page["mismatch"]["mean"] == sum(mismatches) * 1000 // len(answer) / 1000
    assert last_only == (lost < 1), "one of the two is within what a histogram holds"
    assert page["nll_difference"]["mean"] == pytest.approx(min(lost, 1.0), abs=0.002)
    _until(lambda: _find_page(served)["num_audited"] == 2)
    assert _find_page(served)["mismatch"]["mean"] == page["mismatch"]["mean"], "the same where the user asked for log-probabilities as well"
    assert _find_page(served)["num_audit_failures"] == 0
    assert served.read_metrics()["sedac_audited_answers_total{balanced,stable}"] >= 2

    def has_reported() -> bool:
        evidence = control.get_status().engines[0].report.evidence
        return any(sum(e.nll_difference_counts.values()) == 2 for e in evidence if e.tier == "balanced")

    _until(has_reported)


def test_where_nothing_is_reduced_nothing_is_found(served, control):
    _set_policy(control, served, 0.0, 1.0)
    for prompt in PROMPTS[:4]:
        _complete(served, prompt)
    _until(lambda: _find_page(served)["num_audited"] == 4)
    page = _find_page(served)
    assert page["num_audited_tokens"] == 4 * NUM_TOKENS
    assert page["mismatch"]["mean"] == 0
    assert abs(page["nll_difference"]["mean"]) <= 0.002
    assert page["num_requests"] == 4, "audits are no requests"
    assert page["mean_first_token_seconds"] > 0
    assert page["mean_token_seconds"] > 0
    assert next(p for p in _read_status(served)["evidence"] if p["tier"] == "exact")["num_requests"] == 0


def test_responses_are_the_same_with_audits_and_without(served, control):
    client = served.make_openai()
    chat = [{"role": "user", "content": "open a file"}]

    def ask() -> list[Any]:
        options = {"model": "sedac-demo", "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
        answers = [
            client.completions.create(prompt=PROMPTS[1], **options),
            client.completions.create(prompt=PROMPTS[1], **(options | {"n": 2, "temperature": 0.7, "seed": 3})),
            client.completions.create(prompt=PROMPTS[1], logprobs=2, **options),
            client.chat.completions.create(messages=chat, **options),
            client.chat.completions.create(messages=chat, logprobs=True, top_logprobs=2, **options),
        ]
        streams = [
            [(c.choices[0].text, c.choices[0].logprobs) for c in client.completions.create(prompt=PROMPTS[1], stream=True, **options)],
            [(c.choices[0].delta.content, c.choices[0].logprobs) for c in client.chat.completions.create(messages=chat, stream=True, **options)],
        ]
        whole = [{name: value for name, value in answer.to_dict().items() if name not in ("id", "created")} for answer in answers]
        # Tokens that come while a chunk is on its way share the next one, so that chunks differ from one time to the next.
        return whole + [("".join(text or "" for text, _ in stream), {logprobs for _, logprobs in stream}) for stream in streams]

    # Without drafts: their lengths follow measured time, and log-probabilities follow by rounding, and answers with a seed at a temperature.
    _set_policy(control, served, 1e9, 0.0, drafts=False)
    ask()  # so that both find the same prefixes cached
    plain = ask()
    _set_policy(control, served, 1e9, 1.0, drafts=False)
    assert ask() == plain
    _until(lambda: _find_page(served)["num_audited"] == 8)
    assert _find_page(served)["num_audit_failures"] == 0


def _make_reckless_set(directory: Path) -> None:
    """Write the served probe set anew under the name `reckless`, with probes that take no token for a risk."""
    manifest = json.loads((PROBE_SET / "manifest.json").read_text())
    tensors = load_file(PROBE_SET / "probes.safetensors")
    for name in tensors:
        if name.endswith("out.bias"):
            tensors[name] = tensors[name] - 1e4
    save_file(tensors, directory / "probes.safetensors", metadata={"format": "sedac-probe-set/1"})
    manifest |= {"name": "reckless", "sha256": hashlib.sha256((directory / "probes.safetensors").read_bytes()).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))


@contextlib.contextmanager
def _rolling_out(served, candidate: Policy, share: float) -> Iterator[rollouts_pb2.Rollout]:
    """Give a candidate its share of the requests, without an analysis that would end it."""
    with grpc.insecure_channel(served.control_address) as channel:
        rollouts = rollouts_pb2_grpc.RolloutsStub(channel)
        bounds = rollouts_pb2.RolloutBounds(max_mismatch=1.0)
        started = rollouts.StartRollout(
            rollouts_pb2.StartRolloutRequest(
                policy=wire.policy_to_proto(candidate), shares=[share], interval_seconds=3600, bounds=bounds, comment="e2e"
            )
        )
        _until(lambda: (_read_status(served)["candidate"] or {}).get("rollout") == started.number)
        yield started
        rollouts.AbortRollout(rollouts_pb2.ChangeRolloutRequest(name=started.name))
        _until(lambda: _read_status(served)["candidate"] is None)


def test_a_candidate_with_other_probes_is_fetched_and_serves_its_side_alone(served, control, tmp_path):
    stable = _set_policy(control, served, 1e-9, 1.0)
    _make_reckless_set(tmp_path)
    control.upload_probe_set(tmp_path)
    with _rolling_out(served, replace(stable, probe_set="reckless"), 0.5):
        for i in range(12):
            _complete(served, PROMPTS[i], max_tokens=16, xargs={"sedac_key": f"user-{i}"})
        _until(lambda: sum(_find_page(served, side)["num_audited"] for side in ("stable", "candidate")) == 12)
        assert _find_page(served, "stable")["mismatch"]["mean"] == 0, "the attached probes find every token risky"
        assert _find_page(served, "candidate")["mismatch"]["mean"] > 0, "the candidate's find none"
    made = control.update_policy(replace(stable, probe_set="reckless"))
    control.wait_until_synced(made.revision, 30)
    _complete(served, PROMPTS[0])
    _until(lambda: _find_page(served)["num_audited"] == 1)
    assert _find_page(served)["mismatch"]["mean"] > 0
    assert _read_status(served)["stats"]["num_torn_steps"] == 0


def test_the_server_answers_only_after_the_services_policy_is_applied(served):
    log = served.log.read_text()
    assert "policy revision 1 in force" in log
    assert log.index("policy revision 1 in force") < log.index("Application startup complete")


def test_a_roll_out_has_its_share_of_the_requests_and_keeps_its_keys(served, control):
    stable = _set_policy(control, served, 0.0, 1.0)
    skipping = replace(stable, checkpoints=tuple(replace(c, threshold=1e9) for c in stable.checkpoints))
    with _rolling_out(served, skipping, 0.5) as rollout:
        for i in range(12):
            _complete(served, PROMPTS[i], max_tokens=16, xargs={"sedac_key": f"user-{i}"})
        _until(lambda: sum(_find_page(served, side)["num_audited"] for side in ("stable", "candidate")) == 12)
        stable_page, candidate_page = (_find_page(served, side) for side in ("stable", "candidate"))
        assert min(stable_page["num_requests"], candidate_page["num_requests"]) >= 1
        assert stable_page["mismatch"]["mean"] == 0, "the stable side computes everything"
        assert candidate_page["mismatch"]["mean"] > 0, "the candidate skips"
        before = candidate_page["num_requests"]
        seconds = served.read_metrics()["sedac_request_token_seconds_count{candidate}"]
        for i in range(12):
            _complete(served, PROMPTS[12 + i], max_tokens=8, xargs={"sedac_key": f"user-{i}"})
        _until(lambda: sum(_find_page(served, side)["num_requests"] for side in ("stable", "candidate")) == 24)
        assert _find_page(served, "candidate")["num_requests"] == 2 * before, "a key keeps its side"
        metrics = served.read_metrics()
        assert metrics["sedac_rollout"] == rollout.number
        assert metrics["sedac_request_token_seconds_count{candidate}"] - seconds == before
