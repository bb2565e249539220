"""The generated pages are what the code says, the picture is what its script draws, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT, list_pages, read

_METRIC = re.compile(r'\b(?:Counter|Gauge|Histogram|Summary)\(\s*"((?:sedac|grpc)_\w+)"')


def _run(*arguments: str) -> None:
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=quiet)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_is_up_to_date(tmp_path):
    _run("docs/generate", str(tmp_path))
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "docs" / "reference").iterdir()}
    assert {"index.md", "metrics.md", "errors.md"} <= made.keys()
    assert made == kept, "docs/reference is stale: run `make docs`"


def test_the_reference_has_every_metric_that_the_source_declares():
    declared = {name for path in (ROOT / "service").rglob("*.py") for name in _METRIC.findall(path.read_text())}
    assert len(declared) > 40
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    assert not {name for name in declared if not re.search(rf"^\| `{name}(_total)?` \|", page, re.MULTILINE)}


@pytest.mark.parametrize("page", list_pages())
def test_files_that_a_page_names_exist(page):
    roots = (ROOT, ROOT / "service" / "sedac", ROOT / "tests", ROOT / "probes")
    named = {
        path for span in re.findall(r"`([^`\n]+)`", read(page)) for path in re.findall(r"[\w./-]+/[\w.-]+\.(?:py|cpp|cu|h|proto|yml|toml|md)\b", span)
    }
    named = {path for path in named if not path.startswith(("build/", "/", "vllm/"))}
    assert [path for path in sorted(named) if not any((root / path).exists() for root in roots)] == []


def test_the_picture_is_up_to_date(tmp_path):
    _run("docs/overview.py", str(tmp_path / "overview.svg"))
    assert (tmp_path / "overview.svg").read_text() == (ROOT / "docs" / "overview.svg").read_text(), "docs/overview.svg is stale: run `make docs`"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    _run("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out))
    return out


def test_the_site_builds_whole(site):
    pages = {str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {str(path.relative_to(site)) for path in site.rglob("*.html")}
    assert not list(site.rglob("*.py"))


def test_the_site_has_its_pictures_and_asks_nobody_for_anything(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        for source in re.findall(r'<(?:img|script|link)[^>]* (?:src|href)="([^"]+)"', text):
            assert not source.startswith(("http:", "https:", "//")), (page, source)
            assert (page.parent / source.partition("?")[0]).exists() or page.name == "404.html", (page, source)
