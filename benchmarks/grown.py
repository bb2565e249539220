"""The demo model in the shape of a mid-size one, computing the same function: what benchmarks measure acceptance and cost on at once.

    python benchmarks/grown.py --out build/grown            24 layers, hidden 1024, MLP 4096, 16 heads, 8 key-value heads

It says what the demo model says, token for token, so its drafts are accepted as often as those of a trained model of 10.5 million
parameters are: no oftener, though a trained model of its size would be the better one. What a step costs is what 382 million
parameters cost. It is a yardstick, no model to use.

How it stays the same function: the new part of the residual stream is zero everywhere. A mean square over four times the width is a
quarter, so norms have half the weight and a quarter of the epsilon, both exact in bf16. New heads and neurons compute, and the
projections behind them have zeros for what they say. After each layer follows an inserted one, a copy of the next in shape and
weights whose two output projections are zero. So layers 0..l-1 of the demo model are 0..2l-1 here, and a draft of depth l becomes one
of 2l. New rows of weights that read are copies or random, not zeros; those that write are zeros, which matrix products on CPUs do
not skip (benchmarks/speculation.py measures that against dense random weights). New neurons have the gates of old ones, so a level
computes the same share of them.
D hidden size, F neurons.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sedac.probe import artifact
from sedac.probe.draft import DraftHead, load_head, save_draft
from sedac.probe.draft_manifest import DraftManifest, read_draft_manifest
from sedac.probe.levels import Neurons
from sedac.probe.probe import LREProbe
from torch import Tensor

DEMO = Path(__file__).resolve().parents[1] / "probes" / "sedac_demo"
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
_STD = 0.02
"""Standard deviation of the new weights that read."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Qwen2 model."""

    layers: int = 24
    hidden: int = 1024
    neurons: int = 4096
    heads: int = 16
    kv_heads: int = 8

    @classmethod
    def of(cls, model: Path) -> Shape:
        """Read the sizes of the model in a directory."""
        config = json.loads((model / "config.json").read_text())
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        layers, hidden, neurons, heads, kv_heads = (config[name] for name in names)
        return cls(layers=layers, hidden=hidden, neurons=neurons, heads=heads, kv_heads=kv_heads)


