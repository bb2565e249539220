"""A real control service on a free loopback port, and engines that speak the real protocol."""

from __future__ import annotations

from testing.control.fixtures import (  # noqa: F401
    authority,
    client,
    make_engine,
    mtls_settings,
    open_channel,
    other_authority,
    pair,
    principals,
    server,
    settings,
    start,
    tls_settings,
)
