import asyncio
import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from balancer.contract.listing import ReplicaListing
from balancer.contract.words import State, Status
from balancer.fleet.claim import Claim
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import SHOWN_AFTER, Verdict
from balancer.fleet.member_watch import MemberWatch
from balancer.fleet.probe_connection import NoResponse
from tests.fleet.watched import INTERVAL, PATIENCE, TIMEOUT, probes, statuses, until_ready, until_status, watched
from tests.lab.replica import LabReplica
from tests.support.fleets import Chosen, claimed, fleet_of
from tests.support.until import until


def asked(replica: LabReplica, path: str) -> int:
    return sum(probe.target.partition("?")[0] == path for probe in replica.seen.probes)


async def restart(replica: LabReplica, **knobs: Any) -> LabReplica:
    """Another replica at the same address, with an identity of its own."""
    # Bound from one to the other, or any program's connection to somewhere may get the port.
    with socket.socket() as kept:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            kept.setsockopt(socket.SOL_SOCKET, option, 1)
        kept.bind((replica.host, replica.port))
        await replica.stop()
        another = LabReplica(port=replica.port, **knobs)
        await another.start()
    return another


def at_work(fleet: Fleet) -> Claim[Chosen]:
    """A generating request in flight that has brought no byte yet."""
    return claimed(fleet)


# Becoming ready


def test_a_member_is_ready_when_both_questions_pass() -> None:
    async def play() -> None:
        async with LabReplica(health=503) as replica, watched(replica) as fleet:
            member = fleet.members[1]
            await until(lambda: member.service.verdict is Verdict.FAILING, within=PATIENCE)
            assert member.ready.verdict is Verdict.PASSING
            assert statuses(fleet) == ["STARTING"]
            replica.set(health=200)
            await until_ready(fleet)

    asyncio.run(play())


def test_the_service_is_not_asked_before_our_own_question_passes() -> None:
    async def play() -> None:
        async with LabReplica(ready=503) as replica, watched(replica) as fleet:
            await replica.seen.until(lambda _: asked(replica, "/ready") >= 3)
            assert asked(replica, "/health") == 0
            replica.set(ready=200)
            await until_ready(fleet)

    asyncio.run(play())


def test_a_replica_that_listens_later_becomes_ready_later() -> None:
    async def play() -> None:
        async with LabReplica() as replica:
            replica.refuse()
            async with watched(replica) as fleet:
                await probes(fleet, 1, 3)
                assert statuses(fleet) == ["STARTING"]
                await replica.accept()
                await until_ready(fleet)

    asyncio.run(play())


def test_sglang_without_ready() -> None:
    """An older SGLang without /ready is judged by the service's own probe."""

    async def play() -> None:
        async with LabReplica(ready=404) as replica, watched(replica) as fleet:
            await until_ready(fleet)
            replica.set(health=503)
            await until_status(fleet, 1, Status.NOT_READY)

    asyncio.run(play())


def test_a_custom_probe_is_sent_as_the_service_says() -> None:
    readiness = {
        "path": "/v1/chat/completions?probe=a b",
        "post_data": {"model": "m", "messages": [{"role": "user", "content": "hé"}], "max_tokens": 1},
        "headers": {"X-Probe": "yes", "Authorization": "Bearer probe"},
    }

    async def play() -> None:
        async with LabReplica() as replica, watched(replica, readiness=readiness, api_key="replicas") as fleet:
            await until_ready(fleet)
            seen = replica.seen.requests[0]
            assert (seen.method, seen.target) == ("POST", "/v1/chat/completions?probe=a%20b")
            assert seen.header("x-probe") == "yes"
            assert seen.headers_named("authorization") == ["Bearer probe"]
            assert seen.header("content-type") == "application/json"
            assert "hé".encode() in seen.body
            assert asked(replica, "/health") == 0
            assert replica.seen.malformed == []

    asyncio.run(play())


def test_a_custom_get_probe_passes_by_200_alone() -> None:
    async def play() -> None:
        async with (
            LabReplica(status=204) as replica,
            watched(replica, readiness={"path": "/v1/anything", "headers": {"X-Probe": "1"}}) as fleet,
        ):
            await until(lambda: fleet.members[1].service.verdict is Verdict.FAILING, within=PATIENCE)
            assert replica.seen.last.method == "GET"
            replica.set(status=0)
            await until_ready(fleet)

    asyncio.run(play())


