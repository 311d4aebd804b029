import asyncio
import contextlib
import json
import resource
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from balancer.contract.listing import ReplicaListing
from balancer.fleet.ejection import Outlier
from balancer.fleet.inspection import Inspection, inspect, limit_of
from balancer.fleet.member import Member
from balancer.fleet.probe_connection import (
    MAX_RESPONSE,
    CannotProbe,
    ConnectionRefused,
    NoResponse,
    ProbeConnection,
    ProbeResponse,
)
from balancer.spec.settings import ReadinessProbe
from tests.lab.replica import LabReplica

EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def member_at(url: str) -> Member:
    return Member(1, ReplicaListing("r1", url), 0.0, Outlier(10, 300), ReadinessProbe())


class Talker(asyncio.Protocol):
    """Says the next of `answers` to whatever comes; None closes the connection without a word."""

    def __init__(self, answers: list[bytes | None], connections: list["Talker"]) -> None:
        self.answers = answers
        self.heard: list[bytes] = []
        connections.append(self)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard.append(data)
        answer = self.answers.pop(0)
        if answer is None:
            self.transport.abort()
        elif answer.startswith(b"close:"):
            self.transport.write(answer.removeprefix(b"close:"))
            self.transport.close()
        else:
            self.transport.write(answer)


@contextlib.asynccontextmanager
async def talking(*answers: bytes | None) -> AsyncIterator[tuple[Member, list[Talker]]]:
    """A member that answers so, question by question, and its connections so far."""
    left, connections = list(answers), list[Talker]()
    server = await asyncio.get_running_loop().create_server(lambda: Talker(left, connections), "127.0.0.1", 0)
    async with server:
        yield member_at(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"), connections
        for connection in connections:
            connection.transport.abort()


@contextlib.contextmanager
def connection_to(member: Member, **more: Any) -> Iterator[ProbeConnection]:
    with contextlib.closing(ProbeConnection(member, **more)) as connection:
        yield connection


def test_probe_request() -> None:
    """A probe carries the right fields, and its connection is kept."""

    async def play() -> None:
        async with talking(EMPTY, EMPTY) as (member, connections):
            with connection_to(member, fields={"authorization": "Bearer k"}) as connection:
                assert await connection.request("/ready", 5) == ProbeResponse(200, b"")
                await connection.request("/p", 5, "POST", {"X-A": "1", "Authorization": "Bearer own"}, b"{}")
            host = member.authority
            assert [connection.heard for connection in connections] == [
                [
                    b"GET /ready HTTP/1.1\r\nhost: %b\r\nauthorization: Bearer k\r\n\r\n" % host,
                    b"POST /p HTTP/1.1\r\nhost: %b\r\nauthorization: Bearer own\r\nx-a: 1\r\n" % host
                    + b"content-length: 2\r\n\r\n{}",
                ]
            ]

    asyncio.run(play())


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nbusy", ProbeResponse(503, b"busy")),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n",
            ProbeResponse(200, b"abc"),
        ),
        (b"HTTP/1.1 204 Nothing\r\n\r\n", ProbeResponse(204, b"")),
        (
            b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
            ProbeResponse(200, b"x"),
        ),
        (b"close:HTTP/1.0 200 OK\r\n\r\nto the end", ProbeResponse(200, b"to the end")),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", ProbeResponse(200, b"ok")),
    ],
    ids=["length", "chunked", "no body", "interim", "to the end", "says close"],
)
def test_answers_in_every_framing_are_read(said: bytes, answer: ProbeResponse) -> None:
    async def play() -> None:
        async with talking(said) as (member, _):
            with connection_to(member) as connection:
                assert await connection.request("/", 5) == answer

    asyncio.run(play())


@pytest.mark.parametrize(
    "said",
    [
        None,
        b"SSH-2.0-OpenSSH\r\n",
        b"close:HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
        b"close:HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (MAX_RESPONSE + 1, bytes(MAX_RESPONSE + 1)),
        b"HTTP/1.1 101 Switch\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * MAX_RESPONSE,
    ],
    ids=["closed", "no HTTP", "half a body", "interim alone", "too long", "upgrade", "a head without end"],
)
def test_incomplete_answers(said: bytes | None) -> None:
    """An incomplete answer counts as none, and the next probe gets its own answer."""

    async def play() -> None:
        async with talking(said, EMPTY) as (member, connections):
            with connection_to(member) as connection:
                with pytest.raises(NoResponse) as error:
                    await connection.request("/", 5)
                assert not isinstance(error.value, ConnectionRefused)
                assert await connection.request("/", 5) == ProbeResponse(200, b"")
                assert len(connections) == 2

    asyncio.run(play())


