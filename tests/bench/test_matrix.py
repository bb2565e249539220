"""A matrix is checked whole before anything is started, and an error names the field, its value, the limit and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sedac.bench import matrix as matrices
from sedac.bench.reading import list_presets, make_matrix, read_matrix, to_yaml
from sedac.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "benchmarks" / "serving").glob("*.yaml"))
PLAIN = {"name": "plain", "kind": "plain"}


def make(**fields: Any) -> dict[str, Any]:
    return {"name": "test", "systems": [PLAIN], **fields}


@pytest.mark.parametrize("source", [*list_presets(), *map(str, FILES)])
def test_every_matrix_that_is_shipped_is_valid_and_compares_with_plain(source):
    found = read_matrix(source)
    for model in found.models:
        rows = [row.name for row in found.get_rows(model)]
        assert rows[0] == "plain"
        assert len(rows) == len(set(rows)) > 2


def test_there_are_presets_and_committed_matrices():
    assert list_presets() == ["quick", "serving"]
    assert len(FILES) == 6


def test_a_matrix_that_was_printed_is_the_same_matrix(tmp_path):
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(read_matrix("serving")))
    assert read_matrix(str(file)) == read_matrix("serving")


def test_rows_are_pairs_of_system_and_tier():
    systems = [
        PLAIN,
        {"name": "ours", "kind": "sedac", "tiers": ["exact", {"disabled": True}, {"name": "exact", "label": "calm", "policy": {"a": 1}}]},
    ]
    found = make_matrix(make(systems=systems))
    rows = found.get_rows(found.models[0])
    assert [row.name for row in rows] == ["plain", "ours, exact", "ours, disabled", "ours, calm"]
    assert [row.tier.knobs for row in rows] == [{}, {}, {"enabled": False}, {"a": 1}]


def test_systems_may_serve_some_models_only():
    models = [{"name": "a"}, {"name": "b"}]
    found = make_matrix(make(models=models, systems=[PLAIN, {"name": "ours", "kind": "sedac", "models": ["b"]}]))
    assert [[s.name for s in found.get_systems(model)] for model in found.models] == [["plain"], ["plain", "ours"]]


def test_the_digest_knows_what_decides_a_figure_and_nothing_else():
    one = make_matrix(make())
    assert one.get_digest() == make_matrix(make(about="other words")).get_digest() == make_matrix({**make(), "name": "other"}).get_digest()
    assert one.get_digest() != make_matrix(make(rounds=one.rounds + 1)).get_digest()
    assert one.get_digest() != make_matrix(make(systems=[PLAIN, {"name": "ours", "kind": "sedac"}])).get_digest()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"round": 3}, ["round is unknown", "did you mean rounds?"]),
        ({"xyz": 3}, ["xyz is unknown", "known: name, about"]),
        ({"rounds": 0}, ["rounds is 0", "greater than or equal to 1", "Rounds that count"]),
        ({"temperature": 3}, ["temperature is 3", "less than or equal to 2"]),
        ({"systems": []}, ["systems is []", "at least 1"]),
        ({"systems": [{"name": "ours", "kind": "sedac"}]}, ["first system is 'ours'", "{name: plain, kind: plain}"]),
        ({"systems": [PLAIN, {"name": "ours", "kind": "other"}]}, ["systems.1.kind is 'other'", "'plain' or 'sedac'"]),
        ({"systems": [PLAIN, {"name": "ours"}]}, ["systems.1.kind is missing", "`sedac` is `sedac serve`"]),
        ({"systems": [PLAIN, {"name": "ours", "kind": "sedac", "tier": "exact"}]}, ["systems.1.tier is unknown", "did you mean tiers?"]),
        ({"systems": [PLAIN, {"name": "ours", "kind": "sedac", "tiers": [{"nmae": "a"}]}]}, ["systems.1.tiers.0.nmae", "did you mean name?"]),
        ({"systems": [{**PLAIN, "tiers": ["exact"]}]}, ["'plain' is plain vLLM and has tiers", "leave them out"]),
        ({"systems": [PLAIN, {"name": "a", "kind": "sedac", "tiers": ["x", "x"]}]}, ["two tiers 'x'", "`label`"]),
        ({"systems": [PLAIN, PLAIN]}, ["two systems are named 'plain'"]),
        ({"systems": [PLAIN, {"name": "a", "kind": "sedac", "models": ["b"]}]}, ["names model 'b'", "known: demo"]),
        ({"concurrencies": [], "request_rates": []}, ["neither concurrencies nor request_rates"]),
        ({"concurrencies": [0]}, ["a load of 0 is not above 0"]),
        ({"prompt_tokens": 500}, ["prompt_tokens 500 + output_tokens 128", "max_model_len 512", "give fewer"]),
        ({"models": [{"name": "m", "directory": "build/m"}]}, ["no probe_set", "name its probe set"]),
    ],
)
def test_an_error_names_field_value_limit_and_remedy(fields, words):
    with pytest.raises(ConfigError) as caught:
        make_matrix(make(**fields), "mine.yaml")
    assert [word for word in ["mine.yaml", *words] if word not in str(caught.value)] == []


def test_a_file_that_is_not_there_or_no_mapping_is_named(tmp_path):
    with pytest.raises(ConfigError, match="one of quick, serving"):
        read_matrix(str(tmp_path / "none.yaml"))
    for text, words in (("- 1\n", "not a mapping"), ("a: [", "is not YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_matrix(str(tmp_path / "bad.yaml"))


def test_options_take_the_place_of_fields():
    assert read_matrix("quick", rounds=9, concurrencies=None).rounds == 9
    assert read_matrix("quick", rounds=None).rounds == read_matrix("quick").rounds


def test_every_field_says_what_it_is():
    for model in (matrices.Matrix, matrices.Model, matrices.System, matrices.Tier, matrices.Quality):
        assert [name for name, field in model.model_fields.items() if not field.description] == []
