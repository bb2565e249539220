import datetime

from google.protobuf import field_mask_pb2 as _field_mask_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_DECODE: _ClassVar[Phase]
    PHASE_ALL: _ClassVar[Phase]

class Scope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCOPE_UNSPECIFIED: _ClassVar[Scope]
    SCOPE_TOKEN: _ClassVar[Scope]
    SCOPE_BATCH: _ClassVar[Scope]

class Rule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RULE_UNSPECIFIED: _ClassVar[Rule]
    RULE_FIRST: _ClassVar[Rule]
    RULE_ACCUMULATE: _ClassVar[Rule]
    RULE_SINGLE: _ClassVar[Rule]

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
PHASE_UNSPECIFIED: Phase
PHASE_DECODE: Phase
PHASE_ALL: Phase
SCOPE_UNSPECIFIED: Scope
SCOPE_TOKEN: Scope
SCOPE_BATCH: Scope
RULE_UNSPECIFIED: Rule
RULE_FIRST: Rule
RULE_ACCUMULATE: Rule
RULE_SINGLE: Rule
CERTIFICATION_UNSPECIFIED: Certification
CERTIFICATION_UNCERTIFIED: Certification
CERTIFICATION_CERTIFIED: Certification
ENGINE_STATE_UNSPECIFIED: EngineState
ENGINE_STATE_PENDING: EngineState
ENGINE_STATE_SYNCED: EngineState
ENGINE_STATE_NACKED: EngineState
ENGINE_STATE_STALE: EngineState

class Checkpoint(_message.Message):
    __slots__ = ("layer", "threshold", "weight", "target")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    layer: int
    threshold: float
    weight: float
    target: float
    def __init__(self, layer: _Optional[int] = ..., threshold: _Optional[float] = ..., weight: _Optional[float] = ..., target: _Optional[float] = ...) -> None: ...

class Tier(_message.Message):
    __slots__ = ("name", "floor", "level", "threshold_scale", "soft_exit")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_SCALE_FIELD_NUMBER: _ClassVar[int]
    SOFT_EXIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    floor: str
    level: str
    threshold_scale: float
    soft_exit: bool
    def __init__(self, name: _Optional[str] = ..., floor: _Optional[str] = ..., level: _Optional[str] = ..., threshold_scale: _Optional[float] = ..., soft_exit: _Optional[bool] = ...) -> None: ...

