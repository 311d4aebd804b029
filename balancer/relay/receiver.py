"""What takes a replica's answer as it arrives: what one connection to a replica asks of it."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from balancer.relay.upstream import ReplicaConnection

Headers = list[tuple[bytes, bytes]]


class Unwanted(Exception):
    """Raised by a receiver during a body: the rest of this answer is not wanted, so its connection is closed."""


class Receiver(Protocol):
    """Takes a replica's answer piece by piece as it arrives."""

    def on_head(self, status: int, headers: Headers, length: int | None) -> bool:
        """Takes the head, with the body's length in bytes or None. Returns False if the rest is not wanted."""

    def on_body(self, data: bytes, now: float) -> None:
        """Takes a piece of the body, and when it was read (loop time, seconds)."""

    def on_end(self, seconds: float) -> bool:
        """Ends the answer, `seconds` after the request was sent. Returns False if it says that the replica is full."""


@runtime_checkable
class FrameReceiver(Receiver, Protocol):
    """Takes what comes on a connection that the replica has switched to WebSocket, if it does so."""

    def on_switch(self, headers: Headers, connection: "ReplicaConnection") -> None: ...

    def on_frames(self, data: bytes, now: float) -> None: ...

    def on_lost(self) -> None:
        """The connection has ended."""

    def on_slow(self, is_slow: bool) -> None:
        """The replica takes no more for now, or does so again."""
