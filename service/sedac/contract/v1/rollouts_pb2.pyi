import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from sedac.contract.v1 import evidence_pb2 as _evidence_pb2
from sedac.contract.v1 import policy_pb2 as _policy_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RolloutState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLLOUT_STATE_UNSPECIFIED: _ClassVar[RolloutState]
    ROLLOUT_STATE_PROGRESSING: _ClassVar[RolloutState]
    ROLLOUT_STATE_PAUSED: _ClassVar[RolloutState]
    ROLLOUT_STATE_PROMOTED: _ClassVar[RolloutState]
    ROLLOUT_STATE_ABORTED: _ClassVar[RolloutState]
ROLLOUT_STATE_UNSPECIFIED: RolloutState
ROLLOUT_STATE_PROGRESSING: RolloutState
ROLLOUT_STATE_PAUSED: RolloutState
ROLLOUT_STATE_PROMOTED: RolloutState
ROLLOUT_STATE_ABORTED: RolloutState

class RolloutBounds(_message.Message):
    __slots__ = ("max_mismatch", "max_nll_difference", "max_latency_ratio", "max_error_share", "confidence")
    MAX_MISMATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_NLL_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    MAX_LATENCY_RATIO_FIELD_NUMBER: _ClassVar[int]
    MAX_ERROR_SHARE_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    max_mismatch: float
    max_nll_difference: float
    max_latency_ratio: float
    max_error_share: float
    confidence: float
    def __init__(self, max_mismatch: _Optional[float] = ..., max_nll_difference: _Optional[float] = ..., max_latency_ratio: _Optional[float] = ..., max_error_share: _Optional[float] = ..., confidence: _Optional[float] = ...) -> None: ...

class Rollout(_message.Message):
    __slots__ = ("name", "number", "state", "policy", "base_revision", "shares", "step", "interval_seconds", "min_requests", "bounds", "reason", "author", "comment", "create_time", "update_time", "promoted_revision", "evidence", "etag")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    BASE_REVISION_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MIN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_REVISION_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    name: str
    number: int
    state: RolloutState
    policy: _policy_pb2.Policy
    base_revision: int
    shares: _containers.RepeatedScalarFieldContainer[float]
    step: int
    interval_seconds: float
    min_requests: int
    bounds: RolloutBounds
    reason: str
    author: str
    comment: str
    create_time: _timestamp_pb2.Timestamp
    update_time: _timestamp_pb2.Timestamp
    promoted_revision: int
    evidence: _containers.RepeatedCompositeFieldContainer[_evidence_pb2.TierEvidence]
    etag: str
    def __init__(self, name: _Optional[str] = ..., number: _Optional[int] = ..., state: _Optional[_Union[RolloutState, str]] = ..., policy: _Optional[_Union[_policy_pb2.Policy, _Mapping]] = ..., base_revision: _Optional[int] = ..., shares: _Optional[_Iterable[float]] = ..., step: _Optional[int] = ..., interval_seconds: _Optional[float] = ..., min_requests: _Optional[int] = ..., bounds: _Optional[_Union[RolloutBounds, _Mapping]] = ..., reason: _Optional[str] = ..., author: _Optional[str] = ..., comment: _Optional[str] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., update_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., promoted_revision: _Optional[int] = ..., evidence: _Optional[_Iterable[_Union[_evidence_pb2.TierEvidence, _Mapping]]] = ..., etag: _Optional[str] = ...) -> None: ...

class StartRolloutRequest(_message.Message):
    __slots__ = ("policy", "revision", "shares", "interval_seconds", "min_requests", "bounds", "comment", "request_id")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MIN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    policy: _policy_pb2.Policy
    revision: int
    shares: _containers.RepeatedScalarFieldContainer[float]
    interval_seconds: float
    min_requests: int
    bounds: RolloutBounds
    comment: str
    request_id: str
    def __init__(self, policy: _Optional[_Union[_policy_pb2.Policy, _Mapping]] = ..., revision: _Optional[int] = ..., shares: _Optional[_Iterable[float]] = ..., interval_seconds: _Optional[float] = ..., min_requests: _Optional[int] = ..., bounds: _Optional[_Union[RolloutBounds, _Mapping]] = ..., comment: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class GetRolloutRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListRolloutsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListRolloutsResponse(_message.Message):
    __slots__ = ("rollouts", "next_page_token")
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    rollouts: _containers.RepeatedCompositeFieldContainer[Rollout]
    next_page_token: str
    def __init__(self, rollouts: _Optional[_Iterable[_Union[Rollout, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ChangeRolloutRequest(_message.Message):
    __slots__ = ("name", "comment", "etag")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    name: str
    comment: str
    etag: str
    def __init__(self, name: _Optional[str] = ..., comment: _Optional[str] = ..., etag: _Optional[str] = ...) -> None: ...
