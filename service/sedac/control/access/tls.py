"""The service's certificate and who may connect where: TLS, mTLS, and which addresses are safe without.

Certificates are read again when their files change, for connections made from then on. gRPC for Python can require client
certificates or not ask for them at all, so with SEDAC_CONTROL_TLS_CLIENT_CA every caller needs one; it may send a token beside.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from sedac.contract.credentials import is_loopback
from sedac.control.access.reloading import Reloading
from sedac.control.base.metrics import ControlMetrics
from sedac.control.base.settings import ControlSettings
from sedac.errors import ConfigError


def check_exposure(settings: ControlSettings) -> None:
    """Refuse settings that contradict each other, or that would let strangers in.

    Raises:
        ConfigError: with the remedy.
    """
    tls = settings.tls_cert is not None
    if tls != (settings.tls_key is not None):
        raise ConfigError(f"SEDAC_CONTROL_TLS_{'KEY' if tls else 'CERT'} is missing; a certificate and its key go together")
    if settings.tls_client_ca and not tls:
        raise ConfigError("SEDAC_CONTROL_TLS_CLIENT_CA needs SEDAC_CONTROL_TLS_CERT and SEDAC_CONTROL_TLS_KEY; set them, or leave it out")
    if is_loopback(settings.host):
        return
    where = f"SEDAC_CONTROL_HOST={settings.host} is not loopback"
    if settings.principals and not tls:
        raise ConfigError(f"{where} and tokens would travel in the clear; set SEDAC_CONTROL_TLS_CERT and _TLS_KEY, or listen on 127.0.0.1")
    if settings.insecure:
        return
    remedy = "listen on 127.0.0.1, or set SEDAC_CONTROL_INSECURE=1 where something else fences the network"
    if not tls:
        raise ConfigError(f"{where} and there is no TLS; set SEDAC_CONTROL_TLS_CERT and _TLS_KEY, {remedy}")
    if not (settings.principals or settings.tls_client_ca):
        raise ConfigError(f"{where} and anybody could change the policy; set SEDAC_CONTROL_PRINCIPALS or SEDAC_CONTROL_TLS_CLIENT_CA, {remedy}")


class ServerCertificate:
    """The certificate that connections are made with."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None, metrics: ControlMetrics) -> None:
        """Read the files for the first time.

        Raises:
            ConfigError: they can't be read, or do not belong together.
        """
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._files = Reloading("certificate", [path for path in (cert, key, client_ca) if path], self._read, metrics)
        self._given = self._files.value

    @classmethod
    def read(cls, settings: ControlSettings, metrics: ControlMetrics) -> ServerCertificate | None:
        """Read what the settings name; None without TLS.

        Raises:
            ConfigError: the files can't be read, or do not belong together.
        """
        if settings.tls_cert is None or settings.tls_key is None:
            return None
        return cls(settings.tls_cert, settings.tls_key, settings.tls_client_ca, metrics)

    def make_credentials(self) -> grpc.ServerCredentials:
        """Return credentials for a port, which follow the files."""
        return grpc.dynamic_ssl_server_credentials(self._given, self._fetch, require_client_authentication=self._client_ca is not None)

    def refresh(self) -> None:
        """Read the files again where they changed, so that a broken change is told of before somebody connects."""
        self._files.refresh()

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new pair where there is one; gRPC calls it from its own threads before every handshake."""
        self._files.refresh()
        newest = self._files.value
        if newest is self._given:
            return None
        self._given = newest
        return newest

    def _read(self) -> grpc.ServerCertificateConfiguration:
        cert, key = _read("TLS_CERT", self._cert), _read("TLS_KEY", self._key)
        client_ca = _read("TLS_CLIENT_CA", self._client_ca) if self._client_ca else None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._cert, self._key, password=lambda: b"")  # never asks for a passphrase
        except (ssl.SSLError, OSError, ValueError):
            raise ConfigError(
                f"SEDAC_CONTROL_TLS_CERT {self._cert} and SEDAC_CONTROL_TLS_KEY {self._key} are not a PEM certificate and its unencrypted key"
            ) from None
        try:
            if client_ca is not None:
                context.load_verify_locations(cadata=client_ca.decode("ascii"))
        except (ssl.SSLError, ValueError):
            raise ConfigError(f"SEDAC_CONTROL_TLS_CLIENT_CA {self._client_ca} holds no PEM certificate; name the file of the authority") from None
        return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"SEDAC_CONTROL_{name} {path} can't be read: {error.strerror}; name a readable PEM file") from None
