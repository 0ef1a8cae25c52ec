"""Reads the Secrets that Kubernetes clients send in protobuf.

The bytes are a magic number and a `runtime.Unknown` envelope around the object, both described in Kubernetes'
apimachinery and api packages. Only the fields that a release Secret has are declared; others are skipped.
"""

from __future__ import annotations

import base64
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

_MAGIC = b"k8s\x00"
_PACKAGE = "fake"
_Field = descriptor_pb2.FieldDescriptorProto
_STRING, _BYTES, _MESSAGE = _Field.TYPE_STRING, _Field.TYPE_BYTES, _Field.TYPE_MESSAGE

# Message -> field -> (number, type); a map's type is the type of its values, in a tuple.
_MESSAGES: dict[str, dict[str, tuple[int, Any]]] = {
    "TypeMeta": {"api_version": (1, _STRING), "kind": (2, _STRING)},
    "Unknown": {"type_meta": (1, "TypeMeta"), "raw": (2, _BYTES)},
    "ObjectMeta": {"name": (1, _STRING), "namespace": (3, _STRING), "labels": (11, (_STRING,))},
    "Secret": {"metadata": (1, "ObjectMeta"), "data": (2, (_BYTES,)), "type": (3, _STRING)},
}


def decode_secret(body: bytes) -> dict[str, Any]:
    """The Secret as JSON has it. Raises ValueError for anything else."""
    if not body.startswith(_MAGIC):
        raise ValueError("not a Kubernetes protobuf body")
    envelope: Any = _parse("Unknown", body[len(_MAGIC) :])
    if envelope.type_meta.kind != "Secret":
        raise ValueError(f"expected a Secret, got {envelope.type_meta.kind}")
    secret: Any = _parse("Secret", envelope.raw)
    metadata = {"name": secret.metadata.name, "labels": dict(secret.metadata.labels)}
    if secret.metadata.namespace:
        metadata["namespace"] = secret.metadata.namespace
    return {
        "apiVersion": envelope.type_meta.api_version,
        "kind": envelope.type_meta.kind,
        "metadata": metadata,
        "type": secret.type,
        "data": {key: base64.b64encode(value).decode() for key, value in secret.data.items()},
    }


def _build_pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="fake.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            _add_field(message, name, field, number, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _add_field(message: descriptor_pb2.DescriptorProto, owner: str, name: str, number: int, kind: Any) -> None:
    field = message.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    if isinstance(kind, tuple):
        entry_name = f"{name.capitalize()}Entry"
        entry = message.nested_type.add(name=entry_name, options=descriptor_pb2.MessageOptions(map_entry=True))
        entry.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL, type=_STRING)
        entry.field.add(name="value", number=2, label=_Field.LABEL_OPTIONAL, type=kind[0])
        field.label, field.type = _Field.LABEL_REPEATED, _MESSAGE
        field.type_name = f".{_PACKAGE}.{owner}.{entry_name}"
    elif isinstance(kind, str):
        field.type, field.type_name = _MESSAGE, f".{_PACKAGE}.{kind}"
    else:
        field.type = kind


_POOL = _build_pool()


def _parse(name: str, data: bytes) -> Message:
    message = message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}"))()
    message.ParseFromString(data)
    return message
