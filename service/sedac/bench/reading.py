"""Reads a matrix from YAML, or a preset by its name, and says in one line what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel

from sedac.bench.extras import need
from sedac.bench.matrix import Matrix, Model, Quality, System, Tier
from sedac.errors import ConfigError

PRESETS = Path(__file__).resolve().parent / "presets"


def list_presets() -> list[str]:
    """Return the names of the matrices that the package brings."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_matrix(source: str, **changes: Any) -> Matrix:
    """Read a matrix from a YAML file, or a preset by its name; `changes` that are not None take the place of its fields.

    Raises:
        ConfigError: names the file, the field, its value, the limit and the remedy.
    """
    path = PRESETS / f"{source}.yaml" if source in list_presets() else Path(source)
    yaml = need("yaml")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"matrix {source!r} can't be read ({error.strerror}); give a YAML file or one of {', '.join(list_presets())}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"matrix {source!r} is not YAML: {error}; mend the file, `sedac bench quick --show` prints one that is") from error
    if not isinstance(data, dict):
        raise ConfigError(f"matrix {source!r} is not a mapping of fields; `sedac bench quick --show` prints one that is")
    return make_matrix({**data, **{name: value for name, value in changes.items() if value is not None}}, source)


def to_yaml(matrix: Matrix) -> str:
    """Return a matrix with all its defaults as YAML."""
    return str(need("yaml").safe_dump(matrix.model_dump(mode="json"), sort_keys=False, width=120))


def make_matrix(data: Mapping[str, Any], source: str = "matrix") -> Matrix:
    """Check the fields of a matrix.

    Raises:
        ConfigError: names the source, the field, its value, the limit and the remedy.
    """
    try:
        return Matrix.model_validate(data)
    except pydantic.ValidationError as error:
        raise ConfigError("; ".join(_explain(found, source) for found in error.errors())) from None


def _explain(found: Any, source: str) -> str:
    kind, path = found["type"], ".".join(str(part) for part in found["loc"])
    if kind == "value_error":
        return f"{source}: {path + ': ' if path else ''}{found['ctx']['error']}"
    owner, field = _find_field(found["loc"])
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(str(found["loc"][-1]), owner, n=1)
        return f"{source}: {path} is unknown" + (f"; did you mean {close[0]}?" if close else f"; known: {', '.join(owner)}")
    given = "is missing" if kind == "missing" else f"is {found['input']!r}: {found['msg'][:1].lower()}{found['msg'][1:]}"
    return f"{source}: {path} {given}; give this: {field}" if field else f"{source}: {path} {given}"


def _find_field(location: Iterable[Any]) -> tuple[list[str], str]:
    """Return the fields of the model in which an error lies, and what its field is."""
    models: dict[str, type[BaseModel]] = {"models": Model, "systems": System, "tiers": Tier, "quality": Quality}
    described = ""
    owner: type[BaseModel] = Matrix
    last: type[BaseModel] = Matrix
    for part in location:
        if isinstance(part, str) and part in last.model_fields:
            owner, described = last, last.model_fields[part].description or ""
            last = models.get(part, last)
        elif isinstance(part, str):
            owner = last
    return list(owner.model_fields), described
