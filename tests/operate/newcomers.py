"""Clients that come one after the other, each with a connection of its own, and what they got.

Two hundred come a second, over TLS fifty: a handshake costs either side more than a request does.
"""

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.support.until import wait_until

A_SECOND, A_SECOND_BY_TLS = 200, 50
_BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()


@dataclass(slots=True)
class Newcomer:
    """When it began (`time.monotonic`), how far it came, and what became of it: "200", or what went wrong."""

    began: float
    is_connected: bool = False
    is_let_in: bool = False  # with TLS: the handshake is done
    outcome: str = ""


@dataclass(slots=True)
class Newcomers:
    all: list[Newcomer] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def answered(self) -> int:
        return sum(one.outcome == "200" for one in self.all)

    def since(self, moment: float) -> list[Newcomer]:
        return [one for one in self.all if one.began >= moment]

    def outcomes(self, since: float = 0.0) -> dict[str, int]:
        found = [one.outcome for one in self.since(since)]
        return {outcome: found.count(outcome) for outcome in set(found)}

    def until_more_are_answered(self, count: int = A_SECOND) -> None:
        began = time.monotonic()
        wait_until(lambda: sum(one.outcome == "200" for one in self.since(began)) >= count, self.outcomes)


@contextlib.contextmanager
def newcomers(endpoint: str, trusted: ssl.SSLContext | None = None) -> Iterator[Newcomers]:
    """They come meanwhile, over TLS if told whom to trust. When it is over, each has its outcome."""
    seen = Newcomers()
    thread = threading.Thread(target=lambda: asyncio.run(_come(endpoint, trusted, seen)))
    thread.start()
    try:
        wait_until(lambda: seen.answered() >= A_SECOND / 2, seen.outcomes)
        yield seen
    finally:
        seen.is_over.set()
        thread.join()


async def _come(endpoint: str, trusted: ssl.SSLContext | None, seen: Newcomers) -> None:
    loop = asyncio.get_running_loop()
    due, between = loop.time(), 1 / (A_SECOND_BY_TLS if trusted else A_SECOND)
    async with asyncio.TaskGroup() as group:
        while not seen.is_over.is_set():
            group.create_task(_ask(endpoint, trusted, seen))
            due = max(due + between, loop.time() - 0.1)  # late, it catches up a little
            await asyncio.sleep(max(0.0, due - loop.time()))


async def _ask(endpoint: str, trusted: ssl.SSLContext | None, seen: Newcomers) -> None:
    one = Newcomer(time.monotonic())
    seen.all.append(one)
    address = urlsplit(endpoint)
    connection = socket.socket()
    connection.setblocking(False)
    try:
        async with asyncio.timeout(60):
            await asyncio.get_running_loop().sock_connect(connection, (address.hostname, address.port))
            one.is_connected = True
            name = address.hostname if trusted else None
            reader, writer = await asyncio.open_connection(
                sock=connection, ssl=trusted, server_hostname=name, ssl_handshake_timeout=60 if trusted else None
            )
            one.is_let_in = True
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
            )
            answer = await reader.read()
            writer.close()
        one.outcome = (
            answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/1.1 ") else f"closed {answer[:80]!r}"
        )
    except (OSError, TimeoutError) as failure:
        one.outcome = type(failure).__name__
    finally:
        connection.close()
