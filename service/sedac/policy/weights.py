"""The digest that names a model's weights in certificates; the same files give the same digest wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from sedac.errors import ConfigError

_WHOLE_BYTES = 256 * 2**20
_NUM_PIECES, _PIECE_BYTES = 64, 64 * 2**10
_MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
_SUFFIXES = (".safetensors", ".bin")


def get_weights_digest(model: str, *, revision: str | None = None, cache_dir: str | None = None) -> str:
    """Return the sha256 of a model's config.json, and of the name, size and content of every *.safetensors file, else of every *.bin file.

    Of a file beyond 256 MiB the header and 64 pieces of 64 KiB, spread evenly from its start to its end, stand for the content, so that
    large models take no minutes; a change of few numbers in such a file may go unseen.

    Args:
        model: a directory, or a name on the Hugging Face hub whose files lie in the local cache; nothing is downloaded.
        revision: of the hub's repository; None: main.
        cache_dir: of the hub's files; None: where huggingface_hub keeps them.

    Raises:
        ConfigError: the model can't be found or read, or holds no weights.
    """
    try:
        directory = _find_directory(model, revision, cache_dir)
        files = next((found for suffix in _SUFFIXES if (found := sorted(directory.glob(f"*{suffix}")))), None)
        if not files:
            raise ConfigError(f"{directory} holds no weights (*.safetensors or *.bin); name the directory of a whole model")
        digest = hashlib.sha256()
        _add_file(digest, directory / "config.json")
        for file in files:
            _add_file(digest, file)
    except OSError as error:
        raise ConfigError(f"the weights of {model} can't be read: {error}; name the directory of a whole model") from error
    return digest.hexdigest()


def _find_directory(model: str, revision: str | None, cache_dir: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    remedy = "name a model's directory, or download the model first: hf download NAME"
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ConfigError(f"{model} is no directory, and hub names need huggingface_hub, which is not installed; {remedy}") from error
    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision, cache_dir=cache_dir)
    except HFValidationError as error:
        raise ConfigError(f"{model} is neither a directory nor a name on the hub; {remedy}") from error
    if not isinstance(found, str):
        raise ConfigError(f"{model} is no directory and not in the hub's local cache; {remedy}")
    return Path(found).parent


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    """Add name, size and content; the size is of a fixed width and ends the name, so that no two lists of files read the same."""
    size = path.stat().st_size
    digest.update(path.name.encode() + b"\0" + size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            while block := file.read(2**20):
                digest.update(block)
            return
        digest.update(file.read(_get_header_bytes(file, path)))
        for i in range(_NUM_PIECES):
            file.seek((size - _PIECE_BYTES) * i // (_NUM_PIECES - 1))
            digest.update(file.read(_PIECE_BYTES))


def _get_header_bytes(file: BinaryIO, path: Path) -> int:
    """Return how long a safetensors header is, with the number that says so; leaves the file at its start. 0 for other files."""
    if path.suffix != ".safetensors":
        return 0
    stated = int.from_bytes(file.read(8), "little")
    file.seek(0)
    if stated > _MAX_HEADER_BYTES:
        raise ConfigError(f"{path} states a header of {stated} bytes, at most {_MAX_HEADER_BYTES} are allowed; download the file again")
    return 8 + stated
