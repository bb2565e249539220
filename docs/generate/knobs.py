"""The reference pages of the policy's knobs and of the environment variables, from sedac.policy.model and the settings' classes."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings
from sedac.contract.credentials import Credentials
from sedac.control.base.settings import ControlSettings
from sedac.ctl.knobs import list_policy_options, list_tier_options
from sedac.policy.knob import Field, list_fields, list_knobs
from sedac.policy.model import Policy
from sedac.settings import EngineSettings

_KNOBS = """# Knobs of the policy

Every knob that can be changed while engines serve. `sedac ctl policy set` has the options below, `sedac ctl tier set NAME` those of a tier;
`sedac ctl policy get --json` shows all of them by these names. A list has one value per entry, and limits hold for each.

The variables, before `sedac serve`, make the first policy of an engine; a control service that already has a policy rules. `SEDAC_POLICY=FILE`
names a file with the whole first policy in their place. The last column has the names that the earlier versions had for a variable, which
are read too, and their published default, where it is known and said.
"""
_VARIABLES = """# Environment variables

Unknown `SEDAC_*` names are refused with the closest known one. An empty variable is an unset one. Lists are comma-separated.
"""
_LOGS = (
    ("SEDAC_LOG_FORMAT", "text or json: how the lines of the log are written.", "text"),
    ("SEDAC_LOG_LEVEL", "debug, info, warning or error: the least that is logged.", "info"),
)


def render() -> dict[str, str]:
    """Return the pages by their file names under docs/reference."""
    return {"knobs.md": _render_knobs(), "variables.md": _render_variables()}


def _render_knobs() -> str:
    parts: dict[str, list[tuple[str, Field]]] = {"": []}
    for path, field in list_knobs(Policy):
        if field.is_part:
            parts[field.name] = []
        else:
            parts[path.rpartition(".")[0]].append((path, field))
    pages = [_KNOBS]
    whole = {field.name: field for field in list_fields(Policy)}
    for part, knobs in parts.items():
        knob = whole[part].knob if part else None
        pages.append(f"## {part.capitalize()}\n\n{knob.describe()}\n" if knob else "## The policy itself\n")
        header = ("knob", "meaning", "unit", "limits", "default", "option", "variable", "earlier versions")
        pages.append(_make_table(header, (_describe(path, field) for path, field in knobs)))
    return "\n".join(pages)


def _describe(path: str, field: Field) -> tuple[str, ...]:
    knob = field.knob
    assert knob
    own = [f"`{'/'.join(option.flags)}`" for option in list_policy_options() if option.path == path]
    of_tier = [f"`{'/'.join(option.flags)}` of `tier set`" for option in list_tier_options() if f"tiers.{option.path}" == path]
    if field.words:
        limits = ", ".join(field.words)
    else:
        lengths = f"{knob.min_length} to {knob.max_length} {'entries' if field.is_list else 'characters'}" if knob.max_length else ""
        limits = "; ".join(filter(None, (knob.limits, lengths, f"`{knob.pattern}`" if knob.pattern else "")))
    earlier = ", ".join(f"`SEDAC_{name}`" for name in knob.earlier)
    return (
        f"`{path}`",
        _explain(field, knob.describe(field.default)),
        knob.unit,
        limits,
        _show_default(field.default) if not field.is_required else "none: it must be given",
        "; ".join(own + of_tier),
        f"`SEDAC_{knob.variable}`" if knob.variable else "",
        "; ".join(filter(None, (earlier, f"published: {knob.published}" if knob.published else ""))),
    )


def _explain(field: Field, text: str) -> str:
    """Return a help as a sentence."""
    text = text.rstrip(".") + "."
    return text if field.words else text[:1].upper() + text[1:]


def _render_variables() -> str:
    groups: tuple[tuple[str, Iterable[tuple[str, str, str]]], ...] = (
        ("The engine (`sedac serve`)", _list_settings(EngineSettings, "SEDAC_")),
        ("The control service (`sedac control`)", _list_settings(ControlSettings, "SEDAC_CONTROL_")),
        ("Clients of the control service (`sedac ctl`, engines)", _list_settings(Credentials, "SEDAC_CONTROL_")),
        ("Logs of both", _LOGS),
    )
    tables = (f"## {title}\n\n{_make_table(('variable', 'meaning', 'default'), _mark(rows))}" for title, rows in groups)
    return "\n".join([_VARIABLES, *tables])


def _mark(rows: Iterable[tuple[str, str, str]]) -> Iterable[tuple[str, str, str]]:
    return ((f"`{name}`", meaning, default) for name, meaning, default in rows)


def _list_settings(settings: type[BaseSettings], prefix: str) -> Iterable[tuple[str, str, str]]:
    texts, knobs = _read_docstrings(settings), dict(_list_knob_variables())
    for name, field in settings.model_fields.items():
        default = "made when it starts" if field.default_factory else _show_default(field.default)
        meaning, default = (texts[name], default) if name in texts else knobs[name]
        yield prefix + name.upper(), meaning, default


def _list_knob_variables() -> Iterable[tuple[str, tuple[str, str]]]:
    """Yield the variables of knobs, each with its meaning and default."""
    for path, field in list_knobs(Policy):
        assert field.knob
        is_list = path.startswith("checkpoints.") or (field.is_list and field.type is float)
        for name in field.knob.variables:
            other = "" if name == field.knob.variable else f" Another name of SEDAC_{field.knob.variable}."
            default = field.default if field.knob.first is None else field.knob.first
            shown = "the probe set's" if field.is_required else _show_default(default)
            text = _explain(field, field.knob.describe_variable(field.default)) + (" One value per checkpoint." if is_list else "")
            yield name.lower(), (f"{text}{other} Knob `{path}`.", shown)


def _read_docstrings(settings: type[BaseSettings]) -> dict[str, str]:
    """Return what is written under each field of a class."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    assert isinstance(body, ast.ClassDef)
    return {
        before.target.id: after.value.value
        for before, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }


def _show_default(default: Any) -> str:
    if default in (None, (), "", Path()):
        return "unset"
    return str(default).lower() if isinstance(default, bool) else f"{default:g}" if isinstance(default, float) else str(default)


def _make_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
