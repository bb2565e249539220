"""Distillation: what is recorded equals transformers, survives kill -9; what is trained is what serves; what is too large is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from sedac.errors import ConfigError
from sedac.probe.draft import ADAPTER, EXIT_HEAD, DraftHead, load_head, read_draft_manifest, save_draft
from sedac_probes import corpus
from sedac_probes.cli import main
from sedac_probes.drafts import fit as fitting
from sedac_probes.drafts.acceptance import Guesses, StepCosts, guess, propose, roll_out
from sedac_probes.drafts.fit import FitSettings, compare, evaluate, fit
from sedac_probes.drafts.heads import load_saved
from sedac_probes.drafts.states import Source, States, collect_states, read_states
from sedac_probes.drafts.target import count_parameters, make_head, make_manifest, read_target

from testing.forked import run_python
from tests.engine.running import read_heldout_prompts, run_engine

DEMO = Path(__file__).resolve().parents[2] / "probes" / "sedac_demo" / "model"
LENGTH, PIECES, PROMPT = 80, 12, 24

_COLLECT = f"""
import sys
from pathlib import Path
from sedac_probes import corpus
from sedac_probes.drafts.states import Source, collect_states
collect_states(
    Path(sys.argv[1]), Source({str(DEMO)!r}, dtype="float32"), corpus.read_stdlib("heldout")[:20], depths=(3, 8), num_pieces={PIECES},
    own_share=0.5, max_length={LENGTH}, prompt_length={PROMPT}, pieces_per_shard=4,
)
"""


@pytest.fixture(scope="module")
def target():
    return read_target(str(DEMO))


@pytest.fixture(scope="module")
def reference():
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    out = tmp_path_factory.mktemp("work") / "streams"
    done = run_python("-c", _COLLECT, out, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def make_states(num_pieces, length, seed, target):
    """States of an invented model: the final state is a fixed function of this token's stream and of the one before."""
    size = target.config["hidden_size"]
    fixed = torch.Generator().manual_seed(7)
    here_DD, before_DD = (torch.randn(size, size, generator=fixed) * size**-0.5 for _ in range(2))
    x_BSD = torch.randn(num_pieces, length, size, generator=torch.Generator().manual_seed(seed))
    final_BSD = torch.nn.functional.rms_norm(x_BSD @ here_DD + x_BSD.roll(1, 1) @ before_DD, (size,)) * target.norm_D
    final_ND = final_BSD.flatten(0, 1).bfloat16()
    return States(
        stream_ND=x_BSD.flatten(0, 1).bfloat16(), final_ND=final_ND, next_N=(final_ND.float() @ target.lm_head_VD.T).argmax(-1),
        is_own_N=torch.ones(num_pieces * length, dtype=torch.bool), starts=list(range(0, num_pieces * length + 1, length)),
    )  # fmt: skip


