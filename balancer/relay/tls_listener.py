"""Accepts the endpoint's TLS clients, with a limit on handshakes in progress per client.

asyncio's own server accepts every connection and reports it only after its handshake. Until then each connection holds
a descriptor and some memory that no limit counts.
"""

import asyncio
import contextlib
import socket
import ssl
from collections import Counter

from balancer.relay.doors import Doors
from balancer.relay.downstream import ClientConnection
from balancer.relay.request import Peer

HANDSHAKE_TIMEOUT = 10.0  # seconds
_AT_ONCE = 256  # connections accepted before the loop's other callbacks run
_PAUSE = 1.0  # seconds without accepting, once the system has no descriptors left


class TlsListener:
    """An open port, with TLS if there is a `context`. A client may have at most `max_connections_per_client`
    handshakes in progress, unless it is a trusted proxy.
    """

    def __init__(self, doors: Doors, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        self._doors = doors
        self._listener = listener
        self._context = context
        self._under_way: Counter[bytes] = Counter()  # handshakes by client
        self._tasks: set[asyncio.Task[None]] = set()
        self._open()

    def close(self) -> None:
        """Stops accepting; handshakes in progress continue."""
        if self._listener.fileno() >= 0:
            self._doors.loop.remove_reader(self._listener)
            self._listener.close()

    def _open(self) -> None:
        if self._listener.fileno() >= 0:
            self._doors.loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(self._accept_some()):
            try:
                accepted, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                self._doors.loop.remove_reader(self._listener)
                self._doors.loop.call_later(_PAUSE, self._open)
                return
            peer = Peer.of(address[0], self._context is not None, self._doors.trusted)
            if self._under_way[peer.origin] >= self._doors.settings.max_connections_per_client and not peer.is_trusted:
                accepted.close()
                continue
            accepted.setblocking(False)
            self._under_way[peer.origin] += 1
            task = self._doors.loop.create_task(self._shake_hands(accepted, peer.origin))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _accept_some(self) -> int:
        """How many connections to accept now."""
        return _AT_ONCE

    async def _shake_hands(self, accepted: socket.socket, origin: bytes) -> None:
        try:
            # A client that does not speak TLS, breaks the handshake off or takes too long is simply disconnected.
            with contextlib.suppress(OSError, ssl.SSLError):
                await self._doors.loop.connect_accepted_socket(
                    lambda: ClientConnection(self._doors),
                    accepted,
                    ssl=self._context,
                    ssl_handshake_timeout=HANDSHAKE_TIMEOUT if self._context else None,
                    # How long TLS waits at the end for the client to take what was sent.
                    ssl_shutdown_timeout=self._doors.settings.send_timeout if self._context else None,
                )
        finally:
            self._under_way[origin] -= 1
            if not self._under_way[origin]:
                del self._under_way[origin]
