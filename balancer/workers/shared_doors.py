"""The doors of one relay of several: the limits on memory and connections hold for all of them together."""

import asyncio
import socket
import ssl

from balancer.relay.doors import Doors, Facts, Server
from balancer.relay.request import Network
from balancer.relay.tls_listener import TlsListener
from balancer.spec.settings import Settings
from balancer.workers.board import CONNECTIONS, HELD, Board

# A relay that has more connections than another leaves a new one to it for so long, in seconds, and then takes it.
COURTESY = 0.002
# Bytes by which what a relay holds may change before it tells the others, other than four times a second.
NOTICEABLE = 64 << 10


class SharedDoors(Doors):
    """`relay` is its number on the `board`."""

    def __init__(
        self,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        server: Server,
        facts: Facts,
        trusted: tuple[Network, ...],
        board: Board,
        relay: int,
    ) -> None:
        self.board = board
        self.relay = relay
        self._published = 0  # bytes held, as the others know
        super().__init__(settings, loop, server, facts, trusted)

    @property
    def is_full(self) -> bool:
        held = self.buffered
        if abs(held - self._published) > NOTICEABLE:
            self._publish()
        return held + self.buffered_elsewhere > self.settings.max_buffered_bytes

    def _publish(self) -> None:
        self._published = self.buffered
        self.board.set(self.relay, HELD, self.buffered)
        self.buffered_elsewhere = self.board.elsewhere(self.relay, HELD)

    def sweep(self, now: float) -> None:
        super().sweep(now)
        self._publish()
        self.count_connections()

    def count_connections(self, opening: int = 0) -> None:
        self.board.set(self.relay, CONNECTIONS, len(self.connections) + opening)


class SharedListener(TlsListener):
    """Accepts, with TLS or without, from a socket that other relays accept from too, so that all have as many clients.

    Whoever is woken first would take all that wait, and one core would have all the work.
    """

    _doors: SharedDoors

    def __init__(self, doors: SharedDoors, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        self._has_waited = False
        super().__init__(doors, listener, context)

    def _accept_some(self) -> int:
        doors = self._doors
        doors.count_connections(len(self._tasks))
        counts = doors.board.all(CONNECTIONS)
        if counts[doors.relay] <= min(counts) or self._has_waited:
            self._has_waited = False
            return 1
        doors.loop.remove_reader(self._listener)
        doors.loop.call_later(COURTESY, self._waited)
        return 0

    def _waited(self) -> None:
        self._has_waited = True
        self._open()
