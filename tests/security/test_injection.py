"""Logs, metrics and headers: what clients and replicas say stays what they said, and never becomes a line of ours."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from balancer.observe.access_log import AccessLog
from tests.lab.replica import LabReplica
from tests.support.client import CHAT, chat, request
from tests.support.recorded import recorded
from tests.wire.running import each, on_uvloop, serving

HOSTILE_TARGETS = {
    "line ends": "/v1/x%0d%0astatus=200%20key=admin%0a",
    "escapes of a terminal": "/v1/%1b%5b2J%1b%5d0;pwned%07",
    "quotes": '/v1/"} 1%0agroundserve_requests_total{replica="evil"} 1e9',
    "bytes beyond ASCII": "/v1/%ff%fe%e2%80%ae",
    "a label's end": '/v1/a"}%5c%22%7d',
    "a field's beginning": "/v1/x%20key=admin%20status=200",
    "very long": "/v1/" + "a" * 60000,
    "separators that split lines": "/v1/%e2%80%a8%c2%85",
}


@pytest.mark.parametrize("target", **each(HOSTILE_TARGETS))
@on_uvloop
async def test_a_path_is_one_field_of_one_line(target: str) -> None:
    async with LabReplica() as lab, serving(lab) as house:
        answer = await house.ask(request(path=target.replace(" ", "%20"), body=b"x"))
        (line,) = await house.logged(1)
        assert line["status"] == answer.status
        assert "key" not in line
        metrics = await admin(house.balancer.admin_endpoint + "/metrics")
        families = list(parse(metrics))  # raises where a line is broken
        paths = {sample.labels["path"] for family in families for sample in family.samples if "path" in sample.labels}
        assert paths == {"other"}
        assert "evil" not in metrics
        state = await admin(house.balancer.admin_endpoint + "/status")
        assert orjson.loads(state)["service"]["ready"] == 1


async def admin(url: str) -> str:
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(url)).text


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("is_json", [True, False])
@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\nb", "\x1b[2J", 'a" status="200', "a status=200", "\u2028\x85", "\udcff", "\0"]
)
def test_both_formats_keep_to_one_line_of_printable_text(is_json: bool, text: str, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    log = AccessLog(writer, is_json)
    record = recorded("GET", "/v1/" + text.encode("utf-8", "replace").decode("latin-1"), status=404)
    log.finished(record)
    log.flush()
    line = os.read(reader, 1 << 16)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert re.fullmatch(rb"[ -~\x80-\xff]*\n", line), line
    if is_json:
        assert orjson.loads(line)["status"] == 404
    else:
        fields = re.sub(rb'"(?:[^"\\]|\\.)*"', b"quoted", line)
        assert len(re.findall(rb"(?:^| )status=", fields)) == 1


@on_uvloop
async def test_nothing_private_is_logged() -> None:
    """Keys, bodies, queries and headers are never logged."""
    async with LabReplica() as lab, serving(lab) as house:
        secret = "s3cret-s3cret"
        fields = (("Authorization", f"Bearer {secret}"), ("Cookie", secret), ("X-Other", secret))
        body = chat(user=secret)
        await house.ask(request(path=f"{CHAT}?token={secret}", body=body, headers=fields))
        await house.ask(request(path=f"/nowhere?token={secret}#{secret}", body=body, headers=fields))
        await house.ask(b"BROKEN " + secret.encode() + b"\r\n\r\n")
        assert secret not in repr(await house.logged(3))
        assert secret not in await admin(house.balancer.admin_endpoint + "/metrics")


@on_uvloop
async def test_request_ids_are_taken_only_in_their_plain_form() -> None:
    async with LabReplica() as lab, serving(lab) as house:
        for sent in ("plain-Id_1.2", "a b", 'a"b', "a=b", "x" * 129, "ümlaut", ""):
            answer = await house.ask(request(body=chat(), headers=(("X-Request-Id", sent),)))
            taken = answer.header("x-request-id") or ""
            assert (taken == sent) is bool(re.fullmatch(r"[\w.-]{1,128}", sent, re.ASCII)), sent
            assert re.fullmatch(r"[\w.-]{1,128}", taken, re.ASCII)
            assert lab.seen.last.headers_named("x-request-id") == [taken]


@on_uvloop
async def test_a_replica_cannot_speak_in_our_name() -> None:
    ours = (("X-Replica-Id", "forged"), ("X-Request-Id", "forged"), ("X-Route-Reason", "forged"))
    async with LabReplica(headers=ours) as lab, serving(lab) as house:
        answer = await house.ask(request(body=chat(), headers=(("X-Route-Explain", "1"),)))
        assert answer.header("x-replica-id") == "a"
        assert answer.header("x-route-reason") == "in turn; attempts=1; queued=0.000"
        assert "forged" not in repr(answer.headers)


@on_uvloop
async def test_a_replicas_figures_cannot_break_ours() -> None:
    numbers = ("9" * 400, "-5", "1e999", "NaN", '"7"', "null", "true")
    async with LabReplica() as lab, serving(lab) as house:
        for number in numbers:
            usage = (
                f'{{"usage": {{"prompt_tokens": {number}, "completion_tokens": {number}, "cached_tokens": {number}}}}}'
            )
            lab.next(1, body=usage, content_type="application/json")
            answer = await house.ask(request(body=chat()))
            assert answer.body == usage.encode()
        assert len(await house.logged(len(numbers))) == len(numbers)
        for family in parse(await admin(house.balancer.admin_endpoint + "/metrics")):
            for sample in family.samples:
                assert sample.value >= 0, sample


@on_uvloop
async def test_trace_context_passes_untouched() -> None:
    context = (
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("tracestate", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        ("tracestate", "third=1"),
        ("baggage", "userId=alice"),
    )
    async with LabReplica() as lab, serving(lab) as house:
        await house.ask(request(body=chat(), headers=context))
        kept = [(name, value) for name, value in lab.seen.last.headers if name in dict(context)]
        assert kept == list(context)


def test_only_the_logs_own_module_writes_log_lines() -> None:
    """A record's words go out through one pair of functions, so that the tests above speak for all of them. (Those of a
    trace are protobuf's, which has no lines.) To compare it with a path of ours writes nothing.
    """
    sources = (Path(__file__).parents[2] / "balancer").rglob("*.py")
    writers = [path.name for path in sources if re.search(r"\brecord\.path\b(?! ==)", path.read_text())]
    assert sorted(writers) == ["access_log.py", "feed.py", "tally.py", "tracing.py"]
