"""What /metrics says, held against what the balancer was made to do."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from balancer.app import Balancer
from balancer.observe.exposition import label, line
from balancer.observe.metrics import written
from balancer.relay.failover import BROKEN_OFF, PERHAPS_TAKEN, UNTAKEN
from balancer.relay.proxy import RACE
from tests.lab.model import ModelSettings
from tests.lab.replica import LabReplica
from tests.observe.serving import CHAT, chat, client_of, run, serving, stream
from tests.support.until import until

ROOT = Path(__file__).parents[2]


async def families(balancer: Balancer, client: httpx.AsyncClient) -> dict[str, Metric]:
    answer = await client.get(balancer.admin_endpoint + "/metrics")
    assert answer.status_code == 200
    return {family.name: family for family in parse(answer.text)}


async def value(balancer: Balancer, client: httpx.AsyncClient, sample: str, **labels: str) -> float:
    """The sum of all series of that name with at least these labels."""
    every = (await families(balancer, client)).values()
    return sum(s.value for f in every for s in f.samples if s.name == sample and labels.items() <= s.labels.items())


def test_requests_are_counted_by_replica_path_and_status() -> None:
    async def main() -> None:
        async with (
            LabReplica() as one,
            LabReplica() as two,
            serving(one, two) as balancer,
            client_of(balancer) as client,
        ):
            for _ in range(4):
                assert (await client.post(CHAT, json=chat())).status_code == 200
            one.next(1, status=400)
            two.next(1, status=400)
            assert (await client.post("/generate", json={"text": "x"})).status_code == 400
            assert (await client.get("/secret/42")).status_code == 404
            name = "groundserve_requests_total"
            for replica in ("replica-1", "replica-2"):
                assert await value(balancer, client, name, replica=replica, path=CHAT, status="2xx") == 2
            assert await value(balancer, client, name, path="/generate", status="4xx") == 1
            assert await value(balancer, client, name, replica="", path="other", status="4xx") == 1
            assert await value(balancer, client, "groundserve_errors_total", code="not_found") == 1

    run(main())


def test_a_broken_stream_is_not_counted_with_the_good_answers() -> None:
    async def main() -> None:
        async with LabReplica() as one, serving(one) as balancer, client_of(balancer) as client:
            one.next(1, cut="after_tokens")
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post(CHAT, json=chat(stream=True))
            await client.post(CHAT, json=chat(stream=True))
            requests = "groundserve_requests_total"
            assert await value(balancer, client, requests, replica="replica-1", status="broken") == 1
            assert await value(balancer, client, requests, replica="replica-1", status="2xx") == 1

    run(main())


def test_the_latencies_of_a_stream_are_what_the_replica_took() -> None:
    async def main() -> None:
        slow = LabReplica(first_token_delay=0.2, token_interval=0.05)
        async with slow, serving(slow) as balancer, client_of(balancer) as client:
            await client.post(CHAT, json=stream(max_tokens=9))
            await client.post(CHAT, json=chat(max_tokens=2))
            ttft, gaps = "groundserve_time_to_first_token_seconds", "groundserve_inter_token_latency_seconds"
            assert await value(balancer, client, ttft + "_count") == 1, "an answer in one piece has no first token"
            assert 0.199 <= await value(balancer, client, ttft + "_sum") < 0.4, "timers may be early by a clock's tick"
            assert await value(balancer, client, ttft + "_bucket", le="0.1") == 0
            assert await value(balancer, client, ttft + "_bucket", le="0.5") == 1
            # Eight gaps between nine tokens; what follows the last token may come a moment later.
            assert 8 <= await value(balancer, client, gaps + "_count") <= 10
            assert 0.39 <= await value(balancer, client, gaps + "_sum") < 0.7
            assert await value(balancer, client, gaps + "_bucket", le="0.04") <= 2
            duration = "groundserve_request_duration_seconds"
            assert await value(balancer, client, duration + "_count", replica="replica-1") == 2
            assert await value(balancer, client, duration + "_sum", replica="replica-1") >= 0.6
            assert await value(balancer, client, "groundserve_connect_seconds_count") == 1, "the second one was reused"

    run(main())


def test_tokens_come_from_the_usage_of_answers() -> None:
    async def main() -> None:
        async with LabReplica() as lab, serving(lab) as balancer, client_of(balancer) as client:
            said = [(await client.post(CHAT, json=chat(max_tokens=5))).json()["usage"] for _ in range(2)]
            await client.post(CHAT, json=stream(max_tokens=7))
            prompt = await value(balancer, client, "groundserve_prompt_tokens_total", replica="replica-1")
            assert prompt > sum(usage["prompt_tokens"] for usage in said)
            assert await value(balancer, client, "groundserve_completion_tokens_total") == 17
            without = chat(max_tokens=3, stream=True)
            await client.post(CHAT, json=without)
            told = await value(balancer, client, "groundserve_completion_tokens_total")
        assert told == 20, "counted, though its client did not ask for usage"

    run(main())


def test_waiting_and_what_is_in_flight_is_seen_while_it_lasts() -> None:
    async def main() -> None:
        lab = LabReplica(hang="before_head")
        async with lab, serving(lab, settings={"max_in_flight": 1}) as balancer, client_of(balancer) as client:
            asked = [asyncio.ensure_future(client.post(CHAT, json=chat())) for _ in range(3)]
            await until(lambda: balancer.service.admission.queue_depth == 2)
            assert await value(balancer, client, "groundserve_queue_depth") == 2
            assert await value(balancer, client, "groundserve_queue_expected_wait_seconds") == 0, "nothing is known yet"
            assert await value(balancer, client, "groundserve_in_flight", replica="replica-1") == 1
            assert await value(balancer, client, "groundserve_in_flight_limit", replica="replica-1") == 1
            assert await value(balancer, client, "groundserve_client_connections") == 3
            assert await value(balancer, client, "groundserve_buffered_bytes") > 100
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            await until(lambda: not balancer.doors.connections)
            assert await value(balancer, client, "groundserve_requests_total", status="client_left") == 3
            assert await value(balancer, client, "groundserve_in_flight") == 0
            assert await value(balancer, client, "groundserve_buffered_bytes") == 0

    run(main())


def test_the_wait_in_the_queue_is_measured() -> None:
    async def main() -> None:
        lab = LabReplica(head_delay=0.3)
        async with lab, serving(lab, settings={"max_in_flight": 1}) as balancer, client_of(balancer) as client:
            await asyncio.gather(*(client.post(CHAT, json=chat()) for _ in range(2)))
            wait = "groundserve_queue_wait_seconds"
            assert await value(balancer, client, wait + "_count") == 2
            assert await value(balancer, client, wait + "_bucket", le="0.1") == 1
            assert 0.25 <= await value(balancer, client, wait + "_sum") < 0.6

    run(main())


def test_failures_are_counted_by_kind() -> None:
    """Retries, failures and probes are counted by the way in which they failed."""

    async def main() -> None:
        async with (
            LabReplica() as one,
            LabReplica() as two,
            serving(one, two) as balancer,
            client_of(balancer) as client,
        ):
            one.next(1, status=503)
            two.next(1, status=503)
            for _ in range(2):
                await client.post(CHAT, json=chat())
            assert await value(balancer, client, "groundserve_retries_total", reason="busy") == 2
            two.refuse()
            two.drop_connections()
            await until(lambda: len(balancer.service.fleet.available()) == 1)
            probes = "groundserve_probes_total"
            assert await value(balancer, client, probes, replica="replica-2", probe="ready", result="fail") >= 1
            assert await value(balancer, client, probes, replica="replica-1", probe="ready", result="pass") >= 1
            assert await value(balancer, client, probes, replica="replica-1", result="fail") == 0
            assert await value(balancer, client, "groundserve_replicas", status="READY") == 1
            assert await value(balancer, client, "groundserve_replicas", status="NOT_READY") == 1
            assert await value(balancer, client, "groundserve_replica_up", replica="replica-2") == 0

    run(main())


def test_ejections_are_counted() -> None:
    async def main() -> None:
        bad = LabReplica(status=500)
        async with LabReplica() as good, bad, serving(good, bad) as balancer, client_of(balancer) as client:
            while not any(m.ejected_until for m in balancer.service.fleet.members.values()):
                await client.post(CHAT, json=chat())
            assert await value(balancer, client, "groundserve_ejections_total", replica="replica-2") == 1
            failures = await value(balancer, client, "groundserve_replica_failures_total", replica="replica-2")
            assert failures == len(bad.seen.requests) >= 5
            assert await value(balancer, client, "groundserve_ejections_total", replica="replica-1") == 0

    run(main())


def test_replica_that_left_has_no_series() -> None:
    """A replica that left leaves no series behind, even with a request in flight."""

    async def main() -> None:
        async with (
            LabReplica() as one,
            LabReplica() as two,
            serving(one, two) as balancer,
            client_of(balancer) as client,
        ):
            for _ in range(4):
                await client.post(CHAT, json=stream())
            two.set(first_token_delay=0.3)
            one.set(first_token_delay=0.3)
            pending = [asyncio.ensure_future(client.post(CHAT, json=stream())) for _ in range(2)]
            await until(lambda: sum(m.in_flight for m in balancer.service.fleet.members.values()) == 2)
            balancer.service.fleet.reconcile(
                [m.listing for m in balancer.service.fleet.members.values() if m.name == "replica-1"]
            )
            answers = await asyncio.gather(*pending)
            assert [answer.status_code for answer in answers] == [200, 200]
            text = (await client.get(balancer.admin_endpoint + "/metrics")).text
            assert "replica-1" in text
            assert "replica-2" not in text
            assert await value(balancer, client, "groundserve_requests_total", replica="", path=CHAT) == 1

    run(main())


def test_a_replica_that_started_anew_counts_from_nothing() -> None:
    async def main() -> None:
        async with LabReplica() as lab, serving(lab) as balancer, client_of(balancer) as client:
            await client.post(CHAT, json=chat())
            (member,) = balancer.service.fleet.members.values()
            assert await value(balancer, client, "groundserve_completion_tokens_total", replica="replica-1") == 8
            balancer.service.fleet.restarted(member)
            assert await value(balancer, client, "groundserve_completion_tokens_total", replica="replica-1") == 0
            assert await value(balancer, client, "groundserve_requests_total", replica="replica-1") == 0

    run(main())


def test_predicted_and_actual_cache_hits_stand_side_by_side() -> None:
    async def main() -> None:
        lab = LabReplica(model=ModelSettings(prefill_rate=100_000.0, itl_base=0.005))
        async with lab, serving(lab, policy="prefix_aware") as balancer, client_of(balancer) as client:
            for _ in range(2):
                await client.post(CHAT, json=chat("the same long words again " * 40, max_tokens=2))
            cached = await value(balancer, client, "groundserve_cached_tokens_total", replica="replica-1")
            predicted = await value(balancer, client, "groundserve_predicted_cached_tokens_total", replica="replica-1")
            assert cached > 100
            assert predicted == pytest.approx(cached, rel=0.3)
            assert await value(balancer, client, "groundserve_cache_prediction_error_ratio_count") >= 1

    run(main())


def test_waiting_requests_by_key(tmp_path: Path) -> None:
    """Metrics show whose requests wait, and for how long another one would."""

    async def main() -> None:
        keys = tmp_path / "keys"
        keys.write_text("secret-one\nsecret-two\n")
        lab = LabReplica(head_delay=0.2)
        async with (
            lab,
            serving(lab, api_keys=keys, settings={"max_in_flight": 1}) as balancer,
            client_of(balancer) as client,
        ):
            headers = {"Authorization": "Bearer secret-two"}
            asked = [asyncio.ensure_future(client.post(CHAT, json=chat(), headers=headers)) for _ in range(25)]
            await until(lambda: balancer.service.admission.queue_depth > 20)
            waiting = [await value(balancer, client, "groundserve_key_queued", key=f"line-{n}") for n in (1, 2)]
            assert waiting[0] == 0
            assert waiting[1] > 5
            await asyncio.gather(*asked[:8])
            assert 0 < await value(balancer, client, "groundserve_queue_expected_wait_seconds") < 10
            await asyncio.gather(*asked)
            assert await value(balancer, client, "groundserve_queue_expected_wait_seconds") == 0
            assert await value(balancer, client, "groundserve_key_queued", key="line-2") == 0

    run(main())


def test_keys_are_counted_by_name_until_they_are_taken_away(tmp_path: Path) -> None:
    async def main() -> None:
        keys = tmp_path / "keys"
        keys.write_text("secret-one\nsecret-two\n")
        async with LabReplica() as lab, serving(lab, api_keys=keys) as balancer, client_of(balancer) as client:
            for key in ("secret-one", "secret-one", "secret-two"):
                answer = await client.post(CHAT, json=chat(), headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == 200
            name = "groundserve_key_requests_total"
            assert await value(balancer, client, name, key="line-1", status="2xx") == 2
            assert await value(balancer, client, "groundserve_key_tokens_total", key="line-1", kind="completion") == 16
            assert await value(balancer, client, "groundserve_key_in_flight", key="line-2") == 0
            keys.write_text("secret-one\n")
            await until(lambda: len(list(balancer.keys or ())) == 1)
            text = (await client.get(balancer.admin_endpoint + "/metrics")).text
            assert 'key="line-1"' in text
            assert "line-2" not in text
            assert "secret" not in text
            # Nor is anything kept of it: keys that change each day are no reason to grow.
            await until(lambda: set(balancer.tallies.keys) == {"line-1"})

    run(main())


OPEN = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2"


@pytest.mark.parametrize("accept", ["", OPEN])
def test_scrape_of_1000_replicas(accept: str) -> None:
    """A scrape of 1,000 replicas takes little CPU time, and leaves other work its turn every few milliseconds.

    CPU time of this thread, which other programs on the machine do not change. With prometheus-client's encoder it took
    1.6 s in all, and 150 ms in one go.
    """

    async def main() -> None:
        async with LabReplica() as lab, serving(lab) as balancer, client_of(balancer) as client:
            await client.post(CHAT, json=stream())
            for number in range(2, 1001):
                # Not listed anywhere, so that no probes run beside what is measured.
                balancer.tallies.members[f"replica-{number}"] = balancer.tallies.members["replica-1"]
            longest, before, others = 0.0, time.thread_time(), True

            async def take_turns() -> None:
                nonlocal longest, before
                while others:
                    now = time.thread_time()
                    longest, before = max(longest, now - before), now
                    await asyncio.sleep(0)

            task = asyncio.create_task(take_turns())
            await asyncio.sleep(0)
            began = time.thread_time()
            text = await written(balancer.figures, is_openmetrics=bool(accept))
            took, others = time.thread_time() - began, False
            await task
            assert text.count(b"\n") > 85_000
            assert took < 0.8
            assert longest < 0.05

    run(main())


@asynccontextmanager
async def having_counted(streams: int, folder: Path) -> AsyncIterator[tuple[Balancer, httpx.AsyncClient]]:
    """A balancer that wants a key and was asked for so many streams, the first of which its replica refused."""
    (keys := folder / "keys").write_text("k\n")
    async with LabReplica() as lab, serving(lab, api_keys=keys) as balancer, client_of(balancer) as client:
        client.headers["Authorization"] = "Bearer k"
        lab.next(1, status=503)
        for _ in range(streams):
            await client.post(CHAT, json=stream())
        yield balancer, client


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    """The strict parser of OpenMetrics, the one of the older format, and each `Accept` find the same samples."""

    async def main() -> None:
        async with having_counted(3, tmp_path) as (balancer, client):

            async def samples(accept: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
                answer = await client.get(balancer.admin_endpoint + "/metrics", headers={"Accept": accept})
                is_open = answer.headers["content-type"].startswith("application/openmetrics-text")
                assert is_open == ("openmetrics" in accept)
                assert answer.text.endswith("# EOF\n") == is_open
                found = (parse_openmetrics if is_open else parse)(answer.text)
                return {(s.name, frozenset(s.labels.items())): s.value for family in found for s in family.samples}

            accepts = ["", OPEN, "application/openmetrics-text", "text/plain;version=1.0.0;escaping=dots"]
            plain, *others = [await samples(accept) for accept in accepts]
            for other in others:
                assert plain.keys() == other.keys()
                changing = ("loop_lag", "probes_total", "client_connections", "process_")
                assert not [key for key in plain if plain[key] != other[key] and not any(c in key[0] for c in changing)]
            replica = ("replica", "replica-1")
            assert plain["groundserve_replica_up", frozenset({replica})] == 1
            assert plain["groundserve_replica_info", frozenset({replica, ("infra", "-"), ("node", "")})] == 1
            ttft = "groundserve_time_to_first_token_seconds"
            assert plain[ttft + "_bucket", frozenset({replica, ("le", "+Inf")})] == 3
            assert plain[ttft + "_count", frozenset({replica})] == 3

    run(main())


def test_label_values_are_escaped() -> None:
    """What a label's value holds cannot end it, whatever a key is called."""
    text = 'a "name", with \\ and\na line end'
    (family,) = parse("# TYPE x gauge\n" + line("x", (label("key", text),), 1))
    assert family.samples[0].labels == {"key": text}


