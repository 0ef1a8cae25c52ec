"""What the APIs that are translated into chat requests have in common: Responses and Messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from baton.services.core.errors import BatonError
from baton.services.gateway.choice import ChoicePiece
from baton.services.gateway.errors import HttpRefusal
from baton.services.gateway.parts import Part
from baton.services.gateway.tools.calls import Text
from baton.services.gateway.validation import invalid

Message = dict[str, Any]


def parts_of(piece: ChoicePiece) -> Sequence[Part]:
    """What a piece says; text where nobody looked for more in it."""
    if piece.parts is not None:
        return piece.parts
    return (Text(piece.text),) if piece.text else ()


def renamed(error: BatonError, names: Mapping[str, str]) -> BatonError:
    """``error`` with its field called what the client calls it. ``names``: pattern of the chat API's name -> replacement."""
    if error.param is None or isinstance(error, HttpRefusal):
        return error
    for pattern, replacement in names.items():
        param, count = re.subn(f"^{pattern}(?=$|[.\\[])", replacement, error.param)
        if count:
            message = error.message
            if message.startswith(error.param):
                message = param + message[len(error.param) :]
            return BatonError(error.code, message, param=param)
    return error


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Failures inside name fields as the client knows them."""
    try:
        yield
    except BatonError as error:
        raise renamed(error, names) from error


def text_of(path: str, content: Any, kinds: Sequence[str]) -> str:
    """Text, or the joined text of parts of these types. Raises INVALID_REQUEST."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(path, "must be a string or a list")
    return "\n".join(part_text(f"{path}[{i}]", part, kinds) for i, part in enumerate(content))


def part_text(path: str, part: Any, kinds: Sequence[str]) -> str:
    """The text of one part. Raises INVALID_REQUEST."""
    if not isinstance(part, dict) or part.get("type") not in kinds:
        raise invalid(f"{path}.type", f"must be {' or '.join(kinds)}: this server takes no images, sound or files")
    if not isinstance(part.get("text"), str):
        raise invalid(f"{path}.text", "must be a string")
    return str(part["text"])


def string_of(path: str, item: Mapping[str, Any], name: str) -> str:
    """A field that must be a string. Raises INVALID_REQUEST."""
    if not isinstance(item.get(name), str):
        raise invalid(f"{path}.{name}", "is required and must be a string")
    return str(item[name])
