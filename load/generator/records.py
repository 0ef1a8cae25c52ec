"""What became of each request. Pure data; times are seconds from the start of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise


class Outcome(StrEnum):
    """How a request ended. All but the first are misses."""

    COMPLETED = "completed"
    REFUSED = "refused"  # 429 or 503: the server said that it takes no more
    ERROR = "error"  # another status, an error inside the stream, a stream cut off, no token, no connection
    TIMEOUT = "timeout"
    NOT_SENT = "not_sent"  # the conversation's turn before it failed


@dataclass(slots=True)
class RequestRecord:
    """One request, from the moment it should have been sent."""

    index: int  # of the conversation
    turn: int
    intended_s: float
    started_s: float | None = None  # when the generator got to it
    sent_s: float | None = None  # when its bytes went to the socket
    token_times_s: list[float] = field(default_factory=list)  # of each event with output
    ended_s: float | None = None
    outcome: Outcome = Outcome.ERROR
    error: str = ""
    status: int | None = None
    request_id: str = ""
    planned_input_len: int = 0
    planned_output_len: int = 0
    input_len: int | None = None  # as the server counts
    output_len: int | None = None
    cached_len: int | None = None

    @property
    def lateness_s(self) -> float | None:
        """How late the generator was."""
        return None if self.started_s is None else max(0.0, self.started_s - self.intended_s)

    @property
    def client_queue_s(self) -> float | None:
        """From when it was due to when it was sent: lateness, --max-concurrency, connecting."""
        return None if self.sent_s is None else max(0.0, self.sent_s - self.intended_s)

    @property
    def ttft_s(self) -> float | None:
        """Time to the first output from the moment the request was *due*: waiting to be sent is waiting."""
        return self.token_times_s[0] - self.intended_s if self.token_times_s else None

    @property
    def ttft_from_send_s(self) -> float | None:
        """What most tools call TTFT."""
        return self.token_times_s[0] - self.sent_s if self.token_times_s and self.sent_s is not None else None

    @property
    def e2el_s(self) -> float | None:
        return None if self.ended_s is None else self.ended_s - self.intended_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of an output token after the first, up to the end; None with fewer than two."""
        if self.output_len is None or self.output_len < 2 or not self.token_times_s or self.ended_s is None:
            return None
        return (self.ended_s - self.token_times_s[0]) / (self.output_len - 1)

    @property
    def itls_s(self) -> list[float]:
        """Gaps between events with output. Several tokens in one event make one gap."""
        return [later - earlier for earlier, later in pairwise(self.token_times_s)]