def test_formats_and_names() -> None:
    """Both formats are well formed, and names follow Prometheus's rules."""

    async def main() -> None:
        async with LabReplica() as lab, serving(lab) as balancer, client_of(balancer) as client:
            await client.post(CHAT, json=stream())
            plain = await families(balancer, client)
            accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
            answer = await client.get(balancer.admin_endpoint + "/metrics", headers=accept)
            assert answer.headers["content-type"].startswith("application/openmetrics-text")
            open_names = {family.name for family in parse_openmetrics(answer.text)}
            ours = {name for name in plain if name.startswith("groundserve_")}
            assert len(ours) > 20
            assert ours - {"groundserve_balancer_info", "groundserve_replica_info"} <= open_names
            for name in ours:
                family = plain[name]
                assert family.documentation.endswith("."), name
                assert re.fullmatch(r"groundserve_[a-z_]+", name)
                if family.type == "histogram":
                    assert name.endswith(("_seconds", "_ratio")), name
                if family.type == "counter":
                    assert all(sample.name.endswith("_total") for sample in family.samples), name

    run(main())


def test_a_service_that_sleeps_has_not_lost_its_replicas() -> None:
    async def main() -> None:
        async with LabReplica() as lab, serving(lab) as balancer, client_of(balancer) as client:
            assert await value(balancer, client, "groundserve_scaled_to_zero") == 0
            balancer.service.fleet.is_asleep = True
            assert await value(balancer, client, "groundserve_scaled_to_zero") == 1

    run(main())


