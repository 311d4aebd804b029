"""What all client connections share: the limits, the memory they hold, and whether the endpoint is closing."""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, Protocol

from balancer.errors import ServeError
from balancer.relay.reply import Reply
from balancer.relay.request import Network, Request
from balancer.spec.settings import Settings

log = logging.getLogger("groundserve")

READ_SIZE = 64 << 10  # bytes of one read
SPARE = 1 / 64  # share of max_buffered_bytes freed in one go, because finding the largest holder takes a while


class Cuttable(Protocol):
    """A connection that is aborted if our own code fails on it."""

    def abort(self) -> None: ...


class Connection(Cuttable, Protocol):
    """A client's connection, as far as `Doors` uses it."""

    def flush(self) -> None: ...

    def recognise(self) -> None: ...

    def check_time(self, now: float) -> None: ...

    def close_if_idle(self) -> None: ...

    def break_off(self, why: str) -> None: ...

    def held(self) -> Iterator[tuple[str | bytes, int]]: ...

    @property
    def is_reading_body(self) -> bool: ...

    def give_way(self) -> bool: ...


Holders = defaultdict[str | bytes, dict[Connection, int]]


class Server(Protocol):
    """What answers the requests: the proxy."""

    def check(self, request: Request) -> None:
        """Checks a request's head; raises ServeError to refuse it."""

    def serve(self, request: Request, reply: Reply, client: Any) -> Coroutine[Any, Any, None]:
        """Answers a whole request; sets `reply.is_taken` first, and from then on logs what becomes of it."""

    def refuse(self, request: Request, reply: Reply, error: ServeError) -> None:
        """Answers a refused request."""


class Facts(Protocol):
    """`is_leaving`: the balancer was told to stop, so every answer is the last on its connection."""

    is_leaving: bool


class Share(Protocol):
    """What this process and others that serve the same endpoint tell each other."""

    def held_elsewhere(self, held: int) -> int:
        """How many bytes all others hold; `held` is how many this one does."""

    def press(self, most: int) -> None:
        """There is no room here: others that hold more than their part of `most` bytes free some."""


class Doors:
    """The state that all client connections share."""

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
        self.buffered = 0  # bytes held for all connections: unparsed input, requests, and kept parts of streams
        # What other processes have that serve the same endpoint: open connections by client, and bytes held.
        self.origins_elsewhere: Mapping[bytes, int] = {}
        self.buffered_elsewhere = 0
        self.share: Share | None = None
        self.is_closed = False
        self.incoming = memoryview(bytearray(READ_SIZE))  # each read's bytes, until they are parsed
        self._unflushed: list[Connection] = []
        self._hog: str | bytes | None = None  # the owner that held the most when room ran out, until the next sweep

    @property
    def is_full(self) -> bool:
        """Is more than max_buffered_bytes held?"""
        if self.share is not None:
            self.buffered_elsewhere = self.share.held_elsewhere(self.buffered)
        return self.buffered + self.buffered_elsewhere > self.settings.max_buffered_bytes

    def make_room(self, owner: str | bytes) -> bool:
        """Once more than max_buffered_bytes are held, frees memory of those who hold more than `owner`, largest first.

        Returns False if that is not enough. So one client may use all of the memory, but cannot keep others out.
        Of each holder's connections, those that are reading a body go first, and the larger before the smaller.
        """
        has_room = self._make_room(owner)
        if not has_room and self.share is not None:
            self.share.press(self.settings.max_buffered_bytes)
        return has_room

    def _make_room(self, owner: str | bytes) -> bool:
        if owner == self._hog:
            return False
        most = self.settings.max_buffered_bytes - self.buffered_elsewhere
        totals, holders = self._holders()
        fair = most / len(totals)
        enough = most - int(most * SPARE)
        largest = [holder for holder, _ in totals.most_common()]
        self._hog = largest[0]
        if owner == self._hog:
            return False
        for holder in largest:
            if holder == owner:
                break
            for connection in _in_turn(holders[holder]):
                if self.buffered <= enough or (self.buffered <= most and totals[holder] <= fair):
                    return True
                totals[holder] -= self._freed(connection)
            if self.buffered <= most:
                break
        return self.buffered <= most

    def make_room_for_others(self, most: int) -> None:
        """Frees memory until no more than `most` bytes are held here: that of the largest holders first.

        Nobody who holds no more than an equal part of `most` gives way.
        """
        if self.buffered <= most:
            return
        totals, holders = self._holders()
        for holder, _ in totals.most_common():
            for connection in _in_turn(holders[holder]):
                if self.buffered <= most or totals[holder] <= most / len(totals):
                    break
                totals[holder] -= self._freed(connection)

    def _holders(self) -> tuple[Counter[str | bytes], Holders]:
        """How many bytes each holds, and on which connections."""
        totals: Counter[str | bytes] = Counter()
        holders: Holders = defaultdict(dict)
        for connection in self.connections:
            for holder, count in connection.held():
                totals[holder] += count
                holders[holder][connection] = holders[holder].get(connection, 0) + count
        return totals, holders

    def _freed(self, connection: Connection) -> int:
        """Has the connection give way; returns how many bytes that freed."""
        before = self.buffered
        try:
            connection.give_way()
        except Exception:
            _give_up(connection)
        return before - self.buffered

    def flush_soon(self, connection: Connection) -> None:
        """Sends what the connection wrote at the end of this round of the loop, together with what all others get.

        Answers sent one by one wake their sleeping readers one by one, and waking is expensive: it took a twentieth of
        a small request's cost.
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
        """Runs the connection's next step in the loop's next round."""
        self.loop.call_soon(_taken, connection, step)

    def trust(self, proxies: tuple[Network, ...]) -> None:
        """From now on these proxies are trusted to say who the client is, on open connections too."""
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
        """Lets no new client in; closes idle connections at once, the others after the answers in progress on them."""
        self.is_closed = True
        for connection in list(self.connections):
            try:
                connection.close_if_idle()
            except Exception:
                _give_up(connection)


def _in_turn(held: Mapping[Connection, int]) -> list[Connection]:
    """A holder's connections in the order in which they give way."""
    return sorted(held, key=lambda each: (each.is_reading_body, held[each]), reverse=True)


def _taken(connection: Cuttable, step: Callable[[], None]) -> None:
    try:
        step()
    except Exception:
        _give_up(connection)


def _give_up(connection: Cuttable) -> None:
    """Logs and aborts one connection on which our code failed, so that the others are still served."""
    log.exception("a client's connection failed here; it is cut")
    connection.abort()
