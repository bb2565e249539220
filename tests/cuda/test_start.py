"""SEDAC starts on CUDA by the lines that are documented: those of the Dockerfile and of docker-compose.yml, read from the files.

Each line goes through the `sedac` command to the command of the engine, and that through vLLM's parser, its configuration and the building
of the model, in processes that find a CUDA platform (forced_platform.py). Weights, compilation, capture and replay need a GPU.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cuda.forced_platform import REPOSITORY, make_environment

DRAFT = str(REPOSITORY / "probes" / "sedac_demo" / "draft")
WITHOUT_GRAPHS = ["--compilation-config", '{"cudagraph_mode": "NONE"}']
REMEDY = re.escape(shlex.join(WITHOUT_GRAPHS))


@dataclass(frozen=True)
class Line:
    """What a container of an image for CUDA runs."""

    arguments: list[str]
    """after the name of the program"""
    environment: dict[str, str] = field(default_factory=dict)


def read_image(target: str) -> Line:
    """Read the ENTRYPOINT, CMD and ENV of one target of the Dockerfile."""
    text = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
    (stage,) = (part for part in re.split(r"^FROM ", text, flags=re.MULTILINE) if re.match(rf"\S+ AS {target}\n", part))
    environment = dict(pair.split("=", 1) for line in re.findall(r"^ENV (.+)$", stage, re.MULTILINE) for pair in shlex.split(line))
    entry, command = (json.loads(re.findall(rf"^{word} (\[.+\])$", stage, re.MULTILINE)[-1]) for word in ("ENTRYPOINT", "CMD"))
    assert entry == ["sedac"]
    environment.pop("PATH")
    return Line(command, environment)


def read_service(name: str, image: Line) -> Line:
    """Read the command of one service of docker-compose.yml over its image's environment, variables at their defaults."""
    service = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"][name]
    filled = {key: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value)) for key, value in service["environment"].items()}
    return Line(service["command"], {**image.environment, **filled})


IMAGE = read_image("cuda")
LINES = {"image": IMAGE, "compose": read_service("engine-gpu", IMAGE)}


