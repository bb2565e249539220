"""The command `validate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sedac_probes.commands.options import DEMO, MaxLength, Model, Samples, Texts, read_documents
from sedac_probes.commands.train import QUANTILES

_SHARES = (0.1, 0.2, 0.3)


def validate(
    probe_set: Annotated[Path, typer.Option(help="Directory of the probe set.")] = DEMO / "probe-set",
    model: Model = str(DEMO / "model"),
    texts: Texts = None,
    samples: Samples = 32,
    max_length: MaxLength = 512,
    against: Annotated[Path | None, typer.Option(help="Another probe set: compare who chooses tokens, at equal saving; nothing else.")] = None,
    tier: Annotated[str, typer.Option(help="With --against: the tier whose floor and level are chosen between, beside hard exits.")] = "balanced",
    out: Annotated[Path | None, typer.Option(help="Where the results go, without suffix: OUT.json and OUT.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what thresholds and tiers save and cost on held-out text, with the per-token rule applied to all of it.

    Hard exits, one row per share of tokens that each checkpoint alone would let go, and the set's tiers. The engine gives perplexity
    ratio and agreement; the model in fp32 gives KL, entropies and the count of saved FLOPs. The theoretical speed-up is of a decode step
    at batch 1, attention, lm_head and KV cache included. Example: sedac-probes validate --samples 64 --out build/validation
    """
    from sedac.probe.manifest import read_manifest

    documents = [d.text for d in read_documents(texts, "heldout", samples, model)]
    manifest = read_manifest(probe_set)
    if against:
        written = _compare(probe_set, against, model, documents, max_length, tier)
    else:
        from sedac_probes.training.validate import validate as run

        results = run(model, probe_set, documents, QUANTILES, max_length=max_length)
        written = {"kind": "validation", "policies": [asdict(r) for r in results]}
        if not as_json:
            _print(results)
    written |= {"probe_set": manifest.sha256, "data": {"num_documents": len(documents)}}
    if as_json:
        typer.echo(json.dumps(written, indent=2))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")
        if not against:
            _draw(out.with_suffix(".png"), written["policies"])


def _print(results: list[Any]) -> None:
    tokens = f"{results[0].num_tokens} held-out tokens"
    table = Table(
        "policy", "MLP FLOPs saved", "perplexity ratio", "in fp32", "agreement", "KL, nats", "speed-up by bytes", "by FLOPs", title=tokens, box=None
    )
    exits = Table(
        "policy", "layer", "threshold", "exit rate", "entropy, exited", "entropy, rest", "saved by hard exit", title="checkpoints", box=None
    )
    for r in results:
        figures = (f"{r.perplexity_ratio:.4f}", f"{r.reference_ratio:.4f}", f"{r.agreement:.4f}", f"{r.kl:.5f}")
        table.add_row(r.name, f"{r.saved:.1%}", *figures, f"{r.speedup_bytes:.3f}", f"{r.speedup_flops:.3f}")
        for e in r.exits:
            entropies = ("-" if value is None else f"{value:.3f}" for value in (e.entropy_exited, e.entropy_rest))
            exits.add_row(r.name, str(e.layer), f"{e.threshold:.4f}", f"{e.exit_rate:.1%}", *entropies, f"{e.saved:.1%}")
    Console().print(table)
    Console().print(exits)


def _compare(probe_set: Path, against: Path, model: str, texts: list[str], max_length: int, tier: str) -> dict[str, Any]:
    """Print and return perplexity ratios by chooser, for hard exits and between the tier's floor and level."""
    from sedac.errors import ConfigError
    from sedac.probe import artifact

    from sedac_probes.calibration.reduced import ReducedModel
    from sedac_probes.training.choosers import compare_choosers
    from sedac_probes.training.damage import make_batch, make_form

    own, other = artifact.load(probe_set), artifact.load(against)
    if set(own.probes) != set(other.probes):
        raise ConfigError(f"{against} has probes after layers {sorted(other.probes)}, {probe_set} after {sorted(own.probes)}; train both on one")
    reduced = ReducedModel(model)
    rows = [ids for ids in (reduced.tokenizer(text)["input_ids"][: max_length - 1] for text in texts) if len(ids) > 1]
    batches = [make_batch(rows[i : i + 8]) for i in range(0, len(rows), 8)]
    pairs = {"hard exits": ("full", "skip", probe_set)}
    for owner, directory in ((own, probe_set), (other, against)):
        pairs |= {f"{t.floor} or {t.level}": (t.floor, t.level, directory) for t in owner.manifest.tiers if t.name == tier and len(pairs) == 1}
    probes = {f"{d}: {s.manifest.target[:40]}": s.probes for d, s in ((probe_set, own), (against, other))}
    table = Table(
        "levels", "after layer", "who chooses", *(f"{s:.0%} of tokens" for s in _SHARES), title="perplexity ratio at equal saving", box=None
    )
    found = []
    for label, (floor, level, directory) in pairs.items():
        forms = [make_form(reduced, name, directory) for name in (floor, level)]
        for layer in sorted(own.probes):
            for name, ratios in compare_choosers(reduced, batches, probes, layer, _SHARES, forms[0], forms[1]).items():
                found.append({"levels": label, "layer": layer, "chooser": name, "perplexity_ratio": ratios})
                table.add_row(label, str(layer), name, *(f"{ratio:.5f}" for ratio in ratios))
    Console().print(table)
    return {"kind": "choosers", "shares": list(_SHARES), "rows": found}


def _draw(path: Path, policies: list[dict[str, Any]]) -> None:
    """Draw the perplexity increase against the saved share, and the exit rates of each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for kind, marker in (("hard exits", "o-"), ("tier", "s--")):
        points = [(p["saved"] * 100, max(0.001, p["perplexity_ratio"] * 100 - 100)) for p in policies if p["name"].startswith(kind)]
        if points:
            left.plot(*zip(*sorted(points), strict=True), marker, markersize=5, label=kind)
    left.set(xlabel="MLP FLOPs saved, %", ylabel="perplexity increase, %", yscale="log")
    left.legend(fontsize=8)
    below = [0.0] * len(policies)
    for i, row in enumerate(policies[0]["exits"]):
        rates = [p["exits"][i]["exit_rate"] * 100 for p in policies]
        right.barh([p["name"] for p in policies], rates, left=below, label=f"after layer {row['layer']}")
        below = [a + b for a, b in zip(below, rates, strict=True)]
    right.set(xlabel="confident tokens, %")
    right.invert_yaxis()
    right.legend(fontsize=8)
    left.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
