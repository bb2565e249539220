"""The agent's routes on a real FastAPI application with vLLM's own error handlers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sedac.agent.engine import AttachedEngine
from sedac.agent.plugin import AgentPlugin
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from testing.workers import Workers

REPORT = {"request_id": "cmpl-abc", "tier": "balanced", "certified": True, "revision": 3, "num_tokens": 40, "mlp_share": 0.626}


@pytest.fixture
def app():
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    init_exception_handler(app)
    AgentPlugin().attach_router(app)
    return app


def test_a_response_can_be_asked_what_it_was_computed_with(app):
    workers = Workers()
    workers.reports["cmpl-abc"] = REPORT
    app.state.sedac_agent = SimpleNamespace(engine=AttachedEngine(client=workers), stop=asyncio.Event().wait)
    client = TestClient(app)
    assert client.get("/sedac/v1/requests/cmpl-abc").json() == REPORT
    missing = client.get("/sedac/v1/requests/cmpl-xyz")
    assert missing.status_code == 404
    assert "request 'cmpl-xyz' is unknown or forgotten" in missing.text


def test_a_server_without_an_agent_says_so(app):
    client = TestClient(app)
    assert client.get("/sedac/status").json() == {"state": "NOT_ATTACHED"}
    answer = client.get("/sedac/v1/requests/cmpl-abc")
    assert answer.status_code == 404
    assert "ask the first one" in answer.text


def test_workers_that_do_not_answer_are_http_503(app):
    async def collective_rpc(*args):
        raise TimeoutError

    app.state.sedac_agent = SimpleNamespace(engine=AttachedEngine(client=SimpleNamespace(collective_rpc=collective_rpc)))
    assert TestClient(app).get("/sedac/v1/requests/cmpl-abc").status_code == 503