class Growth:
    """From one shape to a larger one."""

    def __init__(self, old: Shape, new: Shape, seed: int = 0) -> None:
        """Check that the function can be kept.

        Raises:
            ValueError: it can't, with the size at fault.
        """
        self.old, self.new = old, new
        self.width = new.hidden // old.hidden
        self.every = new.layers // old.layers
        """Layers for each old one."""
        if self.width not in (1, 4, 16) or new.hidden % old.hidden:
            raise ValueError(f"hidden size {new.hidden} is not 1, 4 or 16 times {old.hidden}; norms would not stay exact in bf16")
        if new.layers % old.layers:
            raise ValueError(f"{new.layers} layers are no multiple of {old.layers}; drafts would have no depth of their own")
        if new.heads * old.kv_heads != new.kv_heads * old.heads or new.heads < old.heads:
            raise ValueError(
                f"{new.heads} heads on {new.kv_heads} key-value heads; as many must share one as share it in {old.heads} on {old.kv_heads}"
            )
        if new.neurons < old.neurons:
            raise ValueError(f"{new.neurons} neurons are fewer than {old.neurons}; give at least as many")
        self._random = torch.Generator().manual_seed(seed)

    def origin(self, place: int) -> tuple[int, bool]:
        """Return the old layer that the layer at `place` is made of, and whether it is an inserted one."""
        number, inserted = divmod(place, self.every)
        return min(number + bool(inserted), self.old.layers - 1), bool(inserted)

    def reading(self, weight: Tensor, rows: int, *, tile: bool = False) -> Tensor:
        """Grow a projection (rows, D) that reads the stream: new columns random; new rows random, or copies of old ones."""
        count = weight.shape[0]
        grown = torch.randn(rows, self.new.hidden, generator=self._random) * _STD
        grown[:count, : self.old.hidden] = weight.float()
        if tile:
            grown[count:, : self.old.hidden] = weight.float()[torch.arange(count, rows) % count]
        return grown.to(weight.dtype)

    def writing(self, weight: Tensor, columns: int) -> Tensor:
        """Grow a projection (D, columns) that writes into the stream: zeros for what is new."""
        grown = weight.new_zeros(self.new.hidden, columns)
        grown[: weight.shape[0], : weight.shape[1]] = weight
        return grown

    def bias(self, bias: Tensor, size: int) -> Tensor:
        """Grow the bias of a projection that reads."""
        grown = (torch.randn(size, generator=self._random) * _STD).to(bias.dtype)
        grown[: bias.shape[0]] = bias
        return grown

    def norm(self, weight: Tensor) -> Tensor:
        """Grow a norm's weight (D,)."""
        grown = torch.ones(self.new.hidden, dtype=weight.dtype)
        grown[: weight.shape[0]] = weight
        return grown / self.width**0.5

    def part(self, name: str, weight: Tensor, neurons: int, heads: int, kv_heads: int, head_size: int) -> Tensor:
        """Grow one tensor of a decoder layer, known by its name."""
        which, kind = name.split(".")[-2:]
        rows = {"q_proj": heads * head_size, "k_proj": kv_heads * head_size, "v_proj": kv_heads * head_size, "gate_proj": neurons, "up_proj": neurons}
        if kind == "bias":
            return self.bias(weight, rows[which])
        if which in rows:
            return self.reading(weight, rows[which], tile=which in ("gate_proj", "up_proj"))
        if which in ("o_proj", "down_proj"):
            return self.writing(weight, heads * head_size if which == "o_proj" else neurons)
        return self.norm(weight)


