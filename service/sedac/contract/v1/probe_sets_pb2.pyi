import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ProbeSetState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROBE_SET_STATE_UNSPECIFIED: _ClassVar[ProbeSetState]
    PROBE_SET_STATE_STAGED: _ClassVar[ProbeSetState]
    PROBE_SET_STATE_VERIFIED: _ClassVar[ProbeSetState]
    PROBE_SET_STATE_LOADABLE: _ClassVar[ProbeSetState]
PROBE_SET_STATE_UNSPECIFIED: ProbeSetState
PROBE_SET_STATE_STAGED: ProbeSetState
PROBE_SET_STATE_VERIFIED: ProbeSetState
PROBE_SET_STATE_LOADABLE: ProbeSetState

class ProbeSet(_message.Message):
    __slots__ = ("name", "sha256", "size_bytes", "format", "state", "create_time", "author", "model", "num_layers", "hidden_size", "rank", "checkpoint_layers", "levels", "engines", "referenced_by")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_LAYERS_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    REFERENCED_BY_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    size_bytes: int
    format: str
    state: ProbeSetState
    create_time: _timestamp_pb2.Timestamp
    author: str
    model: str
    num_layers: int
    hidden_size: int
    rank: int
    checkpoint_layers: _containers.RepeatedScalarFieldContainer[int]
    levels: _containers.RepeatedScalarFieldContainer[str]
    engines: _containers.RepeatedCompositeFieldContainer[EngineFit]
    referenced_by: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ..., format: _Optional[str] = ..., state: _Optional[_Union[ProbeSetState, str]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., author: _Optional[str] = ..., model: _Optional[str] = ..., num_layers: _Optional[int] = ..., hidden_size: _Optional[int] = ..., rank: _Optional[int] = ..., checkpoint_layers: _Optional[_Iterable[int]] = ..., levels: _Optional[_Iterable[str]] = ..., engines: _Optional[_Iterable[_Union[EngineFit, _Mapping]]] = ..., referenced_by: _Optional[_Iterable[str]] = ...) -> None: ...

class EngineFit(_message.Message):
    __slots__ = ("engine_id", "problem")
    ENGINE_ID_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    engine_id: str
    problem: str
    def __init__(self, engine_id: _Optional[str] = ..., problem: _Optional[str] = ...) -> None: ...

class ProbeSetHeader(_message.Message):
    __slots__ = ("name", "size_bytes", "sha256", "format", "manifest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    sha256: str
    format: str
    manifest: bytes
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ..., format: _Optional[str] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class UploadProbeSetRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ProbeSetHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[ProbeSetHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ListProbeSetsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListProbeSetsResponse(_message.Message):
    __slots__ = ("probe_sets", "next_page_token")
    PROBE_SETS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    probe_sets: _containers.RepeatedCompositeFieldContainer[ProbeSet]
    next_page_token: str
    def __init__(self, probe_sets: _Optional[_Iterable[_Union[ProbeSet, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetProbeSetRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteProbeSetRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteProbeSetResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DownloadProbeSetRequest(_message.Message):
    __slots__ = ("name", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

class DownloadProbeSetResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ProbeSetHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[ProbeSetHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...
