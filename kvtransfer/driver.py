"""Runs one machine in real time: feeds it events one after the other, has its commands performed, keeps its timer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import structlog

from baton.kvtransfer.errors import Fenced, LocalProtocolError, RemoteProtocolError, TransferCode
from baton.kvtransfer.machine import Machine
from baton.kvtransfer.messages import Command, Event, GiveUp

_log = structlog.get_logger(__name__)


class Driver:
    """``perform`` may feed further events; they are taken after the commands of the present one."""

    def __init__(self, machine: Machine[Any], perform: Callable[[Command], None], clock: Callable[[], float]) -> None:
        self._machine = machine
        self._perform = perform
        self._clock = clock
        self._inbox: deque[Event] = deque()
        self._is_running = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0

    def feed(self, event: Event) -> None:
        """Takes an event. Raises Fenced or LocalProtocolError for one that was refused; then nothing has changed.

        What a peer may not say ends the handoff instead.
        """
        self._inbox.append(event)
        if self._is_running:
            return
        self._is_running = True
        refused: Fenced | LocalProtocolError | None = None
        try:
            while self._inbox:
                try:
                    self._take(self._inbox.popleft())
                except (Fenced, LocalProtocolError) as error:
                    refused = refused or error
        finally:
            self._is_running = False
            self._arm()
        if refused is not None:
            raise refused

    def tick(self) -> None:
        """Fires what is due."""
        self._do(self._machine.handle_timer(self._clock()))
        self._arm()

    def _take(self, event: Event) -> None:
        now = self._clock()
        self._do(self._machine.handle_timer(now))
        try:
            commands = self._machine.receive(event, now)
        except RemoteProtocolError as error:
            _log.warning("kv_peer_broke_protocol", reason=error.message)
            commands = self._machine.receive(GiveUp(error.message, TransferCode.PROTOCOL), now)
        self._do(commands)

    def _do(self, commands: list[Command]) -> None:
        for command in commands:
            self._perform(command)

    def _arm(self) -> None:
        """Sets the timer to the machine's deadline. A timer that is early does nothing and sets itself again."""
        deadline = self._machine.deadline
        if deadline is None or (self._timer is not None and self._timer_s > deadline):
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if deadline is None:
                return
        if self._timer is None:
            self._timer_s = deadline
            self._timer = asyncio.get_running_loop().call_later(max(0.0, deadline - self._clock()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.tick()