@pytest.mark.engine
def test_recorded_states_equal_transformers(collection, reference):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    states = read_states(collection, 3)
    shards = [safetensors.torch.load_file(path) for path in sorted(collection.glob("shard-*.safetensors"))]
    assert [len(s["document"].unique()) for s in shards] == [4, 4, 4]
    assert {s[name].dtype for s in shards for name in ("stream.2", "stream.7", "final")} == {torch.bfloat16}
    texts = [tokenizer(d.text)["input_ids"] for d in corpus.read_stdlib("heldout")[:20]]
    assert states.num_pieces == PIECES
    temperatures = []
    for number in range(PIECES):
        rows = slice(states.starts[number], states.starts[number + 1])
        following, own = states.next_N[rows].tolist(), states.is_own_N[rows].tolist()
        begun = {ids[i] for ids in texts for i in range(0, len(ids), LENGTH - 1) if ids[i + 1 : i + PROMPT] == following[: PROMPT - 1]}
        assert len(begun) == 1, "the piece is cut from the texts, at a multiple of its length"
        ids = [*begun, *following[:-1]]
        seen = reference(torch.tensor([ids]), output_hidden_states=True)
        torch.testing.assert_close(states.stream_ND[rows].float(), seen.hidden_states[3][0], rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(states.final_ND[rows].float(), seen.hidden_states[-1][0], rtol=2**-8, atol=1e-3)
        deep = shards[number // 4]
        torch.testing.assert_close(deep["stream.7"][deep["document"] == number].float(), seen.hidden_states[8][0], rtol=2**-8, atol=1e-3)
        if number % 2:
            assert own == [False] * (PROMPT - 1) + [True] * (LENGTH - PROMPT)
            greedy = seen.logits[0].argmax(-1)[PROMPT - 1 :].tolist()
            temperatures.append(greedy != following[PROMPT - 1 :])
        else:
            assert own == [False] * (len(ids) - 1) + [True]
            assert following[-1] == int(seen.logits[0, -1].argmax())
    assert temperatures == [True, False] * (PIECES // 4)  # drawn at 0.8, then greedy, in turn


@pytest.mark.thorough
@pytest.mark.engine
def test_killed_and_resumed_gives_the_same_bytes(collection, tmp_path):
    out = tmp_path / "killed"
    killed = subprocess.Popen([sys.executable, "-c", _COLLECT, str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    limit = time.monotonic() + 300
    while not (out / "shard-00000.safetensors").exists() and killed.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    before = sorted(path.name for path in out.iterdir())
    assert "shard-00000.safetensors" in before
    assert "shard-00002.safetensors" not in before
    again = run_python("-c", _COLLECT, out, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in collection.iterdir()}


@pytest.mark.engine
def test_a_collection_with_more_depths_serves_and_one_with_fewer_is_refused(collection):
    settings = {"num_pieces": PIECES, "own_share": 0.5, "max_length": LENGTH, "prompt_length": PROMPT, "pieces_per_shard": 4}
    source, documents = Source(str(DEMO), dtype="float32"), corpus.read_stdlib("heldout")[:20]
    collect_states(collection, source, documents, depths=(8,), **settings)  # it is whole: no engine starts
    with pytest.raises(ConfigError, match=r"layers \[2, 7\], asked for \[3\]"):
        collect_states(collection, source, documents, depths=(4,), **settings)
    with pytest.raises(ConfigError, match=r"own_share 0.5, asked for 0.25"):
        collect_states(collection, source, documents, depths=(3,), **{**settings, "own_share": 0.25})
    with pytest.raises(ConfigError, match=r"--layers names \[12\], outside 1..11"):
        collect_states(collection, source, documents, depths=(12,), **settings)
    with pytest.raises(ConfigError, match=r"has no stream.3; collect it again"):
        read_states(collection, 4)


def disturb(head, seed=3):
    """Let the untrained head say something of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in head.named_parameters():
        if name in ("o_proj.weight", "down_proj.weight"):
            p.data = torch.randn(p.shape, generator=generator) * 0.05
    return head


def guess_with_transformers(reference, head, depth, prompt, answer):
    """Guesses along a greedy answer, from an independent forward of the model and the plain head."""
    seen = reference(torch.tensor([prompt + answer[:-1]]), output_hidden_states=True)
    with torch.no_grad():
        logits_TV = head(seen.hidden_states[depth])[0] @ reference.lm_head.weight.T
    best = logits_TV.softmax(-1).max(-1)
    rows = slice(len(prompt), len(prompt) + len(answer) - 1)
    return Guesses(agrees=(best.indices[rows] == torch.tensor(answer[1:])).tolist(), confidence=best.values[rows].tolist())


@pytest.mark.engine
@pytest.mark.parametrize(("kind", "depth"), [(ADAPTER, 9), pytest.param(EXIT_HEAD, 10, marks=pytest.mark.thorough)])
def test_the_head_that_serves_is_the_head_that_was_trained(kind, depth, target, reference, tmp_path):
    """What the engine drafts and accepts, step by step, follows from the plain head on the whole text: its keys and values too."""
    manifest = replace(make_manifest(target, kind, depth), max_tokens=4)
    directory = tmp_path / kind
    save_draft(directory, manifest, disturb(make_head(target, manifest)))
    head = load_saved(directory)
    prompts, tokens = read_heldout_prompts(10), 48
    speculation = {"method": "custom_class", "model": "sedac.engine.drafting.drafter.Drafter", "num_speculative_tokens": 4}
    steps = []
    for confidence in (0.0, 0.5):
        knobs = {"speculation": {"adaptive": False, "min_confidence": confidence}}
        steps += [{"do": "apply", "policy": knobs}, {"do": "stats"}, {"do": "generate", "prompts": prompts, "batch": 5, "max_tokens": tokens}]
    results = run_engine(
        DEMO, [*steps, {"do": "stats"}], sedac={"draft": str(directory)}, dtype="float32", enforce_eager=True, max_model_len=256,
        speculative_config=speculation,
    )  # fmt: skip
    answers = [answer["tokens"] for answer in results[2]]
    assert answers == [answer["tokens"] for answer in results[5]]
    texts = [guess_with_transformers(reference, head, depth, p, a) for p, a in zip(prompts, answers, strict=True)]
    for confidence, before, after in ((0.0, results[1], results[4]), (0.5, results[4], results[6])):
        expected = roll_out(texts, 4, confidence)
        found = {name: [a - b for a, b in zip(after["drafting"][name], before["drafting"][name], strict=True)] for name in ("lengths", "accepted_at")}
        found["lengths"][0] -= len(prompts)  # a prompt's own step
        assert found["accepted_at"] == list(expected.accepted_at)
        assert sum(found["lengths"]) == expected.num_steps
        if confidence == 0.0:  # else the engine's confidence behind a wrong draft, which is that of another text, decides when to stop
            assert found["lengths"] == list(expected.lengths)
        assert 0 < expected.accepted_at[3] < expected.accepted_at[0] < expected.num_steps
    if kind == ADAPTER:  # the keys and values matter here: without them the head says something else
        head.o_proj.weight.data.zero_()
        deaf = [guess_with_transformers(reference, head, depth, p, a) for p, a in zip(prompts, answers, strict=True)]
        assert roll_out(deaf, 4).accepted_at != roll_out(texts, 4).accepted_at


def test_gradient_and_loss_are_those_of_soft_cross_entropy(target):
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(1100, 256, generator=generator, requires_grad=True)  # more rows than are computed at once
    final_ND = torch.randn(1100, 256, generator=generator)
    loss, gradient_ND = compare(hidden_ND, final_ND, target.lm_head_VD)
    wanted = torch.nn.functional.cross_entropy(hidden_ND @ target.lm_head_VD.T, (final_ND @ target.lm_head_VD.T).softmax(-1))
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(gradient_ND, hidden_ND.grad, rtol=1e-4, atol=1e-8)


def test_training_lowers_the_loss_and_starts_as_an_early_exit(target, tmp_path):
    states, heldout = make_states(24, 32, 1, target), make_states(4, 32, 2, target)
    head = make_head(target, make_manifest(target, ADAPTER, 3, 64))
    x_BSD = heldout.stream_ND.float().view(4, 32, -1)
    exit_BSD = torch.nn.functional.rms_norm(x_BSD, (256,), target.norm_D, eps=1e-6)
    torch.testing.assert_close(head(x_BSD), exit_BSD)
    losses = fit(head, states, heldout, target.lm_head_VD, FitSettings(epochs=6, batch_size=4, evaluations=4), tmp_path / "a.pt")
    assert losses[0][0] == 0
    assert losses[-1][1] < losses[0][1] - 0.1
    weight_VD = target.lm_head_VD.bfloat16()
    assert evaluate(head, heldout, weight_VD) == pytest.approx(min(loss for _, loss in losses), rel=1e-4)


def test_a_run_that_was_stopped_gives_the_same_weights(target, tmp_path, monkeypatch):
    states, heldout = make_states(10, 24, 1, target), make_states(3, 24, 2, target)
    manifest, settings = make_manifest(target, ADAPTER, 3, 64), FitSettings(epochs=3, batch_size=4, evaluations=4)
    whole = make_head(target, manifest)
    losses = fit(whole, states, heldout, target.lm_head_VD, settings, tmp_path / "whole.pt")

    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(fitting, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(make_head(target, manifest), states, heldout, target.lm_head_VD, settings, tmp_path / "stopped.pt")
    monkeypatch.undo()
    resumed = make_head(target, manifest)
    assert fit(resumed, states, heldout, target.lm_head_VD, settings, tmp_path / "stopped.pt") == losses
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(ConfigError, match="other settings or data"):
        fit(make_head(target, manifest), states, heldout, target.lm_head_VD, replace(settings, lr=1e-4), tmp_path / "stopped.pt")


def test_heads_keep_to_their_budget(target):
    for kind, neurons in ((ADAPTER, 384), (EXIT_HEAD, 640)):
        manifest = make_manifest(target, kind, 4)
        assert manifest.intermediate_size == neurons
        assert count_parameters(DraftHead(manifest)) <= 0.05 * target.num_parameters == pytest.approx(524_915, abs=1)
    assert (manifest.num_heads, manifest.num_kv_heads) == (0, 0)
    adapter = make_manifest(target, ADAPTER, 3)
    assert (adapter.num_heads, adapter.num_kv_heads, adapter.head_size) == (4, 2, 64)  # the model's own
    most = make_manifest(target, ADAPTER, 3, 426)
    assert count_parameters(DraftHead(most)) <= target.budget < count_parameters(DraftHead(replace(most, intermediate_size=427)))


def change(directory, **config):
    shutil.copytree(DEMO, directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory


REFUSED = {
    "over the budget": (
        {},
        ["--neurons", 427],
        r"a head of kind adapter with 427 neurons has 525,312 parameters, over 5% .* give --neurons 426 or less",
    ),
    "rope": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4}}, [], r"rope_type is 'yarn'; .* use --kind exit-head"),
    "rope, older form": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, [], r"rope_type is 'linear'"),
    "rope by layer type": ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, [], r"one per layer type \(full_attention, "),
    "rope of a part": ({"partial_rotary_factor": 0.5}, [], r"partial_rotary_factor is 0.5"),
    "capped logits": ({"final_logit_softcapping": 30.0}, [], r"final_logit_softcapping is 30.0; .* --kind reduced"),
    "kind": ({}, ["--kind", "tree"], r"--kind is 'tree'; give one of adapter, exit-head"),
    "depth": ({}, ["--layers", "3,12"], r"--layers names \[12\], outside 1..11"),
    "layers": ({}, ["--layers", "3-5"], r"--layers has '3-5'"),
    "epochs": ({}, ["--epochs", 0], r"--epochs is 0; give a number over 0"),
    "share": ({}, ["--own-share", 1.5], r"--own-share is 1.5; give 0 to 1"),
    "pick": ({}, ["--pick", "adapter-3"], r"--pick names what goes to --out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line_and_start_nothing(name, capsys, monkeypatch, tmp_path):
    config, options, said = REFUSED[name]
    model = change(tmp_path / "model", **config)
    work = tmp_path / "work"
    monkeypatch.setattr("sys.argv", ["sedac-probes", "distill", "--model", str(model), "--work", str(work), *map(str, options)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line.removeprefix("sedac-probes: ")), line
    assert not work.exists()


def test_rollouts_count_what_drafting_would():
    text = Guesses(agrees=[True, True, False, True, True, True], confidence=[0.9, 0.8, 0.9, 0.3, 0.9, 0.9])
    counted = roll_out([text], 2)
    # two accepted and the model's own token, twice
    assert (counted.lengths, counted.accepted_at, counted.reached_at) == ((0, 0, 2), (2, 2), (2, 2))
    assert counted.tokens_per_step == 3.0
    stopped = roll_out([text], 4, 0.5)
    # joint confidences 0.9, 0.72, 0.648, 0.19: four drafted, two accepted; then 0.3 stops after one; the last place has no room for a draft
    assert (stopped.lengths, stopped.accepted_at, stopped.reached_at) == ((1, 1, 0, 0, 1), (2, 1, 0, 0), (2, 1, 1, 0))
    assert stopped.acceptance == (1.0, 1.0, 0.0, 0.0)
    costs = StepCosts(plain=2.0, verify=2.5, row=0.1, draft_pass=0.5)
    assert costs.predict(stopped) == pytest.approx(6 * 2.0 / (5 * 0.6 + 2 * 2.5 + 2.0))


def test_proposals_follow_the_costs():
    sure = [Guesses(agrees=[True] * 96, confidence=[0.95] * 96)]
    unsure = [Guesses(agrees=[False] * 96, confidence=[0.2] * 96)]
    cheap, dear = (StepCosts(plain=1.0, verify=1.0, row=0.02, draft_pass=share) for share in (0.1, 0.9))
    assert propose(sure, cheap).max_tokens == 8
    assert propose(unsure, cheap).max_tokens == 1
    assert propose(unsure, cheap).speedup < 1
    assert propose(sure, dear).speedup < propose(sure, cheap).speedup


def test_guesses_are_the_heads_own(target):
    heldout = make_states(3, 20, 5, target)
    head = disturb(make_head(target, make_manifest(target, ADAPTER, 3, 64)))
    texts = guess(head, heldout, target.lm_head_VD, batch_size=2)
    assert [len(t.agrees) for t in texts] == [19, 19, 19]
    with torch.no_grad():
        logits_TV = head(heldout.stream_ND[20:40].float()[None])[0] @ target.lm_head_VD.T
    best = logits_TV.softmax(-1).max(-1)
    assert texts[1].agrees == (best.indices == heldout.next_N[20:40])[1:].tolist()
    assert texts[1].confidence == pytest.approx(best.values[1:].tolist(), rel=1e-4)


@pytest.mark.engine
@pytest.mark.parametrize(("num_samples", "length"), [(4, 48), pytest.param(8, 80, marks=pytest.mark.thorough)])
def test_the_command_makes_a_draft_and_makes_it_once(tmp_path, num_samples, length):
    work, out = tmp_path / "work", tmp_path / "draft"
    command = ["-m", "sedac_probes.cli", "distill", "--work", str(work), "--samples", str(num_samples), "--heldout-samples", "6"]
    command += ["--max-length", str(length), "--epochs", "1", "--no-measure", "--out", str(out)]
    adapter = run_python(*command, "--layers", "3", "--record", "8", timeout=600)
    assert adapter.returncode == 0, adapter.stderr
    exit_head = run_python(*command, "--kind", "exit-head", "--layers", "8", "--pick", "adapter-3", timeout=600)
    assert exit_head.returncode == 0, exit_head.stderr
    assert "collect streams" not in exit_head.stderr, "the first run recorded both depths"
    manifest = read_draft_manifest(out)
    assert (manifest.kind, manifest.depth, manifest.training["own_share"]) == ("adapter", 3, 0.5)
    assert len(manifest.acceptance) == max(4, manifest.max_tokens)
    assert load_head(out, manifest).keys() == dict(DraftHead(manifest).named_parameters()).keys()
    table = json.loads((work / "distill.json").read_text())["candidates"]
    assert sorted(c["name"] for c in table) == ["adapter-3", "exit-head-8"]
    assert (work / "distill.png").stat().st_size > 0
    before = {path: path.stat().st_mtime_ns for path in (work / "drafts").rglob("*")}
    again = run_python(*command, "--layers", "3", "--pick", "adapter-9", timeout=600)
    assert again.returncode == 1
    assert "--pick is 'adapter-9'" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in (work / "drafts").rglob("*")} == before, "trained and judged once"
