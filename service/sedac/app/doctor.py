"""`sedac doctor`: what is attached, to which vLLM, and why not if not."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from sedac.app.launch import choose_draft, read_draft, with_demo_defaults
from sedac.app.preload import VARIABLE, find_preloads
from sedac.engine.backends.build import find_library
from sedac.engine.vllm.graphs import find_graph_mode, is_cuda
from sedac.engine.vllm.patches import check_all
from sedac.engine.vllm.registry import find_module
from sedac.engine.vllm.touches import Checked
from sedac.errors import SedacError
from sedac.policy.model import Speculation
from sedac.probe.manifest import Manifest, read_manifest
from sedac.settings import EngineSettings, read_settings
from sedac.versions import find_vllm_version

_MARKS = {"ok": "[green]ok[/]", "absent": "[yellow]--[/]", "bad": "[red]no[/]"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "absent", "bad"]
    detail: str
    touches: tuple[Checked, ...] = ()
    """What SEDAC relies on inside vLLM, one entry per place."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON's form."""
        found: dict[str, Any] = {"name": self.name, "state": self.state, "detail": self.detail}
        if self.touches:
            found["touches"] = [
                {
                    "target": row.touch.target, "used_for": row.touch.why, "used_by": row.touch.used_by, "checked_in": row.touch.where,
                    "expects": [str(expected) for expected in row.touch.expects], "differs": row.problem,
                }
                for row in self.touches
            ]  # fmt: skip
        return found


def examine(model: str, probe_set: Path | None, url: str, *, draft: Path | None = None, vllm_args: Sequence[str] = ()) -> list[Finding]:
    """Look at the installation, the model, the probe set, the draft and a running engine; nothing is started or changed.

    `vllm_args`: flags of vLLM's own with which `sedac serve` would be started.
    """
    findings = [*_examine_installation(), _examine_device(vllm_args), _examine_kernels()]
    try:
        filled = with_demo_defaults(read_settings(model=model or None, probe_dir=probe_set, draft_dir=draft))
        settings, reason = choose_draft(filled, vllm_args)
    except SedacError as error:
        return [*findings, Finding("settings", "bad", str(error))]
    findings.append(_examine_preloads(settings))
    findings.append(Finding("settings", "ok", f"model {settings.model}, probe set {settings.probe_dir}"))
    return [*findings, *_examine_model(settings, reason), *examine_engine(url)]


def examine_touches() -> Finding:
    """Hold every touch on vLLM's internals against what SEDAC expects of it; imports most of vLLM, which takes its time."""
    try:
        find_vllm_version()
    except SedacError:
        if find_spec("vllm") is None:
            return Finding("touches", "absent", "vLLM is not installed")
    rows = tuple(check_all())
    bad = [row for row in rows if row.problem]
    detail = f"{len(rows) - len(bad)} of {len(rows)} parts of vLLM are as SEDAC needs them"
    return Finding("touches", "bad" if bad else "ok", detail, rows)


def _examine_installation() -> Iterator[Finding]:
    try:
        yield Finding("vLLM", "ok", find_vllm_version())
    except SedacError as error:
        yield Finding("vLLM", "bad", str(error))
        return
    for group, name in (("vllm.general_plugins", "sedac"), ("vllm.endpoint_plugins", "sedac_agent")):
        try:
            (entry,) = importlib.metadata.entry_points(group=group, name=name)
            entry.load()
            yield Finding(f"plugin {name}", "ok", entry.value)
        except ValueError:
            yield Finding(f"plugin {name}", "bad", f"no entry point in {group}: install SEDAC into vLLM's environment")
        except ImportError as error:
            yield Finding(f"plugin {name}", "bad", f"does not import: {error}")


def _examine_device(vllm_args: Sequence[str]) -> Finding:
    if not is_cuda():
        return Finding("device", "ok", "CPU, or what else vLLM finds: no NVIDIA GPU, or a vLLM that was not built for one")
    return Finding("device", "ok", f"CUDA, cudagraph_mode {find_graph_mode(vllm_args)}")


def _examine_kernels() -> Finding:
    if is_cuda():
        return Finding("native kernels", "absent", "of the CPU, not used on CUDA")
    library = find_library()
    if library:
        return Finding("native kernels", "ok", str(library))
    return Finding("native kernels", "absent", "not built, slower torch forms run; `sedac serve` builds them with a C++ compiler (CXX, or g++)")


def _examine_preloads(settings: EngineSettings) -> Finding:
    if is_cuda():
        return Finding("preloaded", "absent", "libiomp5 and tcmalloc are of the CPU, not used on CUDA")
    found = find_preloads() if settings.preload else []
    together = ":".join(filter(None, [os.environ.get(VARIABLE, ""), *found]))
    if not settings.preload:
        return Finding("preloaded", "absent", f"nothing by `sedac serve` (SEDAC_PRELOAD=0); {VARIABLE} is {together or 'not set'}")
    lacking = ", ".join(name for name in ("libiomp", "libtcmalloc") if name not in together)
    return Finding("preloaded", "ok" if found else "absent", f"{together or 'nothing'}" + (f"; not found: {lacking}" if lacking else ""))


