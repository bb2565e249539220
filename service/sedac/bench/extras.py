"""Packages that only the benchmark needs, which a server may lack."""

from __future__ import annotations

import importlib
from typing import Any

from sedac.errors import ConfigError


def need(module: str) -> Any:
    """Import a module of the extra `bench`.

    Raises:
        ConfigError: it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"`sedac bench` needs {error.name or module}, which is not installed: pip install sedac[bench]") from error
