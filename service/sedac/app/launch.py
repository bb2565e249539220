"""Starts and watches the processes of `sedac serve`: vLLM's API server, and the control service beside it.

The engine is the product: when it ends, everything ends with its exit code. The control service is restarted when it dies,
and serving goes on meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import sedac_demo

from sedac.app.preload import VARIABLE, add_preloads, find_preloads
from sedac.control.access.tls import check_exposure
from sedac.control.base.settings import ControlSettings
from sedac.engine.backends.build import build_missing
from sedac.engine.vllm.graphs import NONE, WITHOUT_GRAPHS, find_graph_mode, is_cuda
from sedac.engine.vllm.speculation import DRAFTER
from sedac.errors import ArtifactError, ConfigError
from sedac.policy.model import FULL, SKIP
from sedac.probe.draft_manifest import DraftManifest, check_fit, read_draft_manifest
from sedac.probe.manifest import Manifest, read_manifest
from sedac.settings import MIN_WEIGHT_MIB, EngineSettings
from sedac.versions import find_vllm_version

_log = logging.getLogger(__name__)
_SHIPPED = sedac_demo.DIRECTORY
_PLUGINS = ("sedac", "sedac_agent")
_NO_DRAFT = Path("none")
_SPECULATION_FLAGS = ("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens")
"""Flags of vLLM's own for speculation, 0.32. `--speculative-config.KEY` is one too."""
_MAX_BACKOFF_SECONDS = 30.0
_STOP_SECONDS = 30.0


def with_demo_defaults(settings: EngineSettings) -> EngineSettings:
    """Fill in the demo model and its probe set where neither was named.

    Raises:
        ConfigError: a model was named without a probe set, or the demo files are not there.
    """
    if settings.model and settings.probe_dir == Path():
        raise ConfigError(f"no probe set for model {settings.model!r}: name its directory with --probe-set or SEDAC_PROBE_DIR")
    model = settings.model or str(_SHIPPED / "model")
    probe_dir = _SHIPPED / "probe-set" if settings.probe_dir == Path() else settings.probe_dir
    if not settings.model and not Path(model).is_dir():
        raise ConfigError(f"the demo model is not at {model}: name a model, or train it with `make demo-model`")
    return settings.model_copy(update={"model": model, "probe_dir": probe_dir.resolve()})


def with_draft(settings: EngineSettings, vllm_args: Sequence[str] = ()) -> EngineSettings:
    """Fill in the draft as `choose_draft` does, and say in the log why the demo's own is left out, where it is.

    Raises:
        ConfigError: as `choose_draft`.
    """
    chosen, reason = choose_draft(settings, vllm_args)
    if reason:
        _log.info("the demo model's draft is left out: %s", reason)
    return chosen


def choose_draft(settings: EngineSettings, vllm_args: Sequence[str] = ()) -> tuple[EngineSettings, str]:
    """Fill in the demo model's draft where that model is served and no draft was named, and make an explicit `none` empty.

    A user's own speculation takes the place of the demo's draft, never of one that was named. Inside CUDA graphs nothing can be drafted.
    Returns the settings, and why the demo's draft is left out; empty where nobody need be told.

    Raises:
        ConfigError: a draft was named beside the user's own speculation or beside CUDA graphs, or room for the tokens of none.
    """
    draft_dir, own, reason = settings.draft_dir, _find_speculation(vllm_args), ""
    graphs = _find_graphs(vllm_args)
    if draft_dir == Path() and not own and settings.model == str(_SHIPPED / "model") and (_SHIPPED / "draft").is_dir():
        draft_dir, reason = (Path(), graphs) if graphs else _find_shipped_draft(settings)
    if draft_dir in (Path(), _NO_DRAFT):
        if settings.draft_tokens is not None:
            there_is_none = f"there is no draft ({reason})" if reason else "there is no draft; name one with --draft or SEDAC_DRAFT_DIR"
            raise ConfigError(f"SEDAC_DRAFT_TOKENS is {settings.draft_tokens}, but {there_is_none}")
        return settings.model_copy(update={"draft_dir": Path()}), reason
    if own:
        raise ConfigError(f"{own} and --draft {draft_dir} (SEDAC_DRAFT_DIR) are two ways to speculate; leave one out, `--draft none` keeps vLLM's")
    if graphs:
        raise ConfigError(f"--draft {draft_dir} (SEDAC_DRAFT_DIR): {graphs}, or keep the graphs with `--draft none`")
    return settings.model_copy(update={"draft_dir": draft_dir.resolve()}), reason


