"""Fit a draft's head to the full model: soft cross-entropy to its whole next-token distribution, the lm_head frozen.

The distribution is softmax(final state times lm_head), computed batch by batch, so nothing of the size of the vocabulary is stored.
A run that was stopped goes on from its last state and gives the same weights. The head with the lowest held-out loss is kept.
B pieces of S positions, N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sedac.errors import ConfigError
from sedac.probe.draft import DraftHead
from torch import Tensor
from tqdm import tqdm

from sedac_probes.drafts.states import States, get_rows, pad

_ROWS = 1024  # of logits at once
_WARM_UP = 0.03  # of the steps
_BETAS = (0.9, 0.95)
_CLIP = 1.0


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a head is trained."""

    epochs: int = 3
    batch_size: int = 8
    """Pieces per step."""
    lr: float = 2e-3
    """Highest learning rate of AdamW. It falls along a cosine to a twentieth."""
    weight_decay: float = 0.01
    evaluations: int = 10
    """Number of looks at the held-out loss, and of states kept."""
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError where a value is out of range."""
        for name, value in (("epochs", self.epochs), ("batch-size", self.batch_size), ("lr", self.lr)):
            if value <= 0:
                raise ConfigError(f"--{name} is {value}; give a number over 0")


def fit(
    head: DraftHead, states: States, heldout: States, lm_head_VD: Tensor, settings: FitSettings, path: Path, *, autocast: bool = True
) -> list[tuple[int, float]]:
    """Train `head` in place and leave its best weights; returns (step, held-out loss in nats per token) of each look.

    `path` keeps the state of the run. `autocast` computes matrix products in bf16.

    Raises:
        ConfigError: a setting is out of range, or `path` holds a run with other settings or data.
    """
    settings.check()
    dtype = torch.bfloat16 if autocast else torch.float32
    weight_VD = lm_head_VD.to(dtype)
    per_epoch = math.ceil(states.num_pieces / settings.batch_size)
    num_steps = per_epoch * settings.epochs
    every = max(1, num_steps // settings.evaluations)
    optimizer = torch.optim.AdamW(_group(head, settings.weight_decay), lr=settings.lr, betas=_BETAS)
    run = _Run(head, optimizer, path, _describe(head, states, heldout, settings, dtype))
    bar = tqdm(total=num_steps, initial=run.step, desc=f"distill {head.manifest.name}", unit="step")
    if not run.losses:
        run.look(evaluate(head, heldout, weight_VD))
    while run.step < num_steps:
        epoch, number = divmod(run.step, per_epoch)
        order = torch.randperm(states.num_pieces, generator=torch.Generator().manual_seed(settings.seed * 10_000 + epoch))
        batch = order[number * settings.batch_size : (number + 1) * settings.batch_size].tolist()
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _get_share(run.step, num_steps)
        optimizer.zero_grad()
        hidden_ND = run_head(head, states, batch, dtype)
        loss, gradient_ND = compare(hidden_ND, states.final_ND[get_rows(states, batch)], weight_VD)
        hidden_ND.backward(gradient_ND)
        torch.nn.utils.clip_grad_norm_(head.parameters(), _CLIP)
        optimizer.step()
        run.step += 1
        bar.update()
        if run.step % every == 0 or run.step == num_steps:
            run.look(evaluate(head, heldout, weight_VD))
            bar.set_postfix(train=f"{loss:.4f}", heldout=f"{run.losses[-1][1]:.4f}")
    bar.close()
    head.load_state_dict(run.best)
    head.eval().requires_grad_(False)
    return run.losses


class _Run:
    """The state of a run: in memory and, after each look at the held-out loss, in a file."""

    def __init__(self, head: DraftHead, optimizer: torch.optim.Optimizer, path: Path, described: str) -> None:
        self.head, self.optimizer, self.path, self.described = head, optimizer, path, described
        self.step = 0
        self.losses: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}
        if not path.exists():
            return
        try:
            kept = torch.load(path, weights_only=True)
            if kept["described"] != described:
                raise ConfigError(f"{path} holds a run with other settings or data; remove it or name another --work")
            head.load_state_dict(kept["head"])
            optimizer.load_state_dict(kept["optimizer"])
            self.step, self.losses, self.best = kept["step"], [(int(s), float(v)) for s, v in kept["losses"]], kept["best"]
        except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
            raise ConfigError(f"{path} can't be read ({error}); remove it and run the same command") from error

    def look(self, loss: float) -> None:
        """Take in a held-out loss, keep the best weights, and write the state."""
        self.losses.append((self.step, loss))
        if loss <= min(value for _, value in self.losses):
            self.best = copy.deepcopy(self.head.state_dict())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        state = {
            "described": self.described, "head": self.head.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "losses": self.losses, "best": self.best,
        }  # fmt: skip
        torch.save(state, temporary)
        temporary.rename(self.path)


def _describe(head: DraftHead, states: States, heldout: States, settings: FitSettings, dtype: torch.dtype) -> str:
    data = hashlib.sha256()
    for part in (states, heldout):
        data.update(part.next_N.numpy().tobytes() + repr(part.starts).encode())
    return json.dumps([asdict(head.manifest), asdict(settings), str(dtype), data.hexdigest()], sort_keys=True)


def _group(head: DraftHead, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices, not norms."""
    matrices = [p for p in head.parameters() if p.ndim == 2]
    norms = [p for p in head.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


def _get_share(step: int, num_steps: int) -> float:
    """Return the share of the learning rate at a step: up in a line, down by a cosine to 0.05."""
    start = max(1, int(num_steps * _WARM_UP))
    if step < start:
        return (step + 1) / start
    return 0.05 + 0.95 * (1 + math.cos(math.pi * (step - start) / max(1, num_steps - start))) / 2


def run_head(head: Callable[[Tensor], Tensor], states: States, pieces: list[int], dtype: torch.dtype) -> Tensor:
    """Return the head's states (N, D) on some pieces, in the order of `get_rows`."""
    x_BSD, real_BS = pad(states, pieces)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return head(x_BSD.float())[real_BS]


@torch.no_grad()
def compare(hidden_ND: Tensor, final_ND: Tensor, weight_VD: Tensor) -> tuple[float, Tensor]:
    """Return the mean soft cross-entropy of `hidden` to `final`, in nats, and its gradient with respect to `hidden` (N, D).

    Logits are computed in the dtype of the weight, a few rows at a time; with p the full model's distribution and q the draft's, the
    gradient of -sum(p log q) with respect to the draft's logits is q - p.
    """
    total, parts = 0.0, []
    num = hidden_ND.shape[0]
    for hidden_RD, final_RD in zip(hidden_ND.split(_ROWS), final_ND.split(_ROWS), strict=True):
        logits_RV = (hidden_RD.to(weight_VD.dtype) @ weight_VD.T).float()
        p_RV = (final_RD.to(weight_VD.dtype) @ weight_VD.T).float().softmax(-1)
        norm_R1 = logits_RV.logsumexp(-1, keepdim=True)
        total += float(norm_R1.sum() - torch.dot(p_RV.flatten(), logits_RV.flatten()))
        difference_RV = logits_RV.sub_(norm_R1).exp_().sub_(p_RV)
        parts.append((difference_RV.to(weight_VD.dtype) @ weight_VD).float() / num)
    return total / num, torch.cat(parts).to(hidden_ND.dtype)


@torch.no_grad()
def evaluate(head: DraftHead, states: States, weight_VD: Tensor, batch_size: int = 16) -> float:
    """Return the mean soft cross-entropy over all tokens, nats."""
    total = 0.0
    for first in range(0, states.num_pieces, batch_size):
        pieces = list(range(first, min(first + batch_size, states.num_pieces)))
        hidden_ND = run_head(head, states, pieces, weight_VD.dtype)
        total += compare(hidden_ND, states.final_ND[get_rows(states, pieces)], weight_VD)[0] * len(hidden_ND)
    return total / states.starts[-1]
