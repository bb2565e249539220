"""The child of an offline measurement: one engine in process, `python -m sedac.bench.engine ORDER.json ANSWER.json`.

Called by `sedac.bench.offline` alone. Everything of vLLM is imported here and nowhere else in this package.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from sedac.bench.matrix import DEFAULT_TIER
from sedac.bench.tuning import with_knob
from sedac.policy.request_keys import TIER_KEY

_WARM_TOKENS = 16


def make_engine(order: dict[str, Any]) -> tuple[Any, str]:
    """Return the engine, and the tier to stamp requests with; empty: none, for it is plain vLLM."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs, FlexibleArgumentParser

    flags = list(order["flags"])
    if not order["probe_set"]:
        return LLM.from_engine_args(_parse(EngineArgs, FlexibleArgumentParser, flags)), ""

    from sedac.engine.vllm.speculation import DRAFTER
    from sedac.probe.draft_manifest import read_draft_manifest
    from sedac.probe.manifest import read_manifest
    from sedac.settings import read_settings

    entry = {"probe_set": order["probe_set"], "levels": True, **({"draft": order["draft"]} if order["draft"] else {})}
    flags += ["--worker-cls", "sedac.engine.step.worker.SedacWorker", "--additional-config", json.dumps({"sedac": entry})]
    if order["draft"]:
        num_tokens = read_draft_manifest(Path(order["draft"])).max_tokens
        flags += ["--speculative-config", json.dumps({"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": num_tokens})]
    llm = LLM.from_engine_args(_parse(EngineArgs, FlexibleArgumentParser, flags))
    policy = read_settings(probe_dir=Path(order["probe_set"])).make_policy(read_manifest(Path(order["probe_set"])))
    for path, value in order["knobs"].items():
        policy = with_knob(policy, path, value)
    answer = llm.collective_rpc("sedac_apply", args=(policy.to_dict(), 1))[0]
    if answer["violations"]:
        raise SystemExit(f"the policy was refused: {answer['violations']}")
    return llm, policy.default_tier if order["tier"] == DEFAULT_TIER else order["tier"]


def _parse(engine_args: Any, parser: Any, flags: list[str]) -> Any:
    return engine_args.from_cli_args(engine_args.add_cli_args(parser()).parse_args(flags))


def run(llm: Any, tier: str, waves: list[list[list[int]]], num_tokens: int, temperature: float) -> dict[str, float]:
    """Answer waves of prompts one after the other; returns tokens per second, and what they are made of."""
    from vllm import SamplingParams

    extra = {TIER_KEY: tier} if tier else None
    params = SamplingParams(temperature=temperature, max_tokens=num_tokens, ignore_eos=True, detokenize=False, extra_args=extra)
    began, count = time.monotonic(), 0
    for wave in waves:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in wave], params, use_tqdm=False)
        count += sum(len(output.outputs[0].token_ids) for output in outputs)
    seconds = time.monotonic() - began
    return {"tokens_per_second": count / seconds, "num_tokens": float(count), "seconds": seconds}


def main() -> None:
    """Measure every load of the order, the smallest first, each after a short wave that warms it up."""
    order, answer = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    llm, tier = make_engine(order)
    found = {}
    for name, waves in order["waves"].items():
        run(llm, tier, [[prompt[::-1] for prompt in waves[0]]], _WARM_TOKENS, order["temperature"])
        found[name] = run(llm, tier, waves, order["num_tokens"], order["temperature"])
    answer.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
