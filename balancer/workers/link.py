"""One Unix connection between a relay and the coordinator: messages of one round of the loop leave together.

A line is a JSON list of messages, each a list that begins with its kind.
"""

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import orjson

log = logging.getLogger("groundserve")

Message = list[Any]
MOMENT = 0.001  # seconds
MOST_UNREAD = 64 << 20  # bytes that wait for an end which reads nothing, before the connection is given up
_CREDENTIALS = struct.Struct("iII")  # process, user and group of a peer


class Link(asyncio.Protocol):
    """`take` gets each message that arrives, `ended` is called once when the connection is over.

    A connection with another user's process is closed before anything is read from it.
    """

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
        if not _is_ours(transport.get_extra_info("socket")):
            self._loop.call_soon(transport.abort)  # type: ignore[attr-defined]  # uvloop must get hold of the socket first
            return
        self._transport = transport  # type: ignore[assignment]
        transport.set_write_buffer_limits(high=MOST_UNREAD)  # type: ignore[attr-defined]

    def pause_writing(self) -> None:
        """The other end hangs. A new connection, on which each end says how it stands, takes the place of this one."""
        log.warning("another process of the balancer does not read what it is told; it is connected anew")
        self._loop.call_soon(self.close)

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
            self._transport.write(_line_of(out))

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        lines = (self._part + data).split(b"\n") if self._part else data.split(b"\n")
        self._part = lines.pop()
        take = self._take
        was_due, queued = self._is_due, len(self._out)
        self._is_due = True  # what is said meanwhile leaves at once, together, instead of at the end of the next round
        for line in lines:
            for message in orjson.loads(line):
                take(message)
        if len(self._out) > queued:
            self.flush()
        else:
            self._is_due = was_due

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._ended()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _line_of(messages: list[Message]) -> bytes:
    try:
        return orjson.dumps(messages, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # a number from elsewhere is too large: the other messages must not be lost with it
        log.exception("a message between the balancer's processes cannot be written")
        return orjson.dumps([one for one in messages if _is_writable(one)], option=orjson.OPT_APPEND_NEWLINE)


def _is_writable(message: Message) -> bool:
    try:
        orjson.dumps(message)
    except TypeError:
        return False
    return True


def _is_ours(peer: Any) -> bool:
    """Does the other end belong to our user? Everybody on the machine sees the address. `peer` is a Unix socket."""
    _, user, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return bool(user == os.geteuid())
