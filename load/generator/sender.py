"""One request: its body, its stream, its record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from baton.load.generator.events import EventSplitter, StreamEvent, error_words, read_event
from baton.load.generator.http_client import ConnectionBroken, HttpClient, Response
from baton.load.generator.records import Outcome, RequestRecord
from baton.load.generator.target import Endpoint, path_of

_REFUSALS = (429, 503)
_MAX_ERROR_BYTES = 10_000


@dataclass(slots=True)
class History:
    """A conversation so far. Units of turns that are text, or token ids, and what the server answered."""

    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RequestMaker:
    """Bodies for one endpoint."""

    model: str
    endpoint: Endpoint
    extra: Mapping[str, Any]  # what every body has besides
    ignore_eos: bool

    def body(self, history: History, units: Sequence[str] | Sequence[int], max_tokens: int) -> bytes:
        """Adds the turn's units to the history and asks for its continuation."""
        body: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": max_tokens,
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }
        is_token_ids = bool(units) and isinstance(units[0], int)
        if is_token_ids:
            history.token_ids += [int(unit) for unit in units]
            body |= {"prompt": history.token_ids, "return_token_ids": True}
        elif self.endpoint == "chat":
            history.messages.append({"role": "user", "content": " ".join(map(str, units))})
            body["messages"] = history.messages
        else:
            history.text += " ".join(map(str, units))
            body["prompt"] = history.text
        return orjson.dumps(body | dict(self.extra))


def remember(history: History, answer: Answer) -> None:
    """Puts the answer behind the turn that it answers."""
    history.messages.append({"role": "assistant", "content": answer.text})
    history.text += f"{answer.text} "
    history.token_ids += answer.token_ids


@dataclass(slots=True)
class Answer:
    """What came of a stream."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    is_done: bool = False
    is_finished: bool = False
    num_outputs: int = 0
    error: str | None = None


class Sender:
    """Sends bodies and fills records. ``clock`` gives seconds from the start of the run."""

    def __init__(self, client: HttpClient, endpoint: Endpoint, *, timeout_s: float, clock: Callable[[], float]) -> None:
        self._client = client
        self._path = path_of(endpoint)
        self._timeout_s = timeout_s
        self._clock = clock

    async def send(self, record: RequestRecord, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Never raises but for cancellation; the record says how it ended."""
        answer = Answer()
        stream = _Stream(record, answer, self._clock)

        def on_sent() -> None:
            record.sent_s = self._clock()

        try:
            # From the moment when it was due, like everything that is measured.
            left_s = self._timeout_s - (self._clock() - record.intended_s)
            async with asyncio.timeout(max(left_s, 0.0)):
                await self._client.request(
                    "POST",
                    self._path,
                    body,
                    headers=headers,
                    on_sent=on_sent,
                    on_head=stream.on_head,
                    on_body=stream.on_body,
                )
            stream.end()
        except TimeoutError:
            record.outcome, record.error = Outcome.TIMEOUT, f"no end within {self._timeout_s:g} s"
        except ConnectionBroken as error:
            if answer.is_done:
                stream.end()  # all was said; how the connection ends does not matter
            else:
                record.error = str(error) if not record.token_times_s else "the stream was cut off"
        except OSError as error:
            record.error = f"no connection: {error.strerror or error}"
        record.ended_s = self._clock()
        return answer


class _Stream:
    """Takes the answer's bytes as they come."""

    def __init__(self, record: RequestRecord, answer: Answer, clock: Callable[[], float]) -> None:
        self._record = record
        self._answer = answer
        self._clock = clock
        self._splitter = EventSplitter()
        self._refusal = bytearray()

    def on_head(self, response: Response) -> None:
        self._record.status = response.status
        self._record.request_id = response.headers.get("x-request-id", "")

    def on_body(self, data: bytes) -> None:
        now_s = self._clock()
        if self._record.status != 200:
            self._refusal += data[: _MAX_ERROR_BYTES - len(self._refusal)]
            return
        for line in self._splitter.feed(data):
            try:
                self._on_event(read_event(line), now_s)
            except (ValueError, TypeError, AttributeError) as error:
                self._answer.error = self._answer.error or f"an event that cannot be read: {error}"

    def _on_event(self, event: StreamEvent, now_s: float) -> None:
        answer = self._answer
        if event.has_output:
            self._record.token_times_s.append(now_s)
            answer.num_outputs += 1
            answer.text += event.text
            answer.token_ids += event.token_ids
        answer.usage = event.usage or answer.usage
        answer.error = answer.error or event.error
        answer.is_done = answer.is_done or event.is_done
        answer.is_finished = answer.is_finished or event.is_finished

    def end(self) -> None:
        """The answer is whole as far as HTTP is concerned."""
        record, answer = self._record, self._answer
        if record.status != 200:
            is_refusal = record.status in _REFUSALS
            record.outcome = Outcome.REFUSED if is_refusal else Outcome.ERROR
            record.error = f"{record.status}: {_body_words(bytes(self._refusal))}"
        elif answer.error is not None:
            record.error = f"error in the stream: {answer.error}"
        elif not (answer.is_done and answer.is_finished):
            record.error = "the stream ended without its end"
        elif not record.token_times_s:
            record.error = "no token came"
        else:
            record.outcome = Outcome.COMPLETED
        usage = answer.usage or {}
        record.input_len = usage.get("prompt_tokens")
        record.output_len = usage.get("completion_tokens", answer.num_outputs or None)
        record.cached_len = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def _body_words(body: bytes) -> str:
    try:
        return error_words(orjson.loads(body))
    except ValueError:
        return " ".join(body.decode(errors="replace").split())[:300]
