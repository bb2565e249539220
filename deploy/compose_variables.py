"""Write the engine's variables into docker-compose.yml, between its two marks: `python deploy/compose_variables.py`, which `make docs` runs.

A knob that has a variable can so be set where the containers start, with nothing to write by hand; a test renders the file again and compares.
"""

from __future__ import annotations

from pathlib import Path

from sedac.settings import EngineSettings

COMPOSE = Path(__file__).resolve().parents[1] / "docker-compose.yml"
BEGIN, END = "# from here on written by deploy/compose_variables.py\n", "# to here\n"
ELSEWHERE = frozenset(
    [
        "MODEL",
        "POLICY",
        "PROBE_DIR",
        "PROBE_LAYERS",
        "PROBE_RANK",
        "LOG_EVERY",
        "CONTROL_ADDRESS",
        "ENGINE_ID",
        "POLL_SECONDS",
        "JOIN_SECONDS",
        "PROBE_CACHE",
    ]
)
"""what the images and the command say, paths that a container does not have, and what it has no use for"""


def render(text: str) -> str:
    """Return the file's text with the variables as the settings have them now.

    Raises:
        ValueError: one of the marks is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{COMPOSE.name}: one of the lines {BEGIN!r} and {END!r} is missing; put both around the variables")
    names = (f"SEDAC_{name.upper()}" for name in EngineSettings.model_fields if name.upper() not in ELSEWHERE)
    return "".join([before, begin, *(f"  {name}: ${{{name}:-}}\n" for name in names), end, after])


if __name__ == "__main__":
    COMPOSE.write_text(render(COMPOSE.read_text()))
