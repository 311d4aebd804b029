"""What one relay of several shares with the others: room in memory, and the clients that connect."""

import socket
import ssl

from balancer.relay.doors import Doors
from balancer.relay.tls_listener import TlsListener
from balancer.workers.board import CONNECTIONS, HELD, PRESSED, Board

# A relay that has more connections than another leaves a new one to it for so long, in seconds, and then takes it.
COURTESY = 0.002
# Bytes by which what a relay holds may change before it tells the others, other than four times a second.
NOTICEABLE = 64 << 10


class SharedMemory:
    """Implements balancer.relay.doors.Share. `relay` is the relay's number on the `board`."""

    def __init__(self, board: Board, relay: int) -> None:
        self._board = board
        self._relay = relay
        self._told = 0  # bytes held here, as the others know
        self._elsewhere = 0
        self._pressed = 0  # how often others lacked room, as far as it was heeded here

    def held_elsewhere(self, held: int) -> int:
        if abs(held - self._told) > NOTICEABLE:
            self.tell(held)
        return self._elsewhere

    def tell(self, held: int) -> int:
        """The same, up to date on both sides."""
        self._told = held
        self._board.set(self._relay, HELD, held)
        self._elsewhere = self._board.elsewhere(self._relay, HELD)
        return self._elsewhere

    def press(self, most: int) -> None:
        relays = self._board.relays
        if self._elsewhere > most * (relays - 1) // relays:
            self._board.add_one(self._relay, PRESSED)

    def owed(self, most: int) -> int | None:
        """How many of `most` bytes may be held here if another has lacked room since the last call; else None."""
        before, self._pressed = self._pressed, self._board.elsewhere(self._relay, PRESSED)
        return most // self._board.relays if self._pressed > before else None


class SharedListener(TlsListener):
    """Accepts, with TLS or without, from a socket that other relays accept from too, so that all have as many clients.

    Whoever is woken first would take all that wait, and one core would have all the work.
    """

    def __init__(
        self, doors: Doors, listener: socket.socket, context: ssl.SSLContext | None, board: Board, relay: int
    ) -> None:
        self._has_waited = False
        self._board = board
        self._relay = relay
        super().__init__(doors, listener, context)

    def _accept_some(self) -> int:
        self.count()
        counts = self._board.all(CONNECTIONS)
        if counts[self._relay] <= min(counts) or self._has_waited:
            self._has_waited = False
            return 1
        self._doors.loop.remove_reader(self._listener)
        self._doors.loop.call_later(COURTESY, self._waited)
        return 0

    def count(self) -> None:
        """Tells the others how many connections there are here."""
        self._board.set(self._relay, CONNECTIONS, len(self._doors.connections) + len(self._tasks))

    def _waited(self) -> None:
        self._has_waited = True
        self._open()
