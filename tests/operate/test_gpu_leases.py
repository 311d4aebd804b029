"""Services that share a machine's GPUs, by real leases on pretended GPUs."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.operate.command_line import LAB, Groundserve
from tests.support.until import wait_until

# A lease on one GPU, and then the lab's replica under it.
LEASED = LAB.replace(
    "-m tests.lab", f"-m replica --gpus 1 --port $GROUNDSERVE_PORT --exec -- {sys.executable} -m tests.lab"
)


@pytest.fixture
def one_gpu(groundserve: Groundserve, tmp_path: Path) -> Groundserve:
    groundserve.environ |= {"REPLICA_PRETEND_GPUS": "1", "LEASE_DIR": str(tmp_path / "leases"), "LEASE_WAIT": "0"}
    return groundserve


def test_who_finds_no_gpu_waits_for_one_and_is_not_given_up(one_gpu: Groundserve) -> None:
    first = one_gpu.up(one_gpu.service("first", LEASED, replicas=1)).until_up()
    second = one_gpu.up(one_gpu.service("second", LEASED, replicas=1, restart_limit=1))
    said = second.until("second-1 waits for a GPU: no GPU free among this machine's 1")
    assert "(process " in said
    assert said.count("replica: ") == 0
    shown = one_gpu.until("second", lambda status: bool(status["replicas"][0].get("reason")))
    assert shown["replicas"][0]["status"] == "PROVISIONING"
    (holder,) = one_gpu.status("first")["replicas"]
    assert (holder["leased"], holder["resources"]) == ("GPU 0 (pretended GPU, GPU-pretended-0)", "1x pretended GPU")
    assert "leased" not in shown["replicas"][0]
    assert first.end(signal.SIGTERM) == 0
    second.until_up()
    assert second.text.count("waits for a GPU") == 1


def test_status_says_who_waits_for_which_kind(one_gpu: Groundserve) -> None:
    one_gpu.environ["LEASE_WAIT"] = "60"
    first = one_gpu.up(one_gpu.service("first", LEASED, replicas=1)).until_up()
    script = LEASED.replace("--gpus 1", "--gpus 1 --gpu-kinds pretended")
    second = one_gpu.up(one_gpu.service("second", script, replicas=1))
    second.until("PROVISIONING")
    shown = one_gpu.until("second", lambda status: bool(status["replicas"][0].get("reason")))
    (row,) = shown["replicas"]
    assert row["status"] == "PROVISIONING"
    assert row["reason"].startswith("waits for GPU of kind pretended (GPU 0: ")
    assert first.end(signal.SIGTERM) == 0
    second.until_up()


def test_update_without_a_free_gpu(one_gpu: Groundserve) -> None:
    """An update without a free GPU stops the old replica first."""
    up = one_gpu.up(one_gpu.service("lab", LEASED, replicas=1)).until_up()
    one_gpu("update", "lab", one_gpu.service("lab", f"{LEASED} --tokens 7", replicas=1))
    up.until("lab is at version 2")
    assert [row["version"] for row in one_gpu.status("lab")["replicas"]] == [2]


def test_more_replicas_than_gpus_are_up_with_those_that_have_one(one_gpu: Groundserve) -> None:
    one_gpu.up(one_gpu.service("lab", LEASED, replicas=2)).until("lab is up after")
    # The second is STARTING for a moment each time that it tries.
    wanted = ["PROVISIONING", "READY"]
    one_gpu.until("lab", lambda status: sorted(row["status"] for row in status["replicas"]) == wanted)


def test_script_with_another_server(one_gpu: Groundserve) -> None:
    """A script that starts another server gets a GPU of its own."""
    wants = "resources: {accelerators: pretended}"
    script = LAB.replace("exec ", 'test "$CUDA_VISIBLE_DEVICES" = 0 || exit 9\nexec ')
    first = one_gpu.up(one_gpu.service("first", script, replicas=1, more=wants)).until_up()
    second = one_gpu.up(one_gpu.service("second", script, replicas=1, more=wants))
    assert "bash on port" in second.until("second-1 waits for a GPU: no GPU free")
    assert first.end(signal.SIGTERM) == 0
    second.until_up()


def test_a_gpu_that_fails_is_an_event(groundserve: Groundserve, tmp_path: Path) -> None:
    """In the driver's words, once; the replica goes on with another."""
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()

    def driver_says(first: str) -> None:
        rows = f"0, GPU-a, NVIDIA L4, {first}, 4, [N/A], No\n1, GPU-b, NVIDIA L4, 23034, 4, [N/A], No"
        fresh = program.with_suffix(".new")
        fresh.write_text(f"#!/bin/sh\ncase \"$*\" in *query-gpu*) cat <<'END'\n{rows}\nEND\nesac\n")
        fresh.chmod(0o755)
        fresh.rename(program)

    driver_says("23034")
    path = f"{program.parent}:{groundserve.environ['PATH']}"
    groundserve.environ |= {"PATH": path, "LEASE_DIR": str(tmp_path / "leases"), "LEASE_WAIT": "0"}
    groundserve.up(groundserve.service("lab", LEASED, replicas=1)).until_up()
    (row,) = groundserve.status("lab")["replicas"]
    assert row["leased"] == "GPU 0 (L4, GPU-a)"
    driver_says("[GPU requires reset]")
    (replica,) = [
        pid for pid, words in groundserve.processes().items() if "tests.lab.replica" in words.split("--log")[0]
    ]
    os.kill(replica, signal.SIGKILL)
    groundserve.until("lab", lambda status: "GPU 1 (" in status["replicas"][0].get("leased", ""))

    def told() -> list[str]:
        lines = groundserve("events", "lab", "--json").splitlines()
        return [line for line in lines if json.loads(line)["event"] == "gpu_failed"]

    (line,) = wait_until(told)
    assert (json.loads(line)["replica"], json.loads(line)["message"]) == (1, "GPU 0: GPU requires reset")


def test_counted_gpus(one_gpu: Groundserve) -> None:
    """The GPUs that are counted are those that a service leaves to its replicas."""
    one_gpu.environ["REPLICA_PRETEND_GPUS"] = "3"
    wants = "envs: {CUDA_VISIBLE_DEVICES: GPU-pretended-2}"
    said = one_gpu("check", one_gpu.service("lab", "sglang serve --model-path smollm2-135m", replicas=1, more=wants))
    assert "GPU 2 (pretended GPU" in said
    assert "GPU 0" not in said
