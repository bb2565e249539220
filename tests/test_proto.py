"""The committed generated code is what the contract generates; messages and plain Python convert without loss."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest
from google.protobuf import json_format
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st
from sedac.contract import wire
from sedac.contract.stats import CONTROLLER_STATES, CheckpointStats, ControllerStats, DraftingStats, RankStats, Stats, TierStats
from sedac.contract.v1 import control_pb2, drafting_pb2
from sedac.errors import EngineReplaced, FieldViolation, PolicyInvalid, RequestIdReused, RevisionNotFound, StaleEtag, StoreFailed
from sedac.policy.certificate import Certificate
from sedac.policy.knob import list_fields
from sedac.policy.layout import Layout
from sedac.policy.model import Adaptation, Audit, Checkpoint, Policy, Speculation, Tier

from testing.strategies import any_policies

ROOT = Path(__file__).resolve().parents[1]
_LISTS = ("checkpoints", "tiers", "ranks")
_counts, _amounts = st.integers(0, 2**62), st.floats(0, 1e30)
_controllers = st.builds(
    ControllerStats,
    num_sequences=st.integers(1, 2**20),
    state=st.sampled_from(CONTROLLER_STATES),
    **dict.fromkeys(("gain", "plain_seconds", "step_seconds", "draft_pass_seconds", "tokens_per_step"), _amounts),
)
_drafting = st.builds(
    DraftingStats,
    kind=st.sampled_from(["adapter", "exit-head", "reduced"]),
    **dict.fromkeys(("num_drafted", "num_accepted", "num_verified_steps", "num_passes"), _counts),
    **dict.fromkeys(("draft_seconds", "step_seconds"), _amounts),
    **dict.fromkeys(("lengths", "accepted_at"), st.lists(_counts, max_size=17).map(tuple)),
    controller=st.lists(_controllers, max_size=3).map(tuple),
)


def test_generated_code_is_up_to_date(tmp_path):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    generate.generate(tmp_path)
    made = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob("*.py*")}
    assert len(made) == 3 * len(list((ROOT / "proto").rglob("*.proto")))
    for path, text in made.items():
        assert (ROOT / "service" / path).read_text() == text, f"{path} is stale: run `make proto`"


def _read_comments() -> dict[str, dict[str, str]]:
    """The comment of every field in policy.proto, by message and name; a line that has nothing but a comment goes on with the field's above."""
    found: dict[str, dict[str, str]] = {}
    message = name = ""
    for line in (ROOT / "proto" / "sedac" / "control" / "v1" / "policy.proto").read_text().splitlines():
        if opened := re.fullmatch(r"message (\w+) \{", line):
            message, name = opened[1], ""
            found[message] = {}
        elif field := re.match(r"  (?:(?:optional|repeated) )?[\w.]+ (\w+) = \d+;(?: *// (.*))?", line):
            name = field[1]
            found[message][name] = field[2] or ""
        elif (more := re.match(r" {3,}// (.*)", line)) and name:
            found[message][name] += f" {more[1]}"
    return found


_COMMENTS = _read_comments()
_MESSAGES = (Policy, Checkpoint, Tier, Adaptation, Certificate, Audit, Speculation)
_KNOBS = [(kind, field) for kind in _MESSAGES for field in list_fields(kind)]
_N = r"[\d.]+"
_STATED = re.compile(rf"(?:over )?{_N} (?:up )?to (?:below )?{_N}|over {_N}, below {_N}|>=? {_N}")


@pytest.mark.parametrize(("kind", "field"), _KNOBS, ids=lambda value: getattr(value, "name", None) or value.__name__)
def test_the_contract_says_of_each_knob_what_the_model_says(kind, field):
    comment = _COMMENTS[kind.__name__][field.name]
    described = control_pb2.DESCRIPTOR.pool.FindMessageTypeByName(f"sedac.control.v1.{kind.__name__}").fields_by_name[field.name]
    assert described.is_repeated == field.is_list
    if field.knob.pattern and field.name == "name":
        assert comment == field.knob.help.rstrip(".")
    elif stated := _STATED.search(comment):
        assert _read_limits(stated[0]) == field.knob.limits
    if unset := re.search(r"\b(?:unset|empty): (true|false|[a-z]+|[\d.e]+)$", comment):
        shown = str(field.default).lower() if isinstance(field.default, bool | str) else field.default
        assert shown in (None, ()) or unset[1] == shown or float(unset[1]) == shown
    if field.type in (int, float, bool) and not field.is_list and not field.is_required:
        has_zero = not field.is_optional and not field.default
        assert described.has_presence != has_zero, "what is unset must mean the model's default"


def _read_limits(stated: str) -> str:
    return stated.replace("up to", "to").replace(">= ", "at least ").replace("> ", "over ")


def test_most_limits_are_stated_in_the_contract():
    stated = {f"{kind.__name__}.{field.name}" for kind, field in _KNOBS if _STATED.search(_COMMENTS[kind.__name__][field.name])}
    assert len(stated) >= 16, stated
    assert _read_limits("over 0 up to 1") == next(field.knob.limits for field in list_fields(Adaptation) if field.name == "alpha")


