from baton.api.common.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HandoffKey(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class Endpoints(_message.Message):
    __slots__ = ("sender", "receiver")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    sender: _common_pb2.WorkerIdentity
    receiver: _common_pb2.WorkerIdentity
    def __init__(self, sender: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ..., receiver: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class HandshakeRequest(_message.Message):
    __slots__ = ("endpoints", "compatibility", "transports", "host_id", "shared_memory", "offers", "failed", "keeps_handoffs")
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    COMPATIBILITY_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    KEEPS_HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    endpoints: Endpoints
    compatibility: _common_pb2.Compatibility
    transports: _containers.RepeatedScalarFieldContainer[str]
    host_id: str
    shared_memory: SharedMemory
    offers: _containers.RepeatedCompositeFieldContainer[TransportOffer]
    failed: _containers.RepeatedScalarFieldContainer[str]
    keeps_handoffs: bool
    def __init__(self, endpoints: _Optional[_Union[Endpoints, _Mapping]] = ..., compatibility: _Optional[_Union[_common_pb2.Compatibility, _Mapping]] = ..., transports: _Optional[_Iterable[str]] = ..., host_id: _Optional[str] = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ..., offers: _Optional[_Iterable[_Union[TransportOffer, _Mapping]]] = ..., failed: _Optional[_Iterable[str]] = ..., keeps_handoffs: _Optional[bool] = ...) -> None: ...

class TransportOffer(_message.Message):
    __slots__ = ("transport", "data")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    transport: str
    data: bytes
    def __init__(self, transport: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("pid", "fd", "num_bytes", "nonce")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    num_bytes: int
    nonce: bytes
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., num_bytes: _Optional[int] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class HandshakeResponse(_message.Message):
    __slots__ = ("refusal", "receiver", "transport", "data_address", "data_token", "protocol_version")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    DATA_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DATA_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    refusal: Refusal
    receiver: _common_pb2.WorkerIdentity
    transport: str
    data_address: str
    data_token: bytes
    protocol_version: int
    def __init__(self, refusal: _Optional[_Union[Refusal, _Mapping]] = ..., receiver: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ..., transport: _Optional[str] = ..., data_address: _Optional[str] = ..., data_token: _Optional[bytes] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("handoff", "endpoints", "block_names", "num_tokens", "transport", "answer_within_ms")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_NAMES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ANSWER_WITHIN_MS_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffKey
    endpoints: Endpoints
    block_names: _containers.RepeatedScalarFieldContainer[bytes]
    num_tokens: int
    transport: str
    answer_within_ms: int
    def __init__(self, handoff: _Optional[_Union[HandoffKey, _Mapping]] = ..., endpoints: _Optional[_Union[Endpoints, _Mapping]] = ..., block_names: _Optional[_Iterable[bytes]] = ..., num_tokens: _Optional[int] = ..., transport: _Optional[str] = ..., answer_within_ms: _Optional[int] = ...) -> None: ...

class Slot(_message.Message):
    __slots__ = ("index", "block_id", "generation")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    index: int
    block_id: int
    generation: int
    def __init__(self, index: _Optional[int] = ..., block_id: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("slots", "lease_ms", "transfer_token")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[Slot]
    lease_ms: int
    transfer_token: bytes
    def __init__(self, slots: _Optional[_Iterable[_Union[Slot, _Mapping]]] = ..., lease_ms: _Optional[int] = ..., transfer_token: _Optional[bytes] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("grant", "refusal", "waiting")
    GRANT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    grant: Grant
    refusal: Refusal
    waiting: Waiting
    def __init__(self, grant: _Optional[_Union[Grant, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., waiting: _Optional[_Union[Waiting, _Mapping]] = ...) -> None: ...

class Waiting(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("handoff", "endpoints", "manifest_digest", "first_token", "num_bytes")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffKey
    endpoints: Endpoints
    manifest_digest: bytes
    first_token: _common_pb2.Token
    num_bytes: int
    def __init__(self, handoff: _Optional[_Union[HandoffKey, _Mapping]] = ..., endpoints: _Optional[_Union[Endpoints, _Mapping]] = ..., manifest_digest: _Optional[bytes] = ..., first_token: _Optional[_Union[_common_pb2.Token, _Mapping]] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("refusal", "missing")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    refusal: Refusal
    missing: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, refusal: _Optional[_Union[Refusal, _Mapping]] = ..., missing: _Optional[_Iterable[int]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("handoff", "endpoints", "reason", "code")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffKey
    endpoints: Endpoints
    reason: str
    code: str
    def __init__(self, handoff: _Optional[_Union[HandoffKey, _Mapping]] = ..., endpoints: _Optional[_Union[Endpoints, _Mapping]] = ..., reason: _Optional[str] = ..., code: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("known",)
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    known: bool
    def __init__(self, known: _Optional[bool] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("endpoints", "live")
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    endpoints: Endpoints
    live: _containers.RepeatedCompositeFieldContainer[HandoffKey]
    def __init__(self, endpoints: _Optional[_Union[Endpoints, _Mapping]] = ..., live: _Optional[_Iterable[_Union[HandoffKey, _Mapping]]] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("unknown", "refusal")
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    unknown: _containers.RepeatedCompositeFieldContainer[HandoffKey]
    refusal: Refusal
    def __init__(self, unknown: _Optional[_Iterable[_Union[HandoffKey, _Mapping]]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("handoff", "endpoints", "receiver_address", "block_names", "time_left_ms")
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_NAMES_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_MS_FIELD_NUMBER: _ClassVar[int]
    handoff: HandoffKey
    endpoints: Endpoints
    receiver_address: str
    block_names: _containers.RepeatedScalarFieldContainer[bytes]
    time_left_ms: int
    def __init__(self, handoff: _Optional[_Union[HandoffKey, _Mapping]] = ..., endpoints: _Optional[_Union[Endpoints, _Mapping]] = ..., receiver_address: _Optional[str] = ..., block_names: _Optional[_Iterable[bytes]] = ..., time_left_ms: _Optional[int] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("refusal", "num_blocks")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    refusal: Refusal
    num_blocks: int
    def __init__(self, refusal: _Optional[_Union[Refusal, _Mapping]] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("sender", "receiver", "receiver_address")
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    sender: _common_pb2.WorkerIdentity
    receiver: _common_pb2.WorkerIdentity
    receiver_address: str
    def __init__(self, sender: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ..., receiver: _Optional[_Union[_common_pb2.WorkerIdentity, _Mapping]] = ..., receiver_address: _Optional[str] = ...) -> None: ...

class ProbeResponse(_message.Message):
    __slots__ = ("refusal", "transport", "verified", "rtt_ms", "gb_per_s", "failed")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    RTT_MS_FIELD_NUMBER: _ClassVar[int]
    GB_PER_S_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    refusal: Refusal
    transport: str
    verified: bool
    rtt_ms: float
    gb_per_s: float
    failed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, refusal: _Optional[_Union[Refusal, _Mapping]] = ..., transport: _Optional[str] = ..., verified: _Optional[bool] = ..., rtt_ms: _Optional[float] = ..., gb_per_s: _Optional[float] = ..., failed: _Optional[_Iterable[str]] = ...) -> None: ...
