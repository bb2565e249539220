"""Options of `sedac ctl` made of the knobs of sedac.policy.model, and what they change; a new knob there is an option here."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import typer

from sedac.ctl.completion import complete_probe_set, complete_tier
from sedac.ctl.options import merge_by_layer, parse_number_or
from sedac.policy.knob import Field, list_fields
from sedac.policy.model import Checkpoint, Policy, Tier

_COMPLETIONS = {"probe_set": complete_probe_set, "default_tier": complete_tier, "speculation.tiers": complete_tier}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnobOption:
    """One option: the knob that it sets, and how a command takes it."""

    path: str
    """Path of the knob, such as `audit.share`."""
    field: Field
    flags: tuple[str, ...]
    parameter: inspect.Parameter

    @property
    def name(self) -> str:
        """As the command knows it."""
        return self.parameter.name


def list_policy_options() -> tuple[KnobOption, ...]:
    """Return the options of `sedac ctl policy set`: of single knobs, of every checkpoint by its layer, and of what is set in every tier."""
    found: list[KnobOption] = []
    for field in list_fields(Policy):
        assert field.knob
        if field.type is Tier:
            found += [_make(f"tiers.{f.name}", f, field.knob.panel, f.knob.help_for_all) for f in list_fields(Tier) if f.knob and f.knob.help_for_all]
        elif field.is_part:
            found += list_part_options(field)
        elif field.knob.option != "":
            found.append(_make(field.name, field, field.knob.panel))
    return tuple(found)


def list_part_options(part: Field) -> tuple[KnobOption, ...]:
    """Return the options of the knobs of one part of a policy."""
    assert part.knob
    return tuple(
        _make(f"{part.name}.{field.name}", field, part.knob.panel, by_layer=part.is_list)
        for field in list_fields(part.type)
        if part.knob.option != "" and field.knob and field.knob.option != ""
    )


def list_tier_options() -> tuple[KnobOption, ...]:
    """Return the options of `sedac ctl tier set`."""
    return tuple(_make(field.name, field, "") for field in list_fields(Tier) if field.knob and field.knob.option != "")


def with_knobs(options: Sequence[KnobOption]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options; it takes what was given as a dict by path, its second argument."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        """Give the command the options of the knobs."""

        @functools.wraps(command)
        def run(client: Any, **arguments: Any) -> None:
            """Call the command with the knobs that were given, by path."""
            given = {option.path: arguments.pop(option.name) for option in options}
            command(client, {path: value for path, value in given.items() if value is not None and value != []}, **arguments)

        client, _, *rest = inspect.signature(command, eval_str=True).parameters.values()
        own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in rest]
        run.__dict__["__signature__"] = inspect.Signature([client, *(option.parameter for option in options), *own])
        return run

    return decorate


def change_policy(policy: Policy, given: Mapping[str, Any]) -> tuple[Policy, list[str]]:
    """Return the policy with the knobs that were given by path as the options take them, and the fields of an update that they are.

    Raises:
        typer.BadParameter: what was given can't be read, or is for a layer that is no checkpoint.
    """
    plain: dict[str, Any] = {path: _read(policy, path, value) for path, value in given.items() if "." not in path}
    by_part: dict[str, dict[str, Any]] = {}
    for path, value in given.items():
        part, dot, name = path.partition(".")
        if dot:
            by_part.setdefault(part, {})[name] = value
    if of_checkpoints := by_part.pop("checkpoints", None):
        plain["checkpoints"] = _merge_checkpoints(policy.checkpoints, of_checkpoints)
    if of_tiers := by_part.pop("tiers", None):
        plain["tiers"] = tuple(dataclasses.replace(tier, **of_tiers) for tier in policy.get_tiers())
    changed, fields = dataclasses.replace(policy, **plain), sorted(plain)
    for part, knobs in by_part.items():
        read = {name: _read(changed, f"{part}.{name}", value) for name, value in knobs.items()}
        whole: dict[str, Any] = {part: dataclasses.replace(getattr(changed, part), **read)}
        changed = dataclasses.replace(changed, **whole)
        fields += [f"{part}.{name}" for name in sorted(read)]
    return changed, fields


def _make(path: str, field: Field, panel: str, help_: str = "", *, by_layer: bool = False) -> KnobOption:
    knob = field.knob
    assert knob
    flag = field.name.replace("_", "-")
    flags = knob.option or (f"--{flag}/--no-{flag}" if field.type is bool else f"--{flag}")
    kind: Any = list[str] if by_layer or field.is_list else str if knob.word_for_none else Literal[field.words] if field.words else field.type
    option = typer.Option(
        flags, help=help_ or knob.describe_option(field.default), rich_help_panel=knob.panel or panel or None, autocompletion=_COMPLETIONS.get(path)
    )
    parameter = inspect.Parameter(
        flags.partition("/")[0].removeprefix("--").replace("-", "_"),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )
    return KnobOption(path=path, field=field, flags=tuple(flags.split("/")), parameter=parameter)


@functools.cache
def _get_options() -> dict[str, KnobOption]:
    return {option.path: option for option in list_policy_options()}


def _read(policy: Policy, path: str, value: Any) -> Any:
    """Return a knob's value from what its option took; from a knob without an option as it is."""
    option = _get_options().get(path)
    if option is None:
        return value
    field = option.field
    if field.knob and field.knob.word_for_none:
        return parse_number_or(field.knob.word_for_none, option.flags[0], value)
    if field.is_list and field.type is str:
        return tuple(dict.fromkeys(word for word in value if word))
    if field.is_list:
        return _merge_values(policy, option.flags[0], operator.attrgetter(path)(policy), value)
    return value


def _merge_values(policy: Policy, flag: str, values: tuple[float, ...], given: Sequence[str]) -> tuple[float, ...]:
    """Return the values, one per checkpoint, with LAYER=VALUE and all=VALUE put in."""
    layers = [c.layer for c in policy.checkpoints]
    known = dict(zip(layers, values, strict=True)) if len(values) == len(layers) else {}
    for item in given:
        if item.startswith("all="):
            known = dict.fromkeys(layers, 0.0)
        known = merge_by_layer(flag, known, [item])
    if unknown := sorted(set(known) - set(layers)):
        raise typer.BadParameter(f"{flag}: layer {unknown[0]} is no checkpoint; the policy has {', '.join(map(str, layers)) or 'none'}")
    if missing := [layer for layer in layers if layer not in known]:
        raise typer.BadParameter(f"{flag}: layer {missing[0]} has none yet; give {missing[0]}=RATE too, or all=RATE")
    return tuple(known[layer] for layer in layers)


def _merge_checkpoints(checkpoints: tuple[Checkpoint, ...], given: Mapping[str, Sequence[str]]) -> tuple[Checkpoint, ...]:
    merged = {c.layer: c for c in checkpoints}
    for field in list_fields(Checkpoint):
        flag = f"--{field.name}"
        values = {layer: getattr(c, field.name) for layer, c in merged.items()}
        for layer, value in merge_by_layer(flag, values, given.get(field.name, ())).items():
            knob: dict[str, Any] = {field.name: value}
            if layer in merged:
                merged[layer] = dataclasses.replace(merged[layer], **knob)
            elif field.is_required:
                merged[layer] = Checkpoint(layer=layer, **knob)
            else:
                raise typer.BadParameter(f"{flag}: layer {layer} is no checkpoint of the policy; add it with --threshold {layer}=VALUE")
    return tuple(merged[layer] for layer in sorted(merged))
