"""The pages' commands run against the control service's own fixtures."""

from __future__ import annotations

from testing.control.fixtures import client, make_engine, server, settings  # noqa: F401
