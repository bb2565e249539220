"""The typed Python client of the control service, which `sedac ctl` (sedac/ctl) is built on.

    from sedac.client import ControlClient

    with ControlClient("127.0.0.1:50051") as client:
        made = client.rollback(3, comment="back to what worked")
        client.wait_until_synced(made.revision, timeout_seconds=5)

    from sedac.client import AsyncControlClient

    async with AsyncControlClient("control.internal:50051") as client:
        async for policy in client.watch_policy(from_revision=8):
            print(policy.revision, policy.author, policy.comment)

Both have the same methods and read SEDAC_CONTROL_TLS and its kin (sedac.contract.credentials) unless `credentials` are given. Answers are the
contract's messages; `sedac.contract.wire.policy_from_proto` makes a `sedac.policy.model.Policy` of one. Errors are those of `sedac.errors`.
"""

from sedac.client.aio import AsyncControlClient
from sedac.client.client import ControlClient
from sedac.client.connection import DEFAULT_ADDRESS
from sedac.client.diff import Change, find_policy_changes
from sedac.contract.credentials import Credentials, read_credentials

__all__ = ["DEFAULT_ADDRESS", "AsyncControlClient", "Change", "ControlClient", "Credentials", "find_policy_changes", "read_credentials"]
