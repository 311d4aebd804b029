"""The page's feed: what viewers are told, and when; the last fifteen minutes with the clock moved by hand."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest

from balancer.contract.listing import ReplicaListing
from balancer.contract.status import Snapshot
from balancer.observe.history import INTERVAL, KEPT, History
from balancer.observe.tally import REMEMBERED, Tallies
from balancer.routing.admission import Admission
from balancer.routing.policies import RoundRobin
from tests.lab.replica import LabReplica
from tests.observe.serving import CHAT, chat, client_of, run, serving, stream
from tests.support.fleets import fleet_of
from tests.support.recorded import recorded
from tests.support.until import until


class Parts:
    """A fleet of one with its tallies and history; `now` is the clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.tallies = Tallies()
        self.fleet = fleet_of(0, lambda: self.now)
        self.fleet.when_joined.append(self.tallies.member_joined)
        self.fleet.when_left.append(self.tallies.member_left)
        self.fleet.reconcile([ReplicaListing("one", "http://127.0.0.1:1")])
        self.history = History(self.fleet, Admission(self.fleet, RoundRobin()), self.tallies)

    def answered(self, **more: Any) -> None:
        record = recorded("POST", CHAT, self.now, status=200, member="one", attempts=1, first_byte=0.5, **more)
        self.tallies.finished(record)

    def pass_time(self, seconds: float) -> None:
        """As the balancer's sweep does: a look four times a second."""
        for _ in range(round(seconds * 4)):
            self.now += 0.25
            self.history.take(self.now)


def test_a_sample_is_what_happened_since_the_last() -> None:
    parts = Parts()
    for _ in range(3):
        parts.answered(prompt_tokens=100, completion_tokens=20, cached_tokens=25, is_stream=False)
    inter_token = parts.tallies.inter_token("one")
    for _ in range(40):
        inter_token.note(0.02)
    parts.answered(prompt_tokens=100, cached_tokens=75, is_stream=True)
    parts.pass_time(INTERVAL)
    (sample,) = parts.history.replicas[1].samples
    assert sample.to_json() == {
        "tokens_per_second": (3 * 20 + 40) / INTERVAL,
        "ttft_seconds": 0.5,
        "cached_share": 0.375,
        "in_flight": 0,
    }
    assert parts.history.service[-1].requests_per_second == 4 / INTERVAL
    parts.pass_time(INTERVAL)
    quiet = parts.history.replicas[1].samples[-1].to_json()
    assert quiet == {"tokens_per_second": 0, "ttft_seconds": None, "cached_share": None, "in_flight": 0}


def test_fifteen_minutes_are_kept_and_no_more() -> None:
    parts = Parts()
    parts.pass_time(INTERVAL * (KEPT + 30))
    assert INTERVAL * KEPT == 15 * 60
    assert len(parts.history.service) == len(parts.history.replicas[1].samples) == KEPT
    assert parts.history.taken == KEPT + 30


def test_recent_figures() -> None:
    """The recent figures cover the last minute for first tokens, and all that is kept for the cache."""
    parts = Parts()
    parts.answered(prompt_tokens=100, cached_tokens=0, is_stream=True)
    parts.pass_time(INTERVAL)
    history = parts.history.replicas[1]
    assert history.lately().ttft_seconds == 0.5
    parts.answered(prompt_tokens=100, cached_tokens=100)
    parts.pass_time(60)
    assert history.lately().ttft_seconds is None
    assert history.lately().cached_share == 0.5
    assert history.lately().tokens_per_second == 0


def test_a_replica_that_left_or_started_anew_has_no_past() -> None:
    parts = Parts()
    parts.answered(prompt_tokens=100, completion_tokens=50)
    parts.pass_time(INTERVAL * 3)
    (member,) = parts.fleet.members.values()
    parts.fleet.restarted(member)
    parts.pass_time(INTERVAL)
    assert [sample.tokens_per_second for sample in parts.history.replicas[1].samples] == [0]
    parts.fleet.reconcile([])
    parts.pass_time(INTERVAL)
    assert parts.history.replicas == {}
    # The counts that a replica took along do not make a negative rate.
    assert all(sample.requests_per_second >= 0 for sample in parts.history.service)


