import asyncio
import hashlib
import json
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from tests.lab.knobs import BadKnob
from tests.lab.replica import LabReplica

CHAT = {"model": "any", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
STREAM = {**CHAT, "stream": True}
Talk = Callable[[LabReplica, httpx.AsyncClient], Awaitable[None]]


def with_replica(talk: Talk, **knobs: Any) -> None:
    """Run `talk` with a replica and a client of it; check at the end that the replica saw nothing malformed."""

    async def main() -> None:
        async with LabReplica(**knobs) as replica, httpx.AsyncClient(base_url=replica.url, timeout=10.0) as client:
            await talk(replica, client)
        assert replica.seen.malformed == []
        assert replica.seen.connections_open == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


async def exchange(replica: LabReplica, data: bytes) -> bytes:
    """What comes back for `data` until the replica closes the connection."""
    reader, writer = await asyncio.open_connection(replica.host, replica.port)
    writer.write(data)
    try:
        async with asyncio.timeout(10.0):
            return await reader.read()
    finally:
        writer.close()


async def ask_and_leave(replica: LabReplica, body: dict[str, Any]) -> None:
    """Ask for a chat completion, and close the connection once the generation runs."""
    data = json.dumps(body).encode()
    _, writer = await asyncio.open_connection(replica.host, replica.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data))
    await replica.seen.until(lambda seen: seen.generations_started == 1)
    writer.close()


def test_a_stream_has_its_tokens_usage_and_done() -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        asked = STREAM | {"stream_options": {"include_usage": True}}
        answer = await client.post("/v1/chat/completions", json=asked, headers={"x-request-id": "a-1"})
        *events, usage, done = answer.text.strip().split("\n\n")
        deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("content", "") for delta in deltas) == " t00 t01 t02 t03"
        assert json.loads(usage[6:])["usage"]["completion_tokens"] == 4
        assert done == "data: [DONE]"
        (seen,) = replica.seen.with_id("a-1")
        assert (seen.outcome, seen.status, seen.tokens_sent, seen.generated) == ("answered", 200, 4, True)
        assert (replica.seen.generations_started, replica.seen.generations_finished) == (1, 1)

    with_replica(talk)


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/v1/chat/completions", CHAT, lambda answer: answer["choices"][0]["message"]["content"]),
        ("/v1/completions", {"prompt": "a", "max_tokens": 4}, lambda answer: answer["choices"][0]["text"]),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 4}}, lambda answer: answer["text"]),
    ],
)
def test_an_answer_that_is_not_streamed_is_whole(path: str, body: dict[str, Any], text: Callable[[Any], str]) -> None:
    async def talk(_: LabReplica, client: httpx.AsyncClient) -> None:
        answer = await client.post(path, json=body)
        assert answer.status_code == 200
        assert text(answer.json()) == " t00 t01 t02 t03"

    with_replica(talk)


def test_what_is_written_goes_out_at_once() -> None:
    """The kernel holds nothing back until the client has acknowledged what came before (Nagle's algorithm)."""

    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        await client.get("/health")
        sockets = [connection.transport.get_extra_info("socket") for connection in replica._connections]
        assert [sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for sock in sockets] == [1]

    with_replica(talk)


