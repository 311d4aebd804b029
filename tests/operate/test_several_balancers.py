"""Two balancers in front of the same replicas: both are told, and what both say counts."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from balancer import cli
from balancer.contract.listing import Listing
from balancer.contract.status import ReplicaRow, ServiceRow, Snapshot
from balancer.contract.words import ServiceStatus, Status
from balancer.operate.engines.ports import free_ports
from balancer.operate.engines.several import merged, shares
from balancer.operate.engines.several_balancers import SeveralBalancers
from balancer.operate.recipe.recipe import Recipe
from tests.operate.command_line import LAB, Groundserve
from tests.operate.streaming import streaming
from tests.support.program import Program
from tests.support.until import wait_until

SESAME = {"authorization": "Bearer sesame"}
TOLD_EVERY = 0.75  # seconds: the list to the balancers, their part to the keys
BODY = {"model": "lab", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def said(status: Status, in_flight: int, service_in_flight: int = 0) -> Snapshot:
    service = ServiceRow("lab", "1", ServiceStatus.READY, 1.0, "http://x", "round_robin", 1, 1, 2, service_in_flight)
    row = ReplicaRow(name="lab-1", endpoint="http://a:1", id=1, launched_seconds=1.0, status=status)
    return Snapshot(service, (replace(row, in_flight=in_flight),))


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([], []),
        ([5], [1]),
        ([0, 0], [0.5, 0.5]),
        ([9, 0], [1, 0.5]),
        ([3, 1], [0.75, 0.5]),
        ([4, 4], [0.5, 0.5]),
        ([None, None], [0.5, 0.5]),
        ([0, None], [1, 0.5]),
        ([None, 3], [0.5, 1]),
    ],
)
def test_each_has_its_half_and_more_of_what_others_leave(loads: list[int | None], expected: list[float]) -> None:
    assert shares(loads) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Status.SHUTTING_DOWN, Status.DRAINING, Status.DRAINING),
        (Status.SHUTTING_DOWN, Status.READY, Status.DRAINING),
        (Status.SHUTTING_DOWN, Status.SHUTTING_DOWN, Status.SHUTTING_DOWN),
        (Status.READY, Status.NOT_READY, Status.READY),
        (Status.FAILED_PROBING, Status.STARTING, Status.STARTING),
    ],
)
def test_a_replica_is_what_both_say_of_it(first: Status, second: Status, expected: Status) -> None:
    both = merged([said(first, 0, 3), said(second, 2, 4)])
    assert (both.replicas[0].status, both.replicas[0].in_flight) == (expected, 2)
    assert (both.service.in_flight, both.service.queue_depth) == (7, 4)


@pytest.fixture
def more() -> tuple[str, ...]:
    """More flags for both balancers."""
    return ()


@pytest.fixture
def pair(tmp_path: Path, more: tuple[str, ...]) -> Iterator[list[Program]]:
    key = tmp_path / "admin.key"
    key.write_text("a-key-of-the-lab")
    (tmp_path / "keys.txt").write_text("sesame max_in_flight=4\n")
    flags = (
        "--admin-key",
        str(key),
        "--set",
        "drain_grace=0",
    )
    ports = iter(free_ports(4))
    both = [
        Program(
            *("-m", "balancer", "--listen", f"127.0.0.1:{listen}", "--admin", f"127.0.0.1:{admin}", *flags),
            *(flag.format(here=tmp_path, port=listen) for flag in more),
        )
        for listen, admin in zip(ports, ports, strict=True)
    ]
    yield both
    for one in both:
        one.close()


def at(balancer: Program, word: str) -> str:
    """Its address: the endpoint (`listening`) or the admin port (`admin`)."""
    lines = wait_until(balancer.lines, fits=lambda lines: any(line.startswith("admin on ") for line in lines))
    return next(line.rpartition(" ")[2] for line in lines if line.startswith(word))


def up(groundserve: Groundserve, pair: list[Program], tmp_path: Path, run: str, **ours: object) -> None:
    admins = ",".join(at(one, "admin").removeprefix("http://") for one in pair)
    flags = ("--balancers", admins, "--admin-key", tmp_path / "admin.key", "--listen", "10.77.0.100:30001")
    groundserve.up(groundserve.service("lab", run, **ours), *flags, ports=()).until_up()


def test_a_replica_leaves_when_both_have_let_go(groundserve: Groundserve, pair: list[Program], tmp_path: Path) -> None:
    """A stream at one of them holds it, although the other has none; and streams at both lose nothing meanwhile."""
    up(groundserve, pair, tmp_path, f"{LAB} --tokens 60 --token-interval 0.05")
    assert groundserve.status("lab")["service"]["endpoint"] == "http://10.77.0.100:30001"
    first, second = (at(one, "listening") for one in pair)
    with httpx.stream("POST", f"{second}/v1/chat/completions", json=BODY, timeout=60) as answer:
        who, lines = answer.headers["x-replica-id"], answer.iter_lines()
        next(lines)
        groundserve("down", "lab", "--replica-id", who.rpartition("-")[2])
        groundserve.until("lab", lambda shown: any(row["name"] == "lab-3" for row in shown["replicas"]))
        assert "data: [DONE]" in list(lines)
    with streaming(first, 2, BODY) as one, streaming(second, 2, BODY) as two:
        groundserve("scale", "lab", "1")
        groundserve.until("lab", lambda shown: len(shown["replicas"]) == 1)
    assert one.failed == two.failed == []


def test_one_balancer_goes_on_when_the_other_dies(
    groundserve: Groundserve, pair: list[Program], tmp_path: Path
) -> None:
    """It gets the whole of each limit; the other is told everything again when it is back."""
    up(groundserve, pair, tmp_path, f"{LAB} --tokens 2", max_in_flight=8)
    first, second = pair
    with streaming(at(first, "listening"), 2, BODY) as seen:
        second.process.send_signal(signal.SIGKILL)
        second.wait()
        groundserve("scale", "lab", "3")
        groundserve.until("lab", lambda shown: shown["service"]["ready"] == 3)
    assert seen.failed == []
    groundserve("down", "lab")
    assert httpx.get(f"{at(first, 'admin')}/services").json()[1:] == []
    groundserve.until_nothing_runs()


@pytest.mark.parametrize("more", [("--api-keys", "{here}/keys.txt")])
def test_two_balancers_share_the_limit_of_a_key(groundserve: Groundserve, pair: list[Program], tmp_path: Path) -> None:
    """Each lets in half of what the key may have at once, and one alone all of it."""
    up(groundserve, pair, tmp_path, f"{LAB} --tokens 1200 --token-interval 0.05", max_in_flight=64)
    first, second = pair
    with contextlib.ExitStack() as open_streams:

        def asked(balancer: Program) -> int:
            """The status of one more stream, which goes on if it is let in."""
            client = open_streams.enter_context(httpx.Client(headers=SESAME, timeout=60))
            return open_streams.enter_context(
                client.stream("POST", f"{at(balancer, 'listening')}/v1/chat/completions", json=BODY)
            ).status_code

        assert [asked(first), asked(second), asked(first), asked(second)] == [200] * 4
        groundserve.until("lab", lambda shown: shown["service"]["in_flight"] == 4)
        time.sleep(2 * TOLD_EVERY)
        assert (asked(first), asked(second)) == (429, 429)
        second.process.send_signal(signal.SIGKILL)
        second.wait()
        assert [wait_until(lambda: asked(first), fits=lambda status: status == 200) for _ in range(2)] == [200, 200]
        assert asked(first) == 429


def test_one_that_comes_back_drains_what_the_other_does(
    groundserve: Groundserve, pair: list[Program], tmp_path: Path
) -> None:
    up(groundserve, pair, tmp_path, f"{LAB} --tokens 200 --token-interval 0.05")
    first, second = pair
    with httpx.stream("POST", f"{at(second, 'listening')}/v1/chat/completions", json=BODY, timeout=60) as answer:
        id, lines = int(answer.headers["x-replica-id"].rpartition("-")[2]), answer.iter_lines()
        next(lines)
        first.process.send_signal(signal.SIGKILL)
        first.wait()
        groundserve("down", "lab", "--replica-id", str(id))
        first.restart()

        def there() -> list[str]:
            with contextlib.suppress(httpx.HTTPError):
                shown = httpx.get(f"{at(first, 'admin')}/status", params={"service": "lab"})
                if shown.is_success:
                    return [row["status"] for row in shown.json()["replicas"] if row["id"] == id]
            return []

        wait_until(there, fits=lambda statuses: statuses == ["SHUTTING_DOWN"])
        assert "data: [DONE]" in list(lines)


def test_a_balancer_that_refuses_the_service_is_told_of(
    groundserve: Groundserve, pair: list[Program], tmp_path: Path
) -> None:
    """Its key may be another one; the other balancer serves meanwhile."""
    first, second = pair
    other = tmp_path / "other.key"
    other.write_text("another-key-of-the-lab")
    second.close()
    pair[1] = Program(
        *("-m", "balancer", "--listen", f"127.0.0.1:{free_ports(1)[0]}"),
        *("--admin", f"127.0.0.1:{free_ports(1)[0]}", "--admin-key", str(other)),
    )
    up(groundserve, pair, tmp_path, f"{LAB} --tokens 2")
    with streaming(at(first, "listening"), 1, BODY) as seen:
        shown = groundserve.until("lab", lambda shown: shown["service"].get("reason"))
    assert f"{at(pair[1], 'admin').removeprefix('http://')} does not take lab" in shown["service"]["reason"]
    assert seen.failed == []


class Balancers(SeveralBalancers):
    """Some that are at these addresses; their admin ports do not answer while `heard` is not set."""

    def __init__(self, key_file: Path) -> None:
        super().__init__("127.0.0.1:1", key_file, "key")
        self.there: dict[str, str] = {}
        self.closed: list[tuple[str, bool]] = []  # each that was asked when it went, and whether its client was closed

    endpoint = "http://127.0.0.1:2"

    def addresses(self) -> dict[str, str]:
        return dict(self.there)

    async def keep_up(self) -> None: ...

    async def renew(self, recipe: Recipe) -> None: ...

    async def replace(self) -> None: ...

    async def stop(self, hurry: asyncio.Event) -> None: ...

    async def _told(self, client: httpx.AsyncClient, listing: Listing) -> Snapshot | None:
        if client.base_url.port == 3:
            return said(Status.READY, 0)
        try:
            await asyncio.Event().wait()
        finally:
            self.closed.append((str(client.base_url), client.is_closed))
        return None


def test_who_asks_a_balancer_that_is_gone_ends_before_its_client(tmp_path: Path) -> None:
    """Several that go at once, while the list is told and a replica drained at the same time."""

    async def run() -> None:
        balancers = Balancers(tmp_path)
        balancers.there = {"a": "127.0.0.1:3", "b": "127.0.0.1:4", "c": "127.0.0.1:5"}
        await balancers.tell(Listing(()))
        balancers.there = {"a": "127.0.0.1:3", "c": "127.0.0.1:6"}
        await asyncio.gather(balancers.tell(Listing(())), balancers._reached(), balancers._reached())
        assert sorted(balancers.closed) == [("http://127.0.0.1:4", False), ("http://127.0.0.1:5", False)]
        await balancers.leave()

    asyncio.run(run())


def test_who_goes_or_comes_brings_no_burst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each balancer counts since its own start, and the number of replicas follows what arrives."""
    totals = {"a": 1000, "b": 5000}

    class Both(SeveralBalancers):
        endpoint = "http://x"

        def addresses(self) -> dict[str, str]:
            return {name: f"{name}:1" for name in totals}

        async def _told(self, client: httpx.AsyncClient, listing: Listing) -> Snapshot | None:
            made = said(Status.READY, 0)
            arrived = totals[client.base_url.host]
            return replace(made, service=replace(made.service, arrived_total=arrived, turned_away_total=arrived))

    monkeypatch.setattr(Both, "__abstractmethods__", frozenset())

    async def run() -> None:
        both = Both("a:1", tmp_path / "key", "sesame")  # type: ignore[abstract]

        async def arrived() -> tuple[int, int]:
            snapshot = await both.tell(Listing(()))
            assert snapshot is not None
            return snapshot.service.arrived_total, snapshot.service.turned_away_total

        assert await arrived() == (0, 0)
        totals.update(a=1003, b=5004)
        assert await arrived() == (7, 7)
        del totals["b"]
        totals["a"] = 1004
        assert await arrived() == (8, 8)
        totals["b"] = 5100
        assert await arrived() == (8, 8)
        totals.update(a=2, b=5101)
        assert await arrived() == (11, 11)
        for silence, expected in ((6.0, 12), (11.0, 12)):  # it may only be slow, or was out of reach
            at, word = both._said["b"]
            both._said["b"] = at - silence, word
            totals["b"] += 1
            assert await arrived() == (expected, expected)
        await both.leave()

    asyncio.run(run())


