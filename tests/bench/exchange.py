"""The client's side of one HTTP/1.1 connection: sends a request, hands on each part of the answer."""

import asyncio
import ssl
import time
from urllib.parse import urlsplit

import httptools

from tests.bench.messages import CHAT_PATH


class Exchange(asyncio.Protocol):
    """One request at a time. Subclasses say what to do with `on_body`, `completed` and `failed`."""

    transport: asyncio.Transport

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.parser = httptools.HttpResponseParser(self)
        self.waiting = False  # for the rest of an answer
        self.sent_at = 0.0

    def send(self) -> None:
        self.waiting = True
        self.sent_at = time.monotonic()
        self.transport.write(self.request)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        if self.waiting:
            self.fail(f"connection lost within an answer: {exc or 'closed'}")

    def on_message_complete(self) -> None:
        self.waiting = False
        self.completed(self.parser.get_status_code(), self.parser.should_keep_alive())

    def fail(self, reason: str) -> None:
        self.waiting = False
        self.transport.close()
        self.failed(reason)

    def on_body(self, body: bytes) -> None:
        raise NotImplementedError

    def completed(self, status: int, keep_alive: bool) -> None:
        raise NotImplementedError

    def failed(self, reason: str) -> None:
        raise NotImplementedError


def tls(url: str) -> ssl.SSLContext | None:
    """What a connection to it needs; whose certificate it is does not matter here."""
    if not url.startswith("https:"):
        return None
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def address(url: str) -> tuple[str, int]:
    """Host and port of http://HOST:PORT, or https."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not parts.port:
        raise ValueError(f"not a URL like http://HOST:PORT: {url}")
    return parts.hostname, parts.port


def chat_post(url: str, body: bytes, key: str = "") -> bytes:
    """The bytes of one chat request, with the headers of a usual client, and with its key if it has one."""
    host, port = address(url)
    bearer = f"Authorization: Bearer {key}\r\n" if key else ""
    head = (
        f"POST {CHAT_PATH} HTTP/1.1\r\nHost: {host}:{port}\r\nUser-Agent: groundserve-bench\r\nAccept: */*\r\n"
        f"{bearer}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
