"""Entry point of `vllm.endpoint_plugins`: starts the agent in the API server and adds its routes.

GET /sedac/status says what is attached and in force, GET /sedac/v1/requests/{id} what a response was computed with.
vLLM loads it only where VLLM_PLUGINS names `sedac_agent`. With several API servers only the first runs an agent; the others
know no policy and promise every request to be exact. Without an engine (render server) it does nothing, and neither where the engine was
started without SEDAC: its requests are plain vLLM's. Importing it imports nothing of vLLM.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request
from starlette.datastructures import State

from sedac.errors import UnsupportedModel
from sedac.versions import find_vllm_version, get_reason, stand_aside

if TYPE_CHECKING:
    from sedac.agent.agent import Agent

_MAX_ID_CHARS = 256


class AgentPlugin:
    """vLLM's endpoint-plugin interface (plugins/endpoint_plugins/interface.py, 0.32)."""

    name = "sedac_agent"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, and stop the agent when the application stops (the interface has no hook for that)."""
        if self._stands_aside():
            return
        inner = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
            """Run the server's own lifespan, and stop the agent at its end."""
            async with inner(app) as state:
                try:
                    yield state
                finally:
                    agent = getattr(app.state, "sedac_agent", None)
                    if agent is not None:
                        await agent.stop()

        app.router.lifespan_context = lifespan

        @app.get("/sedac/status")
        async def status(request: Request) -> dict[str, Any]:
            """Return what is attached, the policy in force and the counters."""
            from sedac.agent.status import describe_agent

            agent: Agent | None = getattr(request.app.state, "sedac_agent", None)
            return describe_agent(agent) if agent else {"state": "NOT_ATTACHED"}

        @app.get("/sedac/v1/requests/{request_id}")
        async def report(request_id: str, request: Request) -> dict[str, Any]:
            """Return what the response of that id was computed with: tier, whether certified, policy revision, tokens, MLPs and their share."""
            agent: Agent | None = getattr(request.app.state, "sedac_agent", None)
            if agent is None:
                raise HTTPException(404, "this API server runs no SEDAC agent; ask the first one")
            try:
                found = await agent.engine.find_report(request_id[:_MAX_ID_CHARS])
            except TimeoutError as error:
                raise HTTPException(503, "the workers did not answer in time; ask again") from error
            if found is None:
                known = "the id of a response, such as cmpl-... or chatcmpl-..., while it runs and until 1,000 others have finished"
                raise HTTPException(404, f"request {request_id[:_MAX_ID_CHARS]!r} is unknown or forgotten; give {known}")
            return found

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Put the first policy into force, and the control service's where that can be reached, before the server answers."""
        state.sedac_agent = None
        if engine_client is None or self._stands_aside():
            return
        additional = engine_client.vllm_config.additional_config
        if not isinstance(additional, dict) or "sedac" not in additional:
            stand_aside("VLLM_PLUGINS names sedac_agent, but the engine was started without SEDAC; start it with `sedac serve`")
            return
        from sedac.agent.start import start

        state.sedac_agent = await start(engine_client, state.openai_serving_models.base_model_paths[0].name)

    def _stands_aside(self) -> bool:
        """Whether SEDAC leaves this vLLM alone; an engine that asks for SEDAC is refused before it gets here (engine/vllm/plugin.py)."""
        if not get_reason():
            try:
                find_vllm_version()
            except UnsupportedModel as error:
                stand_aside(str(error))
        return bool(get_reason())