def grow_model(source: Path, out: Path, new: Shape | None = None) -> Growth:
    """Write the model of `source` in the new shape to `out`.

    Raises:
        ValueError: the shapes don't fit.
    """
    old = Shape.of(source)
    growth = Growth(old, new or Shape())
    new = growth.new
    out.mkdir(parents=True, exist_ok=True)
    head_size = old.hidden // old.heads
    weights = load_file(source / "model.safetensors")
    grown: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name == "model.embed_tokens.weight":
            grown[name] = torch.nn.functional.pad(weight, (0, new.hidden - old.hidden))
        elif name == "model.norm.weight":
            grown[name] = growth.norm(weight)
    for place in range(new.layers):
        number, inserted = growth.origin(place)
        prefix = f"model.layers.{number}."
        for name in [n for n in weights if n.startswith(prefix)]:
            tensor = growth.part(name, weights[name], new.neurons, new.heads, new.kv_heads, head_size)
            if inserted and name.split(".")[-2] in ("o_proj", "down_proj"):
                tensor = torch.zeros_like(tensor)
            grown[f"model.layers.{place}.{name.removeprefix(prefix)}"] = tensor.contiguous()
    save_file(grown, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": new.layers, "hidden_size": new.hidden, "intermediate_size": new.neurons, "num_attention_heads": new.heads}
    config |= {"num_key_value_heads": new.kv_heads, "layer_types": ["full_attention"] * new.layers, "max_window_layers": new.layers}
    config["rms_norm_eps"] = config["rms_norm_eps"] / growth.width
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in _COPIED:
        if (source / file).exists():
            shutil.copy(source / file, out / file)
    return growth


def grow_draft(source: Path, out: Path, growth: Growth) -> DraftManifest:
    """Write the draft in `source` for the grown model to `out`: the same proposals, at the new shape's cost.

    Parts that a reduced draft leaves out, it leaves out of the inserted layers too: the same share of the model.

    Raises:
        ArtifactError: `source` holds no draft.
    """
    m = read_draft_manifest(source)
    new, every = growth.new, growth.every

    def spread(layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(every * layer + i for layer in layers for i in range(every))

    neurons = -(-m.intermediate_size * new.neurons // growth.old.neurons // 64) * 64
    heads, kv_heads = m.num_heads * new.heads // growth.old.heads, m.num_kv_heads * new.kv_heads // growth.old.kv_heads
    manifest = replace(
        m, name=f"{m.name}-grown", hidden_size=new.hidden, num_layers=new.layers, depth=every * m.depth, skip_attention=spread(m.skip_attention),
        skip_mlp=spread(m.skip_mlp), intermediate_size=neurons, num_heads=heads, num_kv_heads=kv_heads, rms_norm_eps=m.rms_norm_eps / growth.width,
        sha256="", training={"grown_from": m.sha256 or m.name},
    )  # fmt: skip
    weights = load_head(source, m)
    if not weights:
        return save_draft(out, manifest, None)
    head = DraftHead(manifest)
    head.load_state_dict({name: growth.part(f".{name}", w, neurons, heads, kv_heads, m.head_size) for name, w in weights.items()})
    return save_draft(out, manifest, head)


def grow_probe_set(source: Path, out: Path, growth: Growth) -> None:
    """Write the probe set in `source` for the grown model to `out`: the same risks, levels that compute the same share of the neurons.

    Raises:
        ArtifactError: `source` holds no probe set.
    """
    found, old, new, every = artifact.load(source), growth.old.neurons, growth.new.neurons, growth.every
    of_F = torch.arange(new) % old  # the neuron whose gate it has
    probes = {}
    for layer, probe in found.probes.items():
        state = {name: t.float() for name, t in probe.state_dict().items()}
        state["down.weight"] = growth.writing(state["down.weight"].T, probe.down.out_features).T
        probes[every * layer + every - 1] = LREProbe.from_tensors(state)
    levels = []
    for level in found.levels:
        parameters_L = torch.stack([level.parameters_L[growth.origin(place)[0]] for place in range(growth.new.layers)])
        levels.append(replace(level, parameters_L=parameters_L * new // old if level.reduction == "width" else parameters_L))
    neurons = {}
    for place in range(growth.new.layers if found.levels else 0):
        number, inserted = growth.origin(place)
        known = found.neurons[number]
        repair_FD = known.repair_FD
        if repair_FD is not None:
            repair_FD = growth.writing(repair_FD.T, new).T * (not inserted)
        neurons[place] = Neurons(order_F=_spread_order(known.order_F, new), scale_F=known.scale_F[of_F], repair_FD=repair_FD)
    manifest = replace(
        found.manifest, name=f"{found.manifest.name}-grown"[:64], hidden_size=growth.new.hidden, num_layers=growth.new.layers, intermediate_size=new,
        probes=tuple(replace(p, layer=every * p.layer + every - 1) for p in found.manifest.probes),
    )  # fmt: skip
    artifact.save(out, manifest, probes, levels=levels, neurons=neurons)


def _spread_order(order_F: Tensor, new: int) -> Tensor:
    """Spread an order of neurons over more: of the first n * new / old, exactly n are the first n old ones."""
    old = order_F.shape[0]
    spread = torch.full((new,), -1, dtype=torch.int32)
    spread[torch.arange(old) * new // old] = order_F
    spread[spread < 0] = torch.arange(old, new, dtype=torch.int32)
    return spread


def main() -> None:
    """Write model, probe set and drafts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for model/, probe-set/ and the drafts, each under its name")
    parser.add_argument("--draft", type=Path, nargs="*", default=[], help="directories of drafts of the demo model")
    args = parser.parse_args()
    growth = grow_model(DEMO / "model", args.out / "model")
    grow_probe_set(DEMO / "probe-set", args.out / "probe-set", growth)
    for draft in args.draft:
        grow_draft(draft, args.out / draft.name, growth)
    print(f"{growth.old} grown to {growth.new} in {args.out}")


if __name__ == "__main__":
    main()
