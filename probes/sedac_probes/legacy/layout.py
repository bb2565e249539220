"""The earlier versions' files, read without executing anything: `sedac_probe_layerN.pth`, `hidden_states_layerN.pt`, `entropies_layerN.pt`.

They are pickles, so everything goes through torch.load(weights_only=True): a pickle that holds more than tensors and plain containers is
refused. N is the decoder layer, 0-based, after which the stream was read, as in our checkpoints. R rank, D hidden size, N tokens.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sedac.errors import ArtifactError, ConfigError
from sedac.probe.probe import LREProbe
from torch import Tensor

PROBES, STREAMS, ENTROPIES = "sedac_probe_layer{}.pth", "hidden_states_layer{}.pt", "entropies_layer{}.pt"
THRESHOLDS, THRESHOLDS_KEY = "sedac_config.json", "v6_thresholds"
DOCUMENTS = "documents.pt"
"""File of ours: document and position of every row, so that a collection comes back as it was. The earlier versions don't read it."""

_NESTED = ("state_dict", "model_state_dict", "probe_state_dict", "model")
_NAMES = {
    "down": ("0", "down", "proj", "project", "projection", "fc1", "linear1"),
    "norm": ("1", "norm", "ln", "layer_norm", "layernorm"),
    "out": ("2", "out", "head", "output", "fc2", "linear2"),
}
_STREAM_KEYS = ("hidden_states", "hidden_state", "hidden", "states", "features", "x")
_ENTROPY_KEYS = ("entropies", "entropy", "targets", "labels", "y")
_BROKEN = (RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError)


def read_pickle(path: Path) -> Any:
    """Load tensors and plain containers on the CPU.

    Raises:
        ArtifactError: the file can't be read, or holds anything else; nothing of it was executed.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        found = what.group(1) if what else "objects other than tensors, or is damaged"
        raise ArtifactError(
            f"{path} holds {found}: refused, nothing of it was run; save tensors alone: torch.save(probe.state_dict(), ...)"
        ) from None
    except _BROKEN as error:
        raise ArtifactError(f"{path} can't be read ({str(error).splitlines()[0] if str(error) else type(error).__name__}); copy it again") from None


def find_layers(directory: Path, pattern: str, wanted: tuple[int, ...] = ()) -> dict[int, Path]:
    """Return the files of `pattern` by layer, ascending: those of `wanted`, or all.

    Raises:
        ConfigError: there are none, a wanted layer is missing, or two files claim one layer.
    """
    parts = re.compile("(\\d+)".join(map(re.escape, pattern.split("{}"))))
    found: dict[int, Path] = {}
    for path in sorted(directory.iterdir()):
        if match := parts.fullmatch(path.name):
            if (layer := int(match.group(1))) in found:
                raise ConfigError(f"{path} and {found[layer].name} are both of layer {layer}; remove one")
            found[layer] = path
    missing = [layer for layer in wanted if layer not in found]
    if missing or not found:
        raise ConfigError(f"{directory} has {pattern.format('N')} of layers {sorted(found)}, not of {missing or 'any'}; name those that it has")
    return {layer: found[layer] for layer in (sorted(set(wanted)) or sorted(found))}


def read_thresholds(directory: Path, layers: tuple[int, ...]) -> dict[int, float]:
    """Return the thresholds that sedac_config.json beside the probes gives for these layers, as a mapping or as a list in their order.

    Raises:
        ConfigError: the file is malformed, or a threshold is below 0 or not finite.
    """
    path = directory / THRESHOLDS
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
        given = data.get(THRESHOLDS_KEY, data.get("thresholds")) or {}
        if isinstance(given, list):
            given = dict(zip(map(str, layers), given, strict=True))
        found = {layer: float(given[str(layer)]) for layer in layers if given.get(str(layer)) is not None}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} has no thresholds by layer ({error}); mend it, or move it away and give --threshold LAYER=RISK") from None
    for layer, threshold in found.items():
        if not (math.isfinite(threshold) and threshold >= 0):
            raise ConfigError(f"{path}: the threshold of layer {layer} is {threshold}; it must be finite and at least 0")
    return found


def read_probe(path: Path) -> LREProbe:
    """Read one probe; its rank and hidden size are those of its tensors.

    Raises:
        ArtifactError: it isn't an LREProbe's state dict, doesn't tell which tensor is which, or holds NaN or infinity.
    """
    state = read_pickle(path)
    while isinstance(state, Mapping) and not any(isinstance(v, Tensor) for v in state.values()):
        inner = [state[key] for key in _NESTED if isinstance(state.get(key), Mapping)]
        if len(inner) != 1:
            break
        state = inner[0]
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    if len(tensors) != 5:
        raise ArtifactError(f"{path} holds {len(tensors)} tensors {sorted(tensors)[:8]}, an LREProbe has 5; save its state dict alone")
    roles = _match_names(tensors) or _match_shapes(tensors)
    if roles is None:
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        raise ArtifactError(
            f"{path} does not tell which tensor is which: {shapes}; name them proj.weight, norm.weight, norm.bias, head.weight, head.bias"
        )
    down = tensors[roles["down.weight"]]
    if down.dim() != 2 or not 0 < down.shape[0] <= 4096 or not 0 < down.shape[1] <= 1 << 20:
        raise ArtifactError(f"{path}: {roles['down.weight']} is {tuple(down.shape)}, expected (rank, hidden size); train the probe again")
    probe = LREProbe(down.shape[1], down.shape[0])
    for role, expected in probe.state_dict().items():
        tensor = check_tensor(path, roles[role], tensors[roles[role]])
        if tensor.shape != expected.shape:
            raise ArtifactError(f"{path}: {roles[role]} is {tuple(tensor.shape)}, expected {tuple(expected.shape)}; train the probe again")
    probe.load_state_dict({role: tensors[name].float() for role, name in roles.items()})
    return probe.eval().requires_grad_(False)


def _match_names(tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Map LREProbe's parameter names to the file's, where all five are usual spellings under one prefix."""
    parts = {name: re.sub(r"^_orig_mod\.", "", name).rsplit(".", 2) for name in tensors}
    if not all(len(p) >= 2 for p in parts.values()) or len({tuple(p[:-2]) for p in parts.values()}) != 1:
        return None
    known = {alias: role for role, aliases in _NAMES.items() for alias in aliases}
    roles = {f"{known.get(p[-2], '?')}.{p[-1]}": name for name, p in parts.items()}
    return roles if set(roles) == {"down.weight", "norm.weight", "norm.bias", "out.weight", "out.bias"} else None


