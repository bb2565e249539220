"""What a bounded answer lost against the full model, as one number per request in [0, 1]. Called by `certify`."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sedac.errors import ConfigError

MISMATCH, NLL, DIVERGENCE = "mismatch", "nll", "divergence"


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One request, both answers, and how far the full model's own choices were from the bounded answer's tokens."""

    prompt: list[int]
    """Token ids, as in the answers."""
    exact: list[int]
    bounded: list[int]
    gaps: list[float]
    """The full model's highest log-probability minus that of the token, in nats, per token of the bounded answer. Empty where not scored."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss by name."""

    name: str
    needs_gaps: bool
    compute: Callable[[Exchange], float]

    def compute_all(self, exchanges: Sequence[Exchange]) -> list[float]:
        """Return the loss of every request.

        Raises:
            ConfigError: one is no number in [0, 1].
        """
        values = []
        for i, exchange in enumerate(exchanges):
            value = self.compute(exchange)
            if isinstance(value, bool):
                value = float(value)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"loss {self.name} of request {i} is {value!r}; a loss is a number from 0 (nothing lost) to 1")
            values.append(float(value))
        return values


def load_loss(name: str, decode: Callable[[list[int]], str], *, temperature: float = 0.0) -> Loss:
    """Return the loss that `name` stands for; `decode` turns token ids into text.

    mismatch: share of the bounded answer's tokens to which the full model, given the prompt and the answer so far, prefers another.
    nll: mean over the bounded answer of the full model's highest log-probability minus the token's, at most 1.
    divergence: share of positions at which the bounded answer's token is not the exact answer's; a missing one differs.
    module:function: called with prompt, exact answer and bounded answer as texts.

    Raises:
        ConfigError: there is no such loss, or it means nothing at a temperature.
    """
    if name in (MISMATCH, NLL):
        if temperature > 0:
            raise ConfigError(
                f"loss {name} compares with the full model's greedy choice, the temperature is {temperature}; use divergence or your own"
            )
        return Loss(name=name, needs_gaps=True, compute=_get_mismatch if name == MISMATCH else _get_nll)
    if name == DIVERGENCE:
        return Loss(name=name, needs_gaps=False, compute=_get_divergence)
    function = _import(name)
    return Loss(name=name, needs_gaps=False, compute=lambda e: function(decode(e.prompt), decode(e.exact), decode(e.bounded)))


def _get_mismatch(exchange: Exchange) -> float:
    return sum(gap > 0 for gap in exchange.gaps) / len(exchange.gaps)


def _get_nll(exchange: Exchange) -> float:
    return min(1.0, math.fsum(exchange.gaps) / len(exchange.gaps))


def _get_divergence(exchange: Exchange) -> float:
    pairs = list(zip_longest(exchange.exact, exchange.bounded))
    return sum(a != b for a, b in pairs) / len(pairs)


def _import(name: str) -> Callable[[str, str, str], Any]:
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ConfigError(f"loss {name!r} is unknown; use {MISMATCH}, {NLL}, {DIVERGENCE} or module:function of your own")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a module beside the texts; installed commands don't have this on the path
    try:
        function: Any = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"loss {name!r} can't be imported ({error}); name a function of a module here or on PYTHONPATH") from error
    if not callable(function):
        raise ConfigError(f"loss {name!r} is no function; it is called with prompt, exact answer and bounded answer")
    return function
