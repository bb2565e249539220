"""Recipe of the demo model: tokenizer and Qwen2-architecture weights from the standard library's sources.

    python probes/demo/train_model.py                          about an hour on 2 free cores; resumes where it was stopped
    python probes/demo/train_model.py --architecture llama     a second, different small model, to see what carries over

Two single-threaded processes share each batch and average gradients once a step; this stands contention better than two
threads in one process. Writes `probes/sedac_demo/model/`: weights in bf16, config, tokenizer, chat template, loss curve and
`training.json`. The work directory keeps the tokenizer, the token stream and the last state.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from muon import Muon
from sedac_probes import corpus
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

HERE = Path(__file__).resolve().parent
END = "<|endoftext|>"
VOCAB = 4096
CONTEXT = 512
# The model completes code; a chat becomes a module: system text as its docstring, questions as comments.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}\"\"\"{{ m['content'] }}\"\"\"\n\n"
    "{% elif m['role'] == 'user' %}# {{ m['content'] | replace('\n', '\n# ') }}\n"
    "{% else %}{{ m['content'] }}\n\n{% endif %}{% endfor %}"
)


def make_tokenizer(work: Path, documents: list[corpus.Document], architecture: str) -> PreTrainedTokenizerFast:
    """Train (or load) the byte-level BPE tokenizer.

    It must split text as `Qwen2Tokenizer` does: transformers loads that class for every model of type qwen2, whatever
    pre-tokenizer tokenizer.json names.
    """
    path = work / "tokenizer.json"
    if not path.exists():
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet)
        bpe.train_from_iterator((d.text for d in documents), trainer, length=len(documents))
        bpe.save(str(path))
    special = {"bos_token": END, "eos_token": END, "pad_token": END, "model_max_length": CONTEXT, "chat_template": CHAT_TEMPLATE}
    if architecture != "qwen2":
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(path)), **special)
    learned = json.loads(path.read_text())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return Qwen2Tokenizer(learned["vocab"], merges, **special)


def tokenise(work: Path, tokenizer: PreTrainedTokenizerFast, split: corpus.Split) -> np.ndarray[Any, Any]:
    """Return the split's token stream (uint16), each file led by the end-of-text token."""
    path = work / f"{split}.npy"
    if not path.exists():
        stream: list[int] = []
        for document in tqdm(corpus.read_stdlib(split), desc=f"tokenise {split}", unit="file"):
            stream += [tokenizer.bos_token_id, *tokenizer(document.text)["input_ids"]]
        np.save(path, np.array(stream, dtype=np.uint16))
    return np.load(path)


