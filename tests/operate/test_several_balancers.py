"""Two balancers in front of the same replicas: both are told, and what both say counts."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from balancer import cli
from balancer.contract.status import ReplicaRow, ServiceRow, Snapshot
from balancer.contract.words import ServiceStatus, Status
from balancer.operate.engines.ports import free_ports
from balancer.operate.engines.several import merged, shares
from tests.operate.command_line import LAB, Groundserve
from tests.operate.streaming import streaming
from tests.support.program import Program
from tests.support.until import wait_until

BODY = {"model": "lab", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def said(status: Status, in_flight: int, service_in_flight: int = 0) -> Snapshot:
    service = ServiceRow("lab", "1", ServiceStatus.READY, 1.0, "http://x", "round_robin", 1, 1, 2, service_in_flight)
    row = ReplicaRow(name="lab-1", endpoint="http://a:1", id=1, launched_seconds=1.0, status=status)
    return Snapshot(service, (replace(row, in_flight=in_flight),))


@pytest.mark.parametrize(
    ("loads", "expected"),
    [([5], [1]), ([0, 0], [0.5, 0.5]), ([9, 0], [1, 0.5]), ([3, 1], [0.75, 0.5]), ([4, 4], [0.5, 0.5])],
)
def test_each_has_its_half_and_more_of_what_others_leave(loads: list[int], expected: list[float]) -> None:
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
def pair(tmp_path: Path) -> Iterator[list[Program]]:
    key = tmp_path / "admin.key"
    key.write_text("a-key-of-the-lab")
    flags = ("--admin-key", str(key), "--set", "drain_grace=0")
    ports = iter(free_ports(4))
    both = [
        Program("-m", "balancer", "--listen", f"127.0.0.1:{listen}", "--admin", f"127.0.0.1:{admin}", *flags)
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


def test_flags_that_belong_elsewhere_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lab.yaml").write_text("service: {readiness_probe: /, replicas: 1}\nrun: exec $GROUNDSERVE_PORT\n")
    for flags, message in ((("--open",), "is said where they are started"), ((), "give --listen")):
        assert cli.main(["up", str(tmp_path / "lab.yaml"), "--on", "local", "--balancers", "h1:1,h2:1", *flags]) == 1
        assert message in capsys.readouterr().err
