"""The access log: one line per request with all that matters about it, and nothing private."""

import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from balancer.observe.access_log import MAX_WAITING, AccessLog
from balancer.observe.record import Record
from tests.lab.replica import LabReplica
from tests.support.client import CHAT, Client, chat, request
from tests.support.program import ROOT
from tests.support.recorded import recorded
from tests.support.until import until
from tests.wire.running import House, each, in_house, kept, on_uvloop, serving

POST = request(body=chat())


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with kept({}) as house:
        yield house


@in_house
async def test_a_line_tells_all_of_a_request(house: House) -> None:
    body = chat(tokens=4, stream=True, stream_options={"include_usage": True})
    answer = await house.ask(request(body=body, headers=(("X-Request-Id", "mine"),)))
    line = (await house.logged(1))[0]
    fixed = {
        "id": "mine", "method": "POST", "path": CHAT, "status": 200, "member": "a", "attempts": 1, "reason": "in turn",
        "bytes_in": len(body), "bytes_out": len(answer.body), "completion_tokens": 4, "cached_tokens": 0,
    }  # fmt: skip
    assert {name: line[name] for name in fixed} == fixed
    assert line["prompt_tokens"] > 0
    assert 0 <= line["queued"] <= line["ttft"] <= line["duration"] < 5
    assert line["time"] > 1_700_000_000


@pytest.mark.parametrize(
    ("trusted", "said", "client"),
    [
        ([], "203.0.113.7", "127.0.0.1"),
        (["127.0.0.0/8"], "203.0.113.7", "203.0.113.7"),
        (["127.0.0.0/8"], "198.51.100.1, 2001:DB8::7", "2001:db8::7"),
        (["127.0.0.0/8"], "unknown status=500", "127.0.0.1"),
    ],
)
@on_uvloop
async def test_a_line_tells_the_clients_address(trusted: list[str], said: str, client: str) -> None:
    """As a trusted proxy names it; what is no address is not copied from a field."""
    async with LabReplica() as a, serving(a, trusted_proxies=trusted) as house:
        await house.ask(request(body=chat(), headers=(("X-Forwarded-For", said),)))
        await house.ask(b"nonsense\r\n\r\n")
        assert [line["client"] for line in await house.logged(2)] == [client, "127.0.0.1"]


@pytest.mark.parametrize("stream", [False, True])
@in_house
async def test_tokens_are_counted_in_anthropics_format_too(house: House, stream: bool) -> None:
    """Its streams count the prompt's tokens in their first event, and the answer's in the last but one."""
    body = chat(300, stream, stream_options={"include_usage": True})
    await house.ask(request(path="/v1/messages", body=body))
    await house.ask(request(body=body))
    theirs, ours = await house.logged(2)
    assert (theirs["completion_tokens"], theirs["cached_tokens"]) == (300, 0)
    assert theirs["prompt_tokens"] == ours["prompt_tokens"] > 0


@in_house
async def test_the_tokens_of_all_texts_of_a_batch_are_counted(house: House) -> None:
    text = {"text": "One", "meta_info": {"prompt_tokens": 4, "completion_tokens": 5, "cached_tokens": 1}}
    house.replicas[0].set(body=orjson.dumps([text] * 3).decode())
    await house.ask(request(path="/generate", body=b'{"text": ["One", "Two", "Three"]}'))
    (line,) = await house.logged(1)
    assert (line["prompt_tokens"], line["completion_tokens"], line["cached_tokens"]) == (12, 15, 3)


@pytest.mark.parametrize("path", ["/" + "x" * 60_000, "/v1/" + "x" * 60_000])
@in_house
async def test_a_long_path_is_cut(house: House, path: str) -> None:
    """Lines that wait for a slow reader take memory."""
    await house.ask(request("GET", path), "GET")
    (line,) = await house.logged(1)
    assert line["path"] == path[:1024]


OUTCOMES: dict[str, tuple[bytes, dict[str, Any], dict[str, Any]]] = {
    "relayed": (POST, {}, {"status": 200, "attempts": 1}),
    "the replica's error": (POST, {"status": 429}, {"status": 429, "attempts": 1}),
    "lost": (POST, {"cut": "before_head"}, {"status": 502, "attempts": 1, "error": "replica_lost"}),
    "refused path": (request("GET", "/nowhere"), {}, {"status": 404, "attempts": 0, "error": "not_found"}),
    "malformed": (b"nonsense\r\n\r\n", {}, {"status": 400, "attempts": 0, "method": "-", "path": "/"}),
    "own": (request("GET", "/health"), {}, {"status": 200, "attempts": 0, "path": "/health"}),
}


