import datetime

from google.protobuf import field_mask_pb2 as _field_mask_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from sedac.contract.v1 import drafting_pb2 as _drafting_pb2
from sedac.contract.v1 import evidence_pb2 as _evidence_pb2
from sedac.contract.v1 import policy_pb2 as _policy_pb2
from sedac.contract.v1 import rollouts_pb2 as _rollouts_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union
from sedac.contract.v1.policy_pb2 import Checkpoint as Checkpoint
from sedac.contract.v1.policy_pb2 import Tier as Tier
from sedac.contract.v1.policy_pb2 import Adaptation as Adaptation
from sedac.contract.v1.policy_pb2 import Certificate as Certificate
from sedac.contract.v1.policy_pb2 import Audit as Audit
from sedac.contract.v1.policy_pb2 import Speculation as Speculation
from sedac.contract.v1.policy_pb2 import Policy as Policy
from sedac.contract.v1.policy_pb2 import Phase as Phase
from sedac.contract.v1.policy_pb2 import Scope as Scope
from sedac.contract.v1.policy_pb2 import Rule as Rule
from sedac.contract.v1.policy_pb2 import GuardAction as GuardAction

DESCRIPTOR: _descriptor.FileDescriptor
PHASE_UNSPECIFIED: _policy_pb2.Phase
PHASE_DECODE: _policy_pb2.Phase
PHASE_ALL: _policy_pb2.Phase
SCOPE_UNSPECIFIED: _policy_pb2.Scope
SCOPE_TOKEN: _policy_pb2.Scope
SCOPE_BATCH: _policy_pb2.Scope
RULE_UNSPECIFIED: _policy_pb2.Rule
RULE_FIRST: _policy_pb2.Rule
RULE_ACCUMULATE: _policy_pb2.Rule
RULE_SINGLE: _policy_pb2.Rule
GUARD_ACTION_UNSPECIFIED: _policy_pb2.GuardAction
GUARD_ACTION_ROLLBACK: _policy_pb2.GuardAction
GUARD_ACTION_EXACT: _policy_pb2.GuardAction

