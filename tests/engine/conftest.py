"""Models, probes, drafts and prompts for the engines that running.py starts."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from testing.shared import make_once
from tests.engine.models import find_drafts, make_drafts, make_short_model, make_short_probes
from tests.engine.running import DEMO, read_heldout_prompts


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return DEMO / "model"


@pytest.fixture(scope="session")
def demo_probes() -> Path:
    return DEMO / "probe-set"


@pytest.fixture(scope="session")
def short_model() -> Path:
    """The demo model's first three layers, which are compiled in a quarter of the time."""
    return make_once("short-model", make_short_model)


@pytest.fixture(scope="session")
def short_probes(short_model: Path, heldout_prompts: list[list[int]]) -> Path:
    """Two of the demo's probes for the short model, with the quantiles of what they say there."""
    return make_once("short-probes", functools.partial(make_short_probes, short_model, heldout_prompts[:16]))


@pytest.fixture(scope="session")
def heldout_prompts() -> list[list[int]]:
    """64 prompts of 24 to 80 tokens from files that neither the model nor the probes were trained on."""
    return read_heldout_prompts(64)


@pytest.fixture(scope="session")
def short_drafts(short_model: Path) -> dict[str, Path]:
    """Drafts for the short model, by name."""
    return find_drafts(make_once("short-drafts", functools.partial(make_drafts, short_model)))


@pytest.fixture(scope="session")
def drafts(demo_model: Path) -> dict[str, Path]:
    """Directories of drafts for the demo model, by name: one of each kind, and `whole`, which leaves nothing out."""
    return find_drafts(make_once("drafts", functools.partial(make_drafts, demo_model)))