# Over the wire


async def events(client: httpx.AsyncClient, endpoint: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    async with client.stream("GET", endpoint + "/feed") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        name = ""
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, orjson.loads(line.removeprefix("data: "))


async def next_state(feed: AsyncIterator[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    async for name, data in feed:
        if name == "state":
            return data
    raise AssertionError("the feed ended")


def test_viewer_gets_history_then_states() -> None:
    """A viewer gets the history first, and then the state each second."""

    async def main() -> None:
        async with LabReplica() as lab, serving(lab) as balancer, client_of(balancer) as client:
            await client.post(CHAT, json=stream())
            feed = events(client, balancer.admin_endpoint)
            name, history = await anext(feed)
            assert (name, history["interval_seconds"], history["kept"]) == ("history", INTERVAL, KEPT)
            began = balancer.loop.time()
            states = [await next_state(feed) for _ in range(3)]
            assert 1.8 < balancer.loop.time() - began < 4
            status = (await client.get(balancer.admin_endpoint + "/status")).json()
            for state in states:
                # All that /status says, in the same words.
                assert Snapshot.from_json(state).to_json().keys() == status.keys()
                assert status["replicas"][0].keys() <= state["replicas"][0].keys()
            (decision,) = states[-1]["decisions"]
            assert decision["replica"] == "replica-1"
            assert decision["reason"] == "in turn"
            assert decision["path"] == CHAT
            assert decision["status"] == 200
            await feed.aclose()  # type: ignore[attr-defined]

    run(main())


def test_a_replica_that_dies_is_told_within_two_seconds() -> None:
    async def main() -> None:
        async with (
            LabReplica() as one,
            LabReplica() as two,
            serving(one, two) as balancer,
            client_of(balancer) as client,
        ):
            feed = events(client, balancer.admin_endpoint)
            assert [row["status"] for row in (await next_state(feed))["replicas"]] == ["READY", "READY"]
            two.refuse()
            two.drop_connections()
            async with asyncio.timeout(3):
                while (await next_state(feed))["replicas"][1]["status"] != "NOT_READY":
                    pass
            await feed.aclose()  # type: ignore[attr-defined]

    run(main())


def test_last_decisions() -> None:
    """Only the last decisions are kept, newest first, with long paths cut."""

    async def main() -> None:
        async with LabReplica() as lab, serving(lab) as balancer, client_of(balancer) as client:
            for number in range(REMEMBERED + 10):
                await client.post(f"/v1/models/{number}", json=chat())
            await client.post("/v1/models/" + "x" * 500, json=chat())
            feed = events(client, balancer.admin_endpoint)
            decisions = (await next_state(feed))["decisions"]
            assert len(decisions) == REMEMBERED
            assert len(decisions[0]["path"]) == 120
            assert decisions[1]["path"] == f"/v1/models/{REMEMBERED + 9}"
            await feed.aclose()  # type: ignore[attr-defined]

    run(main())


def test_viewers_are_let_go_when_the_balancer_ends() -> None:
    async def main() -> None:
        async with LabReplica() as lab, serving(lab) as balancer, client_of(balancer) as client:
            feed = events(client, balancer.admin_endpoint)
            await next_state(feed)
            ended = asyncio.ensure_future(_to_the_end(feed))
            balancer.services.feeds[0].close()  # the first thing that Balancer.stop does
            async with asyncio.timeout(2):
                await ended

    run(main())


async def _to_the_end(feed: AsyncIterator[Any]) -> None:
    async for _ in feed:
        pass


# The playground's way to the endpoint


def test_playground_streams() -> None:
    """The playground streams like the endpoint and says which replica answered."""

    async def main() -> None:
        async with LabReplica(token_interval=0.05) as lab, serving(lab) as balancer, client_of(balancer) as client:
            url = balancer.admin_endpoint + "/playground" + CHAT
            async with client.stream("POST", url, json=stream()) as answer:
                assert answer.headers["x-replica-id"] == "replica-1"
                assert answer.headers["x-route-reason"].startswith("in turn")
                assert answer.headers["content-type"].startswith("text/event-stream")
                came = [balancer.loop.time() async for _ in answer.aiter_raw()]
            assert came[-1] - came[0] > 0.25, "each token was passed on as it came"
            models = await client.get(balancer.admin_endpoint + "/playground/v1/models")
            assert [model["id"] for model in models.json()["data"]] == ["lab"]

    run(main())


@pytest.mark.parametrize("hang", ["before_head", "after_tokens"])
def test_browser_that_leaves(hang: str) -> None:
    """A browser that leaves is noticed both before and during the answer."""

    async def main() -> None:
        async with LabReplica(hang=hang) as lab, serving(lab) as balancer, client_of(balancer) as client:
            url = balancer.admin_endpoint + "/playground" + CHAT
            asked = asyncio.ensure_future(client.post(url, json=stream()))
            await lab.seen.until(lambda seen: len(seen.requests) == 1)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            await until(lambda: lab.seen.last.outcome == "client_left", within=2)
            await until(lambda: not balancer.service.fleet.members[1].in_flight)

    run(main())


def test_expected_wait() -> None:
    """The feed tells how long a new request would wait, while others do."""

    async def main() -> None:
        lab = LabReplica(head_delay=0.2)
        async with lab, serving(lab, settings={"max_in_flight": 1}) as balancer, client_of(balancer) as client:
            asked = [asyncio.ensure_future(client.post(CHAT, json=chat())) for _ in range(20)]
            seen = []
            async for name, event in events(client, balancer.admin_endpoint):
                if name == "state":
                    seen.append((event["service"]["queue_depth"], event["service"]["expected_wait_seconds"]))
                    if seen[-1][0] == 0 and len(seen) > 2:
                        break
            await asyncio.gather(*asked)
            assert any(depth and 0 < wait < 10 for depth, wait in seen)
            assert seen[-1] == (0, 0)

    run(main())


def test_a_browser_that_leaves_leaves_the_queue() -> None:
    async def main() -> None:
        lab = LabReplica(hang="before_head")
        async with lab, serving(lab, settings={"max_in_flight": 1}) as balancer, client_of(balancer) as client:
            url = balancer.admin_endpoint + "/playground" + CHAT
            asked = [asyncio.ensure_future(client.post(url, json=stream())) for _ in range(2)]
            await until(lambda: balancer.service.admission.queue_depth == 1)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            await until(lambda: balancer.service.admission.queue_depth == 0, within=2)

    run(main())


def test_a_stream_that_breaks_ends_with_the_endpoints_own_words() -> None:
    async def main() -> None:
        lab = LabReplica(cut="after_tokens", cut_after=2)
        async with lab, serving(lab) as balancer, client_of(balancer) as client:
            answer = await client.post(balancer.admin_endpoint + "/playground" + CHAT, json=stream())
            assert '"code":"stream_broken"' in answer.text
            assert "[DONE]" not in answer.text

    run(main())


def test_large_images() -> None:
    """A large image passes, and one that is too large is refused as at the endpoint."""

    async def main() -> None:
        limit = {"max_body_bytes": 3 << 20}
        async with LabReplica() as lab, serving(lab, settings=limit) as balancer, client_of(balancer) as client:
            url = balancer.admin_endpoint + "/playground" + CHAT
            assert (await client.post(url, json=chat("x" * (2 << 20)))).status_code == 200
            assert lab.seen.last.body_length > 2 << 20
            answer = await client.post(url, json=chat("x" * (4 << 20)))
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"

    run(main())
