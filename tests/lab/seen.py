"""What a lab replica saw: every request byte for byte, and counts of connections and generations."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["open", "answered", "cut", "client_left", "raced"]


@dataclass(slots=True)
class SeenRequest:
    """One request and what became of it. Times are seconds since the replica started."""

    number: int
    connection: int  # 1 for the first connection accepted
    method: str
    target: str  # as received, undecoded
    version: str
    headers: list[tuple[str, str]]  # as received, with order, case and repetitions
    received_at: float  # when its head was complete
    body: bytes = b""  # the first MiB
    body_length: int = 0
    body_sha256: str = ""
    body_chunked: bool = False
    body_whole: bool = False
    generated: bool = False  # a generation was started for it
    tokens_sent: int = 0
    status: int | None = None
    bytes_sent: int = 0  # handed to the kernel, head included
    outcome: Outcome = "open"
    ended_at: float | None = None
    client_left_after: float | None = None  # from received_at to the client's leaving, if it left first

    @property
    def id(self) -> str:
        """The X-Request-Id header, or the empty string."""
        return self.header("x-request-id") or ""

    def header(self, name: str) -> str | None:
        """The first value of a header, whatever its case."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def headers_named(self, name: str) -> list[str]:
        """All values of a header, in order."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def as_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "body"}
        return {"id": self.id, **plain}


@dataclass(slots=True)
class Seen:
    """All that was seen, and a way to wait for more. `requests` are those on serving paths, `probes` all others."""

    started: float = field(default_factory=time.monotonic)
    requests: list[SeenRequest] = field(default_factory=list)
    probes: list[SeenRequest] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)  # why received bytes are no HTTP request
    crashes: list[str] = field(default_factory=list)  # tracebacks of the lab itself: always a bug in the lab
    connections_accepted: int = 0
    connections_open: int = 0
    generations_started: int = 0
    generations_finished: int = 0
    generations_aborted: int = 0
    version: int = 0  # rises with each change
    _waiters: list[asyncio.Future[None]] = field(default_factory=list)

    def now(self) -> float:
        return time.monotonic() - self.started

    @property
    def last(self) -> SeenRequest:
        return self.requests[-1]

    def with_id(self, request_id: str) -> list[SeenRequest]:
        """Every request that carried this X-Request-Id."""
        return [request for request in self.requests if request.id == request_id]

    def changed(self) -> None:
        self.version += 1
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def until(self, claim: Callable[["Seen"], object], timeout: float | None = 60.0) -> None:
        """Wait until the claim holds. Raises AssertionError with the counts after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not claim(self):
                    waiter = asyncio.get_running_loop().create_future()
                    self._waiters.append(waiter)
                    await waiter
        except TimeoutError:
            raise AssertionError(f"not so after {timeout} s; the replica saw {self.counts()}") from None

    def counts(self) -> dict[str, int]:
        return {
            "requests": len(self.requests),
            "probes": len(self.probes),
            "connections_accepted": self.connections_accepted,
            "connections_open": self.connections_open,
            "generations_started": self.generations_started,
            "generations_finished": self.generations_finished,
            "generations_aborted": self.generations_aborted,
            "version": self.version,
        }

    def as_json(self) -> dict[str, Any]:
        return {
            **self.counts(),
            "now": self.now(),
            "malformed": self.malformed,
            "crashes": self.crashes,
            "requests": [request.as_json() for request in self.requests],
        }