class Certification(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CERTIFICATION_UNSPECIFIED: _ClassVar[Certification]
    CERTIFICATION_UNCERTIFIED: _ClassVar[Certification]
    CERTIFICATION_CERTIFIED: _ClassVar[Certification]

class EngineState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_STATE_UNSPECIFIED: _ClassVar[EngineState]
    ENGINE_STATE_PENDING: _ClassVar[EngineState]
    ENGINE_STATE_SYNCED: _ClassVar[EngineState]
    ENGINE_STATE_NACKED: _ClassVar[EngineState]
    ENGINE_STATE_STALE: _ClassVar[EngineState]
CERTIFICATION_UNSPECIFIED: Certification
CERTIFICATION_UNCERTIFIED: Certification
CERTIFICATION_CERTIFIED: Certification
ENGINE_STATE_UNSPECIFIED: EngineState
ENGINE_STATE_PENDING: EngineState
ENGINE_STATE_SYNCED: EngineState
ENGINE_STATE_NACKED: EngineState
ENGINE_STATE_STALE: EngineState

class GetPolicyRequest(_message.Message):
    __slots__ = ("name", "revision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: int
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[int] = ...) -> None: ...

class UpdatePolicyRequest(_message.Message):
    __slots__ = ("policy", "update_mask", "validate_only", "request_id")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    UPDATE_MASK_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_ONLY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    policy: _policy_pb2.Policy
    update_mask: _field_mask_pb2.FieldMask
    validate_only: bool
    request_id: str
    def __init__(self, policy: _Optional[_Union[_policy_pb2.Policy, _Mapping]] = ..., update_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ..., validate_only: _Optional[bool] = ..., request_id: _Optional[str] = ...) -> None: ...

class ListPolicyRevisionsRequest(_message.Message):
    __slots__ = ("name", "page_size", "page_token")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    page_size: int
    page_token: str
    def __init__(self, name: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListPolicyRevisionsResponse(_message.Message):
    __slots__ = ("policies", "next_page_token")
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[_policy_pb2.Policy]
    next_page_token: str
    def __init__(self, policies: _Optional[_Iterable[_Union[_policy_pb2.Policy, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class RollbackPolicyRequest(_message.Message):
    __slots__ = ("name", "revision", "comment", "etag", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: int
    comment: str
    etag: str
    request_id: str
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[int] = ..., comment: _Optional[str] = ..., etag: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class WatchPolicyRequest(_message.Message):
    __slots__ = ("name", "from_revision")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FROM_REVISION_FIELD_NUMBER: _ClassVar[int]
    name: str
    from_revision: int
    def __init__(self, name: _Optional[str] = ..., from_revision: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ("interval_seconds",)
    INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    interval_seconds: float
    def __init__(self, interval_seconds: _Optional[float] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("policy", "engines", "certification", "rollout", "evidence", "guard", "version", "capabilities")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATION_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    GUARD_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    policy: _policy_pb2.Policy
    engines: _containers.RepeatedCompositeFieldContainer[EngineStatus]
    certification: Certification
    rollout: _rollouts_pb2.Rollout
    evidence: _containers.RepeatedCompositeFieldContainer[_evidence_pb2.TierEvidence]
    guard: Guard
    version: str
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, policy: _Optional[_Union[_policy_pb2.Policy, _Mapping]] = ..., engines: _Optional[_Iterable[_Union[EngineStatus, _Mapping]]] = ..., certification: _Optional[_Union[Certification, str]] = ..., rollout: _Optional[_Union[_rollouts_pb2.Rollout, _Mapping]] = ..., evidence: _Optional[_Iterable[_Union[_evidence_pb2.TierEvidence, _Mapping]]] = ..., guard: _Optional[_Union[Guard, _Mapping]] = ..., version: _Optional[str] = ..., capabilities: _Optional[_Iterable[str]] = ...) -> None: ...

class Guard(_message.Message):
    __slots__ = ("act_time", "refused_revision", "revision", "reason")
    ACT_TIME_FIELD_NUMBER: _ClassVar[int]
    REFUSED_REVISION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    act_time: _timestamp_pb2.Timestamp
    refused_revision: int
    revision: int
    reason: str
    def __init__(self, act_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., refused_revision: _Optional[int] = ..., revision: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ListEnginesRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListEnginesResponse(_message.Message):
    __slots__ = ("engines", "next_page_token")
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[EngineStatus]
    next_page_token: str
    def __init__(self, engines: _Optional[_Iterable[_Union[EngineStatus, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchEnginesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchEnginesResponse(_message.Message):
    __slots__ = ("engines", "forgotten_engine_ids")
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_ENGINE_IDS_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[EngineStatus]
    forgotten_engine_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, engines: _Optional[_Iterable[_Union[EngineStatus, _Mapping]]] = ..., forgotten_engine_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class EngineStatus(_message.Message):
    __slots__ = ("engine", "state", "desired_revision", "active_revision", "error", "last_seen_time", "report", "active_rollout")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DESIRED_REVISION_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REVISION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_TIME_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    engine: EngineHello
    state: EngineState
    desired_revision: int
    active_revision: int
    error: _status_pb2.Status
    last_seen_time: _timestamp_pb2.Timestamp
    report: EngineReport
    active_rollout: int
    def __init__(self, engine: _Optional[_Union[EngineHello, _Mapping]] = ..., state: _Optional[_Union[EngineState, str]] = ..., desired_revision: _Optional[int] = ..., active_revision: _Optional[int] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., last_seen_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., report: _Optional[_Union[EngineReport, _Mapping]] = ..., active_rollout: _Optional[int] = ...) -> None: ...

class EngineMessage(_message.Message):
    __slots__ = ("hello", "answer", "report")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    hello: EngineHello
    answer: PolicyAnswer
    report: EngineReport
    def __init__(self, hello: _Optional[_Union[EngineHello, _Mapping]] = ..., answer: _Optional[_Union[PolicyAnswer, _Mapping]] = ..., report: _Optional[_Union[EngineReport, _Mapping]] = ...) -> None: ...

class EngineHello(_message.Message):
    __slots__ = ("engine_id", "model", "vllm_version", "sedac_version", "num_layers", "hidden_size", "checkpoint_layers", "probe_set", "probe_set_sha256", "num_workers", "active_revision", "initial_policy", "levels", "weights_sha256", "max_rank", "levels_sha256", "data_parallel_size", "draft", "max_draft_tokens", "capabilities")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    SEDAC_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_LAYERS_FIELD_NUMBER: _ClassVar[int]
    PROBE_SET_FIELD_NUMBER: _ClassVar[int]
    PROBE_SET_SHA256_FIELD_NUMBER: _ClassVar[int]
    NUM_WORKERS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REVISION_FIELD_NUMBER: _ClassVar[int]
    INITIAL_POLICY_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    LEVELS_SHA256_FIELD_NUMBER: _ClassVar[int]
    DATA_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    model: str
    vllm_version: str
    sedac_version: str
    num_layers: int
    hidden_size: int
    checkpoint_layers: _containers.RepeatedScalarFieldContainer[int]
    probe_set: str
    probe_set_sha256: str
    num_workers: int
    active_revision: int
    initial_policy: _policy_pb2.Policy
    levels: _containers.RepeatedScalarFieldContainer[str]
    weights_sha256: str
    max_rank: int
    levels_sha256: str
    data_parallel_size: int
    draft: str
    max_draft_tokens: int
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, engine_id: _Optional[str] = ..., model: _Optional[str] = ..., vllm_version: _Optional[str] = ..., sedac_version: _Optional[str] = ..., num_layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., checkpoint_layers: _Optional[_Iterable[int]] = ..., probe_set: _Optional[str] = ..., probe_set_sha256: _Optional[str] = ..., num_workers: _Optional[int] = ..., active_revision: _Optional[int] = ..., initial_policy: _Optional[_Union[_policy_pb2.Policy, _Mapping]] = ..., levels: _Optional[_Iterable[str]] = ..., weights_sha256: _Optional[str] = ..., max_rank: _Optional[int] = ..., levels_sha256: _Optional[str] = ..., data_parallel_size: _Optional[int] = ..., draft: _Optional[str] = ..., max_draft_tokens: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ...) -> None: ...

class PolicyAnswer(_message.Message):
    __slots__ = ("nonce", "revision", "error", "apply_seconds", "rollout")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    APPLY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    nonce: str
    revision: int
    error: _status_pb2.Status
    apply_seconds: float
    rollout: int
    def __init__(self, nonce: _Optional[str] = ..., revision: _Optional[int] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., apply_seconds: _Optional[float] = ..., rollout: _Optional[int] = ...) -> None: ...

class EngineReport(_message.Message):
    __slots__ = ("active_revision", "num_steps", "num_tokens", "num_decode_tokens", "checkpoints", "num_torn_steps", "num_mlp_blocks_computed", "num_mlp_blocks_skipped", "tiers", "num_adaptations", "evidence", "active_rollout", "ranks", "drafting")
    ACTIVE_REVISION_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    NUM_TORN_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_MLP_BLOCKS_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    NUM_MLP_BLOCKS_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    NUM_ADAPTATIONS_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    DRAFTING_FIELD_NUMBER: _ClassVar[int]
    active_revision: int
    num_steps: int
    num_tokens: int
    num_decode_tokens: int
    checkpoints: _containers.RepeatedCompositeFieldContainer[CheckpointReport]
    num_torn_steps: int
    num_mlp_blocks_computed: float
    num_mlp_blocks_skipped: float
    tiers: _containers.RepeatedCompositeFieldContainer[TierReport]
    num_adaptations: int
    evidence: _containers.RepeatedCompositeFieldContainer[_evidence_pb2.Evidence]
    active_rollout: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankReport]
    drafting: _drafting_pb2.Drafting
    def __init__(self, active_revision: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_decode_tokens: _Optional[int] = ..., checkpoints: _Optional[_Iterable[_Union[CheckpointReport, _Mapping]]] = ..., num_torn_steps: _Optional[int] = ..., num_mlp_blocks_computed: _Optional[float] = ..., num_mlp_blocks_skipped: _Optional[float] = ..., tiers: _Optional[_Iterable[_Union[TierReport, _Mapping]]] = ..., num_adaptations: _Optional[int] = ..., evidence: _Optional[_Iterable[_Union[_evidence_pb2.Evidence, _Mapping]]] = ..., active_rollout: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankReport, _Mapping]]] = ..., drafting: _Optional[_Union[_drafting_pb2.Drafting, _Mapping]] = ...) -> None: ...

class RankReport(_message.Message):
    __slots__ = ("rank", "active_revision", "num_steps")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REVISION_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    active_revision: int
    num_steps: int
    def __init__(self, rank: _Optional[int] = ..., active_revision: _Optional[int] = ..., num_steps: _Optional[int] = ...) -> None: ...

class CheckpointReport(_message.Message):
    __slots__ = ("layer", "num_evaluated", "num_exited", "threshold", "exit_rate")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_EVALUATED_FIELD_NUMBER: _ClassVar[int]
    NUM_EXITED_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    EXIT_RATE_FIELD_NUMBER: _ClassVar[int]
    layer: int
    num_evaluated: int
    num_exited: int
    threshold: float
    exit_rate: float
    def __init__(self, layer: _Optional[int] = ..., num_evaluated: _Optional[int] = ..., num_exited: _Optional[int] = ..., threshold: _Optional[float] = ..., exit_rate: _Optional[float] = ...) -> None: ...

class TierReport(_message.Message):
    __slots__ = ("name", "num_tokens", "num_exited", "num_mlp_blocks_computed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXITED_FIELD_NUMBER: _ClassVar[int]
    NUM_MLP_BLOCKS_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_tokens: int
    num_exited: int
    num_mlp_blocks_computed: float
    def __init__(self, name: _Optional[str] = ..., num_tokens: _Optional[int] = ..., num_exited: _Optional[int] = ..., num_mlp_blocks_computed: _Optional[float] = ...) -> None: ...

class PolicyPush(_message.Message):
    __slots__ = ("nonce", "policy", "candidate", "probe_sets", "version", "capabilities")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_FIELD_NUMBER: _ClassVar[int]
    PROBE_SETS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    nonce: str
    policy: _policy_pb2.Policy
    candidate: Candidate
    probe_sets: _containers.RepeatedCompositeFieldContainer[ProbeSetReference]
    version: str
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, nonce: _Optional[str] = ..., policy: _Optional[_Union[_policy_pb2.Policy, _Mapping]] = ..., candidate: _Optional[_Union[Candidate, _Mapping]] = ..., probe_sets: _Optional[_Iterable[_Union[ProbeSetReference, _Mapping]]] = ..., version: _Optional[str] = ..., capabilities: _Optional[_Iterable[str]] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("rollout", "policy", "share")
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    rollout: int
    policy: _policy_pb2.Policy
    share: float
    def __init__(self, rollout: _Optional[int] = ..., policy: _Optional[_Union[_policy_pb2.Policy, _Mapping]] = ..., share: _Optional[float] = ...) -> None: ...

class ProbeSetReference(_message.Message):
    __slots__ = ("name", "sha256", "size_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    size_bytes: int
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...
