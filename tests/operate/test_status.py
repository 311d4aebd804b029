"""The exit status of `groundserve status`, by which scripts see how a service fares."""

import json
import signal
from pathlib import Path

import pytest

from balancer.contract.status import ReplicaRow, ServiceRow, Snapshot
from balancer.contract.words import ServiceStatus, Status
from balancer.operate.commands.show import ALL_READY, DEGRADED, DOWN, exit_code
from tests.operate.command_line import LAB, Groundserve

READY, STARTING, FAILED, DRAINING = Status.READY, Status.STARTING, Status.FAILED, Status.DRAINING


def snapshot(status: ServiceStatus, wanted: int | None, *statuses: Status) -> Snapshot:
    rows = tuple(
        ReplicaRow(f"r-{id}", "", id=id, launched_seconds=1.0, status=one) for id, one in enumerate(statuses, 1)
    )
    ready = statuses.count(READY)
    service = ServiceRow("s", "1", status, None, "", "round_robin", ready, len(rows), 0, 0, wanted=wanted)
    return Snapshot(service, rows)


@pytest.mark.parametrize(
    ("status", "wanted", "replicas", "code"),
    [
        (ServiceStatus.READY, 2, (READY, READY), ALL_READY),
        (ServiceStatus.READY, 2, (READY, READY, STARTING), ALL_READY),
        (ServiceStatus.READY, 2, (READY, READY, DRAINING), ALL_READY),
        (ServiceStatus.READY, 2, (READY, STARTING), DEGRADED),
        (ServiceStatus.READY, 2, (READY, FAILED), DEGRADED),
        (ServiceStatus.READY, 2, (READY,), DEGRADED),
        (ServiceStatus.REPLICA_INIT, 2, (STARTING, STARTING), DOWN),
        (ServiceStatus.FAILED, 1, (FAILED,), DOWN),
        (ServiceStatus.NO_REPLICA, 0, (), ALL_READY),
        (ServiceStatus.CONTROLLER_INIT, 0, (), DOWN),
        (ServiceStatus.SHUTTING_DOWN, 1, (READY,), DEGRADED),
        (ServiceStatus.READY, None, (READY, READY), ALL_READY),
        (ServiceStatus.READY, None, (READY, STARTING), DEGRADED),
        (ServiceStatus.READY, None, (READY, DRAINING), ALL_READY),
        (ServiceStatus.NO_REPLICA, None, (), DOWN),
    ],
)
def test_code(status: ServiceStatus, wanted: int | None, replicas: tuple[Status, ...], code: int) -> None:
    assert exit_code(snapshot(status, wanted, *replicas)) == code


def test_a_service_that_is_not_up(groundserve: Groundserve) -> None:
    assert groundserve("status", "llava", code=4) == "groundserve: no service llava is up here; none is\n"
    assert groundserve("status") == "No existing services.\n"
    groundserve("status", "--endpoint", "llava", code=1)


def test_a_service_on_its_way(groundserve: Groundserve) -> None:
    """All ready, then one of two replicas that cannot come back, then the endpoint alone."""
    flag = groundserve.folder / "once"
    flag.mkdir()
    up = groundserve.up(groundserve.service("lab", f"rmdir {flag} 2>/dev/null || exit 2\n{LAB}", replicas=1)).until_up()
    groundserve("status", "lab")
    wanted = json.loads(groundserve("status", "lab", "--json"))[0]["service"]["wanted"]
    assert wanted == 1
    groundserve("scale", "lab", "2")
    groundserve.until("lab", lambda status: status["service"]["wanted"] == 2)
    groundserve("status", "lab", code=3)
    groundserve("status", "lab", "--endpoint")
    assert up.end(signal.SIGINT) == 0
    groundserve("status", "lab", code=4)


def test_unreadable_state_is_unknown(groundserve: Groundserve, tmp_path: Path) -> None:
    folder = tmp_path / "state/groundserve/bad"
    (folder / "lock").mkdir(parents=True)
    assert "bad" in groundserve("status", code=4)