def _find_graphs(vllm_args: Sequence[str]) -> str:
    """Return why a draft can't be served beside these arguments and what to do; empty: no CUDA graphs are in its way."""
    mode = find_graph_mode(vllm_args) if is_cuda() else NONE
    return "" if mode == NONE else f"CUDA graphs (cudagraph_mode {mode}) can't hold self-speculation; to draft, serve without them: {WITHOUT_GRAPHS}"


def _find_shipped_draft(settings: EngineSettings) -> tuple[Path, str]:
    """Return the demo model's draft, or an empty path and why: the probe set, or the lack of levels, leaves it none that fits."""
    own = _SHIPPED / "draft"
    try:
        read_draft(settings.model_copy(update={"draft_dir": own}), read_manifest(settings.probe_dir))
    except ArtifactError as error:
        return Path(), str(error)
    return own, ""


def read_draft(settings: EngineSettings, manifest: Manifest) -> DraftManifest | None:
    """Read the manifest of the draft and hold it against the probe set, which is of the same model; None where there is no draft.

    Raises:
        ArtifactError: it is missing, broken, or made for another model or other levels.
    """
    if settings.draft_dir == Path():
        return None
    draft = read_draft_manifest(settings.draft_dir)
    levels = (FULL, SKIP, *(level.name for level in manifest.levels if settings.levels))
    check_fit(draft, hidden_size=manifest.hidden_size, num_layers=manifest.num_layers, levels=levels)
    return draft


def _find_speculation(vllm_args: Sequence[str]) -> str:
    """Return the first flag of vLLM's own speculation; empty: none."""
    names = (arg.split("=")[0].split(".")[0] for arg in vllm_args)
    return next((name for name in names if name.replace("_", "-") in _SPECULATION_FLAGS), "")


