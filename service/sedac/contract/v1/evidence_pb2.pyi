from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Side(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIDE_UNSPECIFIED: _ClassVar[Side]
    SIDE_STABLE: _ClassVar[Side]
    SIDE_CANDIDATE: _ClassVar[Side]
SIDE_UNSPECIFIED: Side
SIDE_STABLE: Side
SIDE_CANDIDATE: Side

class Moments(_message.Message):
    __slots__ = ("count", "sum", "sum_squares")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    SUM_SQUARES_FIELD_NUMBER: _ClassVar[int]
    count: int
    sum: float
    sum_squares: float
    def __init__(self, count: _Optional[int] = ..., sum: _Optional[float] = ..., sum_squares: _Optional[float] = ...) -> None: ...

class Evidence(_message.Message):
    __slots__ = ("side", "revision", "rollout", "tier", "num_requests", "num_errors", "first_token_seconds", "token_seconds", "num_audited_tokens", "num_audit_failures", "mismatch_counts", "nll_difference_counts")
    class MismatchCountsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    class NllDifferenceCountsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: int
        def __init__(self, key: _Optional[int] = ..., value: _Optional[int] = ...) -> None: ...
    SIDE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_ERRORS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_AUDITED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_AUDIT_FAILURES_FIELD_NUMBER: _ClassVar[int]
    MISMATCH_COUNTS_FIELD_NUMBER: _ClassVar[int]
    NLL_DIFFERENCE_COUNTS_FIELD_NUMBER: _ClassVar[int]
    side: Side
    revision: int
    rollout: int
    tier: str
    num_requests: int
    num_errors: int
    first_token_seconds: Moments
    token_seconds: Moments
    num_audited_tokens: int
    num_audit_failures: int
    mismatch_counts: _containers.ScalarMap[int, int]
    nll_difference_counts: _containers.ScalarMap[int, int]
    def __init__(self, side: _Optional[_Union[Side, str]] = ..., revision: _Optional[int] = ..., rollout: _Optional[int] = ..., tier: _Optional[str] = ..., num_requests: _Optional[int] = ..., num_errors: _Optional[int] = ..., first_token_seconds: _Optional[_Union[Moments, _Mapping]] = ..., token_seconds: _Optional[_Union[Moments, _Mapping]] = ..., num_audited_tokens: _Optional[int] = ..., num_audit_failures: _Optional[int] = ..., mismatch_counts: _Optional[_Mapping[int, int]] = ..., nll_difference_counts: _Optional[_Mapping[int, int]] = ...) -> None: ...

class Estimate(_message.Message):
    __slots__ = ("num_requests", "mean", "lower", "upper")
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    LOWER_FIELD_NUMBER: _ClassVar[int]
    UPPER_FIELD_NUMBER: _ClassVar[int]
    num_requests: int
    mean: float
    lower: float
    upper: float
    def __init__(self, num_requests: _Optional[int] = ..., mean: _Optional[float] = ..., lower: _Optional[float] = ..., upper: _Optional[float] = ...) -> None: ...

class TierEvidence(_message.Message):
    __slots__ = ("side", "tier", "num_requests", "num_errors", "mismatch", "nll_difference", "mean_first_token_seconds", "mean_token_seconds")
    SIDE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_ERRORS_FIELD_NUMBER: _ClassVar[int]
    MISMATCH_FIELD_NUMBER: _ClassVar[int]
    NLL_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIRST_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEAN_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    side: Side
    tier: str
    num_requests: int
    num_errors: int
    mismatch: Estimate
    nll_difference: Estimate
    mean_first_token_seconds: float
    mean_token_seconds: float
    def __init__(self, side: _Optional[_Union[Side, str]] = ..., tier: _Optional[str] = ..., num_requests: _Optional[int] = ..., num_errors: _Optional[int] = ..., mismatch: _Optional[_Union[Estimate, _Mapping]] = ..., nll_difference: _Optional[_Union[Estimate, _Mapping]] = ..., mean_first_token_seconds: _Optional[float] = ..., mean_token_seconds: _Optional[float] = ...) -> None: ...