def _examine_model(settings: EngineSettings, left_out: str) -> Iterator[Finding]:
    path = Path(settings.model) / "config.json"
    if not path.is_file():
        yield Finding("model", "absent", f"{settings.model} is not a local directory: its architecture is checked when the engine starts")
        config = {}
    else:
        config = json.loads(path.read_text())
        yield _examine_architecture(config["architectures"][0])
    try:
        manifest = read_manifest(settings.probe_dir)
        policy = settings.make_policy(manifest)
    except SedacError as error:
        yield Finding("probe set", "bad", str(error))
        return
    text_config = config.get("text_config", config)
    expected = (text_config.get("hidden_size", manifest.hidden_size), text_config.get("num_hidden_layers", manifest.num_layers))
    if (manifest.hidden_size, manifest.num_layers) != expected:
        yield Finding(
            "probe set", "bad", f"{manifest.name} is for hidden size, layers {manifest.hidden_size}, {manifest.num_layers}; the model has {expected}"
        )
    else:
        layers = ", ".join(str(p.layer) for p in manifest.probes)
        yield Finding("probe set", "ok", f"{manifest.name}, rank {manifest.rank}, checkpoints after layers {layers} of {manifest.num_layers}")
        levels = ", ".join(f"{level.name} (saves {level.saved:.0%}, perplexity x {level.perplexity_ratio:.3f})" for level in manifest.levels)
        yield Finding("levels", "ok" if levels else "absent", levels or "full and skip alone: the probe set has no reduced ones")
        tiers = ", ".join(tier.name for tier in policy.get_tiers())
        yield Finding("tiers", "ok", f"exact, {tiers}; requests that name none get {policy.default_tier if policy.enabled else 'exact'}")
        yield _examine_draft(settings, manifest, policy.speculation, left_out)


def _examine_draft(settings: EngineSettings, manifest: Manifest, knobs: Speculation, left_out: str) -> Finding:
    try:
        draft = read_draft(settings, manifest)
    except SedacError as error:
        return Finding("draft", "bad", str(error))
    if draft is None and left_out:
        return Finding("draft", "absent", f"the demo model's is left out: {left_out}")
    if draft is None:
        return Finding("draft", "absent", "none, so nothing is drafted; name one with --draft or SEDAC_DRAFT_DIR")
    room = settings.draft_tokens or draft.max_tokens
    use = f"up to {room} tokens per step" if knobs.enabled else f"room for {room} tokens per step, off at first (SEDAC_SPECULATION=0)"
    return Finding("draft", "ok", f"{draft.name}: {draft.kind}, {draft.depth} of {draft.num_layers} layers, {use}")


def _examine_architecture(architecture: str) -> Finding:
    try:
        module = find_module(architecture)
    except ImportError as error:
        return Finding("architecture", "bad", f"vLLM's models do not import: {error}")
    if module is None:
        return Finding("architecture", "bad", f"{architecture} is not a text-generation architecture of this vLLM")
    for name, layer in inspect.getmembers(module, inspect.isclass):
        if name.endswith("DecoderLayer"):
            parameters = [p for p in inspect.signature(vars(layer).get("forward", layer)).parameters if p != "self"]
            if parameters[:3] == ["positions", "hidden_states", "residual"]:
                return Finding("architecture", "ok", f"{architecture}: {name}(positions, hidden_states, residual)")
    return Finding("architecture", "bad", f"{architecture} has no decoder layer (positions, hidden_states, residual); serve it without SEDAC")


def examine_engine(url: str) -> Iterator[Finding]:
    """Ask the engine that answers at `url` what it has attached, and which levels it found faster than full."""
    try:
        with urllib.request.urlopen(f"{url}/sedac/status", timeout=3) as answer:
            status = json.load(answer)
    except urllib.error.HTTPError:
        yield Finding("running engine", "bad", f"{url} runs without SEDAC's agent: start it with `sedac serve`")
        return
    except OSError:
        yield Finding("running engine", "absent", f"nothing answers at {url}")
        return
    layout = status.get("layout")
    if not layout:
        yield Finding("running engine", "bad", f"{url}: {status.get('state')}")
        return
    layers = ", ".join(map(str, layout["checkpoint_layers"]))
    draft = f"draft {layout['draft']}, up to {layout['max_draft_tokens']} tokens" if layout.get("draft") else "no draft"
    yield Finding("running engine", "ok", f"{url}: {status['state']}, revision {status['revision']}, checkpoints after layers {layers}, {draft}")
    if found := status.get("faster_rows"):
        yield _examine_speed(found)


def _examine_speed(faster_rows: dict[str, int]) -> Finding:
    pays = ", ".join(f"{name} up to {rows} {'row' if rows == 1 else 'rows'}" for name, rows in faster_rows.items() if rows)
    never = ", ".join(name for name, rows in faster_rows.items() if not rows)
    detail = f"faster than full on this machine: {pays or 'none'}" + (f"; never: {never}" if never else "")
    return Finding("levels that pay", "ok" if pays else "absent", f"{detail}; rows that would be slower are computed in full")


def show(findings: list[Finding]) -> None:
    """Print the findings as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "what", "found", box=None)
    for finding in findings:
        table.add_row(_MARKS[finding.state], finding.name, finding.detail)
    Console().print(table)
    sys.stdout.flush()


def show_touches(finding: Finding) -> None:
    """Print what SEDAC relies on inside vLLM, and what differs."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table("", Column("of vLLM", overflow="fold"), "used for", "what differs", box=None)
    for row in finding.touches:
        table.add_row(_MARKS["bad" if row.problem else "ok"], row.touch.target.removeprefix("vllm."), row.touch.why, row.problem)
    console = Console()
    console.print(table)
    console.print(f"{_MARKS[finding.state]} {finding.detail}")


def show_json(findings: list[Finding]) -> None:
    """Print the findings as JSON."""
    print(json.dumps([finding.to_dict() for finding in findings], indent=2))
