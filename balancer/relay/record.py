"""What is remembered of one request when it is over: the source of its log line and of the metrics."""

import re
from dataclasses import dataclass
from typing import Protocol

from balancer.fleet.member import Member

_FIGURE = re.compile(rb'"(prompt|completion|cached|input|output|cache_read_input)_tokens":\s*(\d{1,15})(?!\d)')


@dataclass(slots=True)
class Record:
    """One request. Times are loop times, spans seconds, sizes bytes; None is unknown or does not apply."""

    id: str
    method: str
    path: str
    received_at: float
    status: int = 0
    member: str = ""
    attempts: int = 0
    queued: float = 0.0
    # A new connection to the member took this long; None where an idle one was used.
    connect: float | None = None
    # How the attempts before the last one failed, in the words of upstream.Outcome.
    retries: tuple[str, ...] = ()
    is_stream: bool = False
    first_byte: float | None = None
    duration: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    reason: str = ""
    matched: float | None = None  # the share of the prompt that the policy took to be cached at the member
    key: str = ""
    error: str = ""

    def read_usage(self, piece: bytes) -> None:
        """Takes the token counts from the end of an answer, or from the beginning of a stream of Anthropic's."""
        first = piece.find(b'_tokens":')
        if first < 0:
            return
        start = max(0, first - len(b'"cache_read_input'))
        found: dict[bytes, bytes | int] = dict(_FIGURE.findall(piece, start))  # of several the last one holds
        if b"input" in found:  # all of it in /v1/responses, in Anthropic's /v1/messages only what was not cached
            found[b"prompt"] = int(found[b"input"]) + int(found.get(b"cache_read_input", 0))
            if b"cache_read_input" in found:
                found[b"cached"] = found[b"cache_read_input"]
        if b"prompt" in found:
            self.prompt_tokens = int(found[b"prompt"])
        if b"completion" in found or b"output" in found:
            self.completion_tokens = int(found.get(b"completion") or found[b"output"])
        if b"cached" in found:
            self.cached_tokens = int(found[b"cached"])


class Spans(Protocol):
    """Takes note of one span after the other, in seconds."""

    def note(self, value: float) -> None: ...


class RequestObserver(Protocol):
    """Whoever wants to know of each request that is over. Called on the hot path: it must only take note."""

    def finished(self, record: Record) -> None: ...

    def gaps(self, member: Member) -> Spans:
        """Where the spans between the pieces of a streamed answer of that member go."""
