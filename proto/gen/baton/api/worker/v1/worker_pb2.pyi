from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

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
