"""Requests and answers mutated at random, by seed: the balancer must handle any of them correctly.

    python -m tests.wire.fuzz --seconds 60 [--seed 1]

Mutated requests: every connection gets whole HTTP answers and is then closed; the replica sees exactly the requests
that were answered in its name, each well-formed and with the path that was decided on; nothing stays in flight or
buffered, and nothing is complained of; no page of an unlisted site may read an answer. The same requests, repeated by
clients that never read: the balancer buffers little for them, and closes the connection. Mutated answers: each request
gets at most one answer, valid HTTP, and the next request is served as usual.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

import uvloop

from balancer.relay.hosts import is_host
from balancer.relay.paths import kind_of
from tests.lab.replica import LabReplica
from tests.lab.seen import SeenRequest
from tests.support.client import CHAT, Answer, BadAnswer, Client, Ended, chat, chunks, request
from tests.wire.running import House, serving

AT_ONCE = 200  # connections with mutated requests
IN_TURN = 10  # mutated answers
# Clients and replicas that do not finish are soon timed out.
WITH_CLIENTS = {"head_timeout": 0.2, "body_timeout": 0.2, "keep_alive_timeout": 0.2}
# A client that reads nothing must be cut by send_timeout, not for being slow to send.
WITH_UNREAD = {"head_timeout": 20.0, "body_timeout": 20.0, "keep_alive_timeout": 20.0, "send_timeout": 0.5}
UNREAD = 8  # connections that send as much as is accepted, and never read
MOST_HELD = 1 << 20  # bytes buffered per connection
WITH_REPLICAS = {"first_byte_timeout": 0.1, "idle_timeout": 0.1, "ejection_time": 0.001}
CHUNKED = (("Transfer-Encoding", "chunked"),)

# Without HEAD: answers could no longer be matched to their requests.
REQUESTS = [
    request(body=chat()),
    request(body=chat(stream=True)),
    request("GET", "/v1/models/x?a=b"),
    request(path="/v1/images/edits", body=b"hello"),
    request("PUT", "/v1/images/edits", headers=CHUNKED) + chunks(b"hello", b"world"),
    request("PUT", "/v1/images/edits", headers=CHUNKED) + b"5;a=b\r\nhello\r\n0\r\nX-T: 1\r\n\r\n",
    request(path="/v1/images/edits", headers=(("Expect", "100-continue"),), body=b"hello"),
    request("DELETE", "http://wire.test/v1/models/x"),
    request("GET", "/v1/images/edits", headers=(("Connection", "keep-alive, X-A"), ("X-A", "1"), ("Upgrade", "h2c"))),
    request("GET", "/v1/images/edits", headers=(("Connection", "upgrade"), ("Upgrade", "websocket"))),
    request(path="/v1/images/edits", body=b"GET /v1/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"),
    request("GET", "/v1/images/edits", headers=(("Connection", "keep-alive"),), version="1.0"),
    request("GET", "/flush_cache"),
    request("GET", "/v1/%2e%2e/flush_cache"),
    request("OPTIONS", CHAT, headers=(("Origin", "http://x"), ("Access-Control-Request-Method", "POST"))),
    request("GET", "//v1/./files//x/?a=//b"),
    request("GET", "http://other.test:80/v1/%66iles"),
    request(
        "GET", "/v1/images/edits", headers=(("Authorization", "Bearer a"), ("x-api-key", "b"), ("Forwarded", "for=c"))
    ),
    request("GET", "/v1/images/edits", headers=(("Origin", "http://x"), ("Sec-Fetch-Site", "cross-site"))),
    request("GET", "/v1/images/edits") * 300,
]

ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n5;a=b\r\nworld\r\n0\r\nX-T: 1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\ndata: [DONE]\n\n",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello",
    b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    b"HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nEtag: x\r\n\r\n",
    b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 4\r\n\r\nbusy",
    b"HTTP/1.1 429 Slow\r\nRetry-After: 1\r\nContent-Length: 4\r\n\r\nslow",
    b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
]

TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";", b",", b"\r\n\r\n", b"\r\n ", b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"Host: other\r\n",
    b"0\r\n\r\n", b"5\r\n", b"ffffffffffffffff", b"99999999999999999999", b"-1", b"+", b"0x", b"HTTP/1.0", b"HTTP/1.1",
    b"GET /v1/smuggled HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"\xff",
    b"Host: [::1\r\n", b"@", b"[", b"]:", b":99999", b"Origin: http://x\r\n", b"x-api-key: k\r\n", b"Via: 1.0 x\r\n",
    b"Authorization: Basic eA==\r\n", b"X-Real-IP: 1.2.3.4\r\n", b"http://other.test", b"//", b"%2e%2e", b"%2F",
    b"\x80", b"%00", b"/../", b"//", b"chunked", b"x" * 5000, b"A: " + b"b" * 70_000 + b"\r\n",
]  # fmt: skip


class Fault(AssertionError):
    """The balancer handled some bytes wrongly."""


@dataclass(frozen=True)
class Case:
    """Bytes to send, and where they are cut into separate writes."""

    data: bytes
    cuts: tuple[int, ...] = ()

    def pieces(self) -> Iterator[bytes]:
        start = 0
        for cut in (*self.cuts, len(self.data)):
            yield self.data[start:cut]
            start = cut


def mutated(random_: random.Random, seeds: list[bytes]) -> Case:
    """One to three of the seeds in a row, damaged in up to four places and cut into up to four pieces."""
    data = bytearray(b"".join(random_.choices(seeds, k=random_.choice((1, 1, 2, 3)))))
    for _ in range(random_.choice((0, 1, 1, 2, 4))):
        at = random_.randrange(len(data) + 1)
        match random_.randrange(6):
            case 0:
                data[at : at + 1] = bytes((random_.randrange(256),))
            case 1:
                del data[at : at + random_.choice((1, 1, 2, 10))]
            case 2:
                data[at:at] = random_.choice(TOKENS)
            case 3:
                data[at:at] = data[at : at + random_.choice((1, 2, 20))]
            case 4:
                del data[at:]
            case 5 if at < len(data):
                data[at] ^= 1 << random_.randrange(8)
    cuts = sorted(random_.randrange(len(data) + 1) for _ in range(random_.choice((0, 0, 1, 3))))
    return Case(bytes(data), tuple(cuts))


async def talk(client: Client, case: Case) -> list[Answer]:
    """Sends the case, and reads to the end. Raises Fault for anything but whole HTTP answers."""
    try:
        for piece in case.pieces():
            await client.send(piece)
            await asyncio.sleep(0)
    except ConnectionError:
        pass  # refused before everything was sent
    answers: list[Answer] = []
    try:
        while True:
            answers.append(await client.answer())
    except Ended as end:
        if end.rest.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""):
            raise Fault(f"half an answer: {end.rest[:200]!r}") from None
    except BadAnswer as bad:
        raise Fault(f"no HTTP: {bad}") from None
    finally:
        client.leave()
    return answers


async def requests(house: House, cases: list[Case]) -> None:
    """Sends mutated requests in parallel. Raises Fault."""
    (replica,) = house.replicas
    house.renew()
    seen = len(replica.seen.probes)
    clients = [await house.client() for _ in cases]
    answered = await asyncio.gather(*(talk(client, case) for client, case in zip(clients, cases, strict=True)))
    await house.emptied()
    ours = [probe for probe in replica.seen.probes[seen:] if probe.header("x-forwarded-for")]
    reached = Counter(request.id for request in (*replica.seen.requests, *ours))
    told = Counter(a.header("x-request-id") for answers in answered for a in answers if a.header("x-replica-id"))
    if reached != told:
        raise Fault(f"reached the replica, unanswered: {reached - told}; answered, not reached: {told - reached}")
    if not all(answer.is_whole for answers in answered for answer in answers):
        raise Fault("an answer that is not whole")
    if any(name.lower().startswith("access-control") for told in answered for a in told for name, _ in a.headers):
        raise Fault("a page of a site that nobody named may read an answer")
    for passed in (*replica.seen.requests, *ours):
        check_passed_on(passed)
    if any(request.target.startswith("/flush") for request in replica.seen.requests):
        raise Fault("an admin path")


def check_passed_on(seen: SeenRequest) -> None:
    """Raises Fault if a request reached the replica with another path than was decided on, or with wrong fields."""
    path = seen.target.partition("?")[0].encode("latin-1")
    if path != kind_of(path)[2]:
        raise Fault(f"decided on as {kind_of(path)[2]!r}, sent as {path!r}")
    (host,) = seen.headers_named("x-forwarded-host")
    if host and not is_host(host.encode("latin-1")):
        raise Fault(f"came for {host!r}, which is no host")
    if len(seen.headers_named("authorization")) > 1 or seen.header("x-api-key") is not None:
        raise Fault("more than one credential")
    if seen.header("forwarded") or seen.header("x-real-ip"):
        raise Fault("what a stranger says of who asks")
    if not (seen.headers_named("via") or [""])[-1].endswith(" groundserve"):
        raise Fault("no word of the way here")


async def unread(house: House, cases: list[Case]) -> None:
    """Has each case sent over and over by a client that never reads. Raises Fault."""
    house.renew()
    doors = house.balancer.doors
    clients = [await house.client(receive_buffer=4096) for _ in cases]
    saying = [asyncio.ensure_future(say_on(client, case)) for client, case in zip(clients, cases, strict=True)]
    loop = asyncio.get_running_loop()
    began = loop.time()
    while doors.connections:
        for connection in doors.connections:
            unsent, queue = connection._transport.get_write_buffer_size(), connection._queue
            if unsent > MOST_HELD or len(queue) > 200:
                raise Fault(f"holds {unsent} bytes of answers, {len(queue)} requests")
        if loop.time() - began > 15:
            raise Fault("not cut")
        await asyncio.sleep(0.01)
    for task in saying:
        task.cancel()
    await asyncio.gather(*saying, return_exceptions=True)
    await house.emptied()


async def say_on(client: Client, case: Case) -> None:
    """Sends the case until the connection ends or 4 s have passed; then leaves."""
    data = case.data or b"x"
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(4):
            while True:
                await client.send(data * (1 + (1 << 16) // len(data)))
                await asyncio.sleep(0)
    client.leave()


async def answers(house: House, cases: list[Case]) -> None:
    """Has the replica send mutated answers, one after the other. Raises Fault."""
    (replica,) = house.replicas
    for case in cases:
        house.renew()
        replica.next(1, raw=case.data.decode("latin-1"), raw_then="keep" if len(case.data) % 4 == 0 else "close")
        client = await house.client()
        await client.send(request(body=chat(), headers=(("X-Request-Id", "mutated"),)))
        told = await client.answer()
        if told.header("x-request-id") != "mutated":
            raise Fault("another one's answer")
        house.member("a").full_until = 0.0
        if told.is_whole and not told.is_last:
            await client.send(request(body=chat(), headers=(("X-Request-Id", "third"),)))
            third = await client.answer()
            if (third.status, third.header("x-request-id")) != (200, "third"):
                raise Fault(f"the next request on the same connection got {third}")
        other = await house.client()
        await other.send(request(body=chat(), headers=(("X-Request-Id", "next"),)))
        after = await other.answer()
        if (after.status, after.header("x-request-id"), b"chat.completion" in after.body) != (200, "next", True):
            raise Fault(f"the next request got {after}")
        await house.emptied()


Play = Callable[[House, list[Case]], Awaitable[None]]


async def fuzz(house: House, play: Play, seeds: Iterable[int]) -> int:
    """Plays a round of cases per seed and returns the number of cases. Raises Fault that says how to repeat it."""
    corpus, count = {requests: (REQUESTS, AT_ONCE), unread: (REQUESTS, UNREAD), answers: (ANSWERS, IN_TURN)}[play]
    played = 0
    for seed in seeds:
        random_ = random.Random(seed)
        cases = [mutated(random_, corpus) for _ in range(count)]
        try:
            await play(house, cases)
        except (AssertionError, Ended) as fault:
            raise Fault(f"{fault}\nseed {seed}: {await culprit(house, play, cases)}") from fault
        played += count
    return played


async def culprit(house: House, play: Play, cases: list[Case]) -> str:
    """The case that causes the fault on its own, if one does."""
    for case in cases:
        try:
            await play(house, [case])
        except (AssertionError, Ended):
            return repr(case)
    return "no case does it alone"


async def _main(seconds: float, seed: int) -> None:
    for play, settings in ((requests, WITH_CLIENTS), (unread, WITH_UNREAD), (answers, WITH_REPLICAS)):
        began, played = time.monotonic(), 0
        async with LabReplica() as replica, serving(replica, **settings) as house:
            for step in itertools.count():
                played += await fuzz(house, play, [seed + step])
                took = time.monotonic() - began
                is_last = took >= seconds / 3
                line = f"{took:5.0f} s, {played} {play.__name__}"
                if sys.stdout.isatty():
                    print(f"\r{line}", end="\n" if is_last else "", flush=True)
                elif is_last or step % 100 == 99:
                    print(line, flush=True)
                if is_last:
                    break


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.wire.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="where to begin; drawn if not given")
    options = parser.parse_args()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            drawn = random.SystemRandom().randrange(1 << 30)
            runner.run(_main(options.seconds, drawn if options.seed is None else options.seed))
    except Fault as fault:
        print(f"\n{fault}\nrepeat it: python -m tests.wire.fuzz --seconds 1 --seed SEED", file=sys.stderr)
        sys.exit(1)
