"""How a client or an engine proves who it is to the control service, and how it knows that service: SEDAC_CONTROL_TLS, _CA,
_CLIENT_CERT, _CLIENT_KEY, _SERVER_NAME and _TOKEN_FILE.

    credentials = read_credentials()
    with credentials.open_channel(address) as channel:
        stub.GetStatus(request, metadata=credentials.make_call_metadata())

Every call takes `metadata=credentials.make_call_metadata()` (beside its own): the token file is read again when it changed, so that a
rotated token counts from the next call on. Certificates are read when a channel is opened: whoever connects again after a lost
connection opens a new channel. Nothing of a token or a key is ever in an error, a log line or a `repr`.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from pydantic import PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from sedac.errors import ConfigError

_PREFIX = "SEDAC_CONTROL_"
_MAX_TOKEN_CHARS = 4096
Metadata = tuple[tuple[str, str], ...]


class Credentials(BaseSettings):
    """What a caller of the control service shows, and what it wants to see."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_ignore_empty=True, frozen=True, extra="ignore")

    tls: bool | None = None
    """Whether to speak TLS. If unset, TLS is spoken where a CA or a client certificate is named."""
    ca: Path | None = None
    """PEM file of the authorities that may have signed the service's certificate. If unset, those that gRPC brings."""
    client_cert: Path | None = None
    """PEM file of the certificate to show, with its chain (mTLS)."""
    client_key: Path | None = None
    """PEM file of the key of that certificate."""
    server_name: str = ""
    """Name that the service's certificate must carry. If empty, the host of the address."""
    token_file: Path | None = None
    """File with a bearer token. It is read again when it changes."""
    _token: tuple[tuple[int, int, int], str] | None = PrivateAttr(default=None)

    @property
    def is_tls(self) -> bool:
        """Whether channels speak TLS."""
        return bool(self.ca or self.client_cert) if self.tls is None else self.tls

    def make_call_metadata(self) -> Metadata:
        """Return the metadata that authenticates one call; empty without a token file.

        Raises:
            ConfigError: the token file can't be read or holds no token.
        """
        return (("authorization", f"Bearer {self._read_token()}"),) if self.token_file else ()

    def make_channel_credentials(self) -> grpc.ChannelCredentials | None:
        """Read the certificates and return what a secure channel needs; None without TLS.

        Raises:
            ConfigError: a file can't be read, or a certificate comes without its key.
        """
        if not self.is_tls:
            if self.ca or self.client_cert or self.client_key:
                raise ConfigError("SEDAC_CONTROL_TLS is 0 and certificates are named; set it to 1, or leave the certificates out")
            return None
        if (self.client_cert is None) != (self.client_key is None):
            missing = "SEDAC_CONTROL_CLIENT_KEY" if self.client_key is None else "SEDAC_CONTROL_CLIENT_CERT"
            raise ConfigError(f"{missing} is missing; a client certificate and its key go together")
        return grpc.ssl_channel_credentials(
            root_certificates=_read("CA", self.ca),
            private_key=_read("CLIENT_KEY", self.client_key),
            certificate_chain=_read("CLIENT_CERT", self.client_cert),
        )

    def open_channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
        """Open a channel to host:port; connecting and reconnecting is gRPC's.

        Raises:
            ConfigError: a file can't be read, or a token would leave this machine in the clear.
        """
        secure = self._check(address)
        return grpc.secure_channel(address, secure, self._name(options)) if secure else grpc.insecure_channel(address, tuple(options))

    def open_aio_channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Channel:
        """Open a channel to host:port for asyncio.

        Raises:
            ConfigError: a file can't be read, or a token would leave this machine in the clear.
        """
        secure = self._check(address)
        return grpc.aio.secure_channel(address, secure, self._name(options)) if secure else grpc.aio.insecure_channel(address, tuple(options))

    def _check(self, address: str) -> grpc.ChannelCredentials | None:
        secure = self.make_channel_credentials()
        if self.token_file and secure is None and not is_loopback(address):
            raise ConfigError(
                f"a token would travel to {address} in the clear; set SEDAC_CONTROL_TLS=1 (and SEDAC_CONTROL_CA), or leave the token out"
            )
        return secure

    def _name(self, options: Sequence[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
        return (*options, ("grpc.ssl_target_name_override", self.server_name)) if self.server_name else tuple(options)

    def _read_token(self) -> str:
        assert self.token_file
        try:
            found = self.token_file.stat()
            version = (found.st_mtime_ns, found.st_size, found.st_ino)
            if self._token is None or self._token[0] != version:
                self._token = (version, _find_token(self.token_file))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
            raise ConfigError(f"SEDAC_CONTROL_TOKEN_FILE {self.token_file} can't be read: {reason}; name a file with one token") from None
        return self._token[1]


VARIABLES = frozenset(_PREFIX + name.upper() for name in Credentials.model_fields)
"""The environment variables that are read here."""


def read_credentials(**overrides: Any) -> Credentials:
    """Read SEDAC_CONTROL_TLS and its kin from the environment; `overrides` win.

    Raises:
        ConfigError: names the variable, its value and the remedy.
    """
    try:
        return Credentials(**overrides)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{_PREFIX}{str(first['loc'][0]).upper()}={first['input']!r}: {first['msg']}") from None


def is_loopback(address: str) -> bool:
    """Whether a host, host:port or unix: address leads to this machine alone."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition("/")[2]  # without a scheme such as ipv4: or dns:///
    host = host.removeprefix("ipv4:").removeprefix("ipv6:").removeprefix("dns:")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    host = host.rpartition(":")[0] if ":" in host else host
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def _read(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{_PREFIX}{name} {path} can't be read: {error.strerror}; name a readable PEM file") from None


def _find_token(path: Path) -> str:
    token = path.read_text("ascii").strip()
    if not token or len(token) > _MAX_TOKEN_CHARS or not token.isprintable() or " " in token:
        raise ConfigError(
            f"SEDAC_CONTROL_TOKEN_FILE {path} must hold one token of 1 to {_MAX_TOKEN_CHARS} printable characters; `sedac control token` makes one"
        )
    return token