def test_replicas_with_a_key_are_asked_with_it() -> None:
    async def play() -> None:
        async with LabReplica(api_key="s3cret") as replica, watched(replica, api_key="s3cret") as fleet:
            await until_ready(fleet)
            assert fleet.members[1].identity == str(replica.random_seed)

    asyncio.run(play())


def test_limits_are_known_before_requests() -> None:
    """A replica's limits are read from it before it gets a request."""

    async def play() -> None:
        async with (
            LabReplica(max_running_requests=40, max_total_tokens=8192) as replica,
            watched(replica) as fleet,
        ):
            await until_ready(fleet)
            member = fleet.members[1]
            assert (member.limit, member.capacity_tokens) == (32, 8192)

    asyncio.run(play())


def test_a_limit_that_was_set_stands() -> None:
    async def play() -> None:
        async with LabReplica(max_running_requests=40) as replica, watched(replica, max_in_flight=7) as fleet:
            await until_ready(fleet)
            assert (fleet.members[1].limit, fleet.members[1].capacity_tokens) == (7, 65536)

    asyncio.run(play())


# Ceasing to be ready


def test_one_bad_answer_is_forgiven_and_two_in_a_row_are_not() -> None:
    async def play() -> None:
        async with LabReplica() as replica, watched(replica) as fleet:
            await until_ready(fleet)
            member = fleet.members[1]
            replica.set(ready=500)
            await probes(fleet, 1, 1)
            replica.set(ready=200)
            assert (member.ready.failures, statuses(fleet)) == (1, ["READY"])
            await probes(fleet, 1, 1)
            assert member.ready.failures == 0
            replica.set(ready=500)
            await until_status(fleet, 1, Status.NOT_READY)
            assert member.ready.failures == 2
            replica.set(ready=200)
            await until_ready(fleet)

    asyncio.run(play())


def test_one_503_stops_claims() -> None:
    """A single 503 stops new claims at once, and a 200 allows them again."""

    async def play() -> None:
        async with LabReplica() as replica, watched(replica) as fleet:
            await until_ready(fleet)
            replica.set(ready=503)
            member = await until_status(fleet, 1, Status.NOT_READY)
            assert member.refusing
            assert member.ready.verdict is Verdict.PASSING
            replica.set(ready=200)
            await until_ready(fleet)
            assert fleet.members[1] is member

    asyncio.run(play())


def test_death_is_noticed_at_once() -> None:
    """A replica that dies is out at once, even if nobody sends it a request."""

    async def play() -> None:
        async with LabReplica() as replica, watched(replica, ready_interval=4.0) as fleet:
            await until_ready(fleet)
            await probes(fleet, 1, 1)  # now the line has been kept once, and the next question is seconds away
            began = time.monotonic()
            replica.refuse()
            replica.drop_connections()
            await until_status(fleet, 1, Status.NOT_READY)
            assert time.monotonic() - began < 1.0

    asyncio.run(play())


@pytest.mark.parametrize("fault", [{"ready": "hang"}, {"black_hole": True}], ids=["hangs", "reads nothing"])
def test_two_time_outs(fault: dict[str, Any]) -> None:
    """A replica that does not answer is out after two time-outs."""

    async def play() -> None:
        async with LabReplica() as replica, watched(replica) as fleet:
            await until_ready(fleet)
            began = time.monotonic()
            replica.set(**fault)
            if "black_hole" in fault:
                replica.drop_connections()
            await until_status(fleet, 1, Status.NOT_READY)
            took = time.monotonic() - began
            assert took >= TIMEOUT
            assert took < 2 * (INTERVAL + TIMEOUT) + 0.5  # a shared machine's own pauses
            replica.set(ready=200, black_hole=False)
            await until_ready(fleet)

    asyncio.run(play())


def test_a_hung_probe_delays_nobody() -> None:
    async def play() -> None:
        async with (
            LabReplica(ready="hang") as hung,
            LabReplica() as replica,
            watched(hung, replica, ready_timeout=30.0) as fleet,
        ):
            await until_ready(fleet, 1)
            replica.set(ready=503)
            await until_status(fleet, 2, Status.NOT_READY)
            replica.set(ready=200)
            await until_ready(fleet, 1)
            assert fleet.members[1].ready.verdict is Verdict.UNKNOWN

    asyncio.run(play())


def test_members_that_joined_together_are_asked_apart() -> None:
    async def play() -> None:
        async with LabReplica() as replica, watched(*[replica.url] * 12, ready_interval=0.5) as fleet:
            await until_ready(fleet)
            seen = len(replica.seen.probes)
            for number in fleet.members:
                await probes(fleet, number, 1)
            times = sorted(p.received_at for p in replica.seen.probes[seen:] if p.target == "/ready")
            assert times[-1] - times[0] > 0.2

    asyncio.run(play())


