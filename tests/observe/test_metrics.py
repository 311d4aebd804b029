"""What /metrics says, held against what the balancer was made to do."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from balancer.app import Balancer
from balancer.contract.listing import ReplicaListing
from balancer.observe.metrics import PIECE, encoded
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


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_scrape_in_pieces(accept: str) -> None:
    """A scrape is made in pieces, and equals one made at once."""

    async def main() -> None:
        async with LabReplica() as lab, serving(lab) as balancer, client_of(balancer) as client:
            await client.post(CHAT, json=stream())
            balancer.service.fleet.reconcile(
                [ReplicaListing(f"r{number}", f"http://127.0.0.1:{number}") for number in range(1, 65)]
            )
            registry = CollectorRegistry()
            registry.register(balancer.figures)
            whole = choose_encoder(accept)[0](registry)
            turns, others = 0, True

            async def take_turns() -> None:
                nonlocal turns
                while others:
                    await asyncio.sleep(0)
                    turns += 1

            task = asyncio.create_task(take_turns())
            text = await encoded(registry, choose_encoder(accept)[0])
            others = False
            await task
            assert len(text) > 100_000
            assert turns >= len(text.splitlines()) / (PIECE + 10)
            changing = ("loop_lag", "probes_total", "client_connections")
            same = [[line for line in said.decode().splitlines() if not any(c in line for c in changing)]
                    for said in (whole, text)]  # fmt: skip
            assert same[0] == same[1]

    run(main())


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


def documented() -> Iterator[tuple[str, str, str]]:
    """Name, type and labels of each row of a table of metrics."""
    row = re.compile(r"\| `(groundserve_\w+)` \| (\w+) \|([^|]*)\|")
    page = (ROOT / "docs/metrics.md").read_text()
    yield from (match.groups() for line in page.splitlines() if (match := row.match(line)))  # type: ignore[misc]


def test_the_documentation_names_every_metric_and_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        (keys := tmp_path / "keys").write_text("k\n")
        async with LabReplica() as lab, serving(lab, api_keys=keys) as balancer, client_of(balancer) as client:
            client.headers["Authorization"] = "Bearer k"
            lab.next(1, status=503)
            await client.post(CHAT, json=stream())
            await client.post(CHAT, json=stream())
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
