"""What may happen to a service on a real Slurm: nothing is lost but what the design says."""

import time

import pytest

from balancer.operate.state.service_folder import ServiceFolder
from tests.e2e.slurm.served import ENDPOINT, LAB, STREAMS, Served
from tests.operate.streaming import streaming
from tests.support.until import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_a_host_that_dies_is_replaced_at_once(served: Served) -> None:
    """Long before Slurm knows. Its streams go on at the other host; what has no room there is queued."""
    served.up(served.file(replicas=4))
    before = served.until_ready(4)["replicas"]
    on_h1 = [row["id"] for row in before if row["node"] == "h1"]
    assert len(on_h1) == 3
    try:
        with streaming(ENDPOINT, clients=6) as seen:
            served.slurm.nodes["h1"].power_off()
            began = time.monotonic()
            status = served.until(
                lambda status: [row["node"] for row in status["replicas"] if row["status"] == "READY"] == ["h2"] * 3
            )
            assert time.monotonic() - began < 45
            assert not {row["id"] for row in status["replicas"] if row["status"] == "READY"} & set(on_h1)
            assert "down" not in served.slurm.ctl.run("sinfo", "-h", "-n", "h1", "-o", "%T")  # Slurm has not noticed
        assert seen.failed == []
        assert "h1 does not answer" in served("events", served.name)
        (queued,) = [job for job in served.queue().splitlines() if "PENDING" in job]
        assert (
            "h1" in served.slurm.ctl.run("scontrol", "show", "job", queued.split("|")[0]).partition("ExcNodeList=")[2]
        )
    finally:
        served.slurm.bring_back("h1")
    wait_until(served.jobs, served.queue, fits=lambda jobs: len(jobs) == 4)


def test_a_drained_node_is_emptied(served: Served) -> None:
    """Its replicas are replaced elsewhere first; for whom there is no room there, the old one serves on."""
    served.up(served.file(replicas=4))
    assert sorted(row["node"] for row in served.until_ready(4)["replicas"]) == ["h1", "h1", "h1", "h2"]
    admin = served.slurm.ctl.run
    try:
        with streaming(ENDPOINT, clients=6) as seen:
            admin("scontrol", "update", "nodename=h1", "state=drain", "reason=new kernel")
            status = served.until(
                lambda status: (
                    sorted((row["status"], row.get("node", "")) for row in status["replicas"])
                    == [("PROVISIONING", ""), ("READY", "h1"), *[("READY", "h2")] * 3]
                )
            )
            reasons = {row["status"]: row.get("reason", "") for row in status["replicas"] if row.get("node") != "h2"}
            assert reasons["READY"] == "Slurm says that h1 is draining: new kernel"
            served.until(lambda status: any("Slurm queues it" in row.get("reason", "") for row in status["replicas"]))
            served("scale", served.name, "3")
            assert {row["node"] for row in served.until_ready(3)["replicas"]} == {"h2"}
            wait_until(lambda: admin("sinfo", "-h", "-n", "h1", "-o", "%T"), fits=lambda state: state == "drained\n")
        assert seen.failed == []
        assert "h1 is draining: new kernel: a successor starts" in served("events", served.name)
    finally:
        admin("scontrol", "update", "nodename=h1", "state=resume", code=None)
    served("scale", served.name, "4")
    assert sorted(row["node"] for row in served.until_ready(4)["replicas"]) == ["h1", "h2", "h2", "h2"]


def test_a_replica_that_ignores_sigterm_is_killed(served: Served) -> None:
    """After its grace, by scancel: SIGTERM once more, and SIGKILL after Slurm's KillWait."""
    deaf = f"trap '' TERM; {STREAMS.removeprefix('exec ')} & trap '' TERM; wait; sleep 600"
    served.up(served.file(run=deaf, replicas=2, stop_grace=1))
    with streaming(ENDPOINT, clients=2) as seen:
        served("scale", served.name, "1")
        served.until_ready(1)
        wait_until(served.jobs, served.queue, fits=lambda jobs: len(jobs) == 1)
    assert seen.failed == []


def test_a_successor_comes_before_the_time_limit(served: Served) -> None:
    served.up(served.file(replicas=1, slurm={"time": "1"}))
    (first,) = served.until_ready(1)["replicas"]
    assert 0 < first["ends_in_seconds"] <= 60
    with streaming(ENDPOINT, clients=4) as seen:
        served.until(
            lambda status: [row["id"] for row in status["replicas"] if row["status"] == "READY"] == [2], within=90
        )
    assert seen.failed == []
    assert set(seen.replicas) == {f"{served.name}-1", f"{served.name}-2"}
    assert "outgoing" in served("events", served.name)


def test_a_job_that_somebody_cancels_starts_again_at_once(served: Served) -> None:
    served.up(served.file(replicas=1))
    served.until_ready(1)
    (job,) = served.jobs()
    served.at("scancel", job)
    wait_until(served.jobs, served.queue, fits=lambda jobs: jobs and job not in jobs)
    served.until_ready(1)
    assert "CANCELLED; starts again in 0 s" in served("events", served.name)


def test_a_dead_slurmctld_is_waited_out(served: Served) -> None:
    """Streams go on, nothing is taken for gone, and what is asked for meanwhile is done when it is back."""
    served.up(served.file(replicas=2))
    before = served.jobs()
    with streaming(ENDPOINT, clients=4) as seen:
        served.slurm.stop_controller()
        status = served.until(
            lambda status: any("Slurm does not say" in row.get("reason", "") for row in status["replicas"])
        )
        assert [row["status"] for row in status["replicas"]] == ["READY", "READY"]
        served("scale", served.name, "3")
        served.until(lambda status: [row["status"] for row in status["replicas"]] == ["READY", "READY", "PROVISIONING"])
        served.slurm.start_controller()
        served.until_ready(3, within=90)
    assert seen.failed == []
    assert set(before) < set(served.jobs())
    assert not any("Slurm does not say" in row.get("reason", "") for row in served.status()["replicas"])


def test_the_next_controller_takes_over_what_runs(served: Served) -> None:
    served.up(served.file(run=LAB, replicas=2))
    served.until_ready(2)
    before = served.jobs()
    holder = ServiceFolder(served.state.parent, served.name).holder()
    assert holder is not None
    served.at("kill", "-9", str(holder.pid))
    wait_until(lambda: served("status", served.name, code=None), fits=lambda said: "groundserve up" in said)
    assert served.jobs() == before
    assert "found 2 of its replicas running" in served("up", served.name, "-d")
    served.until_ready(2)
    assert served.jobs() == before
    with streaming(ENDPOINT, clients=2) as seen:
        pass
    assert seen.failed == []
    served("down", served.name)
    wait_until(served.jobs, served.queue, fits=lambda jobs: not jobs)


def test_down_ends_jobs_without_a_controller(served: Served) -> None:
    served.up(served.file(run=LAB, replicas=1))
    holder = ServiceFolder(served.state.parent, served.name).holder()
    assert holder is not None
    served.at("kill", "-9", str(holder.pid))
    wait_until(lambda: served("status", served.name, code=None), fits=lambda said: "groundserve up" in said)
    served("down", served.name)
    wait_until(served.jobs, served.queue, fits=lambda jobs: not jobs)
