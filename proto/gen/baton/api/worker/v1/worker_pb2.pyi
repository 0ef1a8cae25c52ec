from baton.api.common.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetSessionRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: str
    def __init__(self, key: _Optional[str] = ...) -> None: ...

class GetSessionResponse(_message.Message):
    __slots__ = ("is_known", "num_blocks", "num_bytes", "expires_in_s")
    IS_KNOWN_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    is_known: bool
    num_blocks: int
    num_bytes: int
    expires_in_s: float
    def __init__(self, is_known: _Optional[bool] = ..., num_blocks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., expires_in_s: _Optional[float] = ...) -> None: ...

class CloseSessionRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: str
    def __init__(self, key: _Optional[str] = ...) -> None: ...

class CloseSessionResponse(_message.Message):
    __slots__ = ("was_known",)
    WAS_KNOWN_FIELD_NUMBER: _ClassVar[int]
    was_known: bool
    def __init__(self, was_known: _Optional[bool] = ...) -> None: ...

class ChangeRoleRequest(_message.Message):
    __slots__ = ("role", "incarnation", "timeout_ms")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    role: _common_pb2.WorkerRole
    incarnation: str
    timeout_ms: int
    def __init__(self, role: _Optional[_Union[_common_pb2.WorkerRole, str]] = ..., incarnation: _Optional[str] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class ChangeRoleResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetBlocksRequest(_message.Message):
    __slots__ = ("overdue_only", "include_cached", "first_block_id", "max_num_blocks")
    OVERDUE_ONLY_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_CACHED_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    overdue_only: bool
    include_cached: bool
    first_block_id: int
    max_num_blocks: int
    def __init__(self, overdue_only: _Optional[bool] = ..., include_cached: _Optional[bool] = ..., first_block_id: _Optional[int] = ..., max_num_blocks: _Optional[int] = ...) -> None: ...

class GetBlocksResponse(_message.Message):
    __slots__ = ("worker_id", "blocks", "next_block_id")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    blocks: _containers.RepeatedCompositeFieldContainer[LedgerBlock]
    next_block_id: int
    def __init__(self, worker_id: _Optional[str] = ..., blocks: _Optional[_Iterable[_Union[LedgerBlock, _Mapping]]] = ..., next_block_id: _Optional[int] = ...) -> None: ...

class LedgerBlock(_message.Message):
    __slots__ = ("block_id", "state", "generation", "name", "request_id", "attempt", "peer", "phase", "age_s", "deadline_in_s")
    BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_IN_S_FIELD_NUMBER: _ClassVar[int]
    block_id: int
    state: str
    generation: int
    name: bytes
    request_id: str
    attempt: int
    peer: str
    phase: str
    age_s: float
    deadline_in_s: float
    def __init__(self, block_id: _Optional[int] = ..., state: _Optional[str] = ..., generation: _Optional[int] = ..., name: _Optional[bytes] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., peer: _Optional[str] = ..., phase: _Optional[str] = ..., age_s: _Optional[float] = ..., deadline_in_s: _Optional[float] = ...) -> None: ...

class SetFailpointsRequest(_message.Message):
    __slots__ = ("failpoints",)
    FAILPOINTS_FIELD_NUMBER: _ClassVar[int]
    failpoints: str
    def __init__(self, failpoints: _Optional[str] = ...) -> None: ...

class SetFailpointsResponse(_message.Message):
    __slots__ = ("num_reached",)
    class NumReachedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NUM_REACHED_FIELD_NUMBER: _ClassVar[int]
    num_reached: _containers.ScalarMap[str, int]
    def __init__(self, num_reached: _Optional[_Mapping[str, int]] = ...) -> None: ...
