"""What all client connections share: the limits, the way in, and whether the house is closing."""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Protocol

from balancer.errors import ServeError
from balancer.relay.reply import Reply
from balancer.relay.request import Network, Request
from balancer.spec.settings import Settings

log = logging.getLogger("groundserve")

READ_SIZE = 64 << 10  # bytes of one read
SPARE = 1 / 64  # part of max_buffered_bytes that is freed at once: finding the largest holder takes a while


class Cuttable(Protocol):
    """What is cut when something goes wrong with it here."""

    def abort(self) -> None: ...


class Connection(Cuttable, Protocol):
    """A client's connection, as far as it concerns all of them together."""

    def flush(self) -> None: ...

    def recognise(self) -> None: ...

    def check_time(self, now: float) -> None: ...

    def close_if_idle(self) -> None: ...

    def break_off(self, why: str) -> None: ...

    def held(self) -> Iterator[tuple[str | bytes, int]]: ...

    @property
    def is_reading_body(self) -> bool: ...

    def give_way(self) -> bool: ...


class Server(Protocol):
    """Whoever answers the requests: the proxy."""

    def check(self, request: Request) -> None:
        """Looks at a request's head; raises ServeError to refuse it."""

    def serve(self, request: Request, reply: Reply, client: Any) -> Coroutine[Any, Any, None]:
        """Answers a whole request."""

    def refuse(self, request: Request, reply: Reply, error: ServeError) -> None:
        """Answers one that was refused."""


class Facts(Protocol):
    """Is the balancer told to stop, so that every answer is its connection's last?"""

    is_leaving: bool


class Doors:
    """The way in, for all clients."""

    def __init__(
        self,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        server: Server,
        facts: Facts,
        trusted: tuple[Network, ...] = (),
    ) -> None:
        self.settings = settings
        self.loop = loop
        self.server = server
        self.facts = facts
        self.trusted = trusted
        self.connections: set[Connection] = set()
        self.origins: Counter[bytes] = Counter()  # open connections by client
        self.buffered = 0  # bytes that requests take which are read and not yet passed on, over all connections
        self.is_closed = False
        self.incoming = memoryview(bytearray(READ_SIZE))  # each read's bytes, until they are parsed
        self._unflushed: list[Connection] = []
        self._hog: str | bytes | None = None  # the owner that held most when there was no room a moment ago

    def make_room(self, owner: str | bytes) -> bool:
        """More than max_buffered_bytes are held: refuses requests of those who hold more than `owner`, the most first.

        Returns False if that is not enough. So one client may use all of the memory, but cannot keep others out.
        Unfinished bodies go first, then requests without an answer, the largest first.
        """
        if owner == self._hog:
            return False
        most = self.settings.max_buffered_bytes
        totals: Counter[str | bytes] = Counter()
        holders: defaultdict[str | bytes, dict[Connection, int]] = defaultdict(dict)
        for connection in self.connections:
            for holder, count in connection.held():
                totals[holder] += count
                holders[holder][connection] = holders[holder].get(connection, 0) + count
        fair = most / len(totals)
        enough = most - int(most * SPARE)
        largest = [holder for holder, _ in totals.most_common()]
        self._hog = largest[0]
        if owner == self._hog:
            return False
        for holder in largest:
            if holder == owner:
                break
            held = holders[holder]
            for connection in sorted(held, key=lambda each: (each.is_reading_body, held[each]), reverse=True):
                if self.buffered <= enough or (self.buffered <= most and totals[holder] <= fair):
                    return True
                before = self.buffered
                try:
                    connection.give_way()
                except Exception:
                    _give_up(connection)
                totals[holder] -= before - self.buffered
            if self.buffered <= most:
                break
        return self.buffered <= most

    def flush_soon(self, connection: Connection) -> None:
        """What was written there is sent at the end of this round of the loop, together with what all others get.

        Answers that are sent one by one find their readers asleep one by one, and waking is dear: it was a twentieth
        of a small request.
        """
        if not self._unflushed:
            self.loop.call_soon(self._flush)
        self._unflushed.append(connection)

    def _flush(self) -> None:
        unflushed, self._unflushed = self._unflushed, []
        for connection in unflushed:
            try:
                connection.flush()
            except Exception:
                _give_up(connection)

    def soon(self, connection: Cuttable, step: Callable[[], None]) -> None:
        """The connection's next step, in the loop's next round."""
        self.loop.call_soon(_taken, connection, step)

    def trust(self, proxies: tuple[Network, ...]) -> None:
        """From now on these are the proxies whose word on who asks is kept, on open connections too."""
        self.trusted = proxies
        for connection in self.connections:
            connection.recognise()

    def sweep(self, now: float) -> None:
        """Ends what took too long; call it a few times a second. `now` is the loop's time in seconds."""
        self._hog = None
        for connection in list(self.connections):
            try:
                connection.check_time(now)
            except Exception:
                _give_up(connection)

    def close(self) -> None:
        """Nobody new comes in, and a connection ends with the answers that are under way on it; idle ones at once."""
        self.is_closed = True
        for connection in list(self.connections):
            try:
                connection.close_if_idle()
            except Exception:
                _give_up(connection)


def _taken(connection: Cuttable, step: Callable[[], None]) -> None:
    try:
        step()
    except Exception:
        _give_up(connection)


def _give_up(connection: Cuttable) -> None:
    """One connection's fault, in the midst of looking after all: the others must not wait for it."""
    log.exception("a client's connection failed here; it is cut")
    connection.abort()
