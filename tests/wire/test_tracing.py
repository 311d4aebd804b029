"""--otlp: what a collector gets of each request, and what its replica is told, so that its own spans join."""

import asyncio
import re
import subprocess
import sys
import time

import pytest

from balancer.errors import ConfigError
from balancer.observe import tracing
from balancer.observe.trace_context import begin
from balancer.observe.tracing import Tracing
from tests.lab.replica import LabReplica
from tests.support.client import chat, request
from tests.support.collector import Collector, text_of
from tests.support.until import until
from tests.wire.process import running
from tests.wire.running import each, on_uvloop, serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = ("traceparent", f"00-{TRACE}-{PARENT}-01")


@on_uvloop
async def test_a_request_is_a_span_with_one_for_each_phase() -> None:
    async with LabReplica(head_delay=0.05, token_interval=0.02) as lab:
        with Collector() as collector:
            async with serving(lab, config={"otlp": collector.url}, max_in_flight=1) as house:
                ahead = asyncio.ensure_future(house.ask(request(body=chat())))
                await lab.seen.until(lambda seen: seen.generations_started == 1)
                fields = (SAMPLED, ("X-Request-Id", "mine"), ("tracestate", "a=b"))
                answer = await house.ask(request(body=chat(5, stream=True), headers=fields))
                assert answer.status == 200
                assert (await ahead).status == 200
                seen = lab.seen.last
                await until(lambda: len(collector.named("POST /v1/chat/completions")) == 2, "both are told")
            spans = [span for span in collector.spans if span.trace_id.hex() == TRACE]
            (whole,) = [span for span in spans if span.parent_span_id.hex() == PARENT]
            assert text_of(whole.attributes, "groundserve.request_id") == "mine"
            assert text_of(whole.attributes, "groundserve.replica") == "a"
            assert text_of(whole.attributes, "http.response.status_code") == "200"
            assert text_of(whole.attributes, "gen_ai.usage.output_tokens") == "5"
            assert seen.header("traceparent") == f"00-{TRACE}-{whole.span_id.hex()}-01"
            assert seen.header("tracestate") == "a=b"
            phases = {span.name: span for span in spans if span.parent_span_id == whole.span_id}
            assert {"queue", "first byte", "answer"} <= phases.keys()
            assert phases["queue"].end_time_unix_nano - phases["queue"].start_time_unix_nano > 0
            assert phases["first byte"].end_time_unix_nano - phases["first byte"].start_time_unix_nano > 0.04e9
            order = [phases[name].start_time_unix_nano for name in ("queue", "first byte", "answer")]
            assert order == sorted(order)
            assert whole.start_time_unix_nano <= order[0]
            assert phases["answer"].end_time_unix_nano == whole.end_time_unix_nano
            assert abs(whole.end_time_unix_nano / 1e9 - time.time()) < 60
            (other,) = [span for span in collector.spans if span.trace_id.hex() != TRACE and not span.parent_span_id]
            connects = collector.named("connect")
            assert other.span_id in {span.parent_span_id for span in connects}
            assert collector.services == {"groundserve"}


@on_uvloop
async def test_one_that_breaks_and_one_that_leaves_say_so() -> None:
    async with LabReplica() as lab:
        with Collector() as collector:
            async with serving(lab, config={"otlp": collector.url}, continue_broken=False) as house:
                lab.next(cut="after_tokens", cut_after=2)
                await house.ask(request(body=chat(5, stream=True)))
                lab.next(hang="before_head")
                client = await house.client()
                await client.send(request(body=chat()))
                await lab.seen.until(lambda seen: len(seen.requests) == 2)
                client.leave()
                await until(lambda: len(collector.named("POST /v1/chat/completions")) == 2, "both are told")
    broken, left = collector.named("POST /v1/chat/completions")
    assert broken.status.code == 2
    assert broken.status.message == text_of(broken.attributes, "error.type")
    assert text_of(left.attributes, "error.type") == "client_left"


CONTEXTS = {
    "not sampled": (f"00-{TRACE}-{PARENT}-00", True),
    "of a later version": (f"01-{TRACE}-{PARENT}-01-more", False),
    "no trace": (f"00-{'0' * 32}-{PARENT}-01", False),
    "of no version": (f"ff-{TRACE}-{PARENT}-01", False),
    "nonsense": ("x" * 500, False),
}


@pytest.mark.parametrize("row", **each(CONTEXTS))
@on_uvloop
async def test_what_a_client_says_of_its_trace_is_heard(row: tuple[str, bool]) -> None:
    said, is_left_alone = row
    async with LabReplica() as lab:
        with Collector() as collector:
            async with serving(lab, config={"otlp": collector.url}) as house:
                await house.ask(request(body=chat(), headers=(("Traceparent", said), ("tracestate", "a=b"))))
                passed = lab.seen.last.header("traceparent") or ""
                if is_left_alone:
                    assert passed == said
                else:
                    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", passed)
                    assert (lab.seen.last.header("tracestate") is not None) == (TRACE in passed)
            assert bool(collector.spans) is not is_left_alone


@on_uvloop
async def test_without_a_collector_a_trace_is_passed_on_as_it_is() -> None:
    async with LabReplica() as lab, serving(lab) as house:
        await house.ask(request(body=chat(), headers=(SAMPLED,)))
        assert lab.seen.last.header("traceparent") == SAMPLED[1]


@on_uvloop
async def test_a_collector_that_takes_nothing_holds_no_request_up() -> None:
    with Collector() as collector:
        collector.status = 400
        async with LabReplica() as lab, running(lab.url, arguments=("--otlp", collector.url)) as balancer:
            client = await balancer.client()
            for _ in range(20):
                await client.send(request(body=chat()))
                assert (await client.answer()).status == 200
            await until(lambda: b"takes no traces" in balancer.complained, "it is said")
            await client.send(request(body=chat()))
            assert (await client.answer()).status == 200
            balancer.process.terminate()
            await balancer.end()
            assert balancer.complained.count(b"\n") == 1, "once, and nothing else"


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MOST", 3)
    with Collector() as collector:
        traces = Tracing(collector.url, "x")
        try:
            assert traces._waiting.maxlen == 3
        finally:
            traces.close()


@pytest.mark.parametrize("url", ["collector:4317", "grpc://collector", "http://", "ftp://x/"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--otlp"):
        Tracing(url, "x")


def test_what_to_install_is_said_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"--otlp needs OpenTelemetry: pip install '\.\[tracing\]'"):
        Tracing("http://127.0.0.1:4318", "x")


def test_relays_of_one_supervisor_draw_different_ids() -> None:
    told = """if True:
        import os
        from balancer.observe.trace_context import drawn
        for _ in range(3):
            if os.fork() == 0:
                os.write(1, b"%032x\\n" % drawn(128))
                os._exit(0)
            os.wait()
    """
    ids = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True).stdout.split()
    assert len(ids) == len(set(ids)) == 3


def test_each_span_has_an_id_of_its_own() -> None:
    assert len({begin(SAMPLED[1].encode()) for _ in range(100)}) == 100
