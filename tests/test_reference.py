"""The reference pages know every knob and every variable."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from sedac.contract.credentials import Credentials
from sedac.control.base.settings import ControlSettings
from sedac.ctl.knobs import list_policy_options
from sedac.policy.knob import list_knobs
from sedac.policy.model import Policy
from sedac.settings import EngineSettings

_PAGES = Path(__file__).resolve().parents[1] / "docs" / "generate" / "knobs.py"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("reference_knobs", _PAGES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.render()


def _find_row(page: str, name: str) -> list[str]:
    (row,) = [line.split(" | ") for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    return row


def test_every_knob_has_a_row_with_its_limits_names_and_help(pages):
    assert set(pages) == {"knobs.md", "variables.md"}
    for path, field in list_knobs(Policy):
        if field.is_part:
            assert f"## {field.name.capitalize()}\n" in pages["knobs.md"]
            continue
        row, knob = _find_row(pages["knobs.md"], path), field.knob
        assert len(row) == 8
        assert row[1].lower().rstrip(".") == knob.describe(field.default).lower().rstrip(".")
        assert knob.limits in row[3]
        assert all(word in row[3] for word in field.words)
        assert row[6] == (f"`SEDAC_{knob.variable}`" if knob.variable else "")
        assert all(f"`SEDAC_{name}`" in row[7] for name in knob.earlier)
    for option in list_policy_options():
        assert option.flags[0] in pages["knobs.md"]
    assert "0.9 (v6.1)" in _find_row(pages["knobs.md"], "decay")[7]


@pytest.mark.parametrize(("settings", "prefix"), [(EngineSettings, "SEDAC_"), (ControlSettings, "SEDAC_CONTROL_"), (Credentials, "SEDAC_CONTROL_")])
def test_every_variable_has_a_row_with_its_meaning(pages, settings, prefix):
    for name in settings.model_fields:
        assert len(_find_row(pages["variables.md"], prefix + name.upper())[1]) > 5, name
