"""No block of the pages is without a test, no command names what does not exist, and no link leads nowhere."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import yaml

from tests.docs import commands, pages
from tests.docs.commands import Command, NotFound
from tests.docs.cover import BEFORE, CONTROL, COVER, ENGINE, EXPECTED, GRPCURL, PYTHON, Parsed
from tests.docs.pages import ROOT, Block

_BLOCKS = pages.list_blocks()
_PARSED = [b for b in _BLOCKS if isinstance(COVER.get(b.page, {}).get(b.heading, ["none"] * 99)[b.number], Parsed)]


def test_every_block_is_covered():
    there = Counter(block.key for block in _BLOCKS)
    covered = Counter({(page, heading): len(covers) for page, sections in COVER.items() for heading, covers in sections.items()})
    assert there == covered, "tests/docs/cover.py says how each block is tested: one entry per block, in order"
    assert {block.language for block in _BLOCKS} <= {"bash", "python"}
    assert {*BEFORE} <= {*there}
    assert {*EXPECTED} <= {(*block.key, block.number) for block in _BLOCKS}


def test_every_kind_of_cover_is_one_that_a_test_runs():
    covers = [cover for sections in COVER.values() for listed in sections.values() for cover in listed]
    assert {cover for cover in covers if isinstance(cover, str)} <= {CONTROL, ENGINE, GRPCURL, PYTHON}


@pytest.mark.parametrize("block", _PARSED, ids=str)
def test_commands_that_are_not_run_exist(block: Block):
    for command in commands.split(block.text):
        commands.check(command)


def test_the_tests_that_cover_what_is_not_run_exist():
    for test in {test for s in COVER.values() for covers in s.values() for c in covers if isinstance(c, Parsed) for test in c.tests}:
        file, _, name = test.partition("::")
        assert (ROOT / file).is_file(), test
        assert not name or re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE), test


@pytest.mark.parametrize(
    "line",
    [
        "sedac ctl policy set --treshold all=1",
        "sedac ctl policy sets",
        "sedac ctl policy set --guard reboot",
        "sedac-probes collect --outs x",
        "sedac serve --max-modell-len 3",
        "make tests",
        "python benchmarks/speed.py --fast",
        "python benchmarks/quick.py",
        "SEDAC_ENABLE=0 sedac serve",
        "docker compose --profile cpu up",
        "sedacctl status",
    ],
)
def test_the_check_sees_what_does_not_exist(line):
    (command,) = commands.split(line)
    with pytest.raises(NotFound):
        commands.check(command)


def test_commands_are_split_as_a_shell_does():
    block = 'A=1 B=2 sedac serve x > log  # comment\nmake a \\\n  b && curl -d \'{"a": 1, "b": [2]}\' u | grep ^c >> d\n\nexport C=3\n'
    assert list(commands.split(block)) == [
        Command(words=["sedac", "serve", "x"], variables={"A": "1", "B": "2"}, output="log"),
        Command(words=["make", "a", "b"], end="&&"),
        Command(words=["curl", "-d", '{"a": 1, "b": [2]}', "u"], end="|"),
        Command(words=["grep", "^c"], output="d", appends=True),
        Command(words=["export", "C=3"]),
    ]


@pytest.mark.parametrize("page", pages.list_pages())
def test_links_lead_somewhere(page):
    for link in pages.read_links(page):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page} links {link}"
        if anchor:
            assert anchor in pages.read_anchors(str(target.relative_to(ROOT))), f"{page} links {link}"


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {"README.md"}
    while new:
        reached |= new
        links = {(page, link.partition("#")[0]) for page in new for link in pages.read_links(page) if "://" not in link}
        found = {str(((ROOT / page).parent / link).resolve().relative_to(ROOT)) for page, link in links if link.endswith(".md")}
        new = {page for page in found if (ROOT / page).is_file()} - reached
    assert {*pages.list_pages()} <= reached


def test_the_readme_fits_on_a_few_screens():
    assert len(pages.read("README.md").splitlines()) <= 150


def test_the_runbook_has_every_alert_and_no_other():
    groups = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    assert {heading for heading in re.findall(r"^## (Sedac\w+)$", pages.read("docs/runbook.md"), re.MULTILINE)} == alerts
    assert {heading for heading in COVER["docs/runbook.md"] if heading.startswith("Sedac")} == alerts, "each with its commands"
