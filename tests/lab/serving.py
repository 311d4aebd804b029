"""The serving paths of a lab replica: answers, echoes, and every fault the knobs ask for."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Never

from tests.lab import answers
from tests.lab.asked import Asked, BadRequest, Kind
from tests.lab.exchange import Exchange, standard_headers
from tests.lab.knobs import Knobs
from tests.lab.model import QueueFull
from tests.lab.pace import Pace, usage
from tests.lab.prompts import tokenized
from tests.lab.seen import Seen

GENERATING: dict[str, Kind] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/generate": "generate",
    "/v1/messages": "messages",
}
TOKENIZING = ("/tokenize", "/v1/tokenize")
PIECE = bytes(65536)

PaceFor = Callable[[Knobs, Asked], Pace]


async def silence() -> Never:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


class Sender:
    """Writes one response as the knobs say: framing, splits, cuts and hangs."""

    def __init__(self, exchange: Exchange, knobs: Knobs) -> None:
        self.exchange = exchange
        self.knobs = knobs
        self._body_bytes = 0

    async def head(self, status: int, content_type: str, length: int | None) -> None:
        """Everything up to the body, with the faults that come before it."""
        knobs, exchange = self.knobs, self.exchange
        if knobs.head_delay:
            await asyncio.sleep(knobs.head_delay)
        if knobs.hang == "before_head":
            await silence()
        if knobs.cut == "before_head":
            exchange.connection.cut(knobs.cut_by)
        for number in knobs.interim:
            await exchange.write(f"HTTP/1.1 {number} Interim\r\n\r\n".encode())
        if knobs.connection_close:
            exchange.keeps_alive = False
        headers = [*standard_headers(knobs.content_type or content_type), *knobs.headers]
        if knobs.retry_after:
            headers.append(("retry-after", knobs.retry_after))
        data = exchange.head_bytes(status, headers, knobs.framing, length)
        if knobs.cut == "mid_head":
            await exchange.write(data[: len(data) // 2])
            exchange.connection.cut(knobs.cut_by)
        await exchange.write(data)
        if knobs.hang == "after_head":
            await silence()
        if knobs.cut == "after_head":
            exchange.connection.cut(knobs.cut_by)

    async def body(self, data: bytes) -> None:
        """A piece of the body, unframed."""
        knobs, exchange = self.knobs, self.exchange
        if exchange.head.method == "HEAD" or exchange.record.status in (204, 304):
            return
        cut = knobs.cut == "after_bytes" and self._body_bytes + len(data) >= knobs.cut_after
        if cut:
            data = data[: knobs.cut_after - self._body_bytes]
        self._body_bytes += len(data)
        if knobs.split:
            for start in range(0, len(data), knobs.split):
                await exchange.write(exchange.framed(data[start : start + knobs.split]))
                await asyncio.sleep(0)
        elif data:
            await exchange.write(exchange.framed(data))
        if cut:
            exchange.connection.cut(knobs.cut_by)

    def ended(self, event: bytes) -> bytes:
        """An SSE event with its empty line, and with the line ends that the knob asks for."""
        end = self.knobs.event_end.encode()
        return event.replace(b"\n", end[: len(end) // 2]) + end

    async def event(self, event: bytes) -> None:
        await self.body(self.ended(event))

    async def token(self, count: int, event: bytes) -> None:
        """The event of a token after `count` others."""
        knobs, exchange = self.knobs, self.exchange
        data = self.ended(event)
        if count == knobs.cut_after and knobs.cut == "mid_event":
            await exchange.write(exchange.framed(data[: len(data) // 2]))
            exchange.connection.cut(knobs.cut_by)
        if count == knobs.cut_after and knobs.cut == "mid_chunk":
            framed = exchange.framed(data)
            await exchange.write(framed[: len(framed) // 2])
            exchange.connection.cut(knobs.cut_by)
        await self.body(data)
        exchange.record.tokens_sent = count + 1
        if count + 1 == knobs.hang_after and knobs.hang == "after_tokens":
            await silence()
        if count + 1 == knobs.cut_after and knobs.cut == "after_tokens":
            exchange.connection.cut(knobs.cut_by)

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        """A response whose body is known."""
        await self.head(status, content_type, None if self.knobs.framing == "chunked" else len(body))
        await self.body(body)
        await self.exchange.finish()


async def serve(
    exchange: Exchange, knobs: Knobs, seen: Seen, pace_for: PaceFor, die: Callable[[], None] = lambda: None
) -> None:
    """Answer one request on a serving path; a poison request makes the replica `die`."""
    path = exchange.head.target.partition("?")[0]
    if knobs.race and exchange.connection.served:
        exchange.connection.race()
    if knobs.early == "close":
        exchange.keeps_alive = False
        exchange.connection.stop_reading()
    elif not knobs.early:
        await exchange.read_body()
    if knobs.poison and knobs.poison.encode() in exchange.body:
        die()
        await silence()
    sender = Sender(exchange, knobs)
    kind = GENERATING.get(path) if exchange.head.method in ("POST", "PUT") else None
    if knobs.raw is not None:
        await _raw(exchange, knobs, knobs.raw.encode("latin-1"))
    elif knobs.status >= 400:
        message = answers.QUEUE_FULL if knobs.status == 503 else "what the test asked for"
        ordinary = answers.error(knobs.status, message, str(knobs.status))
        body = ordinary if knobs.body is None else knobs.body.encode()
        await sender.whole(knobs.status, "application/json", body)
    elif knobs.body_mib:
        await _huge(sender, round(knobs.body_mib * (1 << 20)))
    elif knobs.body is not None:
        await sender.whole(knobs.status or 200, "text/plain", knobs.body.encode())
    elif (
        path in TOKENIZING
        and not knobs.early
        and (counted := tokenized(exchange.body, opens_thinking=knobs.opens_thinking)) is not None
    ):
        await sender.whole(200, "application/json", counted)
    elif path == "/v1/realtime" and exchange.record.header("upgrade") == "websocket":
        from tests.lab.realtime import converse  # with a library that the lab's image does not have

        await converse(exchange, knobs)
    elif kind is not None and not knobs.early:
        await _generate(sender, kind, seen, pace_for)
    else:
        content_type = exchange.record.header("content-type") or "application/octet-stream"
        await sender.whole(knobs.status or 200, content_type, exchange.body)
    if knobs.early == "read":
        await exchange.read_body()


async def _raw(exchange: Exchange, knobs: Knobs, data: bytes) -> None:
    if knobs.head_delay:
        await asyncio.sleep(knobs.head_delay)
    await exchange.write(data)
    if knobs.raw_then == "hang":
        await silence()
    if knobs.raw_then != "keep":
        exchange.connection.cut(knobs.raw_then)
    exchange.connection.end("answered")


async def _huge(sender: Sender, size: int) -> None:
    length = None if sender.knobs.framing == "chunked" else size
    await sender.head(sender.knobs.status or 200, "application/octet-stream", length)
    for start in range(0, size, len(PIECE)):
        await sender.body(PIECE[: size - start])
    await sender.exchange.finish()


async def _generate(sender: Sender, kind: Kind, seen: Seen, pace_for: PaceFor) -> None:
    exchange, knobs = sender.exchange, sender.knobs
    try:
        asked = Asked.read(kind, exchange.body, knobs)
        generation = answers.Generation(
            asked, words=answers.words(asked.tokens, asked.begin, asked.closes_at, asked.opens_thinking)
        )
        pace = pace_for(knobs, asked)
    except BadRequest as error:
        await sender.whole(400, "application/json", answers.bad_request(kind, str(error)))
        return
    except QueueFull:
        await _refuse(sender, generation)
        return
    exchange.record.generated = True
    seen.generations_started += 1
    seen.changed()
    try:
        if asked.stream:
            await _stream(sender, generation, pace, seen)
        else:
            await _answer_whole(sender, generation, pace, seen)
    except BaseException:
        _abort(exchange, pace, seen, knobs.abort_delay_for(asked.stream))
        raise
    seen.generations_finished += 1
    seen.changed()


def _abort(exchange: Exchange, pace: Pace, seen: Seen, delay: float) -> None:
    """End a generation that no client waits for: after SGLang's delay if its client left, otherwise at once."""

    def now() -> None:
        if pace.abort():
            seen.generations_aborted += 1
        else:
            seen.generations_finished += 1
        seen.changed()

    if delay and exchange.record.outcome == "client_left":
        asyncio.get_running_loop().call_later(delay, now)
    else:
        now()


