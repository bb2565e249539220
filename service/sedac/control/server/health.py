"""Asks the control service of this machine whether it serves: `python -m sedac.control.server.health`, for container health checks.

It connects to SEDAC_CONTROL_PORT on loopback and needs no token. Where the service speaks TLS, SEDAC_CONTROL_CA (default: the
service's own certificate) and SEDAC_CONTROL_SERVER_NAME tell what to expect; where it asks for certificates, SEDAC_CONTROL_CLIENT_CERT
and _CLIENT_KEY are shown.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sedac.contract.credentials import read_credentials
from sedac.control.base.settings import ControlSettings
from sedac.errors import ConfigError, ControlUnavailable, SedacError

_TIMEOUT_SECONDS = 5.0


def check_health(settings: ControlSettings) -> None:
    """Return where the service of these settings serves.

    Raises:
        ConfigError: the credentials can't be read.
        ControlUnavailable: it does not serve, or not to us.
    """
    credentials = read_credentials()
    if settings.tls_cert and not credentials.is_tls:
        credentials = read_credentials(tls=True, ca=credentials.ca or settings.tls_cert)
    if not settings.port:
        raise ConfigError("SEDAC_CONTROL_PORT is 0, so nobody knows the port; set it")
    address = f"{'[::1]' if settings.host in ('::', '::1') else '127.0.0.1'}:{settings.port}"
    with credentials.open_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise ControlUnavailable(f"the control service on {address} does not answer ({error.code().name}: {error.details()})") from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise ControlUnavailable(f"the control service on {address} does not serve; it is starting or stopping")


if __name__ == "__main__":
    try:
        check_health(ControlSettings())
    except SedacError as error:
        sys.exit(f"sedac: {error}")
