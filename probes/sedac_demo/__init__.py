"""The demo, as files that a wheel carries: the model, its probe set, its drafts and a certified policy; probes/demo tells how they were made."""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent
"""Directory with `model`, `probe-set`, `draft`, `drafts` and `policy.json`."""
