"""Event streams side by side: paced ones, to count and time their events, and silent ones, for memory."""

import asyncio
import itertools
import random
import time
from collections import Counter

from tests.bench import messages, process_tree
from tests.bench.exchange import Exchange, address, chat_post, tls
from tests.bench.phase import PATIENCE, Phase
from tests.bench.replica import EVENTS_A_SECOND
from tests.bench.stats import quantile

OPENED_AT_ONCE = 50  # of the silent streams: a burst of connects is not what they are about


class Stream(Exchange):
    """One stream. Each byte is compared with the body that the replica is known to send."""

    def __init__(self, request: bytes, expected: bytes) -> None:
        super().__init__(request)
        self.expected = expected
        self.offset = 0
        self.ttft = 0.0  # seconds from the request to the first byte of the body
        self.arrivals: list[tuple[float, int]] = []  # of each read: when, and how many events were whole by then
        self.error: str | None = None
        self.first = asyncio.Event()
        self.closed = asyncio.Event()

    @property
    def events(self) -> int:
        return min(self.offset, len(self.expected) - len(messages.DONE)) // messages.EVENT_BYTES

    def data_received(self, data: bytes) -> None:
        had = self.events
        super().data_received(data)
        if self.events > had:
            self.arrivals.append((time.monotonic(), self.events))

    def on_body(self, body: bytes) -> None:
        if not self.expected.startswith(body, self.offset):
            status = self.parser.get_status_code()
            self.fail(f"status {status}, at byte {self.offset} of the body: {body[:80]!r}")
            return
        if not self.offset:
            self.ttft = time.monotonic() - self.sent_at
            self.first.set()
        self.offset += len(body)

    def completed(self, status: int, keep_alive: bool) -> None:
        if status != 200 or self.offset != len(self.expected):
            self.error = self.error or f"status {status}, ended after {self.events} events"
        self.first.set()
        self.transport.close()

    def failed(self, reason: str) -> None:
        self.error = self.error or reason
        self.first.set()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.closed.set()


async def connect(url: str, count: int, events: int, seed: int = 1, key: str = "") -> list[Stream]:
    """`count` connections that have sent nothing yet: TTFT is to leave the client's own connect out."""
    loop = asyncio.get_running_loop()
    request = chat_post(url, messages.stream_request(events, seed), key)
    expected, context = messages.stream_body(events), tls(url)
    return [
        (await loop.create_connection(lambda: Stream(request, expected), *address(url), ssl=context))[1]
        for _ in range(count)
    ]


async def paced(
    url: str, count: int, ramp: float, seed: int, phase: Phase, key: str = "", slow: bool = False
) -> dict[str, object]:
    """Starts `count` streams at random times within `ramp` seconds, so that events do not come in step."""
    loop = asyncio.get_running_loop()
    # The last quarter is for streams to be still running when the phase ends, however late it started.
    events = int((ramp + 1.25 * phase.seconds + 0.25) * (messages.SLOW_EVENTS if slow else EVENTS_A_SECOND))
    opened = await connect(url, count, events, messages.SLOW_SEED if slow else 1, key)
    chance = random.Random(seed)
    for stream in opened:
        loop.call_later(chance.uniform(0, ramp), stream.send)
    await asyncio.sleep(ramp)
    await wait_for({stream: stream.first for stream in opened}, PATIENCE)
    before = sum(stream.events for stream in opened)
    measured = await phase.run()
    count = sum(stream.events for stream in opened) - before
    reads = sum(1 for stream in opened for at, _ in stream.arrivals if measured["start"] <= at <= measured["end"])
    await wait_for({stream: stream.closed for stream in opened}, PATIENCE)
    ttft = [stream.ttft for stream in opened if stream.events]
    between = [gap for stream in opened for gap in gaps(stream.arrivals, measured["start"], measured["end"])]
    return {
        **measured,
        "count": count,
        "sent": len(opened),
        "events_per_read": count / max(reads, 1),
        "ttft_p50": quantile(ttft, 0.5) if ttft else None,
        "ttft_p99": quantile(ttft, 0.99) if ttft else None,
        "gap_p99": quantile(between, 0.99) if between else None,
        "errors": dict(Counter(stream.error for stream in opened if stream.error).most_common(5)),
    }


async def wait_for(marks: dict[Stream, asyncio.Event], seconds: float) -> bool:
    """Whether all events come within `seconds`; streams that are late have failed."""
    try:
        async with asyncio.timeout(seconds):
            for mark in marks.values():
                await mark.wait()
    except TimeoutError:
        for stream, mark in marks.items():
            if not mark.is_set():
                stream.fail(f"{seconds:.0f} s late, after {stream.events} events")
        return False
    return True


def gaps(arrivals: list[tuple[float, int]], start: float, end: float) -> list[float]:
    """Seconds before each event between start and end; of events that came together, 0 for all but one."""
    found = []
    for (earlier, had), (later, has) in itertools.pairwise(arrivals):
        if start <= later <= end:
            found += [later - earlier] + [0.0] * (has - had - 1)
    return found


async def idle(url: str, count: int, pid: int, settle: float) -> dict[str, object]:
    """Memory of the process tree before, and with `count` streams open that have brought one event each."""
    before = process_tree.memory_bytes(pid)
    opened: list[Stream] = []
    while len(opened) < count:
        batch = await connect(url, min(OPENED_AT_ONCE, count - len(opened)), events=1, seed=messages.IDLE_SEED)
        opened += batch
        for stream in batch:
            stream.send()
        if not await wait_for({stream: stream.first for stream in batch}, PATIENCE / 4):
            break
    await asyncio.sleep(settle)
    after = process_tree.memory_bytes(pid)
    alive = [stream for stream in opened if stream.events and stream.waiting]
    errors = Counter(stream.error for stream in opened if stream.error)
    if len(alive) < count:
        errors[f"only {len(alive)} of {count} streams at once got their first event"] = count - len(alive)
    for stream in opened:
        stream.waiting = False
        stream.transport.close()
        await stream.closed.wait()
    return {"before": before, "after": after, "count": len(alive), "errors": dict(errors.most_common(5))}