def test_silence_and_late_answers() -> None:
    """Silence counts as no answer after its time limit, and a late answer belongs to no probe."""

    async def play() -> None:
        async with talking(b"", b"HTTP/1.1 404 Later\r\nContent-Length: 0\r\n\r\n") as (member, connections):
            with connection_to(member) as connection:
                with pytest.raises(NoResponse, match=r"no answer within 0\.1 s"):
                    await connection.request("/", 0.1)
                assert (await connection.request("/", 5)).status == 404
                assert len(connections) == 2

    asyncio.run(play())


def test_a_cancelled_question_leaves_no_answer_to_the_next() -> None:
    async def play() -> None:
        async with talking(b"", EMPTY) as (member, connections):
            with connection_to(member) as connection:
                asking = asyncio.ensure_future(connection.request("/", 5))
                while not connections or not connections[0].heard:  # noqa: ASYNC110 - the very next thing
                    await asyncio.sleep(0)
                connections[0].transport.write(b"HTTP/1.1 500 Late\r\n")
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                assert await connection.request("/", 5) == ProbeResponse(200, b"")

    asyncio.run(play())


def test_nothing_that_listens_is_refused() -> None:
    async def play() -> None:
        async with LabReplica() as replica:
            replica.refuse()
            with connection_to(member_at(replica.url)) as connection, pytest.raises(ConnectionRefused):
                await connection.request("/ready", 5)

    asyncio.run(play())


def test_a_name_that_is_not_known_gives_no_response() -> None:
    async def play() -> None:
        with (
            connection_to(member_at("http://no-such-host.invalid:8000")) as connection,
            pytest.raises(NoResponse) as error,
        ):
            await connection.request("/ready", 10)
        assert not isinstance(error.value, ConnectionRefused)

    asyncio.run(play())


def test_a_shortage_of_our_own_says_nothing_of_the_replica() -> None:
    async def play() -> None:
        async with LabReplica() as replica:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            with connection_to(member_at(replica.url)) as connection:
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
                try:
                    with pytest.raises(CannotProbe):
                        await connection.request("/ready", 5)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                assert await connection.request("/ready", 5) == ProbeResponse(200, b"")

    asyncio.run(play())


def test_an_idle_break_is_told_once_the_connection_was_kept() -> None:
    async def play() -> None:
        told = asyncio.Event()
        async with LabReplica() as replica:
            with connection_to(member_at(replica.url), when_broken=told.set) as connection:
                await connection.request("/ready", 5)
                await connection.request("/ready", 5)
                assert connection.breaks == 0
                replica.drop_connections()
                async with asyncio.timeout(5):
                    await told.wait()
                assert connection.breaks == 1
                assert await connection.request("/ready", 5) == ProbeResponse(200, b"")

    asyncio.run(play())


def test_bytes_that_nobody_asked_for_end_the_connection() -> None:
    async def play() -> None:
        async with talking(EMPTY, EMPTY) as (member, connections):
            with connection_to(member) as connection:
                await connection.request("/", 5)
                connections[0].transport.write(EMPTY)
                async with asyncio.timeout(5):
                    while not connection.breaks:  # noqa: ASYNC110 - nobody is told of it
                        await asyncio.sleep(0.001)
                assert await connection.request("/", 5) == ProbeResponse(200, b"")
                assert len(connections) == 2

    asyncio.run(play())


def test_a_connection_that_ends_as_announced_is_no_break() -> None:
    async def play() -> None:
        told: list[None] = []
        closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        async with talking(closing, closing, closing, EMPTY) as (member, connections):
            with connection_to(member, when_broken=lambda: told.append(None)) as connection:
                for _ in range(4):
                    assert await connection.request("/", 5) == ProbeResponse(200, b"")
                assert len(connections) == 4
                assert (connection.breaks, told) == (0, [])

    asyncio.run(play())


def test_server_that_closes_after_each_answer() -> None:
    """A server that closes its connection after each answer, without saying so, causes no hurried probes."""

    async def play() -> None:
        told: list[None] = []
        async with talking(*[b"close:" + EMPTY] * 3) as (member, _):
            with connection_to(member, when_broken=lambda: told.append(None)) as connection:
                for asked in range(3):
                    assert await connection.request("/", 5) == ProbeResponse(200, b"")
                    while connection.breaks == asked:  # noqa: ASYNC110 - nobody is told of it: that is the point
                        await asyncio.sleep(0)
                assert told == []

    asyncio.run(play())


# What is asked over it


LOADS = {"timestamp": "2026-01-01T00:00:00+00:00", "version": "0.5.23", "accelerator": None, "num_accelerators": 1}


