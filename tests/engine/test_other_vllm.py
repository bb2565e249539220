"""With another vLLM than SEDAC was built for: whoever asked for SEDAC is refused by name, everybody else is served by vLLM, with one warning."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from sedac import versions
from sedac.agent.plugin import AgentPlugin
from sedac.errors import UnsupportedModel

from testing.forked import run_python
from testing.other_vllm import make_environment, pretend_version

pytestmark = pytest.mark.engine

_JOB = """
import json, logging, sys

folder, target, model = sys.argv[1:]
if folder:
    sys.path.insert(0, folder)
lines = []


class Handler(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())


import vllm.logger
from sedac.engine.vllm import patches

logging.getLogger("sedac").addHandler(Handler())
if target:
    import importlib

    module, _, path = target.partition(":")
    *owners, last = path.split(".")
    owner = importlib.import_module(module)
    for name in owners:
        owner = getattr(owner, name)
    delattr(owner, last)
from sedac.engine.vllm.plugin import register
from sedac.versions import get_reason
from vllm.config import VllmConfig
from vllm.model_executor.models.registry import ModelRegistry

found = {"register": register(), "warnings": lines[:], "reason": get_reason()}
found["registered"] = "sedac" in getattr(ModelRegistry.models["Qwen2ForCausalLM"], "module_name", "")


def configure(additional):
    from vllm.engine.arg_utils import EngineArgs

    try:
        EngineArgs(model=model, max_model_len=512, additional_config=additional).create_engine_config()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


found["plain"], found["asked"] = configure({"other": 1}), configure({"sedac": {"probe_set": "p"}})
found["lines"] = lines
worker = patches.why_not("worker")
found["worker"] = worker
print("FOUND" + json.dumps(found))
"""


def _ask(demo_model, folder: str = "", target: str = "") -> dict:
    done = run_python("-c", _JOB, folder, target, str(demo_model))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.split("FOUND")[1].splitlines()[0])


def test_the_installed_vllm_is_as_sedac_needs_it(demo_model):
    found = _ask(demo_model)
    assert (found["lines"], found["reason"], found["worker"]) == ([], "", "")
    assert found["registered"]
    assert (found["plain"], found["asked"]) == ("", "")


def test_another_version_serves_without_sedac_and_refuses_who_asks_for_it(demo_model, tmp_path):
    found = _ask(demo_model, folder=str(pretend_version(tmp_path / "other")))
    said = "vLLM 0.33.0 is installed, SEDAC supports 0.32.x; install that, or serve without SEDAC"
    assert len(found["lines"]) == 1
    assert said in found["lines"][0]
    assert not found["registered"]
    assert found["plain"] == ""
    assert found["asked"].startswith(f"UnsupportedModel: {said}")
    assert found["worker"].startswith(said)


@pytest.mark.parametrize(
    "target",
    [
        "vllm.model_executor.models.registry:_TEXT_GENERATION_MODELS",
        "vllm.config:SpeculativeConfig",
    ],
)
def test_a_part_that_every_process_needs(demo_model, target):
    found = _ask(demo_model, target=target)
    assert len(found["lines"]) == 1
    assert f"{target} (" in found["lines"][0]
    assert "is missing" in found["lines"][0]
    assert not found["registered"]
    assert found["plain"] == ""
    assert found["asked"].startswith("UnsupportedModel: vLLM 0.32.")
    assert f"{target} (" in found["asked"]
    assert "install a vLLM 0.32.x as it was released, or serve without SEDAC" in found["asked"]


def test_a_part_that_only_the_agent_needs(demo_model):
    target = "vllm.v1.engine.output_processor:OutputProcessor._update_stats_from_finished"
    found = _ask(demo_model, target=target)
    assert (found["lines"], found["plain"]) == ([], "")
    assert found["registered"]
    assert f"{target} (wrapped: watches what finished) is missing" in found["asked"]


def test_a_part_that_only_workers_need(demo_model):
    target = "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward"
    found = _ask(demo_model, target=target)
    assert (found["lines"], found["plain"], found["asked"]) == ([], "", "")
    assert f"{target} (wrapped: where a step begins and ends) is missing" in found["worker"]


def test_a_model_of_plain_vllm_needs_none_of_those_parts(tmp_path):
    """In a process of its own: the others have imported them before."""
    target = "vllm.utils.torch_utils:direct_register_custom_op"
    code = (
        "import sys, vllm.model_executor.models.qwen2; from sedac.engine.attach import models; "
        "del vllm.utils.torch_utils.direct_register_custom_op; print(models.SedacQwen2ForCausalLM.__mro__[1].__name__, "
        "[name for name in sys.modules if name.startswith('sedac.engine') and not name.startswith('sedac.engine.vllm')]); "
        "import sedac.engine.attach.attach"
    )
    done = subprocess.run([sys.executable, "-c", code], env=make_environment(tmp_path), capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-1] == "Qwen2ForCausalLM ['sedac.engine', 'sedac.engine.attach', 'sedac.engine.attach.models']"
    assert done.returncode == 1, "who asks for SEDAC needs them"
    assert "UnsupportedModel: vLLM 0.32." in done.stderr
    assert f"{target} (" in done.stderr


@pytest.mark.parametrize(
    ("target", "module"),
    [
        ("vllm.utils.torch_utils:direct_register_custom_op", "sedac.engine.vllm.parts"),
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward", "sedac.engine.vllm.runner"),
        ("vllm.model_executor.layers.rotary_embedding:get_rope", "sedac.engine.drafting.parts"),
    ],
)
def test_a_worker_is_refused_while_it_is_imported(target, module):
    code = f"""