class Adaptation(_message.Message):
    __slots__ = ("enabled", "frozen", "target_exit_rates", "alpha", "warmup_steps", "window_tokens", "min_threshold", "max_threshold", "generation")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    TARGET_EXIT_RATES_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    MAX_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    frozen: bool
    target_exit_rates: _containers.RepeatedScalarFieldContainer[float]
    alpha: float
    warmup_steps: int
    window_tokens: int
    min_threshold: float
    max_threshold: float
    generation: int
    def __init__(self, enabled: _Optional[bool] = ..., frozen: _Optional[bool] = ..., target_exit_rates: _Optional[_Iterable[float]] = ..., alpha: _Optional[float] = ..., warmup_steps: _Optional[int] = ..., window_tokens: _Optional[int] = ..., min_threshold: _Optional[float] = ..., max_threshold: _Optional[float] = ..., generation: _Optional[int] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("tier", "model", "weights_sha256", "probe_set_sha256", "knobs_sha256", "engine", "loss", "eps", "delta", "procedure", "num_requests", "mean_loss", "upper_limit", "data_sha256", "date")
    TIER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    PROBE_SET_SHA256_FIELD_NUMBER: _ClassVar[int]
    KNOBS_SHA256_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    PROCEDURE_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MEAN_LOSS_FIELD_NUMBER: _ClassVar[int]
    UPPER_LIMIT_FIELD_NUMBER: _ClassVar[int]
    DATA_SHA256_FIELD_NUMBER: _ClassVar[int]
    DATE_FIELD_NUMBER: _ClassVar[int]
    tier: str
    model: str
    weights_sha256: str
    probe_set_sha256: str
    knobs_sha256: str
    engine: str
    loss: str
    eps: float
    delta: float
    procedure: str
    num_requests: int
    mean_loss: float
    upper_limit: float
    data_sha256: str
    date: str
    def __init__(self, tier: _Optional[str] = ..., model: _Optional[str] = ..., weights_sha256: _Optional[str] = ..., probe_set_sha256: _Optional[str] = ..., knobs_sha256: _Optional[str] = ..., engine: _Optional[str] = ..., loss: _Optional[str] = ..., eps: _Optional[float] = ..., delta: _Optional[float] = ..., procedure: _Optional[str] = ..., num_requests: _Optional[int] = ..., mean_loss: _Optional[float] = ..., upper_limit: _Optional[float] = ..., data_sha256: _Optional[str] = ..., date: _Optional[str] = ...) -> None: ...

class Policy(_message.Message):
    __slots__ = ("name", "etag", "revision", "revision_create_time", "author", "comment", "enabled", "probe_set", "checkpoints", "phase", "scope", "rule", "decay", "sensitivity", "tiers", "default_tier", "allow_overrides", "adaptation", "certificate")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    REVISION_CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    PROBE_SET_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    DECAY_FIELD_NUMBER: _ClassVar[int]
    SENSITIVITY_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_TIER_FIELD_NUMBER: _ClassVar[int]
    ALLOW_OVERRIDES_FIELD_NUMBER: _ClassVar[int]
    ADAPTATION_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    etag: str
    revision: int
    revision_create_time: _timestamp_pb2.Timestamp
    author: str
    comment: str
    enabled: bool
    probe_set: str
    checkpoints: _containers.RepeatedCompositeFieldContainer[Checkpoint]
    phase: Phase
    scope: Scope
    rule: Rule
    decay: float
    sensitivity: float
    tiers: _containers.RepeatedCompositeFieldContainer[Tier]
    default_tier: str
    allow_overrides: bool
    adaptation: Adaptation
    certificate: Certificate
    def __init__(self, name: _Optional[str] = ..., etag: _Optional[str] = ..., revision: _Optional[int] = ..., revision_create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., author: _Optional[str] = ..., comment: _Optional[str] = ..., enabled: _Optional[bool] = ..., probe_set: _Optional[str] = ..., checkpoints: _Optional[_Iterable[_Union[Checkpoint, _Mapping]]] = ..., phase: _Optional[_Union[Phase, str]] = ..., scope: _Optional[_Union[Scope, str]] = ..., rule: _Optional[_Union[Rule, str]] = ..., decay: _Optional[float] = ..., sensitivity: _Optional[float] = ..., tiers: _Optional[_Iterable[_Union[Tier, _Mapping]]] = ..., default_tier: _Optional[str] = ..., allow_overrides: _Optional[bool] = ..., adaptation: _Optional[_Union[Adaptation, _Mapping]] = ..., certificate: _Optional[_Union[Certificate, _Mapping]] = ...) -> None: ...

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
    policy: Policy
    update_mask: _field_mask_pb2.FieldMask
    validate_only: bool
    request_id: str
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ..., update_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ..., validate_only: _Optional[bool] = ..., request_id: _Optional[str] = ...) -> None: ...

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
    policies: _containers.RepeatedCompositeFieldContainer[Policy]
    next_page_token: str
    def __init__(self, policies: _Optional[_Iterable[_Union[Policy, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

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

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ("interval_seconds",)
    INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    interval_seconds: float
    def __init__(self, interval_seconds: _Optional[float] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("policy", "engines", "certification")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATION_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    engines: _containers.RepeatedCompositeFieldContainer[EngineStatus]
    certification: Certification
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ..., engines: _Optional[_Iterable[_Union[EngineStatus, _Mapping]]] = ..., certification: _Optional[_Union[Certification, str]] = ...) -> None: ...

class EngineStatus(_message.Message):
    __slots__ = ("engine", "state", "desired_revision", "active_revision", "error", "last_seen_time", "report")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DESIRED_REVISION_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REVISION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_TIME_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    engine: EngineHello
    state: EngineState
    desired_revision: int
    active_revision: int
    error: _status_pb2.Status
    last_seen_time: _timestamp_pb2.Timestamp
    report: EngineReport
    def __init__(self, engine: _Optional[_Union[EngineHello, _Mapping]] = ..., state: _Optional[_Union[EngineState, str]] = ..., desired_revision: _Optional[int] = ..., active_revision: _Optional[int] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., last_seen_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., report: _Optional[_Union[EngineReport, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("engine_id", "model", "vllm_version", "sedac_version", "num_layers", "hidden_size", "checkpoint_layers", "probe_set", "probe_set_sha256", "num_workers", "active_revision", "initial_policy", "levels", "weights_sha256")
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
    initial_policy: Policy
    levels: _containers.RepeatedScalarFieldContainer[str]
    weights_sha256: str
    def __init__(self, engine_id: _Optional[str] = ..., model: _Optional[str] = ..., vllm_version: _Optional[str] = ..., sedac_version: _Optional[str] = ..., num_layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., checkpoint_layers: _Optional[_Iterable[int]] = ..., probe_set: _Optional[str] = ..., probe_set_sha256: _Optional[str] = ..., num_workers: _Optional[int] = ..., active_revision: _Optional[int] = ..., initial_policy: _Optional[_Union[Policy, _Mapping]] = ..., levels: _Optional[_Iterable[str]] = ..., weights_sha256: _Optional[str] = ...) -> None: ...

class PolicyAnswer(_message.Message):
    __slots__ = ("nonce", "revision", "error", "apply_seconds")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    APPLY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    nonce: str
    revision: int
    error: _status_pb2.Status
    apply_seconds: float
    def __init__(self, nonce: _Optional[str] = ..., revision: _Optional[int] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., apply_seconds: _Optional[float] = ...) -> None: ...

class EngineReport(_message.Message):
    __slots__ = ("active_revision", "num_steps", "num_tokens", "num_decode_tokens", "checkpoints", "num_torn_steps", "num_mlp_blocks_computed", "num_mlp_blocks_skipped", "tiers", "num_adaptations")
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
    def __init__(self, active_revision: _Optional[int] = ..., num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_decode_tokens: _Optional[int] = ..., checkpoints: _Optional[_Iterable[_Union[CheckpointReport, _Mapping]]] = ..., num_torn_steps: _Optional[int] = ..., num_mlp_blocks_computed: _Optional[float] = ..., num_mlp_blocks_skipped: _Optional[float] = ..., tiers: _Optional[_Iterable[_Union[TierReport, _Mapping]]] = ..., num_adaptations: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("nonce", "policy")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    nonce: str
    policy: Policy
    def __init__(self, nonce: _Optional[str] = ..., policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...