def make_model(architecture: str) -> PreTrainedModel:
    """Build the untrained model (seeded): qwen2 with 12 layers and hidden size 256, or llama with 8 layers and 320."""
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
        "rope_theta": 10000.0,
    }  # fmt: skip
    model: PreTrainedModel
    if architecture == "qwen2":
        config = Qwen2Config(
            hidden_size=256, intermediate_size=768, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2, use_sliding_window=False,
            **common,
        )  # fmt: skip
        model = Qwen2ForCausalLM(config)
    else:
        config = LlamaConfig(
            hidden_size=320, intermediate_size=896, num_hidden_layers=8, num_attention_heads=5, num_key_value_heads=5, head_dim=64, **common
        )
        model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # for training on CPU: compiled explicit attention beats the fused kernel 1.5x
    for name, p in model.named_parameters():  # residual branches start small, so that depth trains stably
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            p.data.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def get_batch(stream: np.ndarray[Any, Any], step: int, rank: int, args: argparse.Namespace) -> Tensor:
    """Return (rows, context + 1) token ids, half the context for the first 85 % of the steps.

    Windows depend on the step and the rank only, so resuming repeats nothing.
    """
    context = CONTEXT // 2 if step < 0.85 * args.steps else CONTEXT
    starts = np.random.default_rng([step, rank]).integers(0, len(stream) - context - 1, args.tokens // context)
    return torch.from_numpy(np.stack([stream[s : s + context + 1] for s in starts]).astype(np.int64))


def get_loss(model: torch.nn.Module, tokens_BT: Tensor) -> Tensor:
    """Return the mean next-token loss in nats under bf16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: torch.nn.Module, stream: np.ndarray[Any, Any], num_windows: int) -> float:
    """Return the held-out loss over `num_windows` windows spread evenly."""
    starts = np.linspace(0, len(stream) - CONTEXT - 1, num_windows).astype(int)
    batches = np.array_split(np.stack([stream[s : s + CONTEXT + 1] for s in starts]).astype(np.int64), math.ceil(num_windows / 8))
    return float(np.mean([get_loss(model, torch.from_numpy(b)).item() for b in batches]))


def train(rank: int, args: argparse.Namespace, work: Path) -> None:
    """Train on one of two ranks; rank 0 shows progress, evaluates and writes the state."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks, timeout=datetime.timedelta(hours=2))  # may be paused
    stream, heldout = np.load(work / "train.npy"), np.load(work / "heldout.npy")
    model = make_model(args.architecture)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [Muon(matrices, lr=4e-3), torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    peaks = [g["lr"] for o in optimizers for g in o.param_groups]
    state_path, first, curve = work / "state.pt", 0, []
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        for o, saved in zip(optimizers, state["optimizers"], strict=True):
            o.load_state_dict(saved)
        first, curve = state["step"], state["curve"]
    compiled = torch.compile(model, dynamic=False)
    params = list(model.parameters())
    with tqdm(total=args.steps, initial=first, desc="train", unit="step", disable=rank > 0) as bar:
        for step in range(first, args.steps):
            scale = min(1.0, (step + 1) / 60) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
            for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks, strict=True):
                group["lr"] = peak * max(scale, 0.01)
            loss = get_loss(compiled, get_batch(stream, step, rank, args))
            loss.backward()
            flat = torch.cat([p.grad.flatten() for p in params])  # type: ignore[union-attr]
            dist.all_reduce(flat)
            flat /= args.ranks
            flat *= min(1.0, 1.0 / (flat.norm().item() + 1e-6))
            for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
                p.grad = part.view_as(p)
            for o in optimizers:
                o.step()
                o.zero_grad(set_to_none=True)
            done = step + 1
            if rank == 0:
                bar.update()
                if done % 10 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
                if done % 100 == 0 or done == args.steps:
                    heldout_loss = evaluate(model, heldout, 64)
                    curve.append({"step": done, "train": loss.item(), "heldout": heldout_loss})
                    tqdm.write(f"step {done}: train {loss.item():.3f}, held out {heldout_loss:.3f} nats per token")
                    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": done, "curve": curve}
                    torch.save(state, work / "state.tmp")
                    (work / "state.tmp").rename(state_path)
    dist.destroy_process_group()


def plot(curve: list[dict[str, float]], path: Path, tokens_per_step: int, title: str) -> None:
    """Draw training and held-out loss against tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    tokens = [c["step"] * tokens_per_step / 1e6 for c in curve]
    for key, label in (("train", "training batch"), ("heldout", "held-out files")):
        axes.plot(tokens, [c[key] for c in curve], label=label)
    axes.set(xlabel="million tokens seen", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def export(args: argparse.Namespace, work: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model directory, measure the written bf16 weights on held-out text and print samples."""
    state = torch.load(work / "state.pt", weights_only=True)
    model = make_model(args.architecture)
    model.load_state_dict(state["model"])
    model = model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    sample = corpus.read_stdlib("heldout")[0].text
    if AutoTokenizer.from_pretrained(args.out)(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
        raise RuntimeError(f"{args.out}: the tokenizer that is loaded from there splits text in another way than in training")
    heldout = np.load(work / "heldout.npy")
    final = evaluate(model, heldout, args.eval_windows)
    tokens_per_step = args.tokens * args.ranks
    record = {
        "parameters": sum(p.numel() for p in model.parameters()), "steps": state["step"], "tokens_per_step": tokens_per_step,
        "tokens_seen": state["step"] * tokens_per_step, "train_tokens": len(np.load(work / "train.npy")), "heldout_tokens": len(heldout),
        "heldout_loss_nats": final, "train_digest": corpus.digest(corpus.read_stdlib("train")),
        "heldout_digest": corpus.digest(corpus.read_stdlib("heldout")), "curve": state["curve"],
    }  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(state["curve"], args.out / "loss.png", tokens_per_step, "SEDAC demo model" if args.architecture == "qwen2" else "llama model")
    print(f"held-out loss {final:.3f} nats per token, perplexity {math.exp(final):.2f} ({len(heldout)} tokens held out)")
    for prompt in ("def read(self, size=-1):\n", "import os\nimport sys\n\n\nclass ", "    def test_"):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=80, do_sample=False)
        print("-" * 80 + "\n" + tokenizer.decode(out[0]))


def main() -> None:
    """Parse the arguments and run tokenizer, training and export in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=["qwen2", "llama"], default="qwen2", help="qwen2: the demo model")
    parser.add_argument("--out", type=Path, help="where the finished model goes; default: probes/sedac_demo/model, build/llama-model")
    parser.add_argument("--work", type=Path, help="tokens and resumable state; default: build/demo-model, build/llama-work")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: 1300, 700")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per rank and step")
    parser.add_argument("--ranks", type=int, default=2, help="single-threaded processes")
    parser.add_argument("--port", type=int, default=29511, help="loopback port on which the ranks meet")
    parser.add_argument("--eval-windows", type=int, default=512, help=f"held-out windows of {CONTEXT} tokens for the final loss")
    parser.add_argument("--restart", action="store_true", help="forget the saved state")
    parser.add_argument("--export-only", action="store_true", help="export the last state without training on")
    args = parser.parse_args()
    is_demo = args.architecture == "qwen2"
    args.out = args.out or (HERE.parent / "sedac_demo" / "model" if is_demo else Path("build/llama-model"))
    args.work = args.work or Path("build/demo-model" if is_demo else "build/llama-work")
    args.steps = args.steps or (1300 if is_demo else 700)
    if args.restart:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.work, corpus.read_stdlib("train"), args.architecture)
    for split in ("train", "heldout"):
        stream = tokenise(args.work, tokenizer, split)
        print(f"{split}: {len(stream):,} tokens")
    if not args.export_only:
        mp.spawn(train, args=(args, args.work), nprocs=args.ranks)
    export(args, args.work, tokenizer)


if __name__ == "__main__":
    main()