async def _refuse(sender: Sender, generation: answers.Generation) -> None:
    # As SGLang does: only a request that is not streamed learns of a full queue from its status.
    if not generation.asked.stream:
        await sender.whole(503, "application/json", answers.queue_full(generation.asked.kind))
        return
    await sender.head(200, "text/event-stream; charset=utf-8", None)
    for event in answers.refused(generation):
        await sender.event(event)
    await sender.exchange.finish()


async def _answer_whole(sender: Sender, generation: answers.Generation, pace: Pace, seen: Seen) -> None:
    for position in range(len(generation.words)):
        await pace.token(position)
    record = sender.exchange.record
    record.tokens_sent = len(generation.words)
    body = answers.whole(generation, usage(pace, len(generation.words)), seen.now() - record.received_at)
    await sender.whole(sender.knobs.status or 200, "application/json", body)


def _events(
    generation: answers.Generation, pace: Pace, since: Callable[[], float]
) -> Iterator[tuple[list[bytes], bytes]]:
    """For each token, the events before it and its own event; at the end, the last events and an empty one."""
    for position in range(len(generation.words)):
        used = usage(pace, position + 1)
        opening = answers.first(generation, used) if position == 0 else []
        yield opening, answers.token(generation, position, used, since())
    yield answers.last(generation, usage(pace, len(generation.words))), b""


async def _stream(sender: Sender, generation: answers.Generation, pace: Pace, seen: Seen) -> None:
    knobs = sender.knobs

    def since() -> float:
        return seen.now() - sender.exchange.record.received_at

    length = None
    if knobs.framing in ("content-length", "http/1.0+length"):
        events = [event for before, own in _events(generation, pace, lambda: 0.0) for event in (*before, own) if event]
        length = sum(len(sender.ended(event)) for event in events)
    await sender.head(knobs.status or 200, "text/event-stream; charset=utf-8", length)
    coming = _events(generation, pace, since)
    for position in range(len(generation.words)):
        await pace.token(position)
        before, own = next(coming)
        for event in before:
            await sender.event(event)
        await sender.token(position, own)
    for event in next(coming)[0]:
        await sender.event(event)
    await sender.exchange.finish()
