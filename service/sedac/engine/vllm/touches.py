"""What a touch on vLLM is, and how it is checked: by names, signatures and cheap behaviour, without an engine.

patches.py lists them. Nothing of vLLM is imported before a check asks for it, and a check changes nothing.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Where = Literal["every process", "front end", "worker"]
"""In which of vLLM's processes a touch is made. Its module is imported there anyway."""


class Expectation(Protocol):
    """What SEDAC relies on; its text says it in a few words."""

    def why_not(self, found: Any) -> str:
        """Return what differs in what was found; empty: nothing."""
        ...


class Takes:
    """Can be called with these parameters, in this order among others, and reached by these names."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __str__(self) -> str:
        return f"({', '.join(self._names)})"

    def why_not(self, found: Any) -> str:
        """Compare with the signature; a class's is that of its `__init__`."""
        if not callable(found):
            return f"is no callable but {type(found).__name__}"
        function = found.__init__ if inspect.isclass(found) else found
        parameters = [name for name in inspect.signature(function).parameters if name != "self"]
        if [name for name in parameters if name in self._names] == list(self._names):
            return ""
        return f"takes ({', '.join(parameters)}), not {self}"


class Has:
    """Has these attributes: as a module, a class, or an instance that its class's `__init__` has made."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __str__(self) -> str:
        return f"with {', '.join(self._names)}"

    def why_not(self, found: Any) -> str:
        """Look for the names in the class and its bases: what is defined, declared, or set while an instance is made."""
        known = set(dir(found))
        for base in inspect.getmro(found) if inspect.isclass(found) else ():
            known |= vars(base).get("__annotations__", {}).keys()
            known |= set(getattr(getattr(inspect.unwrap(vars(base).get("__init__", base)), "__code__", None), "co_names", ()))
        missing = [name for name in self._names if name not in known]
        return f"has no {', '.join(missing)}" if missing else ""


class Does:
    """Behaves as the text says, which `find_fault` tries."""

    def __init__(self, text: str, find_fault: Callable[[Any], str]) -> None:
        self._text, self._find_fault = text, find_fault

    def __str__(self) -> str:
        return self._text

    def why_not(self, found: Any) -> str:
        """Try it."""
        return self._find_fault(found)


@dataclass(frozen=True, kw_only=True)
class Touch:
    """One place where SEDAC reaches into vLLM."""

    target: str
    """Name of the place, as module:qualified name."""
    why: str
    """What SEDAC needs it for."""
    used_by: str
    """The file of SEDAC that reaches there, under service/sedac."""
    expects: tuple[Expectation, ...]
    where: Where
    cpu_only: bool = False
    """Whether it is made on vLLM's CPU platform alone."""

    def check(self) -> str:
        """Return what differs from what SEDAC expects; empty: nothing."""
        module_name, _, path = self.target.partition(":")
        try:
            found: Any = importlib.import_module(module_name)
            for name in filter(None, path.split(".")):
                found = inspect.getattr_static(found, name) if inspect.isclass(found) else getattr(found, name)
            found = found.__func__ if isinstance(found, classmethod | staticmethod) else found
            return "; ".join(filter(None, (expected.why_not(found) for expected in self.expects)))
        except (ImportError, AttributeError) as error:
            return f"is missing: {error}"
        except Exception as error:  # noqa: BLE001  whatever another vLLM raises is a difference
            return f"can't be checked: {type(error).__name__}: {error}"


@dataclass(frozen=True)
class Checked:
    """A touch and what differs; empty: it is as SEDAC expects."""

    touch: Touch
    problem: str
