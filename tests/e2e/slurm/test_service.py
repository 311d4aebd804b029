"""A service on a real Slurm, from its start to its end."""

import json
import re
import sys

import pytest

from tests.e2e.slurm.served import ENDPOINT, STREAMS, Served
from tests.operate.streaming import streaming
from tests.support.until import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


def test_up_serves_from_two_nodes(served: Served) -> None:
    """And no secret of it is in what other users, or Slurm's own files, can show."""
    file = served.file(replicas=6)
    (secrets := served.home / "secrets").write_text("TOKEN=sesame-opens\n")
    said = served.up(file, "--secret-file", str(secrets))
    assert "is up after" in said
    rows = served.until_ready(6)["replicas"]
    assert sorted(row["node"] for row in rows) == [*["h1"] * 3, *["h2"] * 3]
    assert {row["infra"] for row in rows} == {"slurm (gpu)"}
    assert all(row["leased"].startswith("GPU ") for row in rows)
    table = served("status", served.name)
    assert re.search(r"RESOURCES +STATUS +NODE\n", table)
    with streaming(ENDPOINT, clients=8) as seen:
        pass
    assert seen.failed == []
    metrics = served.at(sys.executable, "-c", "import httpx; print(httpx.get('http://127.0.0.1:30002/metrics').text)")
    assert 'groundserve_replica_info{infra="slurm (gpu)",node="h1"' in metrics
    hosts = [served.slurm.ctl, *served.slurm.nodes.values()]
    for host in hosts:
        assert "sesame" not in host.run("ps", "axww")
        host.run("grep", "-ra", "sesame", "/var/lib/slurm", code=1)
    assert "sesame" not in served.slurm.ctl.run("scontrol", "show", "job")
    kept = [path for path in served.state.rglob("*") if path.is_file() and b"sesame" in path.read_bytes()]
    assert kept
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o600}


def test_logs_of_a_replica_are_what_its_job_says(served: Served) -> None:
    served.up(served.file(run=f"echo I am $SKYPILOT_SERVE_REPLICA_ID on $SLURMD_NODENAME; {STREAMS}", replicas=1))
    assert "I am 1 on h1" in served("logs", served.name, "1", "--no-follow")


def test_scale_from_2_to_6_to_2_under_streams(served: Served) -> None:
    served.up(served.file(replicas=2))
    with streaming(ENDPOINT, clients=6) as seen:
        assert "7 replicas does not fit" in served("scale", served.name, "7", code=1)
        served("scale", served.name, "6")
        served.until_ready(6)
        wait_until(lambda: set(seen.replicas), "each has answered", fits=lambda names: len(names) == 6)
        served("scale", served.name, "2")
        served.until_ready(2)
        wait_until(served.jobs, served.queue, fits=lambda jobs: len(jobs) == 2)
    assert seen.failed == []


def test_a_full_queue_is_told_in_slurms_own_word(served: Served) -> None:
    """The service is up with the others, and what is queued starts when there is room."""
    other = served.at("sbatch", "--parsable", "--gres=gpu:3", "--output=/dev/null", "--wrap", "sleep 600").strip()
    wait_until(served.queue, fits=lambda queue: "RUNNING" in queue)
    assert "is up after" in served.up(served.file(replicas=4))
    (queued,) = [row for row in served.status()["replicas"] if row["status"] == "PROVISIONING"]
    assert (queued["reason"], queued["endpoint"]) == ("Slurm queues it: Resources", "")
    assert f"{served.name}-{queued['id']}: Slurm queues it: Resources" in served("status", served.name, code=3)
    assert "waits_for_gpu" in served("events", served.name)
    served.at("scancel", other)
    served.until_ready(4)


def test_a_rolling_update_under_streams_loses_nothing(served: Served) -> None:
    served.up(served.file(replicas=2))
    with streaming(ENDPOINT, clients=6) as seen:
        said = served("update", served.name, served.file(run=f"export NEW=1; {STREAMS}", replicas=2))
        assert said.endswith(f"{served.name} is at version 2\n")
        assert {row["version"] for row in served.until_ready(2)["replicas"]} == {2}
    assert seen.failed == []


def test_check_tells_of_partition_and_nodes(served: Served) -> None:
    said = served("check", served.file(replicas=2), "--on", "slurm")
    assert "a job for each replica in partition gpu, gres gpu:1" in said
    assert "node h1, idle: 3 of 3 GPUs free" in said
    said = served("check", served.file(slurm={"partition": "cpu"}), "--on", "slurm", code=1)
    assert "x-groundserve.slurm.partition: there is no partition cpu; there is gpu" in said
    said = served("check", served.file(replicas=7), "--on", "slurm", code=1)
    assert "partition gpu has room for 6: run fewer replicas" in said
    said = served("check", served.file(slurm={"time": 90}), "--on", "slurm", code=1)
    assert "slurm.time should be text as sbatch takes it, in quotes" in said


def test_what_sbatch_refuses_is_told_in_its_words(served: Served) -> None:
    said = served.up(served.file(replicas=1, slurm={"gres": "gpu:9"}), code=1)
    assert "Requested node configuration is not available" in said
    assert json.loads(served("status", "--json")) == []


def test_a_wrapped_command_runs_in_its_container(served: Served) -> None:
    """Whatever container program a site has: it is put before the replica's command."""
    served.up(served.file(replicas=1, slurm={"container": "env CONTAINED=yes", "exclude": "h1"}))
    (row,) = served.until_ready(1)["replicas"]
    assert row["node"] == "h2"
    inside = served.slurm.nodes["h2"].run(
        "sh", "-c", "cat /proc/[0-9]*/environ | tr '\\0' '\\n' | grep -c CONTAINED=yes"
    )
    assert int(inside) >= 1
