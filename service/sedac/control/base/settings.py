"""Settings of the control service: SEDAC_CONTROL_* environment variables, checked once at the edge."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from sedac.contract.credentials import VARIABLES
from sedac.errors import ConfigError

_PREFIX = "SEDAC_CONTROL_"
KEEP_REVISIONS = 10_000
"""How many of the newest revisions are kept where nobody says otherwise."""
_CLIENTS_OWN = {"SEDAC_CONTROL_ADDRESS", *VARIABLES}


class ControlSettings(BaseSettings):
    """Where the control service listens and what it keeps."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_ignore_empty=True, frozen=True)

    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback wants TLS and principals or a client CA, or `insecure`."""
    port: int = Field(default=50051, ge=0, le=65535)
    """The gRPC port; 0: any free one."""
    metrics_host: str = "127.0.0.1"
    """Address of the Prometheus endpoint."""
    metrics_port: int = Field(default=9464, ge=0, le=65535)
    """Port of the Prometheus endpoint. 0 means that there is none."""
    database: Path = Path("var/control.sqlite3")
    """SQLite file of the revisions. It is made with its directory."""
    keep_revisions: int = Field(default=KEEP_REVISIONS, ge=10)
    """How many of the newest revisions are kept; older ones only as long as a roll-out or the guard needs them."""
    probe_sets: Path | None = None
    """Directory of the uploaded probe sets, of this service alone; unset: `probe-sets` beside the database."""
    max_probe_set_bytes: int = Field(default=1 << 30, ge=1)
    """Bytes; largest weights of one probe set taken."""
    max_probe_sets_bytes: int = Field(default=16 << 30, ge=1)
    """Bytes; weights of all probe sets together."""
    max_uploads: int = Field(default=4, ge=1)
    """Probe sets that may be on their way at one time."""
    upload_silence_seconds: float = Field(default=30.0, gt=0)
    """Seconds without a chunk after which an upload or a download of a probe set is given up."""
    max_message_bytes: int = Field(default=(1 << 20) + (1 << 16), ge=1 << 12)
    """Bytes; largest gRPC message taken; a chunk of a probe set has up to 1 MiB."""
    tls_cert: Path | None = None
    """PEM file of the service's certificate, with its chain. It is read again when it changes."""
    tls_key: Path | None = None
    """PEM file of the key of that certificate, unencrypted. It is read again when it changes."""
    tls_client_ca: Path | None = None
    """PEM file of the authorities whose certificates callers must show (mTLS). If unset, nobody is asked for one."""
    principals: Path | None = None
    """Who may call, in which role: one JSON object per line; read again when it changes; unset: everybody may do everything."""
    insecure: bool = False
    """Listen beyond loopback without TLS or without asking who calls, where something else fences the network."""
    max_calls: int = Field(default=4096, ge=1)
    """Calls of all callers that run at one time, streams among them."""
    max_streams: int = Field(default=1024, ge=1)
    """Streams of one caller at one time; a caller is a principal, or an address where nobody is asked; a fleet may be one caller."""
    max_calls_per_second: float = Field(default=1000.0, ge=0)
    """Of one caller, over time; twice as many at once; 0: no limit."""
    first_message_seconds: float = Field(default=20.0, gt=0)
    """Seconds that a caller has to send the first message of a call, and a connection to become one."""
    max_idle_seconds: float = Field(default=300.0, ge=1)
    """Seconds after which a connection without a call is closed; an engine always has its stream."""
    max_age_seconds: float = Field(default=0.0, ge=0)
    """Seconds after which any connection is asked to come anew, and a drain later cut; 0: never."""
    drain_seconds: float = Field(default=5.0, ge=0)
    """Seconds that running calls have to finish after SIGTERM; streams end at once."""

    def __init__(self, **values: Any) -> None:
        """Read the environment; `values` win.

        Raises:
            ConfigError: names the variable, its value and the remedy.
        """
        known = {_PREFIX + name.upper() for name in type(self).model_fields}
        for name in os.environ:
            if name.startswith(_PREFIX) and name not in known and name not in _CLIENTS_OWN:
                close = difflib.get_close_matches(name, known, n=1)
                raise ConfigError(f"{name} is unknown; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"))
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = _PREFIX + "_".join(map(str, first["loc"])).upper()
            raise ConfigError(f"{name}={first['input']!r}: {first['msg']}") from error
