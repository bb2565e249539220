import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
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

class GuardAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GUARD_ACTION_UNSPECIFIED: _ClassVar[GuardAction]
    GUARD_ACTION_ROLLBACK: _ClassVar[GuardAction]
    GUARD_ACTION_EXACT: _ClassVar[GuardAction]
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
GUARD_ACTION_UNSPECIFIED: GuardAction
GUARD_ACTION_ROLLBACK: GuardAction
GUARD_ACTION_EXACT: GuardAction

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

class Audit(_message.Message):
    __slots__ = ("share", "max_mismatch", "max_nll_difference", "confidence", "action")
    SHARE_FIELD_NUMBER: _ClassVar[int]
    MAX_MISMATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_NLL_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    share: float
    max_mismatch: float
    max_nll_difference: float
    confidence: float
    action: GuardAction
    def __init__(self, share: _Optional[float] = ..., max_mismatch: _Optional[float] = ..., max_nll_difference: _Optional[float] = ..., confidence: _Optional[float] = ..., action: _Optional[_Union[GuardAction, str]] = ...) -> None: ...

class Speculation(_message.Message):
    __slots__ = ("enabled", "max_tokens", "min_confidence", "adaptive", "tiers")
    ENABLED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    ADAPTIVE_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    enabled: bool
    max_tokens: int
    min_confidence: float
    adaptive: bool
    tiers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, enabled: _Optional[bool] = ..., max_tokens: _Optional[int] = ..., min_confidence: _Optional[float] = ..., adaptive: _Optional[bool] = ..., tiers: _Optional[_Iterable[str]] = ...) -> None: ...

class Policy(_message.Message):
    __slots__ = ("name", "etag", "revision", "revision_create_time", "author", "comment", "enabled", "probe_set", "checkpoints", "phase", "scope", "rule", "decay", "sensitivity", "tiers", "default_tier", "allow_overrides", "adaptation", "certificate", "audit", "speculation", "strict")
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
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    STRICT_FIELD_NUMBER: _ClassVar[int]
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
    audit: Audit
    speculation: Speculation
    strict: bool
    def __init__(self, name: _Optional[str] = ..., etag: _Optional[str] = ..., revision: _Optional[int] = ..., revision_create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., author: _Optional[str] = ..., comment: _Optional[str] = ..., enabled: _Optional[bool] = ..., probe_set: _Optional[str] = ..., checkpoints: _Optional[_Iterable[_Union[Checkpoint, _Mapping]]] = ..., phase: _Optional[_Union[Phase, str]] = ..., scope: _Optional[_Union[Scope, str]] = ..., rule: _Optional[_Union[Rule, str]] = ..., decay: _Optional[float] = ..., sensitivity: _Optional[float] = ..., tiers: _Optional[_Iterable[_Union[Tier, _Mapping]]] = ..., default_tier: _Optional[str] = ..., allow_overrides: _Optional[bool] = ..., adaptation: _Optional[_Union[Adaptation, _Mapping]] = ..., certificate: _Optional[_Union[Certificate, _Mapping]] = ..., audit: _Optional[_Union[Audit, _Mapping]] = ..., speculation: _Optional[_Union[Speculation, _Mapping]] = ..., strict: _Optional[bool] = ...) -> None: ...
