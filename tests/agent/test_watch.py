"""What is seen of requests in vLLM's own output processor: latency, kept log-probabilities that nobody else sees, and audits."""

from __future__ import annotations

import asyncio
import copy
import math

import numpy as np
import pytest
from sedac.agent import promise
from sedac.agent.audits import Auditor
from sedac.agent.evidence import Book, open_book
from sedac.agent.promise import Terms
from sedac.agent.scoring import Answer, Loss
from sedac.agent.watch import Watch
from sedac.policy.model import Audit, Candidate, Policy, Tier
from sedac.policy.request_keys import TIER_KEY
from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import IterationStats
from vllm.v1.outputs import LogprobsLists

POLICY = Policy(enabled=True, tiers=(Tier(name="mine"),), default_tier="mine", audit=Audit(share=1.0))
TERMS = Terms(policy=POLICY, levels=("full", "skip"), can_audit=True)
PROMPT = [5, 6]


class Seen:
    """A watched output processor, and what was seen there."""

    def __init__(self, *, log_stats: bool = True, own: frozenset[str] = frozenset()) -> None:
        self.books: dict[int, Book] = {0: open_book(None, POLICY, revision=3)}
        self.answers: list[Answer] = []
        self.wanting: set[str] = set()
        """requests that the engine returns log-probabilities of"""
        self.latencies: list[tuple] = []
        self.processor = OutputProcessor(None, log_stats=log_stats)
        self.watch = Watch(
            find_book=self.books.get,
            on_latency=lambda page, first, each: self.latencies.append((page.side, first, each)),
            on_answer=lambda page, answer: self.answers.append(answer),
            is_own=own.__contains__,
        )
        self.watch.install(self.processor)

    @property
    def page(self):
        return self.books[0].get_page("mine")

    def add(self, request: EngineCoreRequest, *rest, external: str | None = None) -> RequestOutputCollector:
        request.external_req_id = external or request.request_id
        queue = RequestOutputCollector(request.sampling_params.output_kind, request.request_id)
        self.processor.add_request(request, None, *(rest or (None, 0)), queue)
        if request.sampling_params.logprobs is not None:
            self.wanting.add(request.request_id)
        return queue

    def step(self, request_id: str, tokens: list[int], *, at: float, reason: FinishReason | None = None) -> None:
        logprobs = LogprobsLists(
            np.array([[t, 99] for t in tokens]), np.array([[-t / 10, -9.0] for t in tokens], dtype=np.float32), np.array([2 for _ in tokens])
        )
        output = EngineCoreOutput(
            request_id=request_id, new_token_ids=tokens, new_logprobs=logprobs if request_id in self.wanting else None, finish_reason=reason
        )
        self.processor.process_outputs([output], at, IterationStats() if self.processor.log_stats else None)