# What requests tell


def test_refused_request_needs_a_new_connection() -> None:
    """After a refused request, only a new connection proves that the replica listens."""

    async def play() -> None:
        async with LabReplica() as replica, watched(replica) as fleet:
            await until_ready(fleet)
            member = fleet.members[1]
            replica.refuse()  # open connections live on, and so does the prober's
            await probes(fleet, 1, 2)
            assert statuses(fleet) == ["READY"]
            fleet.refused(member)
            await probes(fleet, 1, 3)
            assert statuses(fleet) == ["NOT_READY"]
            await replica.accept()
            await until_ready(fleet)
            assert fleet.members[1] is member  # its identity is the same

    asyncio.run(play())


def test_a_refused_request_has_the_member_asked_at_once() -> None:
    async def play() -> None:
        async with LabReplica() as replica, watched(replica, ready_interval=30.0) as fleet:
            await until_ready(fleet)
            began = time.monotonic()
            fleet.refused(fleet.members[1])
            assert statuses(fleet) == ["NOT_READY"]
            await until_ready(fleet)
            assert time.monotonic() - began < 15.0

    asyncio.run(play())


def test_probes_keep_to_one_connection() -> None:
    async def play() -> None:
        async with LabReplica() as replica, watched(replica) as fleet:
            await until_ready(fleet)
            await probes(fleet, 1, 10)
            assert len({probe.connection for probe in replica.seen.probes if probe.target == "/ready"}) == 1
            assert asked(replica, "/server_info") == 1

    asyncio.run(play())


def test_a_storm_of_refusals_is_no_storm_of_probes() -> None:
    async def play() -> None:
        async with LabReplica() as replica, watched(replica, ready_interval=1.0) as fleet:
            await until_ready(fleet)
            before, began = asked(replica, "/ready"), time.monotonic()
            for _ in range(300):
                fleet.refused(fleet.members[1])
                await asyncio.sleep(0.001)
            took = time.monotonic() - began
            assert asked(replica, "/ready") - before <= 2 + 3 * took / 0.02

    asyncio.run(play())


# Token flow and long prefills


def test_idle_member_gets_deep_probes() -> None:
    """An idle member gets the deep probe again and again."""

    async def play() -> None:
        async with LabReplica() as replica, watched(replica) as fleet:
            await until_ready(fleet)
            before = asked(replica, "/health")
            await replica.seen.until(lambda _: asked(replica, "/health") >= before + 3)

    asyncio.run(play())


def test_long_prefill() -> None:
    """A long prefill never takes a member out, and the deep probe is not sent meanwhile."""

    async def play() -> None:
        async with LabReplica() as replica, watched(replica) as fleet:
            await until_ready(fleet)
            with at_work(fleet):
                replica.set(health=503)
                await probes(fleet, 1, 3)  # one that was on its way may still come
                before = asked(replica, "/health")
                await probes(fleet, 1, 20)
                assert asked(replica, "/health") == before
                assert statuses(fleet) == ["READY"]
                replica.set(health=200)

    asyncio.run(play())


def test_prefill_overtakes_a_deep_probe() -> None:
    """A deep probe that a prefill overtakes does not count."""

    async def play() -> None:
        async with LabReplica() as replica, watched(replica) as fleet:
            await until_ready(fleet)
            replica.set(health="hang")
            before = asked(replica, "/health")
            await replica.seen.until(lambda _: asked(replica, "/health") > before)
            with at_work(fleet) as member:
                await asyncio.sleep(3 * TIMEOUT)
                assert (member.service.failures, statuses(fleet)) == (0, ["READY"])

    asyncio.run(play())


@pytest.mark.parametrize(
    "readiness", [{"path": "/v1/models"}, {"path": "/v1/completions", "post_data": {"prompt": ""}}]
)
def test_a_prefill_that_keeps_any_probe_waiting_takes_nobody_out(readiness: dict[str, Any]) -> None:
    async def play() -> None:
        async with LabReplica() as replica, watched(replica, readiness=readiness) as fleet:
            await until_ready(fleet)
            with at_work(fleet):
                replica.set(service_status="hang", hang="before_head")
                await asyncio.sleep(4 * TIMEOUT)
                assert statuses(fleet) == ["READY"]

    asyncio.run(play())