def test_nothing_comes_earlier_than_the_knobs_say() -> None:
    async def talk(_: LabReplica, client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        async with client.stream("POST", "/v1/chat/completions", json=STREAM) as answer:
            came = [time.monotonic() - began]
            came += [time.monotonic() - began async for line in answer.aiter_lines() if '"content":" t' in line]
        due = [0.1, 0.3, 0.35, 0.40, 0.45]
        assert len(came) == len(due)
        assert all(due_at <= came_at < due_at + 2.0 for due_at, came_at in zip(due, came, strict=True))

    with_replica(talk, head_delay=0.1, first_token_delay=0.2, token_interval=0.05)


def test_every_other_path_echoes_and_all_is_seen_byte_for_byte() -> None:
    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        body = bytes(range(256))
        head = b"PATCH /v1/a%2Fb//c?x=%20y HTTP/1.1\r\nhOST: x\r\nX-Two: 1\r\nx-two:2 \r\nConnection: close\r\n"
        answer = await exchange(replica, head + b"Content-Type: a/b\r\nContent-Length: 256\r\n\r\n" + body)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\ncontent-type: a/b\r\n" in answer
        assert answer.endswith(b"\r\n\r\n" + body)
        seen = replica.seen.last
        assert (seen.method, seen.target, seen.version) == ("PATCH", "/v1/a%2Fb//c?x=%20y", "HTTP/1.1")
        assert seen.headers == [
            ("hOST", "x"),
            ("X-Two", "1"),
            ("x-two", "2"),
            ("Connection", "close"),
            ("Content-Type", "a/b"),
            ("Content-Length", "256"),
        ]
        assert seen.headers_named("X-TWO") == ["1", "2"]
        assert (seen.body, seen.body_length, seen.body_whole) == (body, 256, True)
        assert seen.body_sha256 == hashlib.sha256(body).hexdigest()
        assert seen.bytes_sent == len(answer)

    with_replica(talk)


def test_a_chunked_body_is_read_and_known_as_such() -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        async def pieces() -> Any:
            for piece in (b"ab", b"c" * 70_000, b"d"):
                yield piece

        answer = await client.post("/v1/embeddings", content=pieces())
        assert answer.content == b"ab" + b"c" * 70_000 + b"d"
        assert replica.seen.last.body_chunked
        assert replica.seen.last.header("transfer-encoding") == "chunked"

    with_replica(talk)


def test_pipelined_requests_are_answered_in_turn() -> None:
    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        one = b"POST /v1/x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n%b"
        last = b"POST /v1/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n\r\n3"
        answer = await exchange(replica, one % b"1" + one % b"2" + last)
        assert [part[:1] for part in answer.split(b"\r\n\r\n")[1:]] == [b"1", b"2", b"3"]
        assert [seen.body for seen in replica.seen.requests] == [b"1", b"2", b"3"]

    with_replica(talk)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1x\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
    ],
)
def test_what_is_no_request_is_refused_and_noted(data: bytes) -> None:
    async def main() -> None:
        async with LabReplica() as replica:
            assert (await exchange(replica, data)).startswith(b"HTTP/1.1 400 ")
            assert len(replica.seen.malformed) == 1

    asyncio.run(main())


