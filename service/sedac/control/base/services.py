"""The services of the contract, for whoever must know all of them: reflection, health, metrics, access rules."""

from __future__ import annotations

from google.protobuf.descriptor import ServiceDescriptor

from sedac.contract.v1 import audit_log_pb2, control_pb2, probe_sets_pb2, rollouts_pb2

SERVICES: tuple[ServiceDescriptor, ...] = tuple(
    service for module in (control_pb2, probe_sets_pb2, rollouts_pb2, audit_log_pb2) for service in module.DESCRIPTOR.services_by_name.values()
)
