"""Hosts that vanish: one that lost its power or its network never says that it closes, so the kernel has to ask."""

import socket
import struct
from typing import Protocol

IDLE, BETWEEN, TRIES = 15, 5, 3  # seconds of silence before the first question, between two; questions
UNACKNOWLEDGED = 30.0  # seconds that what was sent may go without the other system's word on it
_TIMEOUTS = 6  # retransmissions in a row: the last of them 12 s after the first try at least
_INFO = struct.Struct("=2xB53xI")  # tcp_info of linux/tcp.h: tcpi_retransmits, and tcpi_last_ack_recv in milliseconds


class Socket(Protocol):
    """A socket, or what uvloop shows of one."""

    def setsockopt(self, level: int, name: int, value: int, /) -> None: ...

    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...


def expect_life(sock: Socket, unacknowledged: float = UNACKNOWLEDGED) -> None:
    """Has the kernel end a connection whose other host is gone; set on a listener, those it accepts have it too.

    Idle, that takes 30 s. With bytes under way it takes `unacknowledged` seconds, and so it does where the other side
    lives, but takes none of them all that time.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, BETWEEN)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, TRIES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(unacknowledged * 1000))


def has_vanished(sock: Socket) -> bool:
    """Has the other system said nothing for 30 s, though it was sent the same bytes again and again?

    One whose program is slow to read acknowledges what comes, and says that it has no room.
    """
    retransmits, last_heard = _INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size))
    return bool(retransmits >= _TIMEOUTS and last_heard > UNACKNOWLEDGED * 1000)
