"""The client's tests use the control service's own fixtures."""

from tests.control.conftest import client, make_engine, server, settings  # noqa: F401
