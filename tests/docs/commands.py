"""Holds the commands of a page against the programs that they call, without running them: program, subcommand, options and their values exist."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import typer
import yaml
from sedac.app.cli import app as sedac
from sedac.settings import EngineSettings
from sedac_probes.cli import app as sedac_probes

from tests.docs.pages import ROOT

_OPERATORS = {"&&", "||", "|", ";", ";;"}
_VARIABLE = re.compile(r"([A-Za-z_]\w*)=.*", re.DOTALL)
_VLLM_FLAGS = ("engine/arg_utils.py", "entrypoints/**/cli_args.py", "entrypoints/launchers/*.py", "config/*.py")
"""where vLLM 0.32 declares what its server's flags are made from"""


class NotFound(AssertionError):
    """A command names what does not exist."""


@dataclass(kw_only=True)
class Command:
    """One command of a block."""

    words: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    """that are set in front of it"""
    output: str = ""
    """file that its output goes to"""
    appends: bool = False
    end: str = ";"
    """the operator behind it"""


def split(block: str) -> Iterator[Command]:
    """Yield the commands of a block, without comments."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command = Command()
        tokens = iter([*lexer, ";"])
        for token in tokens:
            if token in _OPERATORS:
                command.end = token
                if command.words:
                    yield command
                command = Command()
            elif token in (">", ">>"):
                command.output, command.appends = next(tokens), token == ">>"
            elif not command.words and _VARIABLE.fullmatch(token):
                name, _, command.variables[name] = token.partition("=")
            else:
                command.words.append(token)


def _check_variable(name: str) -> None:
    from sedac.contract.credentials import VARIABLES
    from sedac.control.base.settings import ControlSettings

    known = {f"SEDAC_{field.upper()}" for field in EngineSettings.model_fields} | VARIABLES
    known |= {f"SEDAC_CONTROL_{field.upper()}" for field in ControlSettings.model_fields}
    if name not in known:
        raise NotFound(f"{name} is no variable")


def check(command: Command) -> None:
    """Check one command.

    Raises:
        NotFound: with what does not exist.
    """
    for name in command.variables:
        if name.startswith("SEDAC_"):
            _check_variable(name)
    words = [word for word in command.words if word != "do"]  # of a loop in a recipe
    program, arguments = words[0].removeprefix(".venv/bin/").removeprefix("$"), words[1:]
    if program not in _CHECKS:
        raise NotFound(f"{program} is no program that the pages' test knows: {shlex.join(words)}")
    _CHECKS[program](arguments)


def _check_typer(app: typer.Typer, arguments: list[str]) -> None:
    command, context, name = typer.main.get_command(app), None, "sedac"
    while True:
        try:
            context = command.make_context(name, list(arguments), parent=context)
        except Exception as error:  # noqa: BLE001  typer's own usage errors have no public class
            raise NotFound(f"{shlex.join(arguments)}: {error or type(error).__name__}") from None
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not hasattr(command, "commands") or not rest:
            break
        name, *arguments = rest
        if name not in command.commands:
            raise NotFound(f"{name} is no command of {context.command_path}")
        command = command.commands[name]
    ours = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for flag in {word.split("=")[0] for word in arguments if word.startswith("--")} - {"--", *ours}:
        if flag not in _find_vllm_flags():
            raise NotFound(f"{flag} is no flag of vLLM's server")


@functools.cache
def _find_vllm_flags() -> frozenset[str]:
    spec = importlib.util.find_spec("vllm")
    assert spec
    assert spec.origin
    files = [path for pattern in _VLLM_FLAGS for path in Path(spec.origin).parent.glob(pattern)]
    fields = (name for path in files for name in re.findall(r"^    (\w+): ", path.read_text(), re.MULTILINE))
    return frozenset(f"--{name.replace('_', '-')}" for name in fields)


def _check_make(arguments: list[str]) -> None:
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotFound(f"make {shlex.join(arguments)}: {done.stderr}")
    phony = re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in (word for word in arguments if "=" not in word):
        if target not in phony:
            raise NotFound(f"{target} is no target of the Makefile")
    for command in split(done.stdout):
        if any(word.endswith("sedac-probes") or word.startswith("benchmarks/") for word in command.words[:3]):
            check(command)


def _check_script(arguments: list[str]) -> None:
    script, *options = arguments
    known = _read_help(script)
    for option in (word.split("=")[0] for word in options if word.startswith("-")):
        if option not in known:
            raise NotFound(f"{script} has no option {option}")


@functools.cache
def _read_help(script: str) -> set[str]:
    if not (ROOT / script).is_file():
        raise NotFound(f"there is no file {script}")
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--?[a-z][\w-]*", done.stdout))


def _check_pytest(arguments: list[str]) -> None:
    for path in (word for word in arguments if word.startswith("tests/")):
        if not (ROOT / path).exists():
            raise NotFound(f"there is no file {path}")


def _check_compose(arguments: list[str]) -> None:
    file = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    words = iter(arguments)
    assert next(words) == "compose"
    for word in words:
        if word == "--profile":
            profile = next(words)
            if not any(profile in service.get("profiles", ()) for service in file["services"].values()):
                raise NotFound(f"{profile} is no profile of docker-compose.yml")
        elif word == "--scale":
            service = next(words).split("=")[0]
            if service not in file["services"]:
                raise NotFound(f"{service} is no service of docker-compose.yml")
        elif word not in ("up", "down", "logs"):
            raise NotFound(f"docker compose {word}")


def _check_export(arguments: list[str]) -> None:
    for name in (word.partition("=")[0] for word in arguments):
        if name.startswith("SEDAC_"):
            _check_variable(name)


_CHECKS: dict[str, Callable[[list[str]], None]] = {
    "sedac": functools.partial(_check_typer, sedac),
    "sedac-probes": functools.partial(_check_typer, sedac_probes),
    "make": _check_make,
    "python": _check_script,
    "python3": _check_script,
    "pytest": _check_pytest,
    "docker": _check_compose,
    "export": _check_export,
}
