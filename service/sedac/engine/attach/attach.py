"""Attaches SEDAC to a model that vLLM has just built: checkpoints behind decoder layers, gated MLPs, one state.

Called by the model's class (models.py). The engine refuses to start where a part does not fit: nothing is skipped silently.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from torch import nn

from sedac.engine.backends import choice
from sedac.engine.backends.dense import why_not_dense
from sedac.engine.backends.levels import LevelTable
from sedac.engine.drafting import tap
from sedac.engine.step import checkpoint
from sedac.engine.step.record import Recorder
from sedac.engine.step.state import State
from sedac.engine.vllm.config import CONFIG_KEY, StaticConfig
from sedac.engine.vllm.parts import VllmConfig, is_compiled
from sedac.engine.vllm.refusals import leave_graphs, refuse_graphs, refuse_layout
from sedac.engine.vllm.speculation import is_ours
from sedac.errors import ArtifactError, ConfigError, UnsupportedModel
from sedac.policy.layout import Layout
from sedac.policy.model import FULL, SKIP
from sedac.probe import artifact
from sedac.probe.artifact import ProbeSet
from sedac.probe.draft_manifest import DraftManifest, read_draft_manifest

_USUAL_RANK, _MAX_RANK = 128, 4096  # the kernels take no more


def find_layers(model: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers: (name of the list in the model, the list).

    Raises:
        UnsupportedModel: no list of `num_layers` decoder layers with the contract
            (positions, hidden_states, residual) -> (hidden_states, residual) and an `mlp`.
    """
    architecture = type(model).__name__.removeprefix("Sedac")
    for name, module in model.named_modules():
        if not (isinstance(module, nn.ModuleList) and name.endswith("layers") and len(module) == num_layers):
            continue
        for i, layer in enumerate(module):
            parameters = [p for p in inspect.signature(type(layer).forward).parameters if p != "self"]
            if parameters[:3] != ["positions", "hidden_states", "residual"] or not isinstance(getattr(layer, "mlp", None), nn.Module):
                raise UnsupportedModel(
                    f"{architecture}: layer {i} is {type(layer).__name__}({', '.join(parameters)}); SEDAC needs "
                    "(positions, hidden_states, residual) -> (hidden_states, residual) and a module `mlp`: serve this model without SEDAC"
                )
        return name, module
    raise UnsupportedModel(f"{architecture}: no list of {num_layers} decoder layers found; serve this model without SEDAC")


