"""The main path: serve, complete, tune over gRPC, see it in the metrics; and what must hold while that happens."""

from __future__ import annotations

import json
import signal
import threading
import time
import urllib.request

import openai
import pytest
from sedac.client.client import ControlClient
from sedac.contract.v1 import control_pb2
from sedac.errors import PolicyInvalid
from sedac.policy.model import Checkpoint, Policy, Tier
from sedac.policy.weights import get_weights_digest
from sedac_probes import corpus

from testing.strategies import certify

pytestmark = pytest.mark.e2e

PROMPTS = corpus.cut_prompts(corpus.read_stdlib("heldout"), num_prompts=32, num_chars=160)


def _get_layers(control: ControlClient) -> list[int]:
    return [c.layer for c in control.get_policy().checkpoints]


def _exits_at(layer: int) -> str:
    return f"sedac_exited_tokens_total{{{layer}}}"


def _set_thresholds(control: ControlClient, value: float, **knobs) -> int:
    checkpoints = tuple(Checkpoint(layer=layer, threshold=value) for layer in _get_layers(control))
    made = control.update_policy(Policy(enabled=True, checkpoints=checkpoints, **knobs))
    control.wait_until_synced(made.revision, 30)
    return made.revision


class Streams:
    """Clients that keep streaming completions until stopped; every failure is kept."""

    def __init__(self, served, count: int) -> None:
        self.failures: list[Exception] = []
        self.num_done = 0
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(served, i)) for i in range(count)]

    def _run(self, served, number: int) -> None:
        client = served.make_openai()
        while not self._stopping.is_set():
            prompt = PROMPTS[(number * 7 + self.num_done) % len(PROMPTS)]
            try:
                *chunks, last = client.completions.create(
                    model="sedac-demo", prompt=prompt, max_tokens=48, temperature=0, stream=True, stream_options={"include_usage": True},
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
                assert chunks[-1].choices[0].finish_reason == "length"
                assert last.usage.completion_tokens == 48, f"stream broke off after {last.usage.completion_tokens} tokens"
                self.num_done += 1
            except Exception as error:  # noqa: BLE001  whatever a client may see counts as a failed request
                self.failures.append(error)

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(120)


def test_completes_and_chats_and_says_what_is_attached(served):
    client = served.make_openai()
    completion = client.completions.create(model="sedac-demo", prompt="def read(self", max_tokens=16, temperature=0)
    assert completion.usage.completion_tokens > 0
    chat = client.chat.completions.create(model="sedac-demo", messages=[{"role": "user", "content": "open a file"}], max_tokens=16)
    assert chat.choices[0].message.role == "assistant"
    with urllib.request.urlopen(f"{served.url}/sedac/status", timeout=10) as answer:
        status = json.load(answer)
    assert status["state"] == "SYNCED"
    assert status["layout"]["probe_set"] == "demo"
    assert "SEDAC attached to Qwen2ForCausalLM" in served.log.read_text()


def test_an_unknown_tier_is_http_400_that_lists_the_tiers(served):
    with pytest.raises(openai.BadRequestError, match="tiers: 'exact'"):
        served.make_openai().completions.create(model="sedac-demo", prompt="x", extra_body={"vllm_xargs": {"sedac_tier": "turbo"}})


@pytest.mark.parametrize("num_swaps", [40, *(pytest.param(n, marks=pytest.mark.thorough) for n in (100, 500))])
def test_swaps_under_8_streams(served, control, num_swaps):
    layers, seen, stopping = _get_layers(control), [], threading.Event()

    def watch_revisions() -> None:
        while not stopping.is_set():
            seen.append(served.read_metrics()["sedac_policy_revision"])
            time.sleep(0.1)

    watcher = threading.Thread(target=watch_revisions)
    before = served.read_metrics()
    with Streams(served, 8) as streams:
        watcher.start()
        for i in range(num_swaps):
            thresholds = (0.0, 0.3, 1.0, 1e9)[i % 4]
            checkpoints = tuple(Checkpoint(layer=layer, threshold=thresholds) for layer in layers)
            made = control.update_policy(Policy(enabled=True, checkpoints=checkpoints))
            control.wait_until_synced(made.revision, 30)
    stopping.set()
    watcher.join(10)
    assert streams.failures == []
    assert streams.num_done >= 8
    time.sleep(1)
    after = served.read_metrics()
    assert after["sedac_torn_steps_total"] == 0
    assert after["sedac_policy_revision"] == made.revision
    assert after["sedac_policy_updates_total{ack}"] - before["sedac_policy_updates_total{ack}"] == num_swaps
    assert after["sedac_policy_updates_total{nack}"] == before["sedac_policy_updates_total{nack}"]
    assert seen == sorted(seen), "revisions only grow"
    assert len(set(seen)) > num_swaps // 25
    assert after[_exits_at(layers[0])] > before[_exits_at(layers[0])]


def test_exit_rate_on_metrics_follows_within_2_seconds(served, control):
    layers = _get_layers(control)
    first = _exits_at(layers[0])
    with Streams(served, 4) as streams:
        for threshold, expected in ((0.0, 0.0), (1e9, 1.0), (0.0, 0.0)):
            _set_thresholds(control, threshold)
            time.sleep(2)
            start, deadline, decoded = served.read_metrics(), time.monotonic() + 30, 0.0
            while not decoded and time.monotonic() < deadline:
                time.sleep(1.5)
                end = served.read_metrics()
                decoded = end["sedac_decode_tokens_total"] - start["sedac_decode_tokens_total"]
            assert decoded > 0
            exited = sum(end[name] - start[name] for name in end if name.startswith("sedac_exited_tokens_total"))
            if expected:
                assert exited == decoded, "every decode token exits"
                assert exited == end[first] - start[first], "at the first checkpoint"
            else:
                assert exited == 0
    assert streams.failures == []


def test_kill_9_of_the_control_service_under_load(served, control):
    revision = _set_thresholds(control, 0.5)
    with Streams(served, 4) as streams:
        time.sleep(1)
        service = served.find_control()
        service.send_signal(signal.SIGKILL)
        service.wait(10)
        deadline, stale = time.monotonic() + 5, False
        while not stale and time.monotonic() < deadline:
            stale = served.read_metrics()["sedac_control_connected"] == 0
        done = streams.num_done
        with ControlClient(served.control_address, author="e2e", timeout_seconds=60) as again:
            deadline = time.monotonic() + 30
            while True:
                try:
                    status = again.wait_until_synced(revision, 5)
                    break
                except Exception:  # noqa: BLE001  not back yet
                    assert time.monotonic() < deadline
                    time.sleep(0.2)
            assert status.policy.revision == revision, "the revision survived"
            assert status.engines[0].state == control_pb2.ENGINE_STATE_SYNCED
            assert again.get_policy().checkpoints[0].threshold == 0.5
        deadline = time.monotonic() + 60
        while streams.num_done < done + 4 and time.monotonic() < deadline:
            time.sleep(0.1)
    assert stale, "the engine says that it serves without the control service"
    assert streams.failures == []
    assert streams.num_done >= done + 4


def test_exact_requests_never_read_kv_of_reduced_ones(served, control):
    client = served.make_openai()
    prompt = corpus.cut_prompts(corpus.read_stdlib("heldout"), num_prompts=3, num_chars=700)[2]

    def generate(**extra):
        return client.completions.create(
            model="sedac-demo", prompt=prompt, max_tokens=160, temperature=0, extra_body={"ignore_eos": True, "return_token_ids": True} | extra
        )

    def score(tokens, **extra):
        completion = client.completions.create(model="sedac-demo", prompt=tokens, max_tokens=8, temperature=0, logprobs=0, extra_body=extra)
        return completion.choices[0].logprobs.token_logprobs

    _set_thresholds(control, 1e9)
    answer = generate()
    tokens = (answer.choices[0].prompt_token_ids + answer.choices[0].token_ids)[:400]
    assert len(tokens) > 256, "long enough that a cached block holds generated tokens"
    exact = {"vllm_xargs": {"sedac_tier": "exact"}}
    expected = score(tokens, cache_salt="never seen before", **exact)
    assert score(tokens, **exact) == pytest.approx(expected, abs=1e-4)
    control.update_policy(Policy(enabled=False), fields=["enabled"])
    control.wait_until_synced(control.get_policy().revision, 30)
    assert score(tokens) == pytest.approx(expected, abs=1e-4), "and after the policy was turned off"


def test_a_request_chooses_its_tier_and_asks_what_it_was_computed_with(served, control):
    layers = _get_layers(control)
    tiers = (Tier(name="balanced", level="full"), Tier(name="frugal", level="skip"))
    checkpoints = tuple(Checkpoint(layer=layer, threshold=1e9) for layer in layers)
    made = control.update_policy(Policy(enabled=True, checkpoints=checkpoints, tiers=tiers))
    control.wait_until_synced(made.revision, 30)
    client = served.make_openai()

    def ask(**xargs):
        return client.completions.create(
            model="sedac-demo", prompt=PROMPTS[0], max_tokens=24, temperature=0, extra_body={"ignore_eos": True, "vllm_xargs": xargs}
        )

    def report(completion) -> dict:
        with urllib.request.urlopen(f"{served.url}/sedac/v1/requests/{completion.id}", timeout=10) as answer:
            return json.load(answer)

    exact, frugal, default = ask(sedac_tier="exact"), ask(sedac_tier="frugal"), ask()
    assert report(exact)["mlp_share"] == 1
    assert (report(frugal)["tier"], report(frugal)["revision"]) == ("frugal", made.revision)
    assert report(frugal)["mlp_share"] < 0.9
    assert report(default)["tier"] == "balanced"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(sedac_tier="gold")
    assert all(name in str(refused.value) for name in ("exact", "balanced", "frugal"))
    with pytest.raises(openai.BadRequestError, match="override"):
        ask(sedac_tier="frugal", sedac_level="full")
    metrics = served.read_metrics()
    assert metrics["sedac_tier_tokens_total{frugal}"] >= 24


def test_a_certificate_is_held_against_the_model_that_serves_and_told_of_its_requests(served, control):
    layers = _get_layers(control)
    tiers = (Tier(name="balanced", level="skip"), Tier(name="frugal", level="skip"))
    policy = Policy(enabled=True, checkpoints=tuple(Checkpoint(layer=layer, threshold=1.0) for layer in layers), tiers=tiers, allow_overrides=True)
    (engine,) = control.get_status().engines
    weights, probe_set = engine.engine.weights_sha256, engine.engine.probe_set_sha256
    assert weights == get_weights_digest("probes/sedac_demo/model")
    with pytest.raises(PolicyInvalid, match=r"certificate\.weights_sha256: aaaaaaaaaaaa\.\.\., the engine has"):
        control.update_policy(certify(policy, weights="a" * 64, probe_set=probe_set))
    made = control.update_policy(certify(policy, weights=weights, probe_set=probe_set))
    control.wait_until_synced(made.revision, 30)
    assert control.get_status().certification == control_pb2.CERTIFICATION_CERTIFIED
    assert served.read_metrics()["sedac_policy_certified"] == 1
    client = served.make_openai()
    for xargs, certified in (
        ({}, True),
        ({"sedac_tier": "balanced"}, True),
        ({"sedac_tier": "frugal"}, False),
        ({"sedac_tier": "exact"}, False),
        ({"sedac_threshold_scale": 0.5}, False),
    ):
        done = client.completions.create(model="sedac-demo", prompt=PROMPTS[1], max_tokens=8, temperature=0, extra_body={"vllm_xargs": xargs})
        with urllib.request.urlopen(f"{served.url}/sedac/v1/requests/{done.id}", timeout=10) as answer:
            assert json.load(answer)["certified"] is certified, xargs
    made = control.update_policy(Policy(decay=0.5), fields=["decay"])
    control.wait_until_synced(made.revision, 30)
    assert served.read_metrics()["sedac_policy_certified"] == 0