@pytest.mark.parametrize("row", **each(OUTCOMES))
@in_house
async def test_every_request_has_one_line(house: House, row: tuple[bytes, dict[str, Any], dict[str, Any]]) -> None:
    data, knobs, expected = row
    house.replicas[0].set(**knobs)
    answer = await house.ask(data, data.split(b" ")[0].decode())
    line = (await house.logged(1))[0]
    assert {name: line.get(name) for name in expected} == expected
    assert line["id"] == answer.header("x-request-id")


SECRET = "hunter2-do-not-log"
SPOTS: dict[str, bytes] = {
    "header": request(body=chat(), headers=(("Authorization", f"Bearer {SECRET}"), ("Cookie", SECRET))),
    "body": request(body=chat(prompt=SECRET)),
    "query": request("GET", f"/v1/models/lab?key={SECRET}"),
    "query of a refused path": request("GET", f"/nowhere?key={SECRET}"),
    "query of an absolute target": request("GET", f"http://wire.test/v1/models/lab?key={SECRET}"),
    "user of an absolute target": request("GET", f"http://{SECRET}@wire.test/v1/models/lab"),
    "a name": request("GET", "/v1/models/lab", headers=((f"X-{SECRET}", "1"),)),
    "a method that is none": f"{SECRET} / HTTP/1.1\r\n\r\n".encode(),
    "a malformed head": f"GET /v1/models/lab?{SECRET} HTTP/1.1\r\nHost : {SECRET}\r\n\r\n".encode(),
    "a malformed length": f"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: {SECRET}\r\n\r\n".encode(),
    "an id that is none": request("GET", "/v1/models/lab", headers=(("X-Request-Id", f"{SECRET}!"),)),
    "a query behind %3F": request("GET", "/v1/models/lab?a=%3F" + SECRET),
}  # fmt: skip


@pytest.mark.parametrize("data", **each(SPOTS))
@in_house
async def test_no_secret_is_logged(house: House, data: bytes) -> None:
    answer = await house.ask(data, data.split(b" ")[0].decode())
    lines = orjson.dumps(await house.logged(1)).decode()
    assert SECRET not in lines
    assert SECRET.encode() not in answer.body or answer.status == 200, "nor repeated in an error"


@on_uvloop
async def test_no_key_of_the_service_is_logged() -> None:
    knobs = {"replica_key": "inner-secret", "admin_key": "admin-secret"}
    async with LabReplica(api_key="inner-secret") as a, serving(a, config=knobs, admin_paths=True) as house:
        for key in ("inner-secret", "admin-secret", "wrong"):
            await house.ask(request("POST", "/flush_cache", b"", (("Authorization", f"Bearer {key}"),)))
            await house.ask(request(body=chat(), headers=(("Authorization", f"Bearer {key}"),)))
        text = orjson.dumps(await house.logged(6)).decode()
        for key in ("inner-secret", "admin-secret", "wrong"):
            assert key not in text


# A request cannot inject lines into the log

INJECTED = {
    "line ends": ("/v1/a%0d%0afake=1", '"/v1/a\\r\\nfake=1"'),
    "a space": ("/v1/a%20status=200", '"/v1/a status=200"'),
    "a quote": ("/v1/a%20%22b", '"/v1/a \\"b"'),
    "an escape sequence": ("/v1/a%1b[31m", '"/v1/a\\u001b[31m"'),
    "beyond ASCII": ("/v1/caf%C3%A9%E2%80%AE", None),
    "a NUL": ("/v1/a%00", '"/v1/a\\u0000"'),
    "plain": ("/v1/a=b", "/v1/a=b"),
}


@pytest.mark.parametrize("row", **each(INJECTED))
@in_house
async def test_a_path_stays_within_its_field_and_line(house: House, row: tuple[str, str | None]) -> None:
    await house.ask(request("GET", row[0]))
    await house.logged(1)
    assert one_printable_line(house.log_text())
    assert house.log()[0]["path"].startswith("/v1/")