def test_bytes_that_flow_prove_as_much_as_a_probe() -> None:
    async def play() -> None:
        async with LabReplica() as replica, watched(replica) as fleet:
            await until_ready(fleet)
            member = fleet.members[1]
            replica.set(health=503)
            member.last_byte_at = fleet.clock() + 3600
            await probes(fleet, 1, 4)
            before = asked(replica, "/health")
            await probes(fleet, 1, 15)
            assert asked(replica, "/health") == before
            assert (member.service.failures, statuses(fleet)) == (0, ["READY"])
            member.last_byte_at = 0.0
            await until_status(fleet, 1, Status.NOT_READY)

    asyncio.run(play())


def test_a_hung_scheduler_is_found_out_after_the_silence_timeout() -> None:
    async def play() -> None:
        async with LabReplica() as replica, watched(replica, silence_timeout=0.4) as fleet:
            await until_ready(fleet)
            with at_work(fleet):
                began = time.monotonic()
                replica.set(health="hang", service_status="hang")
                await until_status(fleet, 1, Status.NOT_READY)
                assert time.monotonic() - began >= 2 * 0.4
                replica.set(service_status=200)
                await until_ready(fleet)

    asyncio.run(play())


def test_silent_member_with_a_live_scheduler() -> None:
    """A silent member whose scheduler answers is left alone for another silence_timeout."""

    async def play() -> None:
        async with LabReplica() as replica, watched(replica, silence_timeout=0.4) as fleet:
            await until_ready(fleet)
            with at_work(fleet):
                replica.set(health=503)  # SGLang's own word for a prefill that long
                began, before = time.monotonic(), asked(replica, "/server_info")
                await replica.seen.until(lambda _: asked(replica, "/server_info") >= before + 3)
                assert time.monotonic() - began >= 3 * 0.4
                assert statuses(fleet) == ["READY"]

    asyncio.run(play())


