"""The client's tests use the control service's own fixtures, and run `sedac ctl` against it."""

from __future__ import annotations

import pytest
from sedac.ctl.root import app
from typer.testing import CliRunner

from testing.control.fixtures import (  # noqa: F401
    authority,
    client,
    make_engine,
    mtls_settings,
    other_authority,
    pair,
    principals,
    server,
    settings,
    start,
    tls_settings,
)


@pytest.fixture
def ctl(server):  # noqa: F811
    """Run a command against the service; wide, so that no table is cut."""

    def run(*arguments: str, stdin: str | None = None):
        return CliRunner().invoke(app, list(arguments), env={"SEDAC_CONTROL_ADDRESS": server.address, "COLUMNS": "250"}, input=stdin)

    return run