def _is_draft(vllm_config: VllmConfig) -> bool:
    """Whether the model being built only drafts; methods without a draft model name the target's config in its place (config/speculative.py)."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.draft_model_config is speculative.target_model_config:
        return False
    return vllm_config.model_config is speculative.draft_model_config


def attach(model: nn.Module, vllm_config: VllmConfig) -> State | None:
    """Attach SEDAC to a freshly built model, before its weights are loaded; None where it is not configured.

    Raises:
        ConfigError, ArtifactError, UnsupportedModel: what does not fit and what to do.
    """
    static = StaticConfig.from_vllm(vllm_config)
    if static is None or _is_draft(vllm_config):
        return None  # a draft model proposes; decisions belong to the model that verifies
    refuse_layout(vllm_config)
    refuse_graphs(static, vllm_config)
    leave_graphs(vllm_config, _check_graphs)
    text_config = vllm_config.model_config.hf_text_config
    num_layers, hidden_size = text_config.num_hidden_layers, text_config.hidden_size
    list_name, layers = find_layers(model, num_layers)
    wanted = tuple(sorted(static.checkpoint_layers))
    outside = [i for i in wanted if not 0 <= i < num_layers - 1]
    if outside:
        raise ConfigError(
            f"checkpoint layers {outside} are outside 0..{num_layers - 2} (the model has {num_layers} layers); change SEDAC_PROBE_LAYERS"
        )
    probe_set = None
    if static.probe_set or not (static.record or static.draft):
        probe_set = artifact.load(Path(static.probe_set), wanted or None)
        manifest = probe_set.manifest
        if (manifest.hidden_size, manifest.num_layers) != (hidden_size, num_layers):
            raise ArtifactError(
                f"probe set {manifest.name!r} was trained for hidden size {manifest.hidden_size} and {manifest.num_layers} layers, the model has "
                f"{hidden_size} and {num_layers}; train one for this model"
            )
    object.__setattr__(model, "sedac_layers", (list_name, layers))  # for the drafter; no module of the model's own
    device = next(model.parameters()).device
    lora = vllm_config.lora_config is not None
    levels = probe_set.levels if probe_set and static.levels else ()
    if levels:
        _refuse_levels(list_name, layers, lora)
    assert probe_set is not None or not levels
    draft, max_draft_tokens = _read_draft(static, vllm_config)
    layout = Layout(
        num_layers=num_layers,
        hidden_size=hidden_size,
        checkpoint_layers=wanted or (tuple(sorted(probe_set.probes)) if probe_set else ()),
        max_rank=_find_max_rank(static, probe_set),
        probe_set=probe_set.manifest.name if probe_set else "",
        probe_set_sha256=probe_set.manifest.sha256 if probe_set else "",
        levels_sha256=probe_set.levels_sha256 if levels and probe_set else "",
        levels=(FULL, SKIP, *(level.name for level in levels)),
        draft=draft.kind if draft else "",
        max_draft_tokens=max_draft_tokens,
    )
    shares = [record.saved for record in probe_set.manifest.levels] if levels and probe_set else []
    table = LevelTable(num_layers, levels, shares, probe_set.manifest.intermediate_size if probe_set else 0, device)
    state = State(
        layout,
        probe_set.probes if probe_set else {},
        table,
        max_num_tokens=_max_num_tokens(vllm_config),
        device=device,
        make_backend=choice.choose_backend(device, vllm_config.model_config.dtype, min_weight_bytes=static.min_weight_mib << 20),
    )
    if static.record:
        state.recorder = Recorder(static.record_top_k, keeps_final=static.record_final)
        for i, layer in enumerate(layers):
            is_eager = not is_compiled(vllm_config)
            state.recorder.attach(i, layer.mlp, lambda: state.num_tokens, is_eager=is_eager)
    for i in layout.checkpoint_layers:
        checkpoint.attach(layers[i], i, f"{list_name}.{i}", state)
    if draft and draft.num_heads and draft.depth <= num_layers:
        model.sedac_stream_TD = tap.attach(layers[draft.depth - 1], _max_num_tokens(vllm_config), hidden_size, vllm_config.model_config.dtype, device)
    first = 0 if levels else min(layout.checkpoint_layers, default=num_layers) + 1  # without levels nothing below a checkpoint changes
    scores_activation = probe_set is not None and probe_set.manifest.score == "activation"
    for i in range(first, num_layers):
        neurons = probe_set.neurons[i] if levels and probe_set else None
        state.backend.attach_mlp(layers[i].mlp, f"{list_name}.{i}.mlp", i, neurons, scores_activation=scores_activation, lora=lora)
    return state


def _check_graphs() -> str:
    """Return why graphs can't leave MLPs out here; empty: they can."""
    from sedac.engine.backends.cuda import if_nodes  # needs CUDA

    return if_nodes.check()


def _read_draft(static: StaticConfig, vllm_config: VllmConfig) -> tuple[DraftManifest | None, int]:
    """Return the draft that proposes, and how many tokens of a sequence per step at most; None and 0 where SEDAC does not draft.

    Raises:
        ConfigError: a draft is named that nothing would ask for its tokens.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or not is_ours(speculative):
        if static.draft:
            method = f"drafts by {speculative.method}" if speculative else "does not speculate"
            raise ConfigError(
                f"--additional-config {CONFIG_KEY}: draft is {static.draft}, but the engine {method}; start it with `sedac serve --draft`, "
                "or leave the draft out"
            )
        return None, 0
    return read_draft_manifest(Path(static.draft)), speculative.num_speculative_tokens


def _find_max_rank(static: StaticConfig, probe_set: ProbeSet | None) -> int:
    """Return the largest rank that there shall be room for; 0 where the engine has no probes."""
    if probe_set is None:
        return 0
    rank, name = probe_set.manifest.rank, probe_set.manifest.name
    if static.max_rank and not rank <= static.max_rank <= _MAX_RANK:
        raise ConfigError(
            f"--additional-config {CONFIG_KEY}: max_rank is {static.max_rank}, outside {rank} (the rank of {name!r}) to {_MAX_RANK}; "
            "change it, or leave it out"
        )
    return static.max_rank or max(rank, _USUAL_RANK)


def _refuse_levels(list_name: str, layers: nn.ModuleList, lora: bool) -> None:
    """Refuse reduced levels by the name of what can't take them; hard exits need none of this."""
    remedy = 'offer hard exits only: SEDAC_LEVELS=0 (--additional-config \'{"sedac": {"levels": false, ...}}\')'
    if lora:
        raise UnsupportedModel(f"the probe set's reduced levels and LoRA can't be combined (adapters change the neurons); {remedy}")
    for i, layer in enumerate(layers):
        if reason := why_not_dense(layer.mlp):
            raise UnsupportedModel(f"{list_name}.{i}.mlp {reason} and can't take the probe set's reduced levels; {remedy}")


def _max_num_tokens(vllm_config: VllmConfig) -> int:
    scheduler = vllm_config.scheduler_config
    return max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, vllm_config.compilation_config.max_cudagraph_capture_size or 0)
