from baton.api.common.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerAnnouncement(_message.Message):
    __slots__ = ("status", "sequence", "leaving")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    status: _common_pb2.WorkerStatus
    sequence: int
    leaving: bool
    def __init__(self, status: _Optional[_Union[_common_pb2.WorkerStatus, _Mapping]] = ..., sequence: _Optional[int] = ..., leaving: _Optional[bool] = ...) -> None: ...

class DiscoverRequest(_message.Message):
    __slots__ = ("gateway",)
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    gateway: _common_pb2.WorkerIdentity
    def __init__(self, gateway: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ...) -> None: ...

class KVEvents(_message.Message):
    __slots__ = ("identity", "sequence", "stored", "removed", "snapshot")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    identity: _common_pb2.WorkerIdentity
    sequence: int
    stored: _containers.RepeatedScalarFieldContainer[bytes]
    removed: _containers.RepeatedScalarFieldContainer[bytes]
    snapshot: bool
    def __init__(self, identity: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ..., sequence: _Optional[int] = ..., stored: _Optional[_Iterable[bytes]] = ..., removed: _Optional[_Iterable[bytes]] = ..., snapshot: _Optional[bool] = ...) -> None: ...

class KVSnapshotRequest(_message.Message):
    __slots__ = ("gateway",)
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    gateway: _common_pb2.WorkerIdentity
    def __init__(self, gateway: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ...) -> None: ...
