"""Every touch on vLLM's internals in one table: what, why, from where, and what SEDAC expects of it.

Whoever moves SEDAC to a new vLLM begins here. The rows of every process are checked when vLLM loads the plugin (plugin.py), those of the front
end when an engine with a `sedac` entry is configured, those of workers when SEDAC's worker is imported (runner.py), before there is a model;
`sedac doctor` checks and prints them all.
Parts of vLLM that are meant for others to build on stand here too, where SEDAC would not run without them.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from sedac.engine.vllm.touches import Checked, Does, Has, Takes, Touch, Where
from sedac.errors import UnsupportedModel
from sedac.versions import SUPPORTED_VLLM, find_vllm_version

_REGISTRY, _PLUGIN, _SPECULATION = (f"engine/vllm/{name}.py" for name in ("registry", "plugin", "speculation"))
_CONFIG, _RUNNER, _SAMPLING, _PARTS = (f"engine/vllm/{name}.py" for name in ("config", "runner", "sampling", "parts"))
_ATTACH, _DRAFTING, _FRONT = "engine/attach/attach.py", "engine/drafting/parts.py", "agent/frontend.py"


def _list_architectures(found: Any) -> str:
    if not isinstance(found, Mapping) or not found:
        return f"is no mapping of architectures but {type(found).__name__}"
    odd = [name for name, place in found.items() if not (isinstance(place, tuple) and len(place) == 2 and all(isinstance(p, str) for p in place))]
    return f"names {odd[0]} by {found[odd[0]]!r}, not by module and class" if odd else ""


def _is_property(found: Any) -> str:
    return "" if isinstance(found, property) else f"is no property but {type(found).__name__}"


def _takes_classes(found: Any) -> str:
    return "" if "custom_class" in get_args(found) else "has no method custom_class"


def _carries_drafts(found: Any) -> str:
    made = found(req_ids=[], req_id_to_index={})
    made.sedac_drafts = 1
    return "" if getattr(pickle.loads(pickle.dumps(made)), "sedac_drafts", None) == 1 else "loses an attribute on its way between processes"


def _keeps_salt(found: Any) -> str:
    return "" if found([1, 2], cache_salt="s").get("cache_salt") == "s" else "drops cache_salt"


def _keeps_weights(found: Any) -> str:
    code = found.__code__
    kept = {"handler", "packed_weight"} <= set(code.co_cellvars) and "cpu_linear" in code.co_names
    return "" if kept else "keeps no closure cpu_linear over a handler or packed_weight"


TOUCHES = (
    # --- every process: the plugin
    Touch(target="vllm.model_executor.models.registry:_TEXT_GENERATION_MODELS", why="the architectures that get a class of SEDAC's",
          used_by=_REGISTRY, expects=(Does("name -> (module, class)", _list_architectures),), where="every process"),
    Touch(target="vllm.model_executor.models.registry:_ModelRegistry.register_model", why="puts SEDAC's class in an architecture's place",
          used_by=_REGISTRY, expects=(Takes("model_arch", "model_cls"),), where="every process"),
    Touch(target="vllm.logger:init_logger", why="sets up vLLM's log, whose handlers SEDAC's lines share",
          used_by=_PLUGIN, expects=(Takes("name"),), where="every process"),
    Touch(target="vllm.platforms:current_platform", why="whether this is vLLM's CPU platform", used_by=_RUNNER, expects=(Has("is_cpu"),),
          where="every process"),
    Touch(target="vllm.config:VllmConfig.__post_init__", why="wrapped: checks an engine that asks for SEDAC; lengths of drafts",
          used_by=_SPECULATION, expects=(Takes(),), where="every process"),
    Touch(target="vllm.config:VllmConfig.num_lookahead_tokens", why="replaced: slots of draft tokens",
          used_by=_SPECULATION, expects=(Does("a property", _is_property),), where="every process"),
    Touch(target="vllm.config:VllmConfig", why="what the engine is made of", used_by=_CONFIG, where="every process", expects=(
          Has("additional_config", "model_config", "parallel_config", "scheduler_config", "compilation_config", "speculative_config",
              "lora_config", "cache_config", "load_config", "use_v2_model_runner", "num_speculative_tokens"),)),
    Touch(target="vllm.config:ParallelConfig", why="refuses layouts that have no place for SEDAC; which API server runs the agent",
          used_by="engine/vllm/refusals.py", where="every process", expects=(
          Has("pipeline_parallel_size", "tensor_parallel_size", "data_parallel_size", "num_ubatches", "enable_expert_parallel",
              "world_size_across_dp", "_api_process_rank", "_api_process_count"),)),
    Touch(target="vllm.config:SchedulerConfig", why="how many tokens a step has at most",
          used_by=_ATTACH, expects=(Has("max_num_batched_tokens", "max_num_seqs"),), where="every process"),
    Touch(target="vllm.config:CompilationConfig", why="whether the model is compiled, and inside which CUDA graphs", used_by=_ATTACH,
          where="every process", expects=(
          Has("mode", "cudagraph_mode", "max_cudagraph_capture_size", "cudagraph_capture_sizes", "static_forward_context"),)),
    Touch(target="vllm.config:SpeculativeConfig", why="whose drafts they are, and how many", used_by=_SPECULATION, where="every process", expects=(
          Has("method", "model", "num_speculative_tokens", "num_speculative_tokens_per_batch_size", "draft_model_config", "target_model_config"),)),
    Touch(target="vllm.config.speculative:SpeculativeMethod", why="SEDAC's drafter is a class that vLLM loads by name",
          used_by="engine/drafting/drafter.py", expects=(Does("one of them custom_class", _takes_classes),), where="every process"),
    Touch(target="vllm.config.compilation:CompilationMode", why="whether the model is compiled", used_by=_PARTS,
          expects=(Has("NONE"),), where="every process"),
    Touch(target="vllm.config.compilation:CUDAGraphMode", why="leaves CUDA graphs that can't branch", used_by="engine/vllm/refusals.py",
          expects=(Has("NONE"),), where="every process"),
    Touch(target="vllm.sampling_params:SamplingParams", why="a request's tier, and whether its tokens can be drafted",
          used_by="engine/step/worker.py", expects=(Has("extra_args", "min_p", "logit_bias", "seed"),), where="every process"),
    Touch(target="vllm.sampling_params:SamplingParams._validate_spec_decode", why="replaced: serves requests that drafts can't, without them",
          used_by=_SPECULATION, expects=(Takes("speculative_config"),), where="every process"),
    Touch(target="vllm.v1.executor.multiproc_executor:MultiprocExecutor.sample_tokens", why="wrapped: takes a step's drafts from its result",
          used_by=_SPECULATION, expects=(Takes("grammar_output"),), where="every process"),
    Touch(target="vllm.v1.executor.multiproc_executor:MultiprocExecutor.take_draft_token_ids", why="replaced: asks only for drafts that did not come",
          used_by=_SPECULATION, expects=(Takes(),), where="every process"),
    # --- front end: the launcher and the agent
    Touch(target="vllm.entrypoints.openai.api_server", why="what `sedac serve` starts", used_by="app/launch.py", expects=(), where="front end"),
    Touch(target="vllm.engine.arg_utils:EngineArgs", why="the flags that `sedac serve` sets", used_by="app/launch.py", where="front end", expects=(
          Has("worker_cls", "additional_config", "speculative_config", "scheduling_policy", "served_model_name"),)),
    Touch(target="vllm.plugins.endpoint_plugins.interface:EndpointPlugin.attach_router", why="the agent's routes",
          used_by="agent/plugin.py", expects=(Takes("app"),), where="front end"),
    Touch(target="vllm.plugins.endpoint_plugins.interface:EndpointPlugin.init_state", why="starts the agent",
          used_by="agent/plugin.py", expects=(Takes("engine_client", "state", "args"),), where="front end"),
    Touch(target="vllm.engine.protocol:EngineClient.collective_rpc", why="reaches the workers",
          used_by="agent/engine.py", expects=(Takes("method", "timeout", "args"),), where="front end"),
    Touch(target="vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", why="reaches the workers of every data-parallel rank",
          used_by=_FRONT, expects=(Takes("method", "args"),), where="front end"),
    Touch(target="vllm.v1.engine.async_llm:AsyncLLM", why="where the agent finds both processors", used_by="agent/start.py",
          expects=(Has("input_processor", "output_processor", "engine_core"),), where="front end"),
    Touch(target="vllm.v1.engine.input_processor:InputProcessor.process_inputs", why="wrapped: stamps every request with its promise",
          used_by=_FRONT, expects=(Takes("request_id", "params"),), where="front end"),
    Touch(target="vllm.v1.engine.input_processor:InputProcessor", why="wrapped: stamps every request with its promise",
          used_by=_FRONT, expects=(Has("process_inputs_async"),), where="front end"),
    Touch(target="vllm.v1.engine:EngineCoreRequest", why="a request's promise, and the salt that keeps its KV apart", used_by="agent/promise.py",
          where="front end", expects=(
          Has("request_id", "external_req_id", "sampling_params", "cache_salt", "lora_request", "resumable"),)),
    Touch(target="vllm.v1.engine:FinishReason", why="which answers count as failed", used_by=_FRONT,
          expects=(Has("ERROR", "ABORT"),), where="front end"),
    Touch(target="vllm.v1.engine.output_processor:OutputProcessor.add_request", why="wrapped: watches latencies and answers",
          used_by=_FRONT, expects=(Takes("request"),), where="front end"),
    Touch(target="vllm.v1.engine.output_processor:OutputProcessor._update_stats_from_finished", why="wrapped: watches what finished",
          used_by=_FRONT, expects=(Takes("req_state", "finish_reason", "iteration_stats"),), where="front end"),
    Touch(target="vllm.v1.engine.output_processor:OutputProcessor.has_unfinished_requests", why="whether workers may have counted anything",
          used_by="agent/watch.py", expects=(Takes(),), where="front end"),
    Touch(target="vllm.v1.engine.output_processor:RequestState", why="an answer and its latency", used_by=_FRONT,
          expects=(Has("logprobs_processor", "stats", "prompt_token_ids"),), where="front end"),
    Touch(target="vllm.v1.engine.logprobs:LogprobsProcessor._update_sample_logprobs", why="overridden: keeps what an audit compares",
          used_by=_FRONT, expects=(Takes("logprobs_lists"),), where="front end"),
    Touch(target="vllm.v1.engine.logprobs:LogprobsProcessor", why="hides log-probabilities that nobody asked for", used_by=_FRONT,
          expects=(Has("logprobs", "cumulative_logprob", "num_logprobs"),), where="front end"),
    Touch(target="vllm.exceptions:VLLMValidationError", why="HTTP 400 for what a request can't have",
          used_by=_FRONT, expects=(Takes("message", "parameter", "value"),), where="front end"),
    Touch(target="vllm.inputs:tokens_input", why="the prompt of an audit", used_by=_FRONT,
          expects=(Takes("prompt_token_ids", "cache_salt"), Does("keeps the salt", _keeps_salt)), where="front end"),
    # --- worker
    Touch(target="vllm.v1.worker.gpu_worker:Worker", why="SEDAC's worker is a subclass", used_by=_RUNNER, where="worker", expects=(
          Has("init_device", "load_model", "compile_or_warm_up_model", "take_draft_token_ids", "model_runner", "model_config", "vllm_config"),)),
    Touch(target="vllm.v1.worker.gpu_worker:Worker.execute_model", why="overridden: learns of new and finished requests",
          used_by="engine/step/worker.py", expects=(Takes("scheduler_output"),), where="worker"),
    Touch(target="vllm.v1.worker.gpu_worker:Worker.sample_tokens", why="overridden: sends drafts along",
          used_by="engine/step/worker.py", expects=(Takes("grammar_output"),), where="worker"),
    Touch(target="vllm.v1.worker.cpu_worker:CPUWorker", why="SEDAC's worker is a subclass", used_by=_RUNNER,
          expects=(Has("init_device", "load_model", "execute_model", "sample_tokens"),), where="worker", cpu_only=True),
    Touch(target="vllm.v1.core.sched.output:SchedulerOutput", why="which requests a step has",
          used_by="engine/step/worker.py", where="worker", expects=(
          Has("scheduled_new_reqs", "finished_req_ids", "scheduled_spec_decode_tokens", "total_num_scheduled_tokens"),)),
    Touch(target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward", why="wrapped: where a step begins and ends",
          used_by=_RUNNER, expects=(Takes("positions"),), where="worker"),
    Touch(target="vllm.v1.worker.gpu_model_runner:GPUModelRunner", why="the running batch, its requests and their drafts", used_by=_RUNNER,
          where="worker", expects=(
          Has("get_model", "input_batch", "query_start_loc", "discard_request_mask", "attn_groups", "requests", "max_num_reqs", "max_model_len",
              "device", "drafter", "_draft_probs", "_draft_prob_req_ids", "_get_spec_decode_draft_probs"),)),
    Touch(target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter", why="replaced: lengths are bounded by sequence",
          used_by=_DRAFTING, expects=(Takes("common_attn_metadata"),), where="worker"),
    Touch(target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample", why="wrapped: keeps seeds of prompts in pieces; steps without drafts",
          used_by=_SAMPLING, expects=(Takes("logits", "spec_decode_metadata"),), where="worker"),
    Touch(target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync", why="wrapped: keeps seeds of prompts in pieces",
          used_by=_SAMPLING, expects=(), where="worker"),
    Touch(target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._calc_spec_decode_metadata", why="wrapped: steps without drafts",
          used_by=_SAMPLING, expects=(Takes("num_draft_tokens", "cu_num_scheduled_tokens"),), where="worker"),
    Touch(target="vllm.v1.worker.gpu_model_runner:build_logitsprocs", why="wrapped: all logits processors beside SEDAC's drafts",
          used_by=_SPECULATION, expects=(Takes("vllm_config", "device", "is_pin_memory", "custom_logitsprocs"),), where="worker"),
    Touch(target="vllm.v1.worker.gpu_input_batch:InputBatch", why="positions, prompts and tokens of the step",
          used_by=_RUNNER, where="worker", expects=(
          Has("req_ids", "num_reqs", "num_computed_tokens_cpu", "num_prompt_tokens", "num_tokens_no_spec", "token_ids_cpu", "block_table",
              "generators"),)),
    Touch(target="vllm.v1.outputs:ModelRunnerOutput", why="carries a step's drafts", used_by=_RUNNER,
          expects=(Does("keeps an attribute when pickled", _carries_drafts),), where="worker"),
    Touch(target="vllm.v1.sample.rejection_sampler:expand_kernel", why="mended where the CPU's loses the temperature of drafts",
          used_by=_SAMPLING, expects=(), where="worker", cpu_only=True),
    Touch(target="vllm.v1.sample.rejection_sampler:_expand", why="tries the sampler", used_by=_SAMPLING, expects=(), where="worker", cpu_only=True),
    Touch(target="vllm.triton_utils.dispatcher:KernelOverride", why="what stands for a kernel on the CPU, and is mended", used_by=_SAMPLING,
          expects=(Has("_impl"),), where="worker", cpu_only=True),
    Touch(target="vllm.v1.spec_decode.metadata:SpecDecodeMetadata", why="steps without drafts", used_by=_SAMPLING, where="worker", expects=(
          Takes("draft_token_ids", "num_draft_tokens", "cu_num_draft_tokens", "cu_num_sampled_tokens", "target_logits_indices",
                "bonus_logits_indices", "logits_indices"),)),
    Touch(target="vllm.utils.torch_utils:async_tensor_h2d", why="steps without drafts", used_by=_SAMPLING,
          expects=(Takes("data", "device"),), where="worker"),
    Touch(target="vllm.forward_context:ForwardContext", why="the slots of the step's tokens", used_by=_RUNNER,
          expects=(Has("slot_mapping"),), where="worker"),
    Touch(target="vllm.forward_context:set_forward_context", why="draft passes", used_by=_DRAFTING,
          expects=(Takes("attn_metadata", "vllm_config", "num_tokens", "slot_mapping"),), where="worker"),
    Touch(target="vllm.utils.torch_utils:direct_register_custom_op", why="checkpoints, gated MLPs and the tap under torch.compile",
          used_by=_PARTS, expects=(Takes("op_name", "op_func", "mutates_args", "fake_impl"),), where="worker"),
    Touch(target="vllm.utils.torch_utils:vllm_lib", why="the operators are called as torch.ops.vllm.sedac_*", used_by=_PARTS,
          expects=(Does("named vllm", lambda found: "" if found.ns == "vllm" else f"is named {found.ns}"),), where="worker"),
    Touch(target="vllm.model_executor.layers.linear:UnquantizedLinearMethod.apply", why="overridden: a product by levels",
          used_by="engine/backends/cpu_mlp.py", expects=(Takes("layer", "x", "bias"),), where="worker"),
    Touch(target="vllm.model_executor.layers.linear:UnquantizedLinearMethod.process_weights_after_loading", why="overridden: copies neurons first",
          used_by="engine/backends/torch_mlp.py", expects=(Takes("layer"),), where="worker"),
    Touch(target="vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", why="finds the packed weights that native kernels multiply by",
          used_by=_PARTS, expects=(Does("a closure over the weights", _keeps_weights),), where="worker", cpu_only=True),
    Touch(target="vllm.distributed", why="this rank's share of the neurons", used_by=_PARTS, where="worker", expects=(
          Has("get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size", "tensor_model_parallel_all_reduce"),)),
    Touch(target="vllm.distributed.parallel_state:GroupCoordinator", why="ranks agree on CUDA graphs and on what levels cost", used_by=_PARTS,
          expects=(Has("world_size", "cpu_group", "ranks"),), where="worker"),
    Touch(target="vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", why="makes SEDAC's drafter",
          used_by="engine/drafting/drafter.py", expects=(Takes("vllm_config"),), where="worker"),
    Touch(target="vllm.compilation.decorators:support_torch_compile", why="compiles the draft on its own",
          used_by=_DRAFTING, expects=(Takes("dynamic_arg_dims"),), where="worker"),
    Touch(target="vllm.compilation.decorators:_try_load_aot_compiled_fn", why="loads what was compiled for the CPU, given what it asks for",
          used_by="engine/vllm/compiled.py", expects=(Takes("model", "aot_compilation_path"),), where="worker", cpu_only=True),
    Touch(target="vllm.compilation.backends:set_model_tag", why="keeps the draft's compiled graphs apart",
          used_by=_DRAFTING, expects=(Takes("tag"),), where="worker"),
    Touch(target="vllm.model_executor.model_loader.utils:process_weights_after_loading", why="packs the draft's own weights",
          used_by=_DRAFTING, expects=(Takes("model", "model_config", "target_device"),), where="worker"),
    Touch(target="vllm.v1.attention.backend:CommonAttentionMetadata", why="attention of draft passes", used_by=_DRAFTING, where="worker", expects=(
          Takes("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "max_query_len", "max_seq_len",
                "block_table_tensor", "slot_mapping", "causal"),)),
    Touch(target="vllm.v1.attention.backend:AttentionMetadataBuilder.build", why="attention of draft passes", used_by="engine/drafting/attention.py",
          expects=(Takes("common_prefix_len", "common_attn_metadata"),), where="worker"),
    Touch(target="vllm.model_executor.layers.attention:Attention", why="the head's own KV cache", used_by=_DRAFTING,
          expects=(Takes("num_heads", "head_size", "scale", "num_kv_heads", "cache_config", "prefix"), Has("kv_cache", "impl", "kv_cache_dtype")),
          where="worker"),
    Touch(target="vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl", why="native draft passes", used_by="engine/backends/cpu_draft.py",
          expects=(Has("sliding_window", "logits_soft_cap", "alibi_slopes", "sinks", "scale", "head_size"),), where="worker", cpu_only=True),
    Touch(target="vllm.model_executor.layers.rotary_embedding:get_rope", why="the head's layer", used_by=_DRAFTING,
          expects=(Takes("head_size", "max_position", "rope_parameters"),), where="worker"),
    Touch(target="vllm.model_executor.layers.layernorm:RMSNorm", why="the head's layer; what native draft passes know", used_by=_DRAFTING,
          expects=(Takes("hidden_size", "eps"), Has("variance_size_override", "variance_epsilon")), where="worker"),
    Touch(target="vllm.model_executor.layers.activation:SiluAndMul", why="the head's layer", used_by=_DRAFTING, expects=(Takes(),), where="worker"),
    Touch(target="vllm.model_executor.layers.linear:QKVParallelLinear", why="the head's layer", used_by=_DRAFTING,
          expects=(Takes("hidden_size", "head_size", "total_num_heads", "total_num_kv_heads", "bias", "prefix"), Has("weight_loader")),
          where="worker"),
    Touch(target="vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p", why="draws drafts by a request's own parameters",
          used_by=_DRAFTING, expects=(Takes("logits", "k", "p"),), where="worker"),
)  # fmt: skip
"""All touches, in the order in which they come into play."""


def check_all(*wheres: Where) -> list[Checked]:
    """Check the touches of these processes, or of all, that are made on this platform; imports their modules."""
    rows = [touch for touch in TOUCHES if not wheres or touch.where in wheres]
    return [Checked(touch, touch.check()) for touch in rows if not touch.cpu_only or _is_cpu()]


def _is_cpu() -> bool:
    try:
        from vllm.platforms import current_platform

        return bool(current_platform.is_cpu())
    except Exception:  # noqa: BLE001  whatever it lacks, the row of the platform says so
        return False


def why_not(*wheres: Where) -> str:
    """Return why SEDAC can't be attached to the installed vLLM, what differs by name, and what to do; empty: it can."""
    try:
        version = find_vllm_version()
    except UnsupportedModel as error:
        return str(error)
    rows = [f"{row.touch.target} ({row.touch.why}) {row.problem}" for row in check_all(*wheres) if row.problem]
    if not rows:
        return ""
    return (
        f"vLLM {version} is installed, but differs from the {SUPPORTED_VLLM}.x that SEDAC supports: {'; '.join(rows)}; install a vLLM "
        f"{SUPPORTED_VLLM}.x as it was released, or serve without SEDAC (`vllm serve`); `sedac doctor` shows all that SEDAC relies on"
    )


def refuse(*wheres: Where) -> None:
    """Refuse an installed vLLM of another version, or whose internals differ.

    Raises:
        UnsupportedModel: it does; names the rows.
    """
    if reason := why_not(*wheres):
        raise UnsupportedModel(reason)


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Around imports from vLLM: what is missing is refused by its row's name.

    Raises:
        UnsupportedModel: an import failed, and the installed vLLM differs from what the table expects.
    """
    try:
        yield
    except ImportError as error:
        refuse()
        raise UnsupportedModel(f"vLLM {find_vllm_version()} lacks a part that SEDAC is built on: {error}; install it anew") from error
