"""One HTTP/1.1 connection to a replica for the balancer's own requests, kept open from one to the next.

There are two reasons to keep it open. It is cheap: probing 64 members once a second costs a third of a core through
httpx, and about two hundredths of one here. And it shows a crash at once: the kernel closes the connections of a
process that ends.
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import httptools

from balancer.fleet.dial import OUR_OWN_LIMITS, Dialer, Unresolved
from balancer.fleet.member import Member

MAX_RESPONSE = 1 << 20  # bytes of a body


class NoResponse(Exception):
    """No complete response arrived; the message says why."""


class ConnectionRefused(NoResponse):
    """Nothing accepts connections there."""


class CannotProbe(Exception):
    """The request could not be sent, because of a shortage on our own side."""


@dataclass(frozen=True, slots=True)
class ProbeResponse:
    status: int
    body: bytes
    location: str = ""  # of a redirect


class ProbeConnection:
    """Sends one request at a time and connects again where it has to. `tls` is used for https members, `fields` are
    headers that go with every request.

    `when_broken` is called when a connection that has been used before closes unannounced between two requests.
    """

    def __init__(
        self,
        member: Member,
        tls: ssl.SSLContext | None = None,
        fields: Mapping[str, str] | None = None,
        when_broken: Callable[[], None] | None = None,
        dialer: Dialer | None = None,
    ) -> None:
        self.breaks = 0  # connections that closed unannounced: after each of them, another process may answer
        self._member = member
        self._tls = (tls or ssl.create_default_context()) if member.is_https else None
        self._fields = {"host": member.authority.decode(), **(fields or {})}
        self._when_broken = when_broken
        self._dialer = dialer or Dialer()
        self._connection: _HttpConnection | None = None

    async def request(
        self,
        path: str,
        timeout: float,
        method: str = "GET",
        fields: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> ProbeResponse:
        """Raises NoResponse (at most `timeout` seconds after the replica's name is resolved) or CannotProbe.

        `path` and the names in `fields` are ASCII; a field replaces the connection's own field of the same name.
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
                    pass  # it was already closing
            addresses = await self._dialer.addresses(self._member)
            async with self._dialer.within(timeout):
                self._connection = await self._connect(addresses, timeout)
                return await self._connection.exchange(message)
        except TimeoutError:
            raise NoResponse(f"no answer within {timeout:g} s") from None
        except (OSError, Unresolved) as error:
            raise NoResponse(str(error)) from None
        finally:
            if self._connection is not None and self._connection.is_busy:
                self.close()  # a late response would be taken for that to the next request

    async def _connect(self, addresses: Sequence[str], timeout: float) -> "_HttpConnection":
        try:
            return await self._dialer.connect(
                self._member, addresses, lambda: _HttpConnection(self._ended), self._tls, timeout
            )
        except TimeoutError:
            raise  # this does not mean that nothing listens
        except OSError as error:
            if error.errno in OUR_OWN_LIMITS:
                raise CannotProbe(str(error)) from None
            raise ConnectionRefused(str(error)) from None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _ended(self, connection: "_HttpConnection") -> None:
        if connection.was_announced:
            return
        self.breaks += 1
        # Some servers close after every response without announcing it: that is no crash to react to.
        if self._when_broken and connection.responses > 1 and not connection.is_busy:
            self._when_broken()


class _HttpConnection(asyncio.Protocol):
    def __init__(self, when_ended: Callable[["_HttpConnection"], None]) -> None:
        self.responses = 0
        self.was_announced = False  # its end
        self.is_closed = False
        self._when_ended = when_ended
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._response: asyncio.Future[ProbeResponse] | None = None
        self._status = 0
        self._body = b""
        self._size = 0
        self._location = b""
        self._ends_with_connection = False

    @property
    def is_busy(self) -> bool:
        """Is a response still outstanding?"""
        return self._response is not None

    async def exchange(self, message: bytes) -> ProbeResponse:
        """Raises ConnectionError when the connection ends before the whole response has arrived."""
        if self._transport is None or self.is_closed:
            raise ConnectionResetError("the connection was closed at once")
        self._response = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._status, self._body, self._size = 0, b"", 0
        self._location = b""
        self._transport.write(message)
        response = await self._response
        self._response = None
        self.responses += 1
        return response

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._response is None or self._response.done():
            self.close()  # nobody asked for this
            return
        self._size += len(data)
        if self._size > 2 * MAX_RESPONSE:  # with its head and framing
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
        self._parser = None  # it holds a reference to this connection, which holds one to it
        self._when_ended(self)

    # Called by the parser

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
        if len(self._body) > MAX_RESPONSE:
            self._fail("the answer is too long")

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._status >= 200:
            self.was_announced = not self._parser.should_keep_alive()
            self._succeed()
            if self.was_announced:
                self.close()

    def _succeed(self) -> None:
        if self._response is not None and not self._response.done():
            self._response.set_result(ProbeResponse(self._status, self._body, self._location.decode("latin-1")))

    def _fail(self, why: str) -> None:
        if self._response is not None and not self._response.done():
            self._response.set_exception(ConnectionError(why))