def loads_of(*ranks: tuple[object, object]) -> dict[str, Any]:
    """/v1/loads as SGLang 0.5.23 answers it (entrypoints/v1_loads.py): one entry for each data-parallel rank."""
    return LOADS | {
        "loads": [
            {"dp_rank": rank, "num_running_reqs": 1, "max_running_requests": running, "max_total_num_tokens": tokens}
            for rank, (running, tokens) in enumerate(ranks)
        ]
    }


@pytest.mark.parametrize(
    ("loads", "info", "facts"),
    [
        (loads_of((64, 65536)), {"random_seed": 7, "max_running_requests": None}, Inspection("7", 64, 65536)),
        (loads_of((64, 8192)), {"random_seed": 7}, Inspection("7", 32, 8192)),
        (loads_of((64, 1024)), {"random_seed": 0}, Inspection("0", 16, 1024)),
        (loads_of((10, 1024)), {"random_seed": 7}, Inspection("7", 10, 1024)),
        (loads_of((64, 8192), (64, 8192)), {"random_seed": 7}, Inspection("7", 64, 16384, ranks=2)),
        (None, {"random_seed": 7, "dp_size": 4, "max_total_num_tokens": 5120}, Inspection("7", 80, 20480, ranks=4)),
        (
            None,
            {"random_seed": 7, "max_running_requests": 48, "max_total_num_tokens": 65536},
            Inspection("7", 48, 65536),
        ),
        (None, {"random_seed": 7, "max_total_num_tokens": 5120}, Inspection("7", 20, 5120)),
        (loads_of((64, 0)), {"random_seed": 7, "max_total_num_tokens": 8192}, Inspection("7", 32, 8192)),
        (None, {"random_seed": 7, "startup_time": {"scheduler_e2e": 52.01, "load_weight": 8.7}}, Inspection("7 52.01")),
        (None, {"random_seed": 7, "startup_time": None}, Inspection("7")),
        (loads_of((0, 0)), {}, Inspection()),
        (loads_of(("many", True)), {"random_seed": None}, Inspection()),
        ({"loads": "none"}, ["no object"], Inspection()),
        (None, None, Inspection()),
    ],
)
def test_facts_from_sglang(loads: Any, info: Any, facts: Inspection) -> None:
    """Identity, limit and capacity are read from SGLang's answers."""

    def said(body: Any) -> bytes:
        if body is None:
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        text = json.dumps(body).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)

    async def play() -> None:
        async with talking(said(loads), said(info)) as (member, _):
            with connection_to(member) as connection:
                assert await inspect(connection, 5) == facts

    asyncio.run(play())


def test_a_body_that_is_no_json_says_nothing() -> None:
    async def play() -> None:
        odd = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"
        async with talking(odd, odd) as (member, _):
            with connection_to(member) as connection:
                assert await inspect(connection, 5) == Inspection()

    asyncio.run(play())


def test_busy_scheduler_leaves_facts_incomplete() -> None:
    """If the scheduler is too busy to give its identity, the limits are known but the facts are incomplete."""
    said = json.dumps(loads_of((64, 8192))).encode()

    async def play() -> None:
        async with talking(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said), b"") as (member, _):
            with connection_to(member) as connection:
                assert await inspect(connection, 0.1) == Inspection(None, 32, 8192, is_whole=False)

    asyncio.run(play())


def test_a_replica_that_does_not_answer_has_said_nothing_yet() -> None:
    async def play() -> None:
        async with LabReplica(service_status="hang") as replica:
            with connection_to(member_at(replica.url)) as connection:
                assert await inspect(connection, 0.1) == Inspection(is_whole=False)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("running", "capacity", "limit"),
    [
        (None, None, None),
        (64, None, 64),
        (None, 1 << 20, 256),
        (None, 16 * 256, 16),
        (4096, 1 << 20, 4096),
        (4096, 256 * 300, 300),
        (8, 100, 8),
        (100, 100, 16),
    ],
)
def test_limit_of_a_replica(running: int | None, capacity: int | None, limit: int | None) -> None:
    """The limit is the number of requests that run at once, or less if the KV pool is small."""
    assert limit_of(running, capacity) == limit


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"X A": "1"}, "should be the name of a header"),
        ({"": "1"}, "should be the name of a header"),
        ({"X-A:": "1"}, "should be the name of a header"),
        ({"X-A": "1\r\nX-B: 2"}, "should be one line"),
        ({"X-A": "\0"}, "should be one line"),
    ],
)
def test_invalid_probe_headers(headers: dict[str, str], said: str) -> None:
    """Probe headers that are no valid headers are refused when the settings are read."""
    with pytest.raises(ValueError, match=said):
        ReadinessProbe(headers=headers)