def test_idle_connection() -> None:
    """An idle connection is closed after keep_alive, but not before its first request."""

    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        fresh, fresh_writer = await asyncio.open_connection(replica.host, replica.port)
        began = time.monotonic()
        assert (await exchange(replica, b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        assert 0.2 <= time.monotonic() - began < 2.0
        fresh_writer.write(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await fresh.read()).startswith(b"HTTP/1.1 200 OK")
        fresh_writer.close()

    with_replica(talk, keep_alive=0.2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_the_generation(stream: bool) -> None:
    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        await ask_and_leave(replica, {**CHAT, "stream": stream})
        await replica.seen.until(lambda seen: seen.generations_aborted == 1)
        seen = replica.seen.last
        assert seen.outcome == "client_left"
        assert seen.ended_at is not None
        assert seen.client_left_after == seen.ended_at - seen.received_at
        assert (replica.seen.generations_started, replica.seen.generations_finished) == (1, 0)

    with_replica(talk, token_interval=60.0)


def test_an_abort_can_take_as_long_as_sglangs() -> None:
    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        await ask_and_leave(replica, CHAT)
        await replica.seen.until(lambda seen: seen.last.outcome == "client_left")
        assert replica.seen.generations_aborted == 0
        await replica.seen.until(lambda seen: seen.generations_aborted == 1)
        left = replica.seen.last.ended_at
        assert left is not None
        assert replica.seen.now() - left >= 0.29  # timers of the event loop are accurate to 10 ms

    with_replica(talk, token_interval=60.0, abort_delay=0.3)


@pytest.mark.parametrize("status", [200, 503, 404, 500])
@pytest.mark.parametrize(
    ("path", "knob"),
    [("/ready", "ready"), ("/health", "health"), ("/health_generate", "health"), ("/v1/loads", "service_status")],
)
def test_probes_say_what_their_knob_says(path: str, knob: str, status: int) -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        replica.set(**{knob: status})
        assert (await client.get(path)).status_code == status
        assert replica.seen.requests == []

    with_replica(talk)


def test_a_probe_can_hang_or_be_reset_while_requests_are_served() -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        replica.set(ready="hang", health="reset")
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/ready", timeout=httpx.Timeout(10.0, read=0.1))
        with pytest.raises(httpx.ReadError):
            await client.get("/health")
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200

    with_replica(talk)


def test_server_info_tells_identity_limits_and_the_key_in_clear() -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        client.headers["authorization"] = "Bearer secret"
        info = (await client.get("/server_info")).json()
        assert info["random_seed"] == replica.random_seed
        assert (info["max_total_num_tokens"], info["api_key"], info["max_running_requests"]) == (4600, "secret", None)
        load = (await client.get("/v1/loads?include=core")).json()["loads"][0]
        assert (load["max_running_requests"], load["num_running_reqs"]) == (7, 0)

    with_replica(talk, max_total_tokens=4600, max_running_requests=7, api_key="secret")


def test_the_identity_is_new_with_each_start() -> None:
    async def main() -> set[int]:
        seeds = set()
        for _ in range(3):
            async with LabReplica() as replica:
                seeds.add(replica.random_seed)
        return seeds

    assert len(asyncio.run(main())) == 3


def test_without_the_key_only_health_and_metrics_answer() -> None:
    async def talk(_: LabReplica, client: httpx.AsyncClient) -> None:
        for path in ("/ready", "/health", "/metrics"):
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/server_info")).status_code == 401
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 401
        key = {"authorization": "Bearer secret"}
        assert (await client.get("/server_info", headers=key)).status_code == 200
        assert (await client.post("/v1/chat/completions", json=CHAT, headers=key)).status_code == 200

    with_replica(talk, api_key="secret")


def test_knobs_over_http() -> None:
    """Knobs are changed over HTTP, for all requests or only for the next ones."""

    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        turned = await client.post("/lab/knobs", json={"status": 500})
        assert turned.json()["status"] == 500
        await client.post("/lab/knobs", json={"next": 2, "status": 429})
        statuses = [(await client.post("/v1/chat/completions", json=CHAT)).status_code for _ in range(3)]
        assert statuses == [429, 429, 500]
        seen = (await client.get("/lab/seen")).json()
        assert [request["status"] for request in seen["requests"]] == statuses
        assert seen["requests"][0]["headers"][0] == ["Host", f"127.0.0.1:{replica.port}"]

    with_replica(talk)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"staus": 503}, "no knob 'staus'; did you mean 'status'?"),
        ({"cut": "sometimes"}, "knob 'cut' cannot be 'sometimes'"),
        ({"tokens": "3"}, "knob 'tokens' cannot be '3'"),
        ({"tokens": True}, "knob 'tokens' cannot be True"),
        ({"headers": "x: y"}, "knob 'headers' wants a list"),
        ({"ready": "sometimes"}, "knob 'ready' cannot be 'sometimes'"),
    ],
)
def test_a_knob_that_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        with pytest.raises(BadKnob, match=message.replace("?", r"\?")):
            replica.set(**changes)
        answer = await client.post("/lab/knobs", json=changes)
        assert answer.status_code == 400
        assert message in answer.json()["message"]

    with_replica(talk)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"max_tokens": 0}', b'{"max_tokens": "x"}'])
def test_a_body_that_asks_for_nothing_is_400(body: bytes) -> None:
    async def talk(replica: LabReplica, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/chat/completions", content=body)
        assert answer.status_code == 400
        assert answer.json()["object"] == "error"
        assert replica.seen.generations_started == 0

    with_replica(talk)


def test_until_fails_with_the_counts() -> None:
    """Waiting for something that never happens fails with the replica's counts."""

    async def talk(replica: LabReplica, _: httpx.AsyncClient) -> None:
        with pytest.raises(AssertionError, match="'requests': 0"):
            await replica.seen.until(lambda seen: seen.requests, timeout=0.01)

    with_replica(talk)
