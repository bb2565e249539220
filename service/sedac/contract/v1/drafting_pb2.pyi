from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ControllerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTROLLER_STATE_UNSPECIFIED: _ClassVar[ControllerState]
    CONTROLLER_STATE_MEASURING: _ClassVar[ControllerState]
    CONTROLLER_STATE_TRYING: _ClassVar[ControllerState]
    CONTROLLER_STATE_DRAFTING: _ClassVar[ControllerState]
    CONTROLLER_STATE_PAUSED: _ClassVar[ControllerState]
CONTROLLER_STATE_UNSPECIFIED: ControllerState
CONTROLLER_STATE_MEASURING: ControllerState
CONTROLLER_STATE_TRYING: ControllerState
CONTROLLER_STATE_DRAFTING: ControllerState
CONTROLLER_STATE_PAUSED: ControllerState

class Drafting(_message.Message):
    __slots__ = ("kind", "num_drafted", "num_accepted", "num_verified_steps", "lengths", "accepted_at", "num_passes", "draft_seconds", "step_seconds", "controller")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTED_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    NUM_VERIFIED_STEPS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_AT_FIELD_NUMBER: _ClassVar[int]
    NUM_PASSES_FIELD_NUMBER: _ClassVar[int]
    DRAFT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    kind: str
    num_drafted: int
    num_accepted: int
    num_verified_steps: int
    lengths: _containers.RepeatedScalarFieldContainer[int]
    accepted_at: _containers.RepeatedScalarFieldContainer[int]
    num_passes: int
    draft_seconds: float
    step_seconds: float
    controller: _containers.RepeatedCompositeFieldContainer[DraftingController]
    def __init__(self, kind: _Optional[str] = ..., num_drafted: _Optional[int] = ..., num_accepted: _Optional[int] = ..., num_verified_steps: _Optional[int] = ..., lengths: _Optional[_Iterable[int]] = ..., accepted_at: _Optional[_Iterable[int]] = ..., num_passes: _Optional[int] = ..., draft_seconds: _Optional[float] = ..., step_seconds: _Optional[float] = ..., controller: _Optional[_Iterable[_Union[DraftingController, _Mapping]]] = ...) -> None: ...

class DraftingController(_message.Message):
    __slots__ = ("num_sequences", "state", "gain", "plain_seconds", "step_seconds", "draft_pass_seconds", "tokens_per_step")
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GAIN_FIELD_NUMBER: _ClassVar[int]
    PLAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_PASS_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    num_sequences: int
    state: ControllerState
    gain: float
    plain_seconds: float
    step_seconds: float
    draft_pass_seconds: float
    tokens_per_step: float
    def __init__(self, num_sequences: _Optional[int] = ..., state: _Optional[_Union[ControllerState, str]] = ..., gain: _Optional[float] = ..., plain_seconds: _Optional[float] = ..., step_seconds: _Optional[float] = ..., draft_pass_seconds: _Optional[float] = ..., tokens_per_step: _Optional[float] = ...) -> None: ...
