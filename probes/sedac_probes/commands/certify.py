"""The command `certify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from sedac.errors import ConfigError

from sedac_probes.commands.options import DEMO, Model, Texts, read_documents

_ALL = 1_000_000


def certify(
    model: Model = str(DEMO / "model"),
    probe_set: Annotated[Path, typer.Option(help="Directory of the probe set, calibrated.")] = DEMO / "probe-set",
    texts: Texts = None,
    out: Annotated[Path, typer.Option(help="Directory for policy.json, certificate.json and .png; a run that was stopped is resumed.")] = Path(
        "build/certificate"
    ),
    loss: Annotated[
        str,
        typer.Option(help="What an answer lost, 0 to 1: mismatch, nll, divergence, or module:function of (prompt, exact answer, bounded answer)."),
    ] = "mismatch",
    eps: Annotated[float, typer.Option(help="The bound: mean loss at most.")] = 0.05,
    delta: Annotated[float, typer.Option(help="How often the bound may be wrong; 0.05: with 95 % confidence.")] = 0.05,
    requests: Annotated[int, typer.Option(help="Requests to answer; more of them certify more.")] = 500,
    tokens: Annotated[int, typer.Option(help="Tokens per answer at most.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens per prompt.")] = 64,
    procedure: Annotated[str, typer.Option(help="wsr (betting; the tighter one from some 500 requests on) or hb (Hoeffding-Bentkus).")] = "wsr",
    temperature: Annotated[float, typer.Option(help="0: greedy; above, both answers draw with the request's own seed.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Which prompts are cut, and in which order.")] = 0,
    member: Annotated[
        list[str] | None, typer.Option(help="FLOOR or FLOOR,LEVEL[,SCALE]: the family instead of the probe set's own; safest first, may be repeated.")
    ] = None,
    check: Annotated[Path | None, typer.Option(help="A certified policy.json: answer fresh requests under it instead, and compare.")] = None,
) -> None:
    """Show that answers lose at most EPS on average, and write the fastest policy for which that is shown.

    Every request is answered exactly and under one policy after the other, from the safest to the fastest, until one fails its test.

    The last that passed becomes the tier `certified` of OUT/policy.json. Where none passes, no policy is written and the exit code is 1.

    It holds for traffic like the texts: give your own, and none that made the probe set (left out where these very texts made it).

    Choose loss, eps and delta before you see results; trying until something passes voids the bound.

    Examples:

        sedac-probes certify --model build/model --probe-set build/probe-set --texts traffic.txt --loss mismatch --eps 0.05 --out build/certificate

        sedac-probes certify --check build/certificate/policy.json --texts other-traffic.txt

        sedac-probes certify --loss my_scores:lost_points --eps 0.02 --delta 0.01 --requests 1000
    """
    from sedac.probe.manifest import read_manifest

    from sedac_probes.certification import bounds, family, policy_file, verdict
    from sedac_probes.certification import certify as workshop
    from sedac_probes.certification.session import Settings

    settings = Settings(
        loss=loss, eps=eps, delta=delta, procedure=bounds.read_procedure(procedure), num_requests=requests, prompt_tokens=prompt_tokens,
        answer_tokens=tokens, temperature=temperature, seed=seed,
    )  # fmt: skip
    kept = out / "certify"
    if check:
        policy = policy_file.read(check)
        seen = workshop.check(model, probe_set, policy, read_documents(texts, "heldout", _ALL, model), settings, kept)
        verdict.print_observation(seen)
        verdict.write_observation(out / "check.json", seen)
        raise typer.Exit(0 if seen.holds else 1)
    manifest = read_manifest(probe_set)
    members = [family.parse_member(text) for text in member] if member else family.make_family(manifest)
    documents = _leave_out(read_documents(texts, "train", _ALL, model), texts, manifest.training, model)
    made = workshop.certify(model, probe_set, documents, members, settings, kept)
    verdict.print_outcomes(made)
    verdict.write_json(out / "certificate.json", made)
    verdict.draw(out / "certificate.png", made)
    target = out / "policy.json"
    if made.policy is None:
        target.unlink(missing_ok=True)  # of an earlier run: it would pass for this one's
        typer.echo(verdict.summarise(made), err=True)
        raise typer.Exit(1)
    policy_file.write(target, made.policy, verdict.summarise(made))
    typer.echo(verdict.summarise(made))
    typer.echo(f"{target}; put it into force: sedac ctl policy apply {target} --wait 5")


def _leave_out(documents: list[Any], texts: list[Path] | None, training: dict[str, Any], model: str) -> list[Any]:
    """Drop the documents that `collect` and `calibrate` took from these very texts, told by the digests in the manifest."""
    from sedac_probes import corpus

    used: set[str] = set()
    for made in (training, training.get("calibration", {})):
        taken = read_documents(texts, "train", made.get("num_documents", 1), model)
        if corpus.digest(taken) == made.get("data_digest"):
            used |= {d.path for d in taken}
    left = [d for d in documents if d.path not in used]
    if not left:
        raise ConfigError(f"all {len(documents)} documents served to make the probe set; name texts with --texts that did not")
    return left
