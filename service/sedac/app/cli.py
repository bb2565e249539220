"""The `sedac` command: serve, control, ctl, doctor, bench. Imports what a command needs only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sedac import __version__, logs
from sedac.ctl import root as ctl
from sedac.errors import SedacError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Serve a language model through vLLM and spend less computing on the tokens that need less.",
)
control_app = typer.Typer(pretty_exceptions_enable=False)
app.add_typer(control_app, name="control")
app.add_typer(ctl.app, name="ctl")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"sedac {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False) -> None:
    logs.configure()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model directory or name; default: the demo model.")] = "",
    probe_set: Annotated[Path | None, typer.Option(help="Directory of the probe set (SEDAC_PROBE_DIR).")] = None,
    draft: Annotated[
        Path | None, typer.Option(help="Directory of a draft for self-speculation (SEDAC_DRAFT_DIR); `none`: without. Default: the demo model's own.")
    ] = None,
    control: Annotated[
        str | None, typer.Option(help="host:port of a control service elsewhere; `none`: serve without one. Default: run one here.")
    ] = None,
    sedac_layer: Annotated[int | None, typer.Option(help="One checkpoint after this layer; its tokens exit only all together (scope batch).")] = None,
    sedac_threshold: Annotated[float | None, typer.Option(help="First threshold, the same for every checkpoint.")] = None,
    engine_id: Annotated[str | None, typer.Option(help="This engine's name on the control service (SEDAC_ENGINE_ID).")] = None,
) -> None:
    """Run vLLM's OpenAI server with SEDAC attached, and a control service beside it.

    Flags that are not listed here go to vLLM as they are:

        sedac serve                                            the demo model on port 8000
        sedac serve Qwen/Qwen2.5-3B --probe-set ./probes --port 9000 --max-model-len 4096
        sedac serve --control control.internal:50051           follow a control service elsewhere
        sedac serve --draft none                               no self-speculation
    """
    from sedac.app import launch
    from sedac.probe.manifest import read_manifest
    from sedac.settings import read_settings

    arguments = list(context.args)
    if model.startswith("-"):  # an unknown flag first: click took it for the argument
        arguments, model = [model, *arguments], ""
    settings = read_settings(model=model or None, probe_dir=probe_set, draft_dir=draft, engine_id=engine_id)
    if sedac_layer is not None:
        settings = settings.model_copy(update={"probe_layers": (sedac_layer,), "scope": "batch"})
    if sedac_threshold is not None:
        filled = launch.with_demo_defaults(settings)
        num_checkpoints = len(filled.probe_layers or read_manifest(filled.probe_dir).probes)
        settings = settings.model_copy(update={"thresholds": (sedac_threshold,) * num_checkpoints})
    raise typer.Exit(launch.serve(settings, arguments, control=control or settings.control_address or None))


@control_app.callback(invoke_without_command=True)
def control(context: typer.Context) -> None:
    """Run the control service alone; settings come from SEDAC_CONTROL_* (host, port, database, metrics_port, ...)."""
    if context.invoked_subcommand is None:
        from sedac.control.base.settings import ControlSettings
        from sedac.control.server.server import run

        run(ControlSettings())


@control_app.command()
def token(
    name: Annotated[str, typer.Argument(help="Whose token: a person, a script or an engine.")],
    role: Annotated[str, typer.Option(help="viewer, operator, admin or engine.")],
    expires_days: Annotated[float | None, typer.Option(min=0.0, help="Days until it expires; default: never.")] = None,
    engine_id: Annotated[str, typer.Option(help="Role engine: the only engine it may speak for.")] = "",
    token_file: Annotated[Path | None, typer.Option(help="Write the token into this new file instead of showing it.")] = None,
) -> None:
    """Make a bearer token. Its line for the principals file goes to the output, the token itself is shown once beside it.

    sedac control token alice --role operator >> principals.jsonl
    sedac control token e1 --role engine --engine-id e1 --token-file e1.token >> principals.jsonl
    """
    from sedac.control.access.principals import make_token, write_token

    secret, line = make_token(name, role, expires_days=expires_days, engine_id=engine_id)
    if token_file:
        write_token(token_file, secret)
    else:
        typer.echo(f"the token, shown this once: {secret}", err=True)
    typer.echo(line)


@app.command(context_settings={"allow_extra_args": True})
def doctor(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model directory; default: the demo model.")] = "",
    probe_set: Annotated[Path | None, typer.Option(help="Directory of the probe set (SEDAC_PROBE_DIR).")] = None,
    draft: Annotated[Path | None, typer.Option(help="Directory of the draft (SEDAC_DRAFT_DIR); `none`: without.")] = None,
    url: Annotated[str, typer.Option(help="A running engine to ask what is attached.")] = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what is attached, to which vLLM, and why not if not; then what SEDAC relies on inside vLLM, row by row.

    Exit code 1 when something that serving needs is missing, or differs.

    vLLM's own flags, with which `sedac serve` would be started, come after `--`:

        sedac doctor --draft ./draft -- --enforce-eager
    """
    from sedac.app.doctor import examine, examine_touches, show, show_json, show_touches

    arguments = list(context.args)
    if model.startswith("-"):  # it came after `--`, and click took it for the argument
        arguments, model = [model, *arguments], ""
    findings = examine(model, probe_set, url, draft=draft, vllm_args=arguments)
    if not as_json:
        show(findings)  # first, for the touches take a while
    findings.append(examine_touches())
    if as_json:
        show_json(findings)
    else:
        show_touches(findings[-1])
    raise typer.Exit(int(any(finding.state == "bad" for finding in findings)))


@app.command()
def bench(
    matrix: Annotated[str, typer.Argument(help="A YAML file, or the name of a preset: quick, serving.")] = "quick",
    out: Annotated[Path, typer.Option(help="Folder of figures and report. If it holds some of this matrix, the run goes on there.")] = Path("bench"),
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds that count, in place of the matrix's.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="Clients at once, in place of the matrix's (repeat).")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Without servers: the engine in process, tokens per second alone.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the matrix, with all defaults, and end.")] = False,
    only_report: Annotated[bool, typer.Option("--only-report", help="Measure nothing; write the report of what is measured.")] = False,
) -> None:
    """Measure what a client sees: SEDAC's tiers beside plain vLLM and vLLM's own alternatives.

    Every system of the matrix is a server of its own. All run at once and all but the one that is measured are frozen; each round
    measures every row at every load, in changing order. A ratio is that of two figures of the same round, and reported is the median
    over rounds with its least and most. A run that was broken off goes on where it was.

    Examples:

        sedac bench                                          the preset quick: ten minutes on two cores

        sedac bench serving --out build/serving              every shipped tier of the demo model, an hour

        sedac bench mine.yaml --out build/mine --rounds 3

        sedac bench quick --show > mine.yaml                 a matrix to begin with

        sedac bench serving --out build/serving --only-report

        sedac bench quick --offline --out build/offline
    """
    from sedac.bench.bench import OFFLINE, ONLINE, run
    from sedac.bench.reading import read_matrix, to_yaml

    found = read_matrix(matrix, rounds=rounds, concurrencies=concurrency or None)
    if show:
        typer.echo(to_yaml(found), nl=False)
    else:
        run(found, out, mode=OFFLINE if offline else ONLINE, measures=not only_report)


def main() -> None:
    """Run the command; errors that SEDAC raises on purpose end in one line and exit code 1."""
    try:
        app()
    except SedacError as error:
        typer.echo(f"sedac: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
