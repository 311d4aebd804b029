from dataclasses import replace

import pytest

from balancer.contract.status import ReplicaRow, ServiceRow, Snapshot
from balancer.contract.words import ServiceStatus, Status
from balancer.operate.commands.table import ago, tables, uptime

SERVICE = ServiceRow(
    "sglang-llava", "1", ServiceStatus.READY, 496.0, "http://127.0.0.1:30001", "round_robin", 2, 2, 0, 3
)
REPLICA = ReplicaRow(
    "sglang-llava-1",
    "http://127.0.0.1:20456",
    id=1,
    launched_seconds=960.0,
    infra="local",
    resources="1x L4",
    status=Status.READY,
    in_flight=3,
    requests_total=70,
    failures_total=1,
    prompt_tokens_total=1200,
    cached_tokens_total=900,
)
SNAPSHOT = Snapshot(
    SERVICE, (REPLICA, replace(REPLICA, id=2, name="sglang-llava-2", endpoint="http://127.0.0.1:20999"))
)


def test_the_tables_are_those_of_sky_serve_status() -> None:
    assert tables([SNAPSHOT]).splitlines() == [
        "Services",
        "NAME          VERSION  UPTIME  STATUS  REPLICAS  ENDPOINT",
        "sglang-llava  1        8m 16s  READY   2/2       http://127.0.0.1:30001",
        "",
        "Service Replicas",
        "SERVICE_NAME  ID  VERSION  ENDPOINT                LAUNCHED     INFRA  RESOURCES  STATUS",
        "sglang-llava  1   1        http://127.0.0.1:20456  16 mins ago  local  1x L4      READY",
        "sglang-llava  2   1        http://127.0.0.1:20999  16 mins ago  local  1x L4      READY",
    ]


def test_no_service_is_said_in_sky_serves_words() -> None:
    assert tables([]) == "No existing services."


def test_a_service_without_replicas_still_has_both_tables() -> None:
    empty = Snapshot(replace(SERVICE, status=ServiceStatus.NO_REPLICA, uptime_seconds=None, ready=0, total=0))
    assert tables([empty]).splitlines() == [
        "Services",
        "NAME          VERSION  UPTIME  STATUS      REPLICAS  ENDPOINT",
        "sglang-llava  1        -       NO_REPLICA  0/0       http://127.0.0.1:30001",
        "",
        "Service Replicas",
        "No existing replicas.",
    ]


def test_several_services_share_the_tables() -> None:
    other = Snapshot(replace(SERVICE, name="b"), (replace(REPLICA, name="b-1"),))
    names = [line.split()[0] for line in tables([SNAPSHOT, other]).splitlines() if line]
    assert names == ["Services", "NAME", "sglang-llava", "b", "Service"] + ["SERVICE_NAME"] + ["sglang-llava"] * 2 + [
        "b"
    ]


def test_reasons_stand_below_the_tables_once_each() -> None:
    dead = replace(REPLICA, status=Status.FAILED, reason="exited with code 1: out of memory")
    failed = Snapshot(replace(SERVICE, status=ServiceStatus.FAILED, reason=dead.reason), (dead,))
    assert tables([failed]).count("out of memory") == 1
    assert tables([Snapshot(SERVICE, (dead,))]).endswith("sglang-llava-1: exited with code 1: out of memory")


def test_verbose_adds_columns_and_keeps_the_others() -> None:
    short, long = tables([SNAPSHOT]).splitlines(), tables([SNAPSHOT], verbose=True).splitlines()
    assert long[1].split() == [*short[1].split(), "LOAD_BALANCING_POLICY", "IN_FLIGHT", "QUEUED"]
    assert long[2].endswith("round_robin            3          0")
    counts = ["IN_FLIGHT", "REQUESTS", "FAILURES", "PROMPT_TOKENS", "CACHED_TOKENS"]
    assert long[5].split()[8:] == [*counts, "GPU", "NODE", "ENDS_IN"]
    assert long[6].split()[-8:] == ["3", "70", "1", "1200", "900", "-", "-", "-"]


def test_nodes_are_shown_where_there_are_several() -> None:
    """Of all services in the table; on one machine the column would say nothing."""
    placed = replace(SNAPSHOT, replicas=(replace(REPLICA, node="h1"), replace(REPLICA, id=2, name="second")))
    lines = tables([placed]).splitlines()
    assert lines[5].endswith("STATUS  NODE")
    assert [line.split()[-1] for line in lines[6:8]] == ["h1", "-"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"),
        (0.4, "< 1s"),
        (1, "1s"),
        (59.9, "59s"),
        (60, "1m"),
        (496, "8m 16s"),
        (3605, "1h 5s"),
        (86400 * 8 + 60, "1w 1d 1m"),
    ],
)
def test_uptime(seconds: float | None, words: str) -> None:
    assert uptime(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "< 1 sec ago"),
        (1, "1 sec ago"),
        (59.9, "59 secs ago"),
        (60, "1 min ago"),
        (960, "16 mins ago"),
        (7200, "2 hrs ago"),
        (86400, "1 day ago"),
        (86400 * 15, "2 weeks ago"),
    ],
)
def test_ago(seconds: float, words: str) -> None:
    assert ago(seconds) == words
