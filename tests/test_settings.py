"""SEDAC_* variables mean what they say; unknown ones, and ones that do not fit, are refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sedac.app import launch, preload
from sedac.engine.vllm.speculation import DRAFTER
from sedac.errors import ArtifactError, ConfigError
from sedac.policy.knob import list_knobs
from sedac.policy.model import Adaptation, Audit, Checkpoint, Policy, Speculation, Tier
from sedac.probe.draft_manifest import DraftManifest
from sedac.probe.manifest import LevelRecord, Manifest, ProbeRecord, TierRecord, read_manifest
from sedac.settings import EngineSettings, read_settings

MANIFEST = Manifest(
    name="m", model="m", hidden_size=8, num_layers=12, rank=64, target="x", probes=tuple(ProbeRecord(layer=i, threshold=i / 10) for i in (2, 5, 8))
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    import os

    for name in [n for n in os.environ if n.startswith("SEDAC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "is_cuda", lambda: False)  # tests/cuda/test_start.py has what a GPU changes


def test_environment_makes_the_first_policy(monkeypatch):
    for name, value in {"ENABLED": "1", "PROBE_LAYERS": "5, 8", "THRESHOLDS": "0.25,0.5", "PROBE_RANK": "64", "LOG_EVERY": "100"}.items():
        monkeypatch.setenv(f"SEDAC_{name}", value)
    settings = read_settings()
    policy = settings.make_policy(MANIFEST)
    assert policy.enabled
    assert policy.checkpoints == (Checkpoint(layer=5, threshold=0.25), Checkpoint(layer=8, threshold=0.5))
    assert settings.log_every == 100


def test_probe_set_proposes_layers_and_thresholds():
    assert [(c.layer, c.threshold) for c in EngineSettings().make_policy(MANIFEST).checkpoints] == [(2, 0.2), (5, 0.5), (8, 0.8)]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SEDAC_ADAPTIVE", "perhaps", "SEDAC_ADAPTIVE='perhaps'"),
        ("SEDAC_EXIT_RATES", "0.2,b", "SEDAC_EXIT_RATES"),
        ("SEDAC_RULE", "last", "SEDAC_RULE='last'"),
        ("SEDAC_EXIT_RATE", "0.2", "did you mean SEDAC_EXIT_RATES"),
        ("SEDAC_TRESHOLDS", "0.2", "did you mean SEDAC_THRESHOLDS"),
        ("SEDAC_PROBE_RANK", "-3", "SEDAC_PROBE_RANK='-3'"),
        ("SEDAC_PHASE", "sometimes", "SEDAC_PHASE='sometimes'"),
        ("SEDAC_PROBE_LAYERS", "a", "SEDAC_PROBE_LAYERS"),
        ("SEDAC_DRAFT_TOKENS", "0", "SEDAC_DRAFT_TOKENS='0'"),
        ("SEDAC_DRAFT_TOKENS", "17", "SEDAC_DRAFT_TOKENS='17'"),
        ("SEDAC_SPECULATION", "perhaps", "SEDAC_SPECULATION='perhaps'"),
        ("SEDAC_DRAFT", "/d", "did you mean SEDAC_DRAFT_"),
    ],
)
def test_wrong_variables_are_refused_by_name(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        read_settings()


def test_empty_variables_are_unset_ones(monkeypatch):
    for name in ("ADAPTIVE", "EXIT_RATES", "ALPHA", "TIER", "RULE", "SOFT_EXIT", "THRESHOLDS", "CALIBRATION_STEPS"):
        monkeypatch.setenv(f"SEDAC_{name}", "")
    assert read_settings().make_policy(MANIFEST) == EngineSettings().make_policy(MANIFEST)


def test_presets_are_hard_exits_where_the_probe_set_has_no_tiers():
    policy = EngineSettings().make_policy(MANIFEST)
    assert [(t.name, t.floor, t.level, t.threshold_scale) for t in policy.tiers] == [
        ("conservative", "full", "skip", 0.5),
        ("balanced", "full", "skip", 1.0),
        ("aggressive", "full", "skip", 2.0),
    ]
    assert (policy.default_tier, policy.rule, policy.adaptation, policy.allow_overrides) == ("balanced", "first", Adaptation(), False)


LEVELLED = replace(
    MANIFEST,
    intermediate_size=32,
    levels=(LevelRecord(name="width-25", reduction="width", saved=0.25, perplexity_ratio=1.004),),
    tiers=(TierRecord(name="gentle", floor="full", level="width-25"), TierRecord(name="bold", floor="width-25", level="skip", threshold_scale=2.0)),
)


def test_tiers_are_the_probe_sets_where_it_has_some():
    policy = EngineSettings().make_policy(LEVELLED)
    assert policy.tiers == (Tier(name="gentle", level="width-25"), Tier(name="bold", floor="width-25", threshold_scale=2.0))
    assert policy.default_tier == "gentle", "the first, where none is called balanced"
    assert EngineSettings(tier="bold").make_policy(LEVELLED).default_tier == "bold"
    assert EngineSettings(tier="exact").make_policy(LEVELLED).default_tier == "exact"
    broken = replace(LEVELLED, levels=())
    with pytest.raises(ConfigError, match="'width-25' is not a level of this engine"):
        EngineSettings().make_policy(broken)


def test_every_variable_of_the_decision_reaches_the_policy(monkeypatch):
    variables = {
        "SOFT_EXIT": "1", "CONFIDENCE_DECAY": "0.8", "LAYER_WEIGHTS": "0.3, 0.4,0.3", "TARGETS": "0.5,0.6,0.7", "SENSITIVITY": "1.5",
        "TIER": "aggressive", "ALLOW_OVERRIDES": "true", "EXIT_RATES": "0.1,0.2,0.3", "CALIBRATION_STEPS": "50", "CALIBRATION_ALPHA": "0.25",
        "ALPHA": "0.25",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(f"SEDAC_{name}", value)
    policy = read_settings().make_policy(MANIFEST)
    assert policy == Policy(
        enabled=True,
        checkpoints=(
            Checkpoint(layer=2, threshold=0.2, weight=0.3, target=0.5),
            Checkpoint(layer=5, threshold=0.5, weight=0.4, target=0.6),
            Checkpoint(layer=8, threshold=0.8, weight=0.3, target=0.7),
        ),
        rule="accumulate",
        decay=0.8,
        sensitivity=1.5,
        tiers=tuple(Tier(name=n, threshold_scale=s, soft_exit=True) for n, s in (("conservative", 0.5), ("balanced", 1.0), ("aggressive", 2.0))),
        default_tier="aggressive",
        allow_overrides=True,
        adaptation=Adaptation(target_exit_rates=(0.1, 0.2, 0.3), warmup_steps=50, alpha=0.25),
    )


DEMO = Path(__file__).resolve().parents[1] / "probes" / "sedac_demo"


def _write_policy(directory: Path, **changes: object) -> Path:
    path = directory / "policy.json"
    path.write_text(json.dumps({"enabled": True, "checkpoints": [{"layer": 5, "threshold": 0.4}], **changes}))
    return path


def test_a_file_makes_the_first_policy(tmp_path, monkeypatch):
    path = _write_policy(tmp_path, decay=0.75, rule="RULE_ACCUMULATE")
    for name, value in {"POLICY": str(path), "PROBE_LAYERS": "2,5", "LOG_EVERY": "7", "DRAFT_TOKENS": "4"}.items():
        monkeypatch.setenv(f"SEDAC_{name}", value)
    expected = Policy(enabled=True, checkpoints=(Checkpoint(layer=5, threshold=0.4),), decay=0.75, rule="accumulate")
    assert read_settings().make_policy(MANIFEST) == expected
    for name, value in read_settings().to_env().items():
        monkeypatch.setenv(name, value)
    assert read_settings().make_policy(MANIFEST) == expected, "children get it by their environment"


def test_the_demo_models_certified_policy_can_be_the_first():
    settings = launch.with_demo_defaults(read_settings(policy=DEMO / "policy.json"))
    policy = settings.make_policy(read_manifest(settings.probe_dir))
    assert (policy.certificate.tier, policy.default_tier) == ("certified", "certified")


def test_a_file_and_variables_of_the_policy_are_refused_by_name(tmp_path):
    path = _write_policy(tmp_path)
    with pytest.raises(ConfigError, match=f"^SEDAC_POLICY={path} and SEDAC_THRESHOLDS, SEDAC_ALPHA set the first policy twice; leave the file out"):
        read_settings(policy=path, thresholds=(0.1,), alpha=0.5).make_policy(MANIFEST)


@pytest.mark.parametrize("has_file", [False, True])
def test_a_layer_that_is_named_twice_is_refused(monkeypatch, tmp_path, has_file):
    monkeypatch.setenv("SEDAC_PROBE_LAYERS", "5,2,5")
    if has_file:
        (tmp_path / "policy.json").write_text("{}")
        monkeypatch.setenv("SEDAC_POLICY", str(tmp_path / "policy.json"))
    with pytest.raises(ConfigError, match=r"^SEDAC_PROBE_LAYERS names layer 5 twice; give each layer once$"):
        read_settings().make_policy(MANIFEST)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decay": 1.5}, r"decay: 1.5 is outside 0..1; the earlier versions used 0.9; change the file$"),
        ({"checkpoints": [{"layer": 7, "threshold": 1}]}, r"checkpoints\[0\].layer: 7 has no probe attached"),
        ({"probe_set": "other"}, "probe_set: 'other' is neither attached"),
        ({"phase": "PHASE_SOMETIMES"}, "can't be read as a policy: .*PHASE_SOMETIMES.*; give a policy as `sedac ctl policy get --json` prints it$"),
        ({"treshold": 1}, "can't be read as a policy: .*treshold"),
        ({"phase": 9}, "phase: 9 is unknown; use PHASE_DECODE or PHASE_ALL"),
    ],
)
def test_a_file_that_is_no_policy_for_this_engine_is_refused_by_field(tmp_path, changes, words):
    path = _write_policy(tmp_path, **changes)
    with pytest.raises(ConfigError, match=f"^SEDAC_POLICY={path}:? {words}"):
        read_settings(policy=path).make_policy(MANIFEST)
    with pytest.raises(ConfigError, match=r"^SEDAC_POLICY=/nowhere can't be read as a policy: .*No such file"):
        read_settings(policy=Path("/nowhere")).make_policy(MANIFEST)


def test_every_variable_of_a_knob_is_a_setting_of_its_type():
    variables = {name: field for _, field in list_knobs(Policy) for name in field.knob.variables}
    assert {name.lower() for name in variables} <= set(EngineSettings.model_fields)
    for name in (
        "ALPHA",
        "CALIBRATION_ALPHA",
        "EXIT_RATES",
        "CALIBRATION_STEPS",
        "CONFIDENCE_DECAY",
        "SOFT_EXIT",
        "ENABLED",
        "THRESHOLDS",
        "ADAPTIVE",
    ):
        assert name in variables[name].knob.earlier, "a variable of the earlier versions"


def test_audits_of_the_first_policy_are_settings(monkeypatch):
    assert read_settings().make_policy(MANIFEST).audit == Audit()
    for name, value in {"AUDIT_SHARE": "0.1", "AUDIT_MAX_MISMATCH": "0.05", "AUDIT_MAX_NLL_DIFFERENCE": "0.2"}.items():
        monkeypatch.setenv(f"SEDAC_{name}", value)
    assert read_settings().make_policy(MANIFEST).audit == Audit(share=0.1, max_mismatch=0.05, max_nll_difference=0.2)


def test_self_speculation_of_the_first_policy_is_settings(monkeypatch):
    assert read_settings().make_policy(MANIFEST).speculation == Speculation()
    variables = {
        "SPECULATION": "0", "DRAFT_TOKENS": "6", "DRAFT_MIN_CONFIDENCE": "0.25", "DRAFT_ADAPTIVE": "false", "DRAFT_TIERS": "exact, aggressive",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(f"SEDAC_{name}", value)
    expected = Speculation(enabled=False, max_tokens=6, min_confidence=0.25, adaptive=False, tiers=("exact", "aggressive"))
    assert read_settings().make_policy(MANIFEST).speculation == expected


def test_adaptive_makes_thresholds_follow(monkeypatch):
    for name, value in {"ADAPTIVE": "1", "EXIT_RATES": "0.2,0.5,0.8", "ALPHA": "0.5"}.items():
        monkeypatch.setenv(f"SEDAC_{name}", value)
    assert read_settings().make_policy(MANIFEST).adaptation == Adaptation(enabled=True, target_exit_rates=(0.2, 0.5, 0.8), alpha=0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"probe_layers": (2, 7)}, "SEDAC probe missing for layer 7"),
        ({"thresholds": (0.1,)}, "SEDAC_THRESHOLDS has 1 values for 3 checkpoints"),
        ({"probe_rank": 32}, "SEDAC_PROBE_RANK is 32"),
        ({"thresholds": (0.1, float("nan"), 0.2)}, r"checkpoints\[1\].threshold.*; check SEDAC_THRESHOLDS$"),
        ({"layer_weights": (0.1,)}, "SEDAC_LAYER_WEIGHTS has 1 values for 3 checkpoints"),
        ({"targets": (0.1, 0.2)}, "SEDAC_TARGETS has 2 values"),
        ({"exit_rates": (0.1, 0.2)}, "SEDAC_EXIT_RATES has 2 values"),
        ({"exit_rates": (0.1, 0.2, 1.3)}, "outside 0..1; check SEDAC_EXIT_RATES"),
        ({"adaptive": True}, "SEDAC_ADAPTIVE needs SEDAC_EXIT_RATES"),
        ({"adaptive": True, "exit_rates": (0.1, 0.2, 0.3), "soft_exit": True}, "use rule first or single; check SEDAC_ADAPTIVE"),
        ({"alpha": 0.1, "calibration_alpha": 0.2}, "SEDAC_ALPHA is 0.1 and SEDAC_CALIBRATION_ALPHA is 0.2; they are one knob"),
        ({"alpha": 2.0}, "check SEDAC_ALPHA"),
        ({"soft_exit": True, "rule": "first"}, "SEDAC_SOFT_EXIT needs accumulated confidence, SEDAC_RULE is first"),
        ({"rule": "single"}, "check SEDAC_RULE"),
        ({"tier": "turbo"}, "'turbo' is no tier of this policy; it has aggressive, balanced, conservative, exact; check SEDAC_TIER"),
        ({"confidence_decay": 2.0}, "check SEDAC_CONFIDENCE_DECAY"),
        ({"sensitivity": -1.0}, "check SEDAC_SENSITIVITY"),
        ({"calibration_steps": -1}, "check SEDAC_CALIBRATION_STEPS"),
        ({"audit_share": 1.5}, "check SEDAC_AUDIT_SHARE"),
        ({"audit_share": 0.1, "audit_max_mismatch": 2.0}, "check SEDAC_AUDIT_MAX_MISMATCH"),
        ({"audit_max_nll_difference": 0.1}, "guards nothing while audit.share is 0.*check SEDAC_AUDIT_MAX_NLL_DIFFERENCE"),
        ({"draft_min_confidence": 1.5}, "1.5 is outside 0..1; .*check SEDAC_DRAFT_MIN_CONFIDENCE$"),
        ({"draft_tiers": ("exact", "turbo")}, r"speculation.tiers\[1\]: 'turbo' is no tier.*; check SEDAC_DRAFT_TIERS$"),
    ],
)
def test_settings_that_do_not_fit_the_probe_set_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        read_settings(**overrides).make_policy(MANIFEST)


_numbers = st.floats(allow_nan=False)
_lists = st.lists(_numbers, max_size=3).map(tuple)
_settings = st.fixed_dictionaries(
    {
        "enabled": st.booleans(), "probe_dir": st.just(Path("/x")), "probe_layers": st.lists(st.integers(), max_size=3).map(tuple),
        "thresholds": _lists, "layer_weights": _lists, "targets": _lists, "exit_rates": _lists, "engine_id": st.just("e 1"),
        "rule": st.sampled_from([None, "first", "accumulate", "single"]), "scope": st.sampled_from(["token", "batch"]),
        "confidence_decay": _numbers, "sensitivity": _numbers, "soft_exit": st.booleans(), "allow_overrides": st.booleans(),
        "adaptive": st.booleans(), "alpha": st.none() | _numbers, "calibration_alpha": st.none() | _numbers,
        "calibration_steps": st.integers(), "tier": st.sampled_from(["", "exact", "mine"]), "audit_share": _numbers,
        "audit_max_mismatch": st.none() | _numbers, "join_seconds": st.floats(0, 600), "probe_cache": st.none() | st.just(Path("/y")),
        "draft_dir": st.sampled_from([Path(), Path("none"), Path("/d")]), "draft_tokens": st.none() | st.integers(1, 16),
        "speculation": st.booleans(), "draft_min_confidence": st.none() | _numbers, "draft_adaptive": st.booleans(),
        "draft_tiers": st.lists(st.sampled_from(["exact", "mine"]), max_size=2).map(tuple),
    }
)  # fmt: skip


@given(_settings)
def test_settings_survive_the_way_through_the_environment(values):
    first = read_settings(**values)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in first.to_env().items():
            patched.setenv(name, value)
        assert read_settings() == first


def test_engine_command_keeps_the_users_flags():
    settings = EngineSettings(model="m", probe_dir=Path("/p"), probe_layers=(2,))
    command = launch.make_engine_command(settings, ["--port", "9", "--additional-config", '{"mine": 1}'])
    assert json.loads(command[command.index("--additional-config") + 1]) == {
        "mine": 1,
        "sedac": {"probe_set": "/p", "checkpoint_layers": [2], "levels": True},
    }
    assert command[-2:] == ["--port", "9"]
    for bad in (["--worker-cls", "x"], ["--model=x"], ["--additional-config", "no json"], ["--additional-config=[]"]):
        with pytest.raises(ConfigError):
            launch.make_engine_command(settings, bad)


def test_the_size_below_which_nothing_is_reduced_is_passed_where_it_is_not_the_usual_one(monkeypatch):
    def read_entry() -> dict[str, object]:
        command = launch.make_engine_command(read_settings(model="m", probe_dir=Path("/p")), [])
        return json.loads(command[command.index("--additional-config") + 1])["sedac"]

    assert "min_weight_mib" not in read_entry(), "the usual entry names compiled graphs, which shall be found again"
    for value in ("0", "65536"):
        monkeypatch.setenv("SEDAC_MIN_WEIGHT_MIB", value)
        assert read_entry()["min_weight_mib"] == int(value)
    for value in ("-1", "65537"):
        monkeypatch.setenv("SEDAC_MIN_WEIGHT_MIB", value)
        with pytest.raises(ConfigError, match=rf"^SEDAC_MIN_WEIGHT_MIB='{value}': {value} is not .* 0 .* 65536; .*leave it out for 16"):
            read_settings()


DRAFT = DraftManifest(
    name="d", kind="adapter", model="m", hidden_size=8, num_layers=12, depth=3, num_heads=2, num_kv_heads=2, head_size=4, max_tokens=3
)


def _write_draft(directory: Path, **changes: object) -> Path:
    directory.mkdir()
    (directory / "manifest.json").write_text(json.dumps(asdict(replace(DRAFT, **changes))))
    return directory


@pytest.mark.parametrize(("given", "expected"), [(None, 3), (1, 1), (8, 8)])
def test_a_draft_reaches_the_engine_with_room_for_its_tokens(tmp_path, given, expected):
    directory = _write_draft(tmp_path / "d")
    settings = launch.with_draft(EngineSettings(model="m", probe_dir=Path("/p"), draft_dir=directory, draft_tokens=given))
    command = launch.make_engine_command(settings, ["--port", "9"], launch.read_draft(settings, MANIFEST))
    assert json.loads(command[command.index("--additional-config") + 1])["sedac"]["draft"] == str(directory)
    speculative = json.loads(command[command.index("--speculative-config") + 1])
    assert speculative == {"method": "custom_class", "model": DRAFTER, "num_speculative_tokens": expected}
    assert settings.make_policy(MANIFEST).speculation.max_tokens == (given or 0)


@pytest.mark.parametrize("directory", ["", "none"])
def test_without_a_draft_nothing_speculates(directory):
    settings = launch.with_draft(EngineSettings(model="m", probe_dir=Path("/p"), draft_dir=Path(directory)))
    assert launch.read_draft(settings, MANIFEST) is None
    assert "--speculative-config" not in launch.make_engine_command(settings, [])
    with pytest.raises(ConfigError, match="SEDAC_DRAFT_TOKENS is 4, but there is no draft; name one with --draft"):
        launch.with_draft(settings.model_copy(update={"draft_tokens": 4}))


_OWN_SPECULATION = (["--speculative-config", "{}"], ["--speculative_config={}"], ["-sc", "{}"], ["--speculative-config.method", "ngram"],
                    ["--port", "9", "--spec-method=ngram"])  # fmt: skip


@pytest.mark.parametrize("own", _OWN_SPECULATION)
def test_a_draft_beside_the_users_own_speculation_is_refused_by_name(tmp_path, own):
    settings = EngineSettings(model="m", probe_dir=Path("/p"), draft_dir=_write_draft(tmp_path / "d"))
    name = next(arg for arg in own if "spec" in arg or arg == "-sc").partition("=")[0].partition(".")[0]
    with pytest.raises(ConfigError, match=f"^{name} and --draft {tmp_path}/d .* leave one out, `--draft none` keeps vLLM's"):
        launch.with_draft(settings, own)
    assert launch.with_draft(settings.model_copy(update={"draft_dir": Path("none")}), own).draft_dir == Path()


def test_the_demo_model_drafts_with_its_own_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_SHIPPED", tmp_path)
    monkeypatch.setattr(launch, "read_manifest", lambda _: MANIFEST)
    for name in ("model", "probe-set"):
        (tmp_path / name).mkdir()
    demo = launch.with_demo_defaults(EngineSettings())
    assert launch.with_draft(demo).draft_dir == Path(), "there is none yet"
    own = _write_draft(tmp_path / "draft")
    assert launch.with_draft(demo).draft_dir == own
    assert launch.with_draft(demo.model_copy(update={"draft_dir": Path("none")})).draft_dir == Path()
    other = _write_draft(tmp_path / "other")
    assert launch.with_draft(demo.model_copy(update={"draft_dir": other})).draft_dir == other
    assert launch.with_draft(EngineSettings(model="m", probe_dir=Path("/p"))).draft_dir == Path(), "it is of another model"
    for flags in _OWN_SPECULATION:
        assert launch.with_draft(demo, flags).draft_dir == Path(), "vLLM's own speculation was asked for"


def test_the_demo_models_draft_is_left_out_where_its_level_is_not_there(caplog):
    demo = launch.with_demo_defaults(EngineSettings())
    assert launch.with_draft(demo).draft_dir.name == "draft"
    with caplog.at_level("INFO", "sedac"):
        assert launch.with_draft(demo.model_copy(update={"levels": False})).draft_dir == Path()
    assert "the demo model's draft is left out: " in caplog.text
    assert "width-50" in caplog.text


def test_the_shipped_draft_fits_the_demo_model():
    settings = launch.with_draft(launch.with_demo_defaults(EngineSettings()))
    assert settings.draft_dir.parts[-3:] == ("probes", "sedac_demo", "draft")
    manifest = read_manifest(settings.probe_dir)
    draft = launch.read_draft(settings, manifest)
    speculation = settings.make_policy(manifest).speculation
    assert (draft.kind, speculation) == ("reduced", Speculation())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 16}, "made for hidden size 16 and 12 layers, the model has 8 and 12"),
        ({"num_layers": 24}, "made for hidden size 8 and 24 layers"),
        ({"level": "width-25"}, "runs MLPs at level 'width-25', which this engine does not have; it has full, skip"),
        ({"max_tokens": 17}, "field max_tokens is 17; give an integer from 1 to 16"),
        ({"kind": "other"}, "field kind is 'other'; use adapter, exit-head, reduced"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused_before_anything_is_started(tmp_path, changes, words):
    settings = EngineSettings(model="m", probe_dir=Path("/p"), draft_dir=_write_draft(tmp_path / "d", **changes))
    with pytest.raises(ArtifactError, match=words):
        launch.read_draft(settings, MANIFEST)
    with pytest.raises(ArtifactError, match=r"draft missing: /nowhere/manifest\.json; write it with `sedac-probes distill`"):
        launch.read_draft(settings.model_copy(update={"draft_dir": Path("/nowhere")}), MANIFEST)


def test_a_draft_at_a_level_needs_the_levels(tmp_path):
    settings = EngineSettings(model="m", probe_dir=Path("/p"), draft_dir=_write_draft(tmp_path / "d", level="width-25"))
    assert launch.read_draft(settings, LEVELLED) == replace(DRAFT, level="width-25")
    with pytest.raises(ArtifactError, match="leave SEDAC_LEVELS at 1"):
        launch.read_draft(settings.model_copy(update={"levels": False}), LEVELLED)


def test_audits_wait_behind_every_request_unless_the_user_schedules():
    command = launch.make_engine_command(EngineSettings(), [])
    assert command[command.index("--scheduling-policy") + 1] == "priority"
    for own in (["--scheduling-policy", "fcfs"], ["--scheduling-policy=fcfs"], ["--scheduling_policy=fcfs"]):
        command = launch.make_engine_command(EngineSettings(), own)
        assert command[-len(own) :] == own
        assert "priority" not in command


def test_users_plugins_are_kept():
    env = launch.make_engine_env(EngineSettings(), {"VLLM_PLUGINS": "mine,sedac"})
    assert env["VLLM_PLUGINS"] == "sedac,sedac_agent,mine"


def _find_preloads(tmp_path, monkeypatch, *, has_openmp=True, allocator=None, machine="x86_64", cuda=False, **environ):
    if has_openmp:
        (tmp_path / "lib").mkdir()
        (tmp_path / "lib" / "libiomp5.so").touch()
    monkeypatch.setattr(preload.platform, "machine", lambda: machine)
    monkeypatch.setattr(preload, "is_cuda", lambda environ: cuda)
    monkeypatch.setattr(preload.ctypes.util, "find_library", {"tcmalloc_minimal": allocator}.get)
    return preload.find_preloads(environ, tmp_path)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({}, ["OPENMP"]),
        ({"allocator": "libtcmalloc_minimal.so.4"}, ["OPENMP", "libtcmalloc_minimal.so.4"]),
        ({"has_openmp": False}, []),
        ({"machine": "aarch64"}, []),
        ({"cuda": True, "allocator": "libtcmalloc_minimal.so.4"}, []),
        ({"LD_PRELOAD": "/opt/libiomp5.so", "allocator": "libtcmalloc_minimal.so.4"}, ["libtcmalloc_minimal.so.4"]),
        ({"LD_PRELOAD": "libgomp.so.1"}, []),
        ({"LD_PRELOAD": "libjemalloc.so.2", "allocator": "libtcmalloc_minimal.so.4"}, ["OPENMP"]),
    ],
)
def test_what_vllm_asks_for_is_preloaded_where_it_is_and_the_user_has_none(tmp_path, monkeypatch, case, expected):
    found = _find_preloads(tmp_path, monkeypatch, **case)
    assert found == [str(tmp_path / "lib" / "libiomp5.so") if name == "OPENMP" else name for name in expected]


def test_preloads_come_behind_the_users_own_and_can_be_left_out(monkeypatch):
    monkeypatch.setattr(launch, "find_preloads", lambda environ: ["/x/libiomp5.so", "libtcmalloc.so.4"])
    assert launch.make_engine_env(EngineSettings(), {})["LD_PRELOAD"] == "/x/libiomp5.so:libtcmalloc.so.4"
    assert launch.make_engine_env(EngineSettings(), {"LD_PRELOAD": "own.so"})["LD_PRELOAD"] == "own.so:/x/libiomp5.so:libtcmalloc.so.4"
    assert launch.make_engine_env(EngineSettings(preload=False), {"LD_PRELOAD": "own.so"})["LD_PRELOAD"] == "own.so"
    assert "LD_PRELOAD" not in launch.make_engine_env(EngineSettings(preload=False), {})
