"""Prompts are cut from what a source holds, each once before any comes again."""

from __future__ import annotations

import json

import pytest
import sedac_demo
from sedac.bench.machine import describe_machine, read_versions
from sedac.bench.prompts import Prompts, read_texts
from sedac.bench.tuning import with_knob
from sedac.errors import ConfigError
from sedac.policy.model import Checkpoint, Policy

MODEL = sedac_demo.DIRECTORY / "model"


def test_held_out_code_gives_many_prompts_that_differ():
    prompts = Prompts("heldout-code", MODEL)
    taken = prompts.take(500, 64)
    assert {len(prompt) for prompt in taken} == {64}
    assert len({tuple(prompt) for prompt in taken}) > 490
    assert prompts.take(10, 64, first=5) == taken[5:15]
    assert prompts.take(10, 64) == Prompts("heldout-code", MODEL).take(10, 64)
    assert prompts.take(10, 64) != Prompts("heldout-code", MODEL, seed=1).take(10, 64)
    assert len(prompts.take(3, 400)[2]) == 400


def test_sources_are_a_text_lines_of_json_or_a_directory(tmp_path):
    (tmp_path / "a.txt").write_text("x = 1\n" * 50)
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.py").write_text("three")
    assert read_texts(str(tmp_path / "b.jsonl"))[:2] == ["one", "two"]
    assert read_texts(str(tmp_path / "c")) == ["three"]
    prompts = Prompts(str(tmp_path / "a.txt"), MODEL)
    number = sum(1 for _ in iter(prompts._cut(16)))
    assert prompts.take(number + 1, 16)[number] == prompts.take(1, 16)[0], "after the last comes the first again"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "neither a file nor a directory"),
        ("empty.txt", "", "holds no text"),
        ("bad.jsonl", '{"text": "a"}\n{"other": 1}\n', r"bad.jsonl:2 is no prompt"),
        ("short.txt", "x = 1", "tokens; give longer texts"),
    ],
)
def test_a_source_that_is_of_no_use_is_named(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        Prompts(str(tmp_path / name), MODEL).take(1, 64)


def test_the_machine_says_whether_amx_is_there_and_masked(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: A Processor\nflags\t\t: sse avx512f amx_tile amx_bf16\n")
    assert describe_machine({}, cpuinfo)["processor"] == "A Processor"
    for limit, masked in (("", False), ("AVX512_CORE_BF16", True), ("AVX512_CORE_AMX", False), ("ALL", False)):
        found = describe_machine({"ONEDNN_MAX_CPU_ISA": limit}, cpuinfo)
        assert (found["has_amx"], found["is_amx_masked"]) == (True, masked)
    cpuinfo.write_text("flags\t\t: sse\n")
    assert describe_machine({"ONEDNN_MAX_CPU_ISA": "AVX2"}, cpuinfo)["is_amx_masked"] is False
    assert {"python", "sedac", "torch"} <= read_versions().keys()


def test_knobs_are_set_by_their_paths():
    policy = Policy(checkpoints=(Checkpoint(layer=2, threshold=0.5),))
    changed = with_knob(with_knob(policy, "enabled", True), "speculation.enabled", False)
    assert (changed.enabled, changed.speculation.enabled, changed.checkpoints) == (True, False, policy.checkpoints)
    with pytest.raises(ConfigError, match=r"policy speculation\.on: 'on' is no knob; known: enabled"):
        with_knob(policy, "speculation.on", True)
