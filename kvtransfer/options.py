"""How long the agent waits for what, and how much it lets in."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.kvtransfer.protocol import HandoffLimits
from baton.kvtransfer.shape import LinkShape


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """Seconds, unless said otherwise."""

    limits: HandoffLimits = field(default_factory=HandoffLimits)
    heartbeat_s: float = 5.0  # a third of the lease: one may be lost and one late
    expect_wait_s: float = 10.0  # a reservation that comes before its announcement waits this long
    rpc_timeout_s: float = 5.0  # calls that only exchange a few fields
    connect_timeout_s: float = 2.0
    hello_timeout_s: float = 2.0  # a connection that has not said who it is by then is closed
    stall_s: float = 10.0  # a frame that does not move
    silent_s: float = 4.0  # blocks under way and no verdict; longer where the link needs longer for a frame of them
    min_bytes_per_s: float = 1e6  # a link that was not measured to be slower moves at least so much, or is broken
    canary_timeout_s: float = 5.0  # from sending a canary to the verdict on it
    canary_bytes: int = 1024 * 1024  # of blocks in the canary that measures bandwidth; 0: no canaries are sent
    transport_retry_s: float = 60.0  # a transport that failed between two workers is not tried again before that
    close_timeout_s: float = 5.0  # what is under way when the agent closes
    max_unknown_connections: int = 64  # connections that have not said who they are
    max_connections_per_peer: int = 4  # more than one only while a broken one is being replaced
    max_waiting_reservations: int = 1024  # reservations that wait for their announcement
    reserve_answer_s: float = 1.0  # a reservation is answered in this time, if only with "still looking"
    max_num_quarantined: int | None = None  # slots; with more in quarantine no reservation is granted. None: any number
    newest_wire_version: int | None = None  # speaks none that is newer: to try out beforehand what an upgrade will do
    num_send_threads: int = 1  # hash what goes out, with one of them sending it; they hardly use the interpreter
    num_copy_threads: int = 2  # copy and hash what comes in: one that does both is slower than one that only copies
    link_shape: LinkShape | None = (
        None  # incoming blocks are reported as if they came over such a link; None: as they come
    )