def documented() -> Iterator[tuple[str, str, str]]:
    """Name, type and labels of each row of a table of metrics."""
    row = re.compile(r"\| `(groundserve_\w+)` \| (\w+) \|([^|]*)\|")
    page = (ROOT / "docs/metrics.md").read_text()
    yield from (match.groups() for line in page.splitlines() if (match := row.match(line)))  # type: ignore[misc]


def test_the_documentation_names_every_metric_and_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        async with having_counted(2, tmp_path) as (balancer, client):
            live = {}
            for family in (await families(balancer, client)).values():
                if family.name.startswith("groundserve_"):
                    name = family.name + ("_total" if family.type == "counter" else "")
                    labels = {label for sample in family.samples for label in sample.labels} - {"le"}
                    live[name] = (family.type, labels)
        table = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in documented()}
        assert table.keys() == live.keys()
        for name, (kind, labels) in live.items():
            assert table[name][0] == kind, name
            # A counter that counted nothing has no series, so no labels yet.
            assert labels <= table[name][1], name

    run(main())


def test_the_documentation_names_every_reason_of_a_retry() -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| `groundserve_retries_total`"))
    reasons = {outcome.value for outcome in UNTAKEN | PERHAPS_TAKEN | BROKEN_OFF} | {RACE}
    assert set(re.findall(r"`(\w+)`", row)) - {"groundserve_retries_total", "reason", "first_byte_timeout"} == reasons
