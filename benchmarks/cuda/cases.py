"""Real models' shapes, what each case asks of their rows, and what it would ideally cost; plain Python, so that planning needs no torch.

T tokens, D hidden size, F neurons of a rank. Bytes and FLOPs are of one MLP; an ideal is the dense time, shortened as the longer of
reading and computing gets shorter (a roofline with the card's own ceilings, which only weigh the two against each other).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FULL, SKIP, CONTEXTUAL, WIDTH = 0, 1, 2, 3
"""levels by index in every table made here"""
FORMS = ("few", "middle", "many")
"""The forms of the kernels, in the order in which sedac.engine.backends.cuda.forms numbers them."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a card reaches at best, both per second."""

    bytes_per_second: float
    """Bytes of memory that are read and written."""
    flops_per_second: float
    """Dense products in bf16."""


DATA_SHEET = Ceilings(bytes_per_second=4.8e12, flops_per_second=990e12)
"""The ceilings of an H200 by its data sheet, which stand in where nothing was measured."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model's MLP (of one rank) and what surrounds it."""

    name: str
    hidden_size: int
    num_neurons: int
    num_layers: int
    num_heads: int = 0
    num_kv_heads: int = 0
    head_size: int = 128


SHAPES = (
    Shape(name="Qwen2.5-7B", hidden_size=3584, num_neurons=18944, num_layers=28, num_heads=28, num_kv_heads=4),
    Shape(name="Qwen2.5-0.5B", hidden_size=896, num_neurons=4864, num_layers=24, num_heads=14, num_kv_heads=2, head_size=64),
    Shape(name="Llama-3-70B/TP8", hidden_size=8192, num_neurons=3584, num_layers=80, num_heads=8, num_kv_heads=1),
    Shape(name="Qwen2.5-3B", hidden_size=2048, num_neurons=11008, num_layers=36, num_heads=16, num_kv_heads=2),
    Shape(name="Qwen2.5-14B", hidden_size=5120, num_neurons=13824, num_layers=48, num_heads=40, num_kv_heads=8),
    Shape(name="Qwen2.5-32B", hidden_size=5120, num_neurons=27648, num_layers=64, num_heads=40, num_kv_heads=8),
)
"""the most telling first"""
TINY = Shape(name="tiny", hidden_size=72, num_neurons=200, num_layers=3, num_heads=4, num_kv_heads=2, head_size=16)
"""what stands for any of them under the interpreter"""


def get_shape(name: str, *, is_tiny: bool = False) -> Shape:
    """Return the shape of that name; `is_tiny`: with the sizes of `TINY`.

    Raises:
        ValueError: there is none of that name.
    """
    found = next((shape for shape in (*SHAPES, TINY) if shape.name == name), None)
    if found is None:
        raise ValueError(f"no shape is called {name!r}; there are {', '.join(shape.name for shape in SHAPES)}")
    return replace(TINY, name=name) if is_tiny else found


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the rows of a step get."""

    name: str
    level: int
    rows: float = 1.0
    """Share of the rows that get the level. The others are full."""
    active: float = 1.0
    """Share of the neurons that a contextual or ordered row keeps."""
    is_telling: bool = False
    """Whether it is measured before the others."""

    def get_levels(self, num_tokens: int) -> list[int]:
        """Return the levels of the rows, the reduced ones spread evenly."""
        reduced = round(num_tokens * self.rows)
        return [self.level if (t * reduced) // num_tokens != ((t + 1) * reduced) // num_tokens else FULL for t in range(num_tokens)]

    def get_ideal(self, shape: Shape, num_tokens: int, ceilings: Ceilings) -> float:
        """Return what the case ideally costs as a share of the dense MLP's time."""
        num_reduced = sum(level != FULL for level in self.get_levels(num_tokens))
        num_full = num_tokens - num_reduced
        union = 1 - (1 - self.active) ** num_reduced  # rows choose independently
        read = {SKIP: 0.0, WIDTH: self.active, CONTEXTUAL: (1 + 2 * union) / 3, FULL: 1.0}[self.level]
        work = {SKIP: 0.0, WIDTH: self.active, CONTEXTUAL: (1 + 2 * self.active) / 3, FULL: 1.0}[self.level]
        weights = 3 * shape.hidden_size * shape.num_neurons
        reading, computing = 2 * weights / ceilings.bytes_per_second, 2 * weights * num_tokens / ceilings.flops_per_second
        ours = max(reading * (1.0 if num_full else read), computing * (num_full + num_reduced * work) / num_tokens)
        return ours / max(reading, computing)


CASES = (
    Case(name="nothing reduced", level=FULL, is_telling=True),
    *(Case(name=f"skip, {round(100 * r)} % of rows", level=SKIP, rows=r, is_telling=r == 1.0) for r in (0.25, 0.5, 0.75, 1.0)),
    *(Case(name=f"contextual, {round(100 * a)} % active", level=CONTEXTUAL, active=a, is_telling=a == 0.5) for a in (0.25, 0.5, 0.75)),
    *(Case(name=f"width, {round(100 * a)} %", level=WIDTH, active=a, is_telling=a == 0.5) for a in (0.25, 0.5)),
    Case(name="width 50 %, half the rows", level=WIDTH, rows=0.5, active=0.5),
)

EXITS = (0.25, 0.5, 0.75)
"""The places of a step's checkpoints, as shares of the layers."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a whole step's rows get: a case from the first layer on, or a skip of all rows from a share of the layers on."""

    name: str
    case: Case
    exits_at: float | None = None

    @property
    def is_telling(self) -> bool:
        """Whether it is measured before those that are not."""
        return self.case.is_telling or self.exits_at == 0.5


PLANS = (
    Plan(name="checkpoints on, nothing reduced", case=Case(name="full", level=FULL, is_telling=True)),
    *(Plan(name=f"skip from {round(100 * at)} % of the layers", case=Case(name="full", level=FULL), exits_at=at) for at in reversed(EXITS)),
    *(
        Plan(name=f"skip everywhere, {round(100 * r)} % of rows", case=Case(name="skip", level=SKIP, rows=r, is_telling=r == 1.0))
        for r in (0.25, 0.5, 0.75, 1.0)
    ),
    *(
        Plan(name=f"contextual, {round(100 * a)} % active", case=Case(name="contextual", level=CONTEXTUAL, active=a, is_telling=a == 0.5))
        for a in (0.75, 0.5, 0.25)
    ),
    *(Plan(name=f"width, {round(100 * a)} %", case=Case(name="width", level=WIDTH, active=a, is_telling=a == 0.5)) for a in (0.75, 0.5, 0.25)),
)


def get_case(name: str) -> Case:
    """Return the case of that name.

    Raises:
        ValueError: there is none.
    """
    found = next((case for case in CASES if case.name == name), None)
    if found is None:
        raise ValueError(f"no case is called {name!r}")
    return found


def get_plan(name: str) -> Plan:
    """Return the plan of that name.

    Raises:
        ValueError: there is none.
    """
    found = next((plan for plan in PLANS if plan.name == name), None)
    if found is None:
        raise ValueError(f"no plan is called {name!r}")
    return found
