"""Hosts that vanish: one that loses power or network never closes its connections, so the kernel has to probe them."""

import errno
import socket
import struct
from typing import Protocol

IDLE, BETWEEN, TRIES = 15, 5, 3  # keepalive: seconds of silence before the first probe, seconds between two, probes
UNACKNOWLEDGED = 30.0  # seconds for which sent bytes may stay unacknowledged
_TIMEOUTS = 6  # retransmissions in a row: the last comes at least 12 s after the first try
# Replicas are near, and streams wait for another: keepalive towards them, and how long their hosts may be silent.
NEAR = (3, 1)
NEAR_SILENCE = 8.0
_NEAR_TIMEOUTS = 3
# tcp_info of linux/tcp.h: tcpi_retransmits and tcpi_probes, both without an answer, and tcpi_last_ack_recv in ms
_INFO = struct.Struct("=2xBB52xI")


_SILENCE = frozenset((errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH))


class Socket(Protocol):
    """A socket, or uvloop's stand-in for one."""

    def setsockopt(self, level: int, name: int, value: int, /) -> None: ...

    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...


def expect_life(
    sock: Socket, unacknowledged: float = UNACKNOWLEDGED, probes: tuple[int, int] = (IDLE, BETWEEN)
) -> None:
    """Has the kernel end a connection whose other host is gone; set on a listener, it holds for those it accepts.

    An idle connection ends after 30 s. With unacknowledged bytes it ends after `unacknowledged` seconds, even if the
    other host is alive but accepts none of them in that time.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probes[0])
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probes[1])
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, TRIES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(unacknowledged * 1000))


def has_vanished(sock: Socket) -> bool:
    """Has the other host acknowledged nothing for 30 s, although the same bytes were sent again and again?

    A host whose program is slow to read still sends acknowledgements, with a window of zero.
    """
    return _is_silent(sock, _TIMEOUTS, UNACKNOWLEDGED)


def has_vanished_nearby(sock: Socket) -> bool:
    """The same of a replica's host, for 8 s. The kernel there acknowledges keepalive whatever the replica does."""
    return _is_silent(sock, _NEAR_TIMEOUTS, NEAR_SILENCE)


def _is_silent(sock: Socket, tries: int, seconds: float) -> bool:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    retransmits, probes, last_heard = _INFO.unpack(info)
    return bool(max(retransmits, probes) >= tries and last_heard > seconds * 1000)


def is_of_the_host(error: Exception | None) -> bool:
    """Did a connection end with this because its other host said nothing any more? A process that dies, closes it."""
    return isinstance(error, OSError) and error.errno in _SILENCE