def _match_shapes(tensors: Mapping[str, Tensor]) -> dict[str, str] | None:
    """The same by shape; the norm's two vectors only by a name that ends in weight or bias. None where more than one mapping fits."""
    flat = [name for name, t in tensors.items() if t.dim() == 2 and t.shape[0] == 1]
    wide = [name for name, t in tensors.items() if t.dim() == 2 and t.shape[0] > 1]
    single = [name for name, t in tensors.items() if tuple(t.shape) == (1,)]
    vectors = [name for name, t in tensors.items() if t.dim() == 1 and t.shape[0] > 1]
    weights, biases = ([n for n in vectors if n.lower().endswith(ends)] for ends in (("weight", "gamma"), ("bias", "beta")))
    if [len(names) for names in (flat, wide, single, vectors, weights, biases)] != [1, 1, 1, 2, 1, 1]:
        return None
    return {"down.weight": wide[0], "norm.weight": weights[0], "norm.bias": biases[0], "out.weight": flat[0], "out.bias": single[0]}


def check_tensor(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Return it where it is a dense float tensor of finite values.

    Raises:
        ArtifactError: it is not.
    """
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
        raise ArtifactError(f"{path}: {name} is {tensor.dtype} on {tensor.device}, {tensor.layout}; save dense float tensors")
    if not tensor.isfinite().all():
        raise ArtifactError(f"{path}: {name} holds {int((~tensor.isfinite()).sum())} NaN or infinite values; make it again")
    return tensor


def read_states(directory: Path, path: Path, layer: int) -> tuple[Tensor, Tensor]:
    """Return the streams (N, D) and entropies (N,), nats, of one layer: from one file, or with entropies_layerN.pt beside it.

    Raises:
        ArtifactError: something is missing, not finite, or of shapes that don't fit.
    """
    data = read_pickle(path)
    streams, entropies = data, None
    if isinstance(data, Mapping):
        streams, entropies = (next((data[k] for k in keys if k in data), None) for keys in (_STREAM_KEYS, _ENTROPY_KEYS))
    elif isinstance(data, list | tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data) and data[1].dim() < data[0].dim():
        streams, entropies = data
    elif isinstance(data, list | tuple) and data and all(isinstance(part, Mapping) for part in data):
        streams, entropies = ([next((part[k] for k in keys if k in part), None) for part in data] for keys in (_STREAM_KEYS, _ENTROPY_KEYS))
    beside = directory / ENTROPIES.format(layer)
    if entropies is None and beside.is_file():
        entropies = read_pickle(beside)
    streams_ND, entropies_N = (_join(part) for part in (streams, entropies))
    if streams_ND is None or entropies_N is None:
        lacks = "hidden states" if streams_ND is None else f"entropies, and there is no {beside.name} beside it"
        raise ArtifactError(f"{path} has no {lacks}; collect again with `sedac-probes collect`")
    streams_ND = check_tensor(path, "hidden states", streams_ND.flatten(0, -2) if streams_ND.dim() > 2 else streams_ND)
    entropies_N = check_tensor(path, "entropies", entropies_N.flatten())
    if streams_ND.dim() != 2 or len(streams_ND) != len(entropies_N) or not len(entropies_N):
        shapes = f"hidden states {tuple(streams_ND.shape)} and entropies {tuple(entropies_N.shape)}"
        raise ArtifactError(f"{path}: {shapes} don't belong together, expected (N, D) and (N,); collect again with `sedac-probes collect`")
    return streams_ND, entropies_N


def _join(data: Any) -> Tensor | None:
    """A tensor, or a list of tensors of rows one after the other."""
    if isinstance(data, list | tuple) and data and all(isinstance(part, Tensor) for part in data):
        parts = [part.flatten(0, -2) if part.dim() > 2 else part for part in data]
        if len({part.shape[1:] for part in parts}) == 1 and all(part.dim() for part in parts):
            return torch.cat(parts)
        return None
    return data if isinstance(data, Tensor) else None