class Starter:
    """Runs the halves of a start in processes of their own."""

    def __init__(self, folder: Path, **platform: Any) -> None:
        self.folder, self.platform = folder, make_environment(folder / "platform", **platform)
        self.output = ""

    def _run(self, environment: dict[str, str], part: str, *arguments: str) -> Any:
        out = self.folder / "result.json"
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.cuda.start_job", part, str(out), *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
        self.output = done.stdout + done.stderr
        assert done.returncode == 0, self.output[-6000:]
        return json.loads(out.read_text())

    def run_sedac(self, arguments: list[str], **variables: str) -> dict[str, Any]:
        """What the `sedac` command would start; the image's folders lie in the test's."""
        moved = {name: value.replace("/var/", f"{self.folder}/var/") for name, value in variables.items()}
        found: dict[str, Any] = self._run({**self.platform, **moved}, "sedac", *arguments)
        return found

    def run_engine(self, found: dict[str, Any], **variables: str) -> dict[str, Any]:
        """What vLLM makes of the command that `sedac` would start."""
        assert not found["error"], found["error"]
        assert found["command"][1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
        environment = {**found["env"], "TRITON_INTERPRET": "1", **variables}
        made: dict[str, Any] = self._run(environment, "engine", *found["command"][3:])
        return made

    def compare_modes(self, lines: list[list[str]]) -> list[dict[str, Any]]:
        """What SEDAC reads off flags, and what vLLM makes of them."""
        compared: list[dict[str, Any]] = self._run(self.platform, "modes", json.dumps(lines))
        return compared

    def ask_platform(self, **variables: str) -> dict[str, bool]:
        """Whether SEDAC and vLLM take this for CUDA."""
        answers: dict[str, bool] = self._run({**self.platform, **variables}, "platform")
        return answers


@pytest.fixture
def starter(tmp_path: Path) -> Starter:
    return Starter(tmp_path)


@pytest.mark.parametrize("name", ["image", pytest.param("compose", marks=pytest.mark.thorough)])
def test_documented_lines_start_inside_graphs(starter: Starter, name: str) -> None:
    line = LINES[name]
    found = starter.run_sedac(line.arguments, **line.environment)
    made = starter.run_engine(found)
    assert made["refused"] == ""
    assert (made["device"], made["mode"], made["v2"]) == ("cuda", "FULL_AND_PIECEWISE", False)
    assert made["worker"] == "sedac.engine.step.worker.SedacWorker"
    assert made["speculative"] is None
    assert made["entry"] == {"probe_set": str(REPOSITORY / "probes/sedac_demo/probe-set"), "checkpoint_layers": [], "levels": True}
    assert (made["built"], made["forms"], made["mlps"]) == ("SedacQwen2ForCausalLM", "CudaBackend", ["GatedQwen2MLP"])
    assert (made["attention"], made["draft"], made["min_weight_bytes"]) == ("FlashAttentionImpl", "", 16 << 20)
    assert made["mode_built"] == "FULL_AND_PIECEWISE"
    assert made["dispatched"]["step"] == "FULL"
    assert made["dispatched"]["is_wrapped"]
    said = [message for message in found["log"] if "left out" in message]
    assert len(said) == 1
    assert re.search(f"FULL_AND_PIECEWISE.*{REMEDY}", said[0])


def test_a_named_draft_beside_graphs_is_refused_before_anything_heavy_loads(starter: Starter) -> None:
    by_flag = starter.run_sedac(["serve", "--draft", DRAFT])
    by_variable = starter.run_sedac(["serve", "-O1"], SEDAC_DRAFT_DIR=DRAFT)
    for found, mode in ((by_flag, "FULL_AND_PIECEWISE"), (by_variable, "PIECEWISE")):
        assert re.search(f"--draft {DRAFT} .*cudagraph_mode {mode}.*{REMEDY}.*--draft none", found["error"])
        assert "command" not in found
        assert found["heavy"] == []
    room = starter.run_sedac(["serve"], SEDAC_DRAFT_TOKENS="4")
    assert re.search(f"SEDAC_DRAFT_TOKENS is 4, but there is no draft .*{REMEDY}", room["error"])


@pytest.mark.thorough
def test_drafts_are_served_where_graphs_are_given_up(starter: Starter) -> None:
    found = starter.run_sedac(["serve", *WITHOUT_GRAPHS])
    assert not any("left out" in message for message in found["log"])
    made = starter.run_engine(found)
    assert made["refused"] == ""
    assert made["mode"] == made["mode_built"] == "NONE"
    assert made["speculative"] == "sedac.engine.drafting.drafter.Drafter"
    assert made["draft"]


@pytest.mark.thorough
def test_the_engine_itself_refuses_a_draft_inside_graphs(starter: Starter) -> None:
    """The launcher reads flags; what a command of its own brings vLLM to, the engine judges."""
    found = starter.run_sedac(["serve", *WITHOUT_GRAPHS])
    found["command"].extend(["--compilation-config", '{"cudagraph_mode": "FULL_DECODE_ONLY"}'])
    made = starter.run_engine(found)
    assert re.search(f"UnsupportedModel: cudagraph_mode is FULL_DECODE_ONLY, but self-speculation.*{REMEDY}", made["refused"])


@pytest.mark.thorough
def test_graphs_are_left_where_conditional_nodes_do_not_work(starter: Starter) -> None:
    found = starter.run_sedac(IMAGE.arguments, **IMAGE.environment, SEDAC_MIN_WEIGHT_MIB="1")
    made = starter.run_engine(found, SEDAC_TEST_IF_NODES="a replay wrote nothing")
    assert made["refused"] == ""
    assert (made["mode"], made["mode_built"], made["sizes_built"]) == ("FULL_AND_PIECEWISE", "NONE", [])
    assert made["dispatched"] == {"step": "NONE", "is_wrapped": False, "num_captures": 0}
    line = "SEDAC: conditional nodes do not work here (a replay wrote nothing): running without CUDA graphs, slower"
    assert starter.output.count(line) == 1
    assert made["entry"]["min_weight_mib"] == 1
    assert made["min_weight_bytes"] == 1 << 20


def test_modes_are_read_off_flags_as_vllm_reads_them(starter: Starter, tmp_path: Path) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text("compilation-config: {cudagraph_mode: NONE}\nmax-num-seqs: 8\n")
    eager = tmp_path / "eager.yml"
    eager.write_text("enforce_eager: true\noptimization-level: 1\n")
    lines = [
        [],
        ["--enforce-eager"],
        ["--enforce_eager", "--no-enforce-eager"],
        ["-O0"],
        ["-O", "1"],
        ["-O=0"],
        ["-O3"],
        ["--optimization-level", "0", "--port", "8001"],
        ["--optimization_level=1"],
        ["--compilation-config", '{"cudagraph_mode": "NONE"}'],
        ['--compilation_config={"cudagraph_mode": "piecewise"}'],
        ["-cc", '{"cudagraph_mode": "FULL"}'],
        ["-cc", '{"cudagraph_mode": "NONE"}', "--compilation-config", '{"mode": 3}'],
        ["-cc.cudagraph_mode", "none"],
        ["-cc.cudagraph_mode=FULL_DECODE_ONLY", "-O0"],
        ["--compilation-config.cudagraph_mode=none", "-cc.mode=VLLM_COMPILE"],
        ["-cc.cudagraph_mode=none", "-cc.mode=3"],
        ["--compilation-config", '{"cudagraph_mode": "NONE"}', "-cc.mode=3"],
        ["-cc.mode=none"],
        ["-cc", '{"mode": 0, "cudagraph_mode": "PIECEWISE"}'],
        ["-cc", '{"splitting_ops": []}'],
        ["-cc", '{"splitting_ops": [], "cudagraph_mode": "PIECEWISE"}'],
        ["-cc", '{"cudagraph_mode": null}'],
        ["-cc", '{"cudagraph_mode": 0}'],
        ["-cc.pass_config.fuse_norm_quant=false", "--max-num-seqs", "4"],
        ["--config", str(config)],
        ["--config", str(config), "-cc.cudagraph_mode=piecewise"],
        ["--config", str(eager)],
    ]
    compared = starter.compare_modes(lines)
    assert [(case["line"], case["said"]) for case in compared] == [(case["line"], case["made"]) for case in compared]
    assert len(compared) == len(lines)
    assert {case["said"] for case in compared} == {"NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("num_gpus", "build", "variables", "is_cuda"),
    [(1, "vllm", {}, True), (0, "vllm", {}, False), (1, "none", {}, False), (1, "vllm", {"VLLM_TARGET_DEVICE": "cpu"}, False)],
)
def test_the_platform_is_the_one_that_vllm_chooses(tmp_path: Path, num_gpus: int, build: str, variables: dict[str, str], is_cuda: bool) -> None:
    """`none`: beside the GPU there is only the installed build for the CPU."""
    starter = Starter(tmp_path, num_gpus=num_gpus, build=build)
    assert starter.ask_platform(**variables) == {"ours": is_cuda, "vllm": is_cuda}


@pytest.mark.thorough
def test_doctor_says_what_the_launcher_would_do(starter: Starter) -> None:
    def ask(*arguments: str) -> dict[str, dict[str, str]]:
        command = [sys.executable, "-m", "sedac.app.cli", "doctor", "--json", "--url", "http://127.0.0.1:9", *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, env=starter.platform, capture_output=True, text=True, timeout=300)
        return {finding["name"]: finding for finding in json.loads(done.stdout)}

    found = ask()
    assert found["device"]["detail"] == "CUDA, cudagraph_mode FULL_AND_PIECEWISE"
    assert found["draft"]["state"] == "absent"
    assert re.search(f"left out: .*{REMEDY}", found["draft"]["detail"])
    assert re.search(REMEDY, ask("--draft", DRAFT)["settings"]["detail"])
    assert ask("--draft", DRAFT, "--", "-cc.cudagraph_mode=none")["draft"]["state"] == "ok"
