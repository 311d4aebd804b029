"""Replicas on several nodes each: one job of Slurm, all of it or none."""

import pytest

from tests.e2e.slurm.served import ENDPOINT, STREAMS, Served
from tests.operate.streaming import streaming
from tests.support.until import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

NODES = 3
# What the parts beside the first do: they compute for it, and serve nobody.
OTHERS = "if [ $SKYPILOT_NODE_RANK != 0 ]; then sleep 4711; exit 1; fi"


def test_a_replica_on_two_nodes_is_all_or_none(served: Served) -> None:
    """One job, whose parts know of each other; it ends when one of them does, and another takes its place."""
    run = f'{OTHERS}; echo "nodes $SKYPILOT_NUM_NODES at" $SKYPILOT_NODE_IPS; {STREAMS}'
    served.up(served.file(run=run, replicas=2, nodes=2))
    rows = served.until_ready(2)["replicas"]
    assert {row["node"] for row in rows} == {"h[1-2]"}
    assert len(served.jobs()) == 2
    assert "nodes 2 at 10.77.0.12 10.77.0.13" in served("logs", served.name, "1", "--no-follow")
    with streaming(ENDPOINT, clients=4) as seen:
        assert "5 replicas does not fit" in served("scale", served.name, "5", code=1)
        served("scale", served.name, "1")
        served.until_ready(1)
        wait_until(served.jobs, served.queue, fits=lambda jobs: len(jobs) == 1)
    assert seen.failed == []
    (job,) = served.jobs()
    served.slurm.nodes["h2"].run("pkill", "-KILL", "-f", "sleep 4711")
    wait_until(served.jobs, served.queue, fits=lambda jobs: jobs and job not in jobs)
    served.until_ready(1)
    assert "h2: task 1: Killed" in served("events", served.name)
    served("down", served.name)
    assert list((served.state / "jobs").glob("*")) == []


def test_each_part_sees_the_gpus_of_its_own_node(served: Served) -> None:
    """They are others on each: what Slurm says on the first node holds for that one only."""
    served.at("sbatch", "--gres=gpu:1", "--nodelist=h1", "--output=/dev/null", "--wrap", "sleep 600")
    wait_until(served.queue, fits=lambda queue: "RUNNING" in queue)
    tells = 'echo "on $SLURMD_NODENAME GPU $CUDA_VISIBLE_DEVICES"'
    served.up(served.file(run=f"{tells}; {OTHERS}; {STREAMS}", nodes=2, gpus=2, replicas=1, slurm={"exclude": "h3"}))
    (row,) = served.until_ready(1)["replicas"]
    assert (row["node"], row["resources"]) == ("h[1-2]", "2x (2x L4)")
    said = served("logs", served.name, "1", "--no-follow")
    assert "on h1 GPU 1,2" in said
    assert "on h2 GPU 0,1" in said
    served.at("scancel", "--me")


def test_a_node_that_dies_takes_its_replica_along(served: Served) -> None:
    """The first part answers as before; it ends, and another starts on other nodes, long before Slurm knows."""
    served.up(served.file(run=f"{OTHERS}; {STREAMS}", replicas=1, nodes=2))
    (row,) = served.until_ready(1)["replicas"]
    assert row["node"] == "h[1-2]"
    (job,) = served.jobs()
    h1 = served.slurm.nodes["h1"]
    try:
        served.slurm.nodes["h2"].power_off()
        status = served.until(
            lambda status: [(row["id"], row["status"]) for row in status["replicas"]] == [(2, "READY")]
        )
        assert served.hosts(status["replicas"][0]) == ["h1", "h3"]
        assert "down" not in served.slurm.ctl.run("sinfo", "-h", "-n", "h2", "-o", "%T")  # Slurm has not noticed
        assert "h2 does not answer" in served("events", served.name)
        its = f"grep -slzx SLURM_JOB_ID={job} /proc/[0-9]*/environ"
        wait_until(lambda: h1.run("sh", "-c", its, code=None), fits=lambda processes: not processes)
    finally:
        served.slurm.bring_back("h2")
    wait_until(served.jobs, served.queue, fits=lambda jobs: len(jobs) == 1 and job not in jobs)
    assert len(list((served.state / "jobs").glob("*"))) == 3  # of the one that runs, and of its two parts
