"""What is installed: the demo's files wherever the package lies, one version everywhere, and a wheel and an sdist with all that they need."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import sedac_demo
from sedac import __version__
from sedac.app import cli, launch
from sedac.engine.backends import build
from sedac_probes import cli as probes_cli
from sedac_probes.commands.options import DEMO
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"sedac": ROOT / "service" / "sedac", "sedac_demo": ROOT / "probes" / "sedac_demo", "sedac_probes": ROOT / "probes" / "sedac_probes"}
DEMO_FILES = (
    "model/config.json", "model/model.safetensors", "model/tokenizer.json", "model/tokenizer_config.json", "model/chat_template.jinja",
    "model/generation_config.json", "probe-set/manifest.json", "probe-set/probes.safetensors", "draft/manifest.json", "policy.json",
    "drafts/adapter-4/manifest.json", "drafts/adapter-4/head.safetensors",
    "drafts/exit-head-8/manifest.json", "drafts/exit-head-8/head.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("name", DEMO_FILES)
def test_the_lookup_finds_the_demos_files(name):
    assert (sedac_demo.DIRECTORY / name).stat().st_size > 100


def test_there_is_one_lookup():
    assert launch._SHIPPED == DEMO == sedac_demo.DIRECTORY


@pytest.mark.parametrize(("app", "told"), [(cli.app, f"sedac {__version__}"), (probes_cli.app, f"sedac-probes {__version__}")])
def test_the_commands_tell_the_version(app, told):
    assert CliRunner().invoke(app, ["--version"]).stdout == f"{told}\n"


def test_the_version_is_stated_once_and_in_the_changelog():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = [line for line in text.splitlines() if line.startswith("## [")]
    assert headings[0] == "## [Unreleased]"
    assert re.fullmatch(rf"## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d", headings[1]), "released with its day"


@pytest.fixture
def no_library(tmp_path, monkeypatch):
    """A package folder without a library that can't be written to, and an empty cache."""
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "package" / "_kernels.so")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build.os, "access", lambda path, mode: False)


@pytest.mark.usefixtures("no_library")
def test_the_kernels_go_to_the_users_cache_where_the_package_can_not_be_written_to(tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho compiled >"$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(sys, "argv", ["build"])
    assert build.find_library() is None
    build.main()
    found = build.find_library()
    assert found == build.get_cached_library()
    assert found.is_relative_to(tmp_path / "cache" / "sedac" / "kernels")
    assert [path.name for path in found.parent.iterdir()] == [found.name], "nothing half made is left"
    assert found.read_text() == "compiled\n"


@pytest.mark.usefixtures("no_library")
def test_without_a_home_what_is_built_is_used_and_nothing_else_is_asked_for(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    monkeypatch.setattr(sys, "argv", ["build"])
    assert build.find_library() is None
    with pytest.raises(SystemExit, match="set XDG_CACHE_HOME to a folder that can"):
        build.main()
    build.LIBRARY.parent.mkdir()
    build.LIBRARY.write_text("built")
    assert build.find_library() == build.LIBRARY
    build.build_missing()


def test_a_library_of_other_sources_is_built_again_and_used_no_more(tmp_path, no_library):
    build.LIBRARY.parent.mkdir()
    build.LIBRARY.write_text("current")
    build.build_missing()
    assert build.find_library() == build.LIBRARY
    os.utime(build.LIBRARY, (0, 0))
    assert build.find_library() == build.LIBRARY, "an old one is better than none"
    cached = build.get_cached_library()
    cached.parent.mkdir(parents=True)
    cached.write_text("of these sources")
    assert build.find_library() == cached


@pytest.mark.usefixtures("no_library")
def test_without_a_compiler_serving_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    package = tmp_path / "elsewhere" / "sedac"  # the build runs in a process of its own, which must not find this clone's library
    shutil.copytree(PACKAGES["sedac"], package, ignore=shutil.ignore_patterns("_kernels.*", "__pycache__"))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    with caplog.at_level(logging.INFO):
        build.build_missing()
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("building SEDAC's native kernels once")
    assert told[1].startswith("SEDAC's native kernels could not be built, without them slower torch forms run: kernels: no C++ compiler (")
    assert told[1].endswith("install g++ or name one in CXX")


def _list_files() -> set[str]:
    """Return the packages' files as a wheel should name them."""
    return {
        f"{name}/{path.relative_to(folder)}"
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("_kernels.")
    }


def _build(target: str, source: Path, out: Path) -> Path:
    done = subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


@pytest.mark.thorough
def test_the_wheel_holds_all_that_serving_needs(tmp_path):
    wheel = _build("wheel", ROOT, tmp_path / "wheel")
    assert wheel.name == f"sedac-{__version__}-py3-none-any.whl"
    unpacked = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(unpacked)
    assert names == _list_files()
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert {f"sedac_demo/{name}" for name in DEMO_FILES} <= names
    assert {"sedac/engine/backends/kernels/mlp.cpp", "sedac/engine/backends/kernels/rows.h", "sedac_probes/page/report.css"} <= names
    metadata = (unpacked / f"sedac-{__version__}.dist-info" / "METADATA").read_text()
    assert f"Version: {__version__}\n" in metadata
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}

    def run(*arguments: str) -> str:
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert run("-c", "import sedac, sedac_demo; print(sedac.__file__, sedac_demo.DIRECTORY)").split() == [
        str(unpacked / "sedac" / "__init__.py"),
        str(unpacked / "sedac_demo"),
    ]
    assert run("-m", "sedac.app.cli", "--version") == f"sedac {__version__}\n"
    assert "certify" in run("-m", "sedac_probes.cli", "--help")
    found = run(
        "-c", "from sedac.app.launch import *; s = with_draft(with_demo_defaults(EngineSettings())); print(s.model, s.probe_dir, s.draft_dir)"
    )
    assert found.split()[-3:] == [str(unpacked / "sedac_demo" / name) for name in ("model", "probe-set", "draft")]


@pytest.mark.thorough
def test_the_sdist_makes_the_same_wheel(tmp_path):
    with tarfile.open(_build("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"sedac-{__version__}"
    for name in ("CHANGELOG.md", "LICENSE", "README.md", "proto/generate.py", "probes/demo/train_model.py"):
        assert (source / name).is_file()
    with zipfile.ZipFile(_build("wheel", source, tmp_path / "wheel")) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == _list_files()