import importlib, {module} as ours
place, _, path = {target!r}.partition(":")
*owners, last = path.split(".")
owner = importlib.import_module(place)
for name in owners:
    owner = getattr(owner, name)
delattr(owner, last)
importlib.reload(ours)
"""
    done = run_python("-c", code)
    assert done.returncode == 1
    assert "UnsupportedModel: vLLM 0.32." in done.stderr
    assert f"{target} (" in done.stderr


def _attach(caplog, additional: dict) -> tuple[int, list[str], object]:
    """Wire the endpoint plugin as vLLM does; returns how many routes it added, its warnings, and the agent."""
    app, plugin = FastAPI(), AgentPlugin()
    before = len(app.routes)
    with caplog.at_level(logging.WARNING):
        plugin.attach_router(app)
        client = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=additional))
        asyncio.run(plugin.init_state(client, app.state, Namespace()))
    return len(app.routes) - before, [r.getMessage() for r in caplog.records if r.name.startswith("sedac")], app.state.sedac_agent


@pytest.fixture
def _fresh(monkeypatch):
    monkeypatch.setattr(versions, "_reasons", [])
    monkeypatch.setenv("_SEDAC_STOOD_ASIDE", "")
    monkeypatch.delenv("_SEDAC_STOOD_ASIDE")


@pytest.mark.usefixtures("_fresh")
def test_the_agent_stands_aside_with_another_version(monkeypatch, caplog, tmp_path):
    monkeypatch.syspath_prepend(str(pretend_version(tmp_path / "other")))
    num_routes, warnings, agent = _attach(caplog, {})
    assert (num_routes, agent) == (0, None)
    assert len(warnings) == 1
    assert "vLLM 0.33.0 is installed, SEDAC supports 0.32.x" in warnings[0]


@pytest.mark.usefixtures("_fresh")
def test_the_agent_stands_aside_where_the_engine_was_started_without_sedac(caplog):
    num_routes, warnings, agent = _attach(caplog, {"other": 1})
    assert num_routes == 2
    assert agent is None
    assert len(warnings) == 1
    assert "start it with `sedac serve`" in warnings[0]


@pytest.mark.usefixtures("_fresh")
def test_one_warning_for_a_process_and_all_that_it_starts(caplog):
    with caplog.at_level(logging.WARNING):
        versions.stand_aside("first")
        versions.stand_aside("second")
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records] == ["first"]
    assert versions.get_reason() == "first"


def test_a_version_that_is_not_supported_is_named_with_the_remedy(monkeypatch, tmp_path):
    assert versions.find_vllm_version().startswith("0.32.")
    monkeypatch.syspath_prepend(str(pretend_version(tmp_path / "other", "0.320.1")))
    with pytest.raises(UnsupportedModel, match=r"vLLM 0\.320\.1 is installed, SEDAC supports 0\.32\.x; install that, or serve without SEDAC"):
        versions.find_vllm_version()
