"""How much of what we sent the other host has acknowledged: the rest it has never read."""

import socket
import struct
from typing import Protocol

_BYTES_ACKED = struct.Struct("=120xQ")  # tcp_info of linux/tcp.h: tcpi_bytes_acked


class Socket(Protocol):
    """A socket, or uvloop's stand-in for one."""

    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...


def acknowledged(sock: Socket) -> int | None:
    """Bytes acknowledged since we connected, and one for the handshake; None if the kernel does not say."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
    return int(_BYTES_ACKED.unpack(info)[0]) if len(info) == _BYTES_ACKED.size else None


def never_arrived(sock: Socket, before: int, error: Exception | None) -> bool:
    """Has the other host read nothing of what was sent last on this connection, which has just ended with `error`?

    `before` is what it may have acknowledged of everything else. A host that closes acknowledges with that what it
    received, so what is unacknowledged then reached it later. A connection that ended for another reason, as by a
    timeout, proves nothing: acknowledgements may have been lost.
    """
    if error is not None and not isinstance(error, ConnectionError):
        return False
    so_far = acknowledged(sock)
    return so_far is not None and so_far <= before
