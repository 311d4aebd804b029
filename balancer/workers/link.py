"""One Unix connection between a relay and the coordinator: messages of one round of the loop leave together.

A line is a JSON list of messages, each a list that begins with its kind.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson

Message = list[Any]
MOMENT = 0.001  # seconds


class Link(asyncio.Protocol):
    """`take` gets each message that arrives, `ended` is called once when the connection is over."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, take: Callable[[Message], None], ended: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._take = take
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        self._out: list[Message] = []
        self._is_due = False  # `_out` leaves at the end of this round
        self._timer: asyncio.TimerHandle | None = None
        self._part = b""  # of a line whose end has not come yet

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    @property
    def peer(self) -> Any:
        """The socket, or uvloop's stand-in for it; None if there is no connection."""
        return None if self._transport is None else self._transport.get_extra_info("socket")

    def send(self, message: Message) -> None:
        """Sends at the end of this round of the loop."""
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self.flush)
        self._out.append(message)

    def send_later(self, message: Message) -> None:
        """Sends with the next message, or after a moment: nobody waits for it, and a write of its own costs more."""
        if not self._is_due and self._timer is None:
            self._timer = self._loop.call_later(MOMENT, self.flush)
        self._out.append(message)

    def flush(self) -> None:
        out, self._out = self._out, []
        self._is_due = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if out and self._transport is not None and not self._transport.is_closing():
            self._transport.write(orjson.dumps(out, option=orjson.OPT_APPEND_NEWLINE))

    def data_received(self, data: bytes) -> None:
        lines = (self._part + data).split(b"\n") if self._part else data.split(b"\n")
        self._part = lines.pop()
        take = self._take
        for line in lines:
            for message in orjson.loads(line):
                take(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._ended()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