def make_request(name: str = "r1", terms: Terms = TERMS, **knobs) -> EngineCoreRequest:
    params = SamplingParams(**({"temperature": 0, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY} | knobs))
    request = EngineCoreRequest(
        request_id=name,
        prompt_token_ids=PROMPT,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    promise.stamp(request, terms)
    return request


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize("asked", [None, 1])
def test_an_audited_answer_is_kept_and_the_response_is_as_without(kind, asked):
    async def run(seen: Seen | None) -> list[RequestOutput]:
        processor = seen or Seen()
        terms = TERMS if seen else Terms(policy=Policy(), levels=())
        queue, outputs = processor.add(make_request(terms=terms, logprobs=asked, output_kind=kind)), []
        for i, tokens in enumerate([[3], [1, 4], [2]]):
            processor.step("r1", tokens, at=float(i), reason=FinishReason.LENGTH if i == 2 else None)
            if (output := queue.get_nowait()) is not None:
                outputs.append(output)
        return outputs

    def show(outputs: list[RequestOutput]) -> list:
        return [(o.finished, o.prompt_token_ids, o.prompt_logprobs, [repr(c) for c in o.outputs]) for o in outputs]

    seen = Seen()
    watched = asyncio.run(run(seen))
    (answer,) = seen.answers
    assert (answer.prompt_ids, answer.token_ids, answer.is_greedy) == (PROMPT, [3, 1, 4, 2], True)
    assert answer.logprobs == pytest.approx([-0.3, -0.1, -0.4, -0.2])
    if asked is None:
        assert all(choice.logprobs is None and choice.cumulative_logprob is None for output in watched for choice in output.outputs)
    else:
        assert show(watched) == show(asyncio.run(run(None)))


def test_latency_and_ends_are_counted():
    seen = Seen()
    for name, tokens, reason in (("r1", [[3], [4], [5]], FinishReason.STOP), ("r2", [[3]], FinishReason.LENGTH), ("r3", [[3]], FinishReason.ERROR)):
        seen.add(make_request(name))
        for i, each in enumerate(tokens):
            seen.step(name, each, at=10.0 + 2 * i, reason=reason if i == len(tokens) - 1 else None)
    page = seen.page
    assert (page.num_requests, page.num_errors) == (3, 1)
    assert (page.first_token_seconds.count, page.token_seconds) == (2, type(page.token_seconds)(1, 2.0, 4.0))
    assert [each for _, _, each in seen.latencies] == [2.0, None, None]
    assert len(seen.answers) == 2, "what ended in an error is no answer"


def test_what_a_client_gave_up_is_no_evidence():
    seen = Seen()
    seen.add(make_request())
    seen.step("r1", [3], at=1.0)
    assert seen.processor.abort_requests(["r1"], internal=True) == ["r1"]
    seen.step("r1", [3], at=2.0, reason=FinishReason.ABORT)
    assert (seen.page.num_requests, seen.answers) == (0, [])


@pytest.mark.parametrize("name", ["r1", "sedac-audit-1"])
def test_activity_is_what_began_or_is_unfinished(name):
    seen = Seen(own=frozenset(["sedac-audit-1"]))
    take = seen.watch.take_activity
    assert not take()
    seen.add(make_request(name))
    assert [take(), take()] == [True, True], "it runs"
    seen.step(name, [3], at=1.0, reason=FinishReason.STOP)
    assert not take(), "it was told of already"
    seen.add(make_request(name))
    seen.step(name, [3], at=1.0, reason=FinishReason.STOP)
    assert [take(), take()] == [True, False], "it came and went between two calls"


def test_every_choice_of_a_request_counts_for_itself():
    seen = Seen()
    request = make_request(n=2, temperature=0.7, seed=1)
    request.external_req_id = "r1"
    parent = ParentRequest(request)
    for index in range(2):
        child = copy.copy(request)
        child.request_id, child.sampling_params = parent.get_child_info(index)
        seen.add(child, parent, index, external="r1")
    for index in range(2):
        seen.step(f"{index}_r1", [3 + index], at=1.0, reason=FinishReason.STOP)
    assert [(a.token_ids, a.is_greedy) for a in seen.answers] == [([3], False), ([4], False)]
    assert seen.page.num_requests == 2


def test_sides_have_books_of_their_own_and_requests_keep_the_page_of_their_arrival():
    seen = Seen()
    candidate = Policy(enabled=True)
    seen.books[7] = open_book(None, candidate, rollout=7)
    terms = Terms(policy=POLICY, levels=(), candidate=Candidate(rollout=7, policy=candidate, share=1.0), can_audit=True)
    seen.add(make_request("r1", terms))
    seen.add(make_request("r2"))
    before = seen.page
    seen.books[0] = open_book(before and seen.books[0], POLICY, revision=4)
    for name in ("r1", "r2"):
        seen.step(name, [3], at=1.0, reason=FinishReason.STOP)
    assert seen.books[7].get_page("balanced").num_requests == 1
    assert (before.num_requests, seen.page.num_requests) == (1, 0)
    seen.add(make_request("r3", Terms(policy=POLICY, levels=(), candidate=Candidate(rollout=8, policy=candidate, share=1.0))))
    seen.step("r3", [3], at=1.0, reason=FinishReason.STOP)
    assert sum(page.num_requests for book in seen.books.values() for page in book.pages.values()) == 1, "the roll-out was over by then"


def test_audits_and_unfinished_inputs_are_not_watched():
    seen = Seen(own=frozenset(["sedac-audit-1"]))
    seen.add(make_request("sedac-audit-1"))
    unfinished = make_request("r2")
    unfinished.resumable = True
    seen.add(unfinished)
    for name in ("sedac-audit-1", "r2"):
        seen.step(name, [3], at=1.0, reason=FinishReason.STOP)
    assert (seen.page.num_requests, seen.answers) == (0, [])


def test_without_vllms_statistics_requests_count_and_latency_does_not():
    seen = Seen(log_stats=False)
    seen.add(make_request())
    seen.step("r1", [3], at=1.0, reason=FinishReason.STOP)
    assert (seen.page.num_requests, seen.page.first_token_seconds.count, len(seen.answers)) == (1, 0, 1)


def test_an_error_of_the_watch_costs_no_request(caplog):
    seen = Seen()
    seen.watch._on_answer = lambda page, answer: 1 / 0
    queue = seen.add(make_request())
    seen.step("r1", [3], at=1.0, reason=FinishReason.STOP)
    assert queue.get_nowait().finished
    assert "left out of the evidence" in caplog.text


class FullModel:
    """Stands in for vLLM's engine client: gives every token of a prompt the same log-probability, after what a test lets it wait for."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.salts: list[str] = []
        self.calls: list[tuple] = []
        self.num_queued = 0
        self.running = self.most_running = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    def get_num_queued_tokens(self) -> int:
        return self.num_queued

    async def generate(self, prompt, params, request_id, *, priority):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.prompts.append(prompt["prompt_token_ids"])
        self.salts.append(prompt["cache_salt"])
        self.calls.append((params, request_id, priority))
        await self.gate.wait()
        self.running -= 1
        if self.error:
            raise self.error
        scores = [None, *({t: Logprob(-1.0), 99: Logprob(-0.5 if t % 2 else -1.0)} for t in prompt["prompt_token_ids"][1:])]
        yield RequestOutput(request_id=request_id, prompt=None, prompt_token_ids=[], prompt_logprobs=scores, outputs=[], finished=True)


class Audits:
    """An auditor at work."""

    def __init__(self, **knobs) -> None:
        self.model = FullModel()
        self.page = open_book(None, POLICY, revision=3).get_page("mine")
        self.results: list = []
        self.auditor = Auditor(
            client=self.model, on_result=lambda page, result: self.results.append(result), **({"max_model_len": 16, "patience_seconds": 0.05} | knobs)
        )

    def add(self, *tokens: int) -> None:
        self.auditor.add(self.page, Answer(prompt_ids=PROMPT, token_ids=list(tokens), logprobs=[-0.5] * len(tokens), is_greedy=True))

    async def until(self, count: int) -> None:
        task = asyncio.create_task(self.auditor.run())
        async with asyncio.timeout(10):
            while len(self.results) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_answers_are_scored_one_by_one_behind_everybody_under_salts_of_their_own():
    async def scenario() -> None:
        audits = Audits()
        audits.add(2, 3, 4)
        audits.add(3, 3)
        await audits.until(2)
        assert audits.results == [
            Loss(num_tokens=3, num_mismatches=1, nll_difference=0.5),
            Loss(num_tokens=2, num_mismatches=2, nll_difference=0.5),
        ]
        assert audits.model.prompts == [[5, 6, 2, 3, 4], [5, 6, 3, 3]]
        assert audits.model.most_running == 1
        assert len(set(audits.model.salts)) == 2
        for params, request_id, priority in audits.model.calls:
            assert (params.max_tokens, params.prompt_logprobs, params.extra_args) == (1, 1, {TIER_KEY: "exact"})
            assert priority > 0
            assert not audits.auditor.is_own(request_id), "over"
        assert (audits.page.num_audited_tokens, dict(audits.page.mismatch_counts)) == (5, {333: 1, 1000: 1})

    asyncio.run(scenario())


def test_an_audit_knows_its_own_request_while_it_runs():
    async def scenario() -> None:
        audits = Audits()
        audits.model.gate.clear()
        audits.add(2)
        task = asyncio.create_task(audits.until(1))
        while not audits.model.calls:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert audits.auditor.is_own(audits.model.calls[0][1])
        audits.model.gate.set()
        await task

    asyncio.run(scenario())


def test_an_answer_longer_than_the_context_is_scored_as_far_as_it_fits():
    async def scenario() -> None:
        audits = Audits(max_model_len=6)
        audits.add(2, 2, 2, 2)
        await audits.until(1)
        assert (audits.model.prompts, audits.results[0].num_tokens) == ([[5, 6, 2, 2, 2]], 3)

    asyncio.run(scenario())


def test_audits_wait_for_waiting_prompts_though_not_for_ever():
    async def scenario() -> None:
        audits = Audits(patience_seconds=30)
        audits.model.num_queued = 100
        audits.add(2)
        task = asyncio.create_task(audits.until(1))
        await asyncio.sleep(0.1)
        assert not audits.model.calls
        audits.model.num_queued = 0
        await task
        restless = Audits(patience_seconds=0.01)
        restless.model.num_queued = 100
        restless.add(2)
        await restless.until(1)

    asyncio.run(scenario())


def test_the_oldest_answers_give_way_and_are_counted():
    async def scenario() -> None:
        audits = Audits()
        for i in range(300):
            audits.add(2, i % 2)
        assert (audits.results, audits.auditor.get_num_waiting()) == (["dropped"] * 44, 256)
        assert audits.page.num_audit_failures == 44
        long = Audits()
        for _ in range(3):
            long.auditor.add(long.page, Answer(prompt_ids=[1] * 2**21, token_ids=[1], logprobs=[0.0], is_greedy=True))
        assert (long.results, long.auditor.get_num_waiting()) == (["dropped", "dropped"], 1), "bounded in tokens as well"

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [RuntimeError("gone"), ValueError("refused")])
def test_a_failed_audit_is_counted_and_the_next_one_made(error):
    async def scenario() -> None:
        audits = Audits()
        audits.model.error = error
        audits.add(2)
        await audits.until(1)
        audits.model.error = None
        audits.add(2)
        await audits.until(2)
        assert audits.results == ["failed", Loss(num_tokens=1, num_mismatches=0, nll_difference=0.5)]
        assert (audits.page.num_audit_failures, sum(audits.page.mismatch_counts.values())) == (1, 1)

    asyncio.run(scenario())


def test_an_audit_that_takes_too_long_is_given_up():
    async def scenario() -> None:
        audits = Audits(timeout_seconds=0.02)
        audits.model.gate.clear()
        audits.add(2)
        await audits.until(1)
        assert audits.results == ["failed"]

    asyncio.run(scenario())


def test_sums_of_squares_are_sums_of_squares():
    seen = Seen()
    for seconds in (0.5, 1.5):
        seen.page.add_finished(is_error=False, first_token_seconds=seconds, token_seconds=None)
    assert seen.page.first_token_seconds.sum_squares == pytest.approx(2.5)
    assert math.isnan(seen.page.token_seconds.mean)
