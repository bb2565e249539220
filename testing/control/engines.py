"""An engine that speaks the real protocol and answers as it is told."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence

import grpc
from sedac.contract import wire
from sedac.contract.v1 import control_pb2, control_pb2_grpc
from sedac.policy.model import Checkpoint, Policy

FIRST = Policy(enabled=True, checkpoints=(Checkpoint(layer=2, threshold=0.5), Checkpoint(layer=5, threshold=0.25)))
"""the policy that engines bring where nobody says otherwise"""


class FakeEngine:
    """An engine on the discovery stream that answers as it is told; everything but the engine is real."""

    def __init__(
        self,
        address: str,
        engine_id: str = "e1",
        *,
        answer: bool = True,
        initial: Policy | None = FIRST,
        layers: Sequence[int] = (2, 5, 8),
        levels: Sequence[str] = (),
        weights: str = "1" * 64,
        max_rank: int = 4,
        levels_sha256: str = "",
        draft: str = "",
        max_draft_tokens: int = 0,
        version: str = "",
        capabilities: Sequence[str] = (),
        hello: control_pb2.EngineHello | None = None,
    ) -> None:
        """Connect; `hello` holds what is sent beside the rest, as it is."""
        beside = hello
        self._outbox: queue.Queue[control_pb2.EngineMessage | None] = queue.Queue()
        self.pushes: queue.Queue[control_pb2.PolicyPush] = queue.Queue()
        self.error: grpc.RpcError | None = None
        self.refuse: str = ""
        self.answers = answer
        self._channel = grpc.insecure_channel(address)
        hello = control_pb2.EngineHello(engine_id=engine_id, model="m", num_layers=12, hidden_size=8, checkpoint_layers=layers, probe_set="demo")
        hello.levels.extend(levels)
        hello.weights_sha256, hello.probe_set_sha256 = weights, "2" * 64
        hello.max_rank, hello.levels_sha256 = max_rank, levels_sha256
        hello.draft, hello.max_draft_tokens = draft, max_draft_tokens
        hello.sedac_version = version
        hello.capabilities.extend(capabilities)
        if beside is not None:
            hello.MergeFrom(beside)
        if initial is not None:
            hello.initial_policy.CopyFrom(wire.policy_to_proto(initial))
        self.send(control_pb2.EngineMessage(hello=hello))
        self._call = control_pb2_grpc.DiscoveryStub(self._channel).Follow(iter(self._outbox.get, None))
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def send(self, message: control_pb2.EngineMessage) -> None:
        self._outbox.put(message)

    def answer(self, push: control_pb2.PolicyPush) -> None:
        answer = control_pb2.PolicyAnswer(nonce=push.nonce, revision=push.policy.revision, rollout=push.candidate.rollout)
        if self.refuse:
            answer.error.code, answer.error.message, answer.revision = 3, self.refuse, push.policy.revision - 1
        self.send(control_pb2.EngineMessage(answer=answer))

    def _follow(self) -> None:
        try:
            for push in self._call:
                self.pushes.put(push)
                if self.answers:
                    self.answer(push)
        except grpc.RpcError as error:
            self.error = error

    def wait_for_end(self) -> grpc.RpcError | None:
        """Return how the stream ended; None: in peace."""
        self._thread.join(5)
        assert not self._thread.is_alive(), "the stream has not ended"
        return self.error

    def close(self) -> None:
        self._call.cancel()
        self._outbox.put(None)
        self._thread.join(5)
        self._channel.close()