@on_uvloop
async def test_a_path_stays_within_its_field_and_line_of_text_too() -> None:
    async with LabReplica() as a, serving(a, config={"is_log_json": False}) as house:
        for target, shown in INJECTED.values():
            written = len(house.log_text())
            await house.ask(request("GET", target))
            await until(lambda written=written: len(house.log_text()) > written)  # type: ignore[misc]
            line = house.log_text()[written:]
            assert one_printable_line(line)
            if shown is not None:
                assert f" path={shown} status=".encode() in line


WHOLE = recorded(
    "POST", CHAT, status=200, member="a", attempts=2, queued=0.25, retries=("busy",), is_stream=True, first_byte=0.5,
    duration=1.5, bytes_in=10, bytes_out=20, prompt_tokens=30, completion_tokens=40, cached_tokens=20, reason="in turn",
    matched=0.75, client="192.0.2.1", key="a caller", error="stream_broken",
)  # fmt: skip
BARE = recorded("-")


@pytest.mark.parametrize("record", [WHOLE, BARE], ids=["whole", "bare"])
def test_text_has_the_fields_of_json(record: Record) -> None:
    """A text line has the fields of a JSON line, in the same order."""

    def line(is_json: bool) -> str:
        reading, writing = os.pipe()
        log = AccessLog(writing, is_json, lambda: 1_700_000_000.0)
        log.finished(record)
        log.flush()
        os.close(writing)
        with os.fdopen(reading) as whole:
            return whole.read()

    told = orjson.loads(line(is_json=True))
    stamp, *words = shlex.split(line(is_json=False))
    assert stamp == "2023-11-14T22:13:20Z"
    pairs = [word.partition("=") for word in words]
    assert ["time", *(name for name, _, _ in pairs)] == list(told)
    for name, _, value in pairs:
        assert type(told[name])(value) == told[name]


def one_printable_line(text: bytes) -> bool:
    return text.endswith(b"\n") and all(byte >= 32 for byte in text[:-1])


# A reader that is slow, or gone


def record(number: int) -> Record:
    return recorded(id=f"n{number}", status=200)


def test_slow_reader_of_the_log() -> None:
    """A slow reader of the log holds up nothing, and is told how much it missed."""
    reader, writer = os.pipe()
    try:
        log = AccessLog(writer, is_json=True, wall_clock=lambda: 0.0)
        for number in range(MAX_WAITING + 5):
            log.finished(record(number))
        received = b""
        log.flush()  # returns although nobody reads the log
        os.set_blocking(reader, False)
        while True:
            try:
                received += os.read(reader, 1 << 20)
            except BlockingIOError:
                break
            log.flush()
        lines = [orjson.loads(line) for line in received.splitlines()]
        assert [line["id"] for line in lines[:-1]] == [f"n{number}" for number in range(MAX_WAITING)]
        assert lines[-1]["dropped"] == 5
    finally:
        os.close(reader)
        os.close(writer)


def test_a_reader_that_is_gone_ends_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        log = AccessLog(writer, is_json=False)
        for number in range(1000):
            log.finished(record(number))
        log.flush()
        log.finished(record(1))
        log.flush()
    finally:
        os.close(writer)


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
@on_uvloop
async def test_output_that_nobody_takes_stops_nothing(kind: str, tmp_path: Path) -> None:
    """After Ctrl-S, or when a connection hangs, neither log lines nor warnings block the balancer or its exit."""
    reader, writer = os.openpty() if kind == "terminal" else os.pipe()
    os.set_blocking(reader, False)
    service = tmp_path / "service.yaml"
    service.write_text("service: {replicas: 1}\nrun: python -m sglang.launch_server\nx-groundserve: {drain_grace: 0}")
    options = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--service", str(service)]
    command = [sys.executable, "-m", "balancer", *options]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=writer, stderr=writer)
    os.close(writer)
    try:
        said = b""
        while b"admin on" not in said:
            with contextlib.suppress(BlockingIOError):
                said += os.read(reader, 4096)
            await asyncio.sleep(0.01)
        client = await Client.open(said.partition(b"listening on ")[2].split()[0].decode())
        for number in range(3):
            service.write_text(f"nonsense {number}")  # each causes a warning
            for _ in range(500):  # a terminal holds less than 64 KiB
                await client.send(request("GET", "/nowhere"))
                assert (await client.answer("GET")).status == 404
            await asyncio.sleep(0.5)  # two checks of the file
        client.leave()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(reader)