def make_engine_command(settings: EngineSettings, vllm_args: Sequence[str], draft: DraftManifest | None = None) -> list[str]:
    """Build the command line of vLLM's OpenAI server with SEDAC attached, and speculating with the `draft` in the settings' directory.

    A user's own --additional-config is kept and gets SEDAC's entry.

    Raises:
        ConfigError: `vllm_args` set what SEDAC must set itself, or their --additional-config is not a JSON object.
    """
    rest, additional = _take_additional_config(vllm_args)
    taken = [arg for arg in rest if arg.split("=")[0] in ("--worker-cls", "--model")]
    if taken:
        raise ConfigError(f"{taken[0]} is set by `sedac serve` itself; name the model as its argument and leave the flag out")
    additional["sedac"] = {"probe_set": str(settings.probe_dir), "checkpoint_layers": list(settings.probe_layers), "levels": settings.levels}
    if settings.min_weight_mib != MIN_WEIGHT_MIB:  # the entry is part of what names a compiled graph
        additional["sedac"]["min_weight_mib"] = settings.min_weight_mib
    if draft:
        additional["sedac"]["draft"] = str(settings.draft_dir)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", settings.model]
    command += ["--worker-cls", "sedac.engine.step.worker.SedacWorker", "--additional-config", json.dumps(additional)]
    if draft:
        speculative = {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": settings.draft_tokens or draft.max_tokens}
        command += ["--speculative-config", json.dumps(speculative)]
    named = {arg.split("=")[0].replace("_", "-") for arg in rest}
    if "--served-model-name" not in named and Path(settings.model) == _SHIPPED / "model":
        command += ["--served-model-name", "sedac-demo"]
    if "--scheduling-policy" not in named:
        command += ["--scheduling-policy", "priority"]  # audits wait behind every request; among equals it is first come, first served
    return command + rest


def _take_additional_config(vllm_args: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    rest, values = [], []
    arguments = iter(vllm_args)
    for argument in arguments:
        if argument == "--additional-config":
            values.append(next(arguments, ""))
        elif argument.startswith("--additional-config="):
            values.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    try:
        additional = json.loads(values[-1]) if values else {}
    except ValueError as error:
        raise ConfigError(f"--additional-config {values[-1]!r} is not JSON ({error}); give one JSON object") from error
    if not isinstance(additional, dict):
        raise ConfigError(f"--additional-config {values[-1]!r} is not a JSON object; give one")
    return rest, additional


def make_engine_env(settings: EngineSettings, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Build the environment of the engine's processes: settings, plugins by name, what SEDAC needs of vLLM, and libraries to preload."""
    plugins = [p for p in environ.get("VLLM_PLUGINS", "").split(",") if p and p not in _PLUGINS]
    env = {**environ, **settings.to_env(), "VLLM_PLUGINS": ",".join([*_PLUGINS, *plugins])}
    env.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read by the CPU backend alone, which would otherwise claim all memory
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    if settings.preload:
        add_preloads(env, find_preloads(environ))
    return env


@dataclass(kw_only=True)
class Launch:
    """The processes of one `sedac serve`."""

    engine_command: list[str]
    engine_env: dict[str, str]
    control_command: list[str] | None
    """Command that starts the control service. None where it runs elsewhere, or there is none."""
    control_env: dict[str, str] = field(default_factory=dict)
    _stopping: bool = False

    def run(self) -> int:
        """Run until the engine ends or a signal comes; returns the engine's exit code."""
        control = self._start_control()
        engine = subprocess.Popen(self.engine_command, env=self.engine_env)

        def stop(signum: int, frame: FrameType | None) -> None:
            """Note that the end was asked for, and end the engine."""
            self._stopping = True
            engine.send_signal(signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        backoff, started = 0.5, time.monotonic()
        while engine.poll() is None:
            time.sleep(0.2)
            if control is not None and control.poll() is not None and not self._stopping:
                if time.monotonic() - started > 60:
                    backoff = 0.5
                _log.error("the control service ended with code %s; serving goes on, restarting it in %.1f s", control.returncode, backoff)
                time.sleep(backoff)
                backoff, started = min(backoff * 2, _MAX_BACKOFF_SECONDS), time.monotonic()
                control = self._start_control()
        if control is not None and control.poll() is None:
            control.terminate()
            try:
                control.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                control.kill()
        return 0 if self._stopping and engine.returncode in (0, -signal.SIGTERM) else engine.returncode or 0

    def _start_control(self) -> subprocess.Popen[bytes] | None:
        return subprocess.Popen(self.control_command, env=self.control_env) if self.control_command else None


def serve(settings: EngineSettings, vllm_args: Sequence[str], *, control: str | None) -> int:
    """Serve until stopped; `control` is host:port of a service elsewhere, "none", or None to run one here.

    Raises:
        ConfigError, ArtifactError, UnsupportedModel: found before anything is started.
    """
    find_vllm_version()
    settings = with_draft(with_demo_defaults(settings), vllm_args)
    manifest = read_manifest(settings.probe_dir)
    settings.make_policy(manifest)
    draft = read_draft(settings, manifest)
    if not is_cuda():
        build_missing()
    control_command = None
    if control is None:
        check_exposure(ControlSettings())
        host, port = os.environ.get("SEDAC_CONTROL_HOST", "127.0.0.1"), os.environ.get("SEDAC_CONTROL_PORT", "50051")
        address = f"{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        control_command = [sys.executable, "-m", "sedac.app.cli", "control"]
    else:
        address = "" if control == "none" else control
    settings = settings.model_copy(update={"control_address": address})
    launch = Launch(
        engine_command=make_engine_command(settings, vllm_args, draft),
        engine_env=make_engine_env(settings),
        control_command=control_command,
        control_env=dict(os.environ),
    )
    place = f"{address}, {'started here' if control_command else 'elsewhere'}" if address else "none"
    drafts = f"{settings.draft_dir} ({draft.kind})" if draft else "none"
    preloads = launch.engine_env.get(VARIABLE, "") or "nothing"
    _log.info("model %s, probe set %s, draft %s, control service %s", settings.model, settings.probe_dir, drafts, place)
    _log.info("preloaded in the engine's processes: %s", preloads)
    return launch.run()