def test_flags_that_belong_elsewhere_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lab.yaml").write_text("service: {readiness_probe: /, replicas: 1}\nrun: exec $GROUNDSERVE_PORT\n")
    for flags, message in ((("--open",), "is said where they are started"), ((), "give --listen")):
        assert cli.main(["up", str(tmp_path / "lab.yaml"), "--on", "local", "--balancers", "h1:1,h2:1", *flags]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("more", [("--state", "{here}/state-{port}")])
def test_issued_keys_are_known_to_both(groundserve: Groundserve, pair: list[Program], tmp_path: Path) -> None:
    """Each enforces its part of the limits; `usage` sums what both counted; a key that one lacks is given to it."""
    up(groundserve, pair, tmp_path, f"{LAB} --tokens 2")
    ends = [at(one, "listening") for one in pair]
    body = BODY | {"stream": False}

    def asked(key: str) -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {key}"}
        return [httpx.post(f"{end}/v1/chat/completions", json=body, headers=headers, timeout=30) for end in ends]

    def statuses(key: str) -> list[int]:
        return [answer.status_code for answer in asked(key)]

    key = groundserve("keys", "add", "alice", "--requests-per-minute", "600").splitlines()[0]
    assert "there is a key alice already" in groundserve("keys", "add", "alice", code=1)
    assert statuses("sk-other") == [401, 401]
    for answer in asked(key):
        assert (answer.status_code, answer.headers["x-ratelimit-limit-requests"]) == (200, "600")
        assert 200 < int(answer.headers["x-ratelimit-remaining-requests"]) < 300, "half of them is its part"
    (row,) = [row for row in json.loads(groundserve("usage", "--by", "key", "--json")) if row["key"] == "alice"]
    assert (row["requests"], row["completion_tokens"]) == (2, 4)
    admin, bearer = at(pair[1], "admin"), {"Authorization": "Bearer a-key-of-the-lab"}
    httpx.delete(f"{admin}/keys/alice", headers=bearer, timeout=30).raise_for_status()
    assert statuses(key) == [200, 401]
    assert f"{admin} does not have alice: groundserve keys rotate alice" in groundserve("keys", "list")
    fresh = groundserve("keys", "rotate", "alice").splitlines()[0]
    assert (statuses(key), statuses(fresh)) == ([401, 401], [200, 200])
    groundserve("keys", "revoke", "alice")
    assert statuses(fresh) == [401, 401]
