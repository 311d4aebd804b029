"""One HTTP/1.1 connection to a replica for the balancer's own questions, kept from one question to the next.

Kept for two reasons. It is cheap: 64 members asked once a second cost a third of a core through httpx and about two
hundredths of one here. And it tells of a death at once: the kernel closes the connections of a process that ended.
"""

import asyncio
import errno
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import httptools

from balancer.fleet.dial import Dialer, Unresolved
from balancer.fleet.member import Member

LARGEST_ANSWER = 1 << 20
# What connecting may end in for want of something on our side: it says nothing of the replica.
OUR_OWN_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}


class Unheard(Exception):
    """No whole answer came; the message says why."""


class Refused(Unheard):
    """Nothing takes connections there."""


class NotAsked(Exception):
    """The question could not be put, for want of something on our own side."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    location: str = ""  # where it says to go instead


class Line:
    """Asks one question at a time. `tls` is for https members, `fields` are headers that go with each question.

    `when_broken` is called when a connection that has served before ends unannounced between two questions.
    """

    def __init__(
        self,
        member: Member,
        tls: ssl.SSLContext | None = None,
        fields: Mapping[str, str] | None = None,
        when_broken: Callable[[], None] | None = None,
        dialer: Dialer | None = None,
    ) -> None:
        self.breaks = 0  # connections that ended unannounced: after each, another process may answer
        self._member = member
        self._tls = (tls or ssl.create_default_context()) if member.is_https else None
        self._fields = {"host": member.authority.decode(), **(fields or {})}
        self._when_broken = when_broken
        self._dialer = dialer or Dialer()
        self._connection: _Connection | None = None

    async def ask(
        self,
        path: str,
        timeout: float,
        method: str = "GET",
        fields: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> Answer:
        """The answer; raises Unheard (`timeout` seconds after it is known where to ask, at the latest) or NotAsked.

        `path` and the names in `fields` are ASCII; a field replaces the line's own of the same name.
        """
        merged = self._fields
        if fields:
            merged = merged | {name.lower(): value for name, value in fields.items()}
        if body:
            merged = merged | {"content-length": str(len(body))}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in merged.items()), "", ""]
        message = "\r\n".join(lines).encode() + body
        try:
            if self._connection is not None and not self._connection.is_closed:
                try:
                    async with self._dialer.within(timeout):
                        return await self._connection.exchange(message)
                except ConnectionError:
                    pass  # it was closing already
            addresses = await self._dialer.addresses(self._member)
            async with self._dialer.within(timeout):
                self._connection = await self._connect(addresses, timeout)
                return await self._connection.exchange(message)
        except TimeoutError:
            raise Unheard(f"no answer within {timeout:g} s") from None
        except (OSError, Unresolved) as error:
            raise Unheard(str(error)) from None
        finally:
            if self._connection is not None and self._connection.is_asked:
                self.close()  # its answer would be taken for that to the next question

    async def _connect(self, addresses: Sequence[str], timeout: float) -> "_Connection":
        try:
            return await self._dialer.connect(
                self._member, addresses, lambda: _Connection(self._ended), self._tls, timeout
            )
        except TimeoutError:
            raise  # it does not say that nothing listens
        except OSError as error:
            if error.errno in OUR_OWN_LIMITS:
                raise NotAsked(str(error)) from None
            raise Refused(str(error)) from None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _ended(self, connection: "_Connection") -> None:
        if connection.was_announced:
            return
        self.breaks += 1
        # Some servers close after each answer without a word: no death to hurry for.
        if self._when_broken and connection.answers > 1 and not connection.is_asked:
            self._when_broken()


class _Connection(asyncio.Protocol):
    def __init__(self, when_ended: Callable[["_Connection"], None]) -> None:
        self.answers = 0
        self.was_announced = False  # its end
        self.is_closed = False
        self._when_ended = when_ended
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._status = 0
        self._body = b""
        self._size = 0
        self._location = b""
        self._ends_with_connection = False

    @property
    def is_asked(self) -> bool:
        return self._answer is not None

    async def exchange(self, message: bytes) -> Answer:
        """Raises ConnectionError when the connection ends before a whole answer came."""
        if self._transport is None or self.is_closed:
            raise ConnectionResetError("the connection was closed at once")
        self._answer = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._status, self._body, self._size = 0, b"", 0
        self._location = b""
        self._transport.write(message)
        answer = await self._answer
        self._answer = None
        self.answers += 1
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._answer is None or self._answer.done():
            self.close()  # nobody asked
            return
        self._size += len(data)
        if self._size > 2 * LARGEST_ANSWER:  # with its head and framing
            self._fail("the answer is too long")
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"the answer is no HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        if self._status >= 200 and self._ends_with_connection and error is None:
            self.was_announced = True
            self._succeed()
        else:
            self._fail(str(error or "the connection ended before the answer did"))
        self._parser = None  # it holds this connection, which holds it
        self._when_ended(self)

    # What the parser tells us

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._ends_with_connection = False
        elif name.lower() == b"location":
            self._location = value

    def on_message_begin(self) -> None:
        self._ends_with_connection = True

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self._status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._body += data
        if len(self._body) > LARGEST_ANSWER:
            self._fail("the answer is too long")

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._status >= 200:
            self.was_announced = not self._parser.should_keep_alive()
            self._succeed()
            if self.was_announced:
                self.close()

    def _succeed(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(self._status, self._body, self._location.decode("latin-1")))

    def _fail(self, why: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(why))