@given(any_policies)
def test_policies_survive_the_wire_and_json(policy):
    message = control_pb2.Policy.FromString(wire.policy_to_proto(policy).SerializeToString())
    assert wire.policy_from_proto(message) == policy
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    text = json_format.MessageToJson(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    assert wire.policy_from_proto(json_format.Parse(text, control_pb2.Policy())) == policy


@pytest.mark.parametrize("field", ["phase", "scope", "rule"])
def test_enum_values_of_a_newer_contract_are_refused_by_name(field):
    with pytest.raises(PolicyInvalid, match=f"{field}: 7 is unknown"):
        wire.policy_from_proto(control_pb2.Policy(**{field: 7}))


def test_unset_fields_mean_the_defaults_of_the_policy():
    assert wire.policy_from_proto(control_pb2.Policy()) == Policy()
    sparse = control_pb2.Policy(checkpoints=[control_pb2.Checkpoint(layer=3, threshold=1)], tiers=[control_pb2.Tier(name="a")])
    sparse.adaptation.frozen = True
    sparse.speculation.max_tokens = 3
    expected = Policy(
        checkpoints=(Checkpoint(layer=3, threshold=1),),
        tiers=(Tier(name="a"),),
        adaptation=Adaptation(frozen=True),
        speculation=Speculation(enabled=True, max_tokens=3, min_confidence=None, adaptive=True),
    )
    assert wire.policy_from_proto(sparse) == expected
    of_before = json.loads((ROOT / "probes" / "sedac_demo" / "policy.json").read_text())
    of_before.pop("speculation", None)
    assert wire.policy_from_proto(json_format.ParseDict(of_before, control_pb2.Policy())).speculation == Speculation()


def test_zero_is_not_unset():
    policy = Policy(
        checkpoints=(Checkpoint(layer=3, threshold=0, weight=0, target=0),),
        tiers=(Tier(name="a", threshold_scale=0),),
        decay=0,
        adaptation=Adaptation(alpha=0, warmup_steps=0, window_tokens=0, max_threshold=0),
        speculation=Speculation(enabled=False, min_confidence=0, adaptive=False),
    )
    assert wire.policy_from_proto(control_pb2.Policy.FromString(wire.policy_to_proto(policy).SerializeToString())) == policy


_ascii = st.characters(codec="ascii")


@given(st.lists(st.builds(FieldViolation, st.text(_ascii, max_size=300), st.text(_ascii, max_size=1000)), min_size=1, max_size=300))
def test_refusals_survive_the_wire_and_fit_a_trailer(violations):
    status = wire.error_to_status(PolicyInvalid(violations), 3)
    assert len(status.SerializeToString()) + len(status.message) < 8 << 10
    read = wire.error_from_status(status)
    assert isinstance(read, PolicyInvalid)
    for sent, came in zip(violations, read.violations, strict=False):
        assert came.description in (sent.description, sent.description[:253] + "...")


@pytest.mark.parametrize("kind", [StaleEtag, RevisionNotFound, RequestIdReused, StoreFailed, EngineReplaced])
def test_errors_survive_the_wire(kind):
    read = wire.error_from_status(wire.error_to_status(kind("value 3, limit 2: do this"), 10))
    assert type(read) is kind
    assert str(read) == "value 3, limit 2: do this"


def test_foreign_statuses_are_not_taken_for_ours():
    assert wire.error_from_status(status_pb2.Status(code=13, message="x")) is None
    assert wire.error_from_status(wire.error_to_status(ValueError("x"), 13)) is None


@given(
    st.builds(
        Stats,
        **{f.name: _amounts if "mlp_blocks" in f.name else _counts for f in dataclasses.fields(Stats) if f.name not in (*_LISTS, "drafting")},
        drafting=st.none() | _drafting,
        checkpoints=st.lists(
            st.builds(
                CheckpointStats, layer=st.integers(0, 4096), num_evaluated=_counts, num_exited=_counts, threshold=_amounts, exit_rate=st.floats(0, 1)
            ),
            max_size=3,
        ).map(tuple),
        tiers=st.lists(
            st.builds(
                TierStats, name=st.text(st.characters(codec="ascii")), num_tokens=_counts, num_exited=_counts, num_mlp_blocks_computed=_amounts
            ),
            max_size=3,
        ).map(tuple),
        ranks=st.lists(st.builds(RankStats, rank=st.integers(0, 1024), active_revision=_counts, num_steps=_counts), max_size=3).map(tuple),
    )
)
def test_counters_survive_the_wire(stats):
    report = control_pb2.EngineReport.FromString(wire.stats_to_report(stats).SerializeToString())
    for field in dataclasses.fields(Stats):
        if field.name not in (*_LISTS, "drafting"):
            assert getattr(report, field.name) == getattr(stats, field.name)
    for entries, read in ((getattr(stats, name), getattr(report, name)) for name in _LISTS):
        assert [vars(e) for e in entries] == [{f.name: getattr(r, f.name) for f in r.DESCRIPTOR.fields} for r in read]
    assert (wire.drafting_from_proto(report.drafting) if report.HasField("drafting") else None) == stats.drafting
    assert Stats.from_dict(json.loads(json.dumps(dataclasses.asdict(stats)))) == stats


def test_a_controller_state_of_a_newer_contract_is_unknown():
    message = drafting_pb2.Drafting(controller=[drafting_pb2.DraftingController(num_sequences=4, state=99)])
    (size,) = wire.drafting_from_proto(message).controller
    assert (size.num_sequences, size.state) == (4, "unknown")


def test_layouts_survive_the_hello():
    layout = Layout(num_layers=12, hidden_size=8, checkpoint_layers=(2, 5), probe_set="demo", levels=("full", "skip", "width-25"))
    layout = dataclasses.replace(layout, weights_sha256="1" * 64, probe_set_sha256="2" * 64, draft="adapter", max_draft_tokens=4)
    assert wire.layout_from_hello(control_pb2.EngineHello(**vars(layout))) == layout
    assert wire.layout_from_hello(control_pb2.EngineHello()).levels == ("full", "skip"), "an engine that names none has what every engine has"