def test_silent_server_that_is_no_sglang() -> None:
    """A silent server that is not SGLang gets the service's own probe."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
                seen.append(path)
                status = b"200 OK" if path in (b"/ready", b"/health") else b"404 Not Found"
                writer.write(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status)
        writer.close()

    seen: list[bytes] = []

    async def play() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, watched(url, silence_timeout=0.2) as fleet:
            await until_ready(fleet)
            with at_work(fleet):
                began = len(seen)
                await probes(fleet, 1, 20)
                assert seen[began:].count(b"/server_info") >= 2
                assert seen[began:].count(b"/health") >= 2
                assert (fleet.members[1].service.failures, statuses(fleet)) == (0, ["READY"])

    asyncio.run(play())


def test_a_deep_question_that_failed_once_is_asked_again_soon() -> None:
    async def play() -> None:
        readiness = {"endpoint_probe_interval_seconds": 4.0}
        async with LabReplica(health=503) as replica, watched(replica, readiness=readiness) as fleet:
            await until(lambda: fleet.members[1].service.verdict is Verdict.FAILING, within=PATIENCE)
            replica.set(health=200)
            await until_ready(fleet)
            passed = asked(replica, "/health")
            replica.set(health=503)
            await until_status(fleet, 1, Status.NOT_READY)
            times = [probe.received_at for probe in replica.seen.probes if probe.target == "/health"][passed:]
            assert len(times) == 2
            assert times[1] - times[0] < 2.0  # half an interval

    asyncio.run(play())


# Identity


def test_restart_between_two_probes() -> None:
    """A restart between two probes is noticed without any traffic."""

    async def play() -> None:
        replica = LabReplica(random_seed=1)
        await replica.start()
        async with watched(replica, ready_interval=2.0) as fleet:
            await until_ready(fleet)
            await probes(fleet, 1, 1)
            old = fleet.members[1]
            old.requests_total = 5
            replica = await restart(replica, random_seed=2)
            await until(lambda: fleet.members[1] is not old, within=PATIENCE)
            new = await until_status(fleet, 1, Status.READY)
            assert (new.identity, new.requests_total, new.url) == ("2", 0, old.url)
        await replica.stop()

    asyncio.run(play())


def test_a_restart_behind_a_503_is_noticed() -> None:
    async def play() -> None:
        replica = LabReplica(random_seed=1)
        await replica.start()
        async with watched(replica) as fleet:
            await until_ready(fleet)
            old = fleet.members[1]
            replica.set(ready=503)
            await until_status(fleet, 1, Status.NOT_READY)
            replica = await restart(replica, random_seed=2, ready=503)
            await replica.seen.until(lambda _: asked(replica, "/ready") >= 2)
            assert fleet.members[1] is old  # who it is does not matter before it can serve
            replica.set(ready=200)
            # Its identity may come later than its first pass, where it takes longer than a probe may.
            await until(lambda: fleet.members[1] is not old, within=PATIENCE)
            await until_ready(fleet)
            assert fleet.members[1].identity == "2"
        await replica.stop()

    asyncio.run(play())


def test_a_restart_leaves_no_ejection_behind_and_keeps_a_drain() -> None:
    async def play() -> None:
        replica = LabReplica()
        await replica.start()
        async with watched(replica) as fleet:
            await until_ready(fleet)
            old = fleet.members[1]
            old.ejected_until = fleet.clock() + 3600
            fleet.drain(old)
            replica = await restart(replica)
            await until(lambda: fleet.members[1] is not old, within=PATIENCE)
            await until(lambda: fleet.members[1].has_passed, within=PATIENCE)
            assert statuses(fleet) == ["SHUTTING_DOWN"]
            fleet.undrain(fleet.members[1])
            assert statuses(fleet) == ["READY"]
        await replica.stop()

    asyncio.run(play())


def test_a_line_that_breaks_by_itself_makes_no_new_member() -> None:
    async def play() -> None:
        async with LabReplica() as replica, watched(replica) as fleet:
            await until_ready(fleet)
            member, asked_before = fleet.members[1], asked(replica, "/server_info")
            replica.drop_connections()
            await replica.seen.until(lambda _: asked(replica, "/server_info") > asked_before)
            await probes(fleet, 1, 2)
            assert fleet.members[1] is member
            assert statuses(fleet) == ["READY"]

    asyncio.run(play())


def test_replica_without_an_identity() -> None:
    """A replica without an identity counts as new when it passes again after refusing connections."""

    async def play() -> None:
        async with LabReplica(service_status=404) as replica, watched(replica) as fleet:
            await until_ready(fleet)
            old = fleet.members[1]
            replica.drop_connections()
            await probes(fleet, 1, 3)
            assert fleet.members[1] is old  # nothing was refused
            replica.refuse()
            replica.drop_connections()
            await until_status(fleet, 1, Status.NOT_READY)
            await replica.accept()
            # Its identity may come later than its first pass, where it takes longer than a probe may.
            await until(lambda: fleet.members[1] is not old, within=PATIENCE)
            await until_ready(fleet)

    asyncio.run(play())


def test_identity_during_a_prefill() -> None:
    """A member that cannot give its identity during a prefill stays in and is asked later."""

    async def play() -> None:
        replica = LabReplica(random_seed=1)
        await replica.start()
        async with watched(replica) as fleet:
            await until_ready(fleet)
            old = fleet.members[1]
            with at_work(fleet):
                replica.set(service_status="hang")
                replica.drop_connections()
                await probes(fleet, 1, 5)
                assert statuses(fleet) == ["READY"]
            replica.set(service_status=200, random_seed=0)
            replica.random_seed = 2  # as if it had been another process all along
            await until(lambda: fleet.members[1] is not old, within=PATIENCE)
        await replica.stop()

    asyncio.run(play())


# Coming and going


def test_members_that_leave_and_come() -> None:
    """A member that left gets no more probes, and a new one gets them."""

    async def play() -> None:
        async with LabReplica() as first, LabReplica() as second, watched(first) as fleet:
            await until_ready(fleet)
            fleet.reconcile([ReplicaListing("r2", second.url, id=2)])
            await until_ready(fleet)
            await first.seen.until(lambda seen: seen.connections_open == 0)
            before = len(first.seen.probes)
            await probes(fleet, 2, 4)
            assert len(first.seen.probes) == before

    asyncio.run(play())


def test_a_replica_that_is_not_running_yet_is_not_asked() -> None:
    async def play() -> None:
        async with LabReplica() as replica, watched(replica) as fleet:
            fleet.reconcile([ReplicaListing("r2", replica.url, id=2, state=State.PROVISIONING)])
            before = len(replica.seen.probes)
            await asyncio.sleep(4 * INTERVAL)
            assert asked(replica, "/ready") - before <= 1
            fleet.reconcile([ReplicaListing("r2", replica.url, id=2)])
            await until_ready(fleet)

    asyncio.run(play())


def test_stopping_ends_every_task_and_connection() -> None:
    async def play() -> None:
        async with LabReplica() as replica, LabReplica(ready="hang", health="hang") as hung:
            before = asyncio.all_tasks()
            async with watched(replica, hung) as fleet:
                await until_ready(fleet, 1)
                await hung.seen.until(lambda _: asked(hung, "/ready") > 0)
            await replica.seen.until(lambda seen: seen.connections_open == 0)
            await hung.seen.until(lambda seen: seen.connections_open == 0)
            ours = {task for task in asyncio.all_tasks() - before if "MemberWatch" in repr(task.get_coro())}
            assert ours == set()

    asyncio.run(play())


# What a probe gets


@contextlib.asynccontextmanager
async def saying(answers: dict[str, tuple[int, str]]) -> AsyncIterator[tuple[str, list[str]]]:
    """A server that answers each path so: a status, and where to go instead; its URL, and what it was asked."""
    heard: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                method, path, *_ = (await reader.readuntil(b"\r\n\r\n")).decode().split()
                heard.append(f"{method} {path}")
                status, onward = answers.get(path, (404, ""))
                field = f"Location: {onward}\r\n".replace("HERE", url) if onward else ""
                writer.write(f"HTTP/1.1 {status} Said\r\n{field}Content-Length: 0\r\n\r\n".encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield url, heard
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    ("path", "status", "onward"),
    [
        ("/health/", 307, "/health"),
        ("/health/", 301, "HERE/health"),
        ("/a/b", 308, "../health"),
        ("/one", 302, "/two"),
        ("/one?x=1", 303, "/health"),
    ],
)
def test_a_probe_that_is_redirected_is_followed_as_skyserve_does(path: str, status: int, onward: str) -> None:
    async def play() -> None:
        answers = {"/health": (200, ""), path: (status, onward), "/two": (302, "/health")}
        async with saying(answers) as (url, heard), watched(url, readiness={"path": path}) as fleet:
            await until_ready(fleet)
            assert f"GET {path}" in heard
            assert "GET /health" in heard

    asyncio.run(play())


@pytest.mark.parametrize(
    ("answers", "got"),
    [
        ({}, "/health/ got 404"),
        ({"/health/": (503, "")}, "/health/ got 503"),
        ({"/health/": (302, "http://login.example/")}, "/health/ got 302, to http://login.example/"),
        ({"/health/": (302, "https://127.0.0.1/health")}, "/health/ got 302, to https://127.0.0.1/health"),
        ({"/health/": (302, "/health/")}, "/health/ got 302, to /health/"),
        ({"/ready": (500, "")}, "GET /ready got 500"),
        (None, "it accepts no connections yet"),
    ],
)
def test_a_probe_that_fails_for_long_says_what_it_gets(answers: dict[str, tuple[int, str]] | None, got: str) -> None:
    async def play() -> None:
        async with saying(answers or {}) as (url, _):
            where = url if answers is not None else "http://127.0.0.1:1"
            async with watched(where, readiness={"path": "/health/"}) as fleet:
                member = fleet.members[1]
                await until(lambda: member.probe is Verdict.FAILING, within=PATIENCE)
                now = fleet.clock()
                assert member.trouble(now) == "", "not at once: a replica that loads looks like that"
                assert got in member.trouble(now + SHOWN_AFTER + 1)

    asyncio.run(play())


def test_after_a_pass_there_is_nothing_to_say() -> None:
    async def play() -> None:
        async with LabReplica(health=500) as replica, watched(replica) as fleet:
            member = fleet.members[1]
            await until(lambda: member.service.verdict is Verdict.FAILING, within=PATIENCE)
            replica.set(health=200)
            await until_ready(fleet)
            assert member.trouble(fleet.clock() + 1000) == ""

    asyncio.run(play())


# A watch that ends


def test_a_watch_that_its_own_probe_stops_ends_on_a_late_loop() -> None:
    """It stops as its probe finds another process; the pause that follows is over before the cancellation comes."""

    class Silent:
        breaks = 0

        async def request(self, *_: Any, **__: Any) -> None:
            watch.stop()
            raise NoResponse("")

        def close(self) -> None: ...

    async def stop() -> None:
        nonlocal watch
        fleet = fleet_of(1, asyncio.get_running_loop().time, ready_interval=1e-9)
        (member,) = fleet.members.values()
        watch = MemberWatch(member, fleet, lambda *_, **__: Silent(), random.Random(1), "")
        _, going_on = await asyncio.wait(watch.tasks, timeout=3)
        for task in going_on:
            task.cancel()
        assert not going_on

    watch: MemberWatch
    asyncio.run(stop())
