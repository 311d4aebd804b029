"""The steps for many GPUs, rehearsed with simulated replicas, so that no device time goes into their own faults."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from balancer.operate.engines.ports import free_ports
from tests.gpu import eight, sharing
from tests.gpu.proof import Proof
from tests.gpu.serving import Process, services, start, wait_ready


class Rehearsal(Proof):
    """Its replicas are simulated: `model` is the name under which they serve."""

    def replica(self, name: str, model: str, flags: Sequence[str] = (), **environ: str) -> Process:
        (port,) = free_ports(1)
        argv = [sys.executable, "-m", "tests.lab.replica", "--faithful", "--port", str(port), "--served-model", model]
        return start(name, [*argv, *flags], f"http://127.0.0.1:{port}", self.work, **environ)


def test_eight_replicas_and_their_workload(tmp_path: Path) -> None:
    proof = Rehearsal(tmp_path, tmp_path, tmp_path)
    fast = ["--prefill-rate", "1e6", "--itl-base", "0.001"]
    members = [proof.replica(f"eight-{n}", "llama-3-8b", fast) for n in range(8)]
    try:
        for one in members:
            wait_ready(one, 60)
        small = {"prefix_tokens": 600, "question_tokens": 20, "answer_tokens": 4}
        eight.at_rates(proof, members, 1.0, small, speed=40.0)
    finally:
        for one in members:
            one.stop(signal.SIGKILL)
    runs = {name.removeprefix("eight "): runs[0] for name, runs in proof.figures.items() if name.startswith("eight ")}
    assert {"round_robin", "prefix_aware", "prefix_aware, 2 workers"} <= set(runs)
    assert [run["error_count"] for run in runs.values()] == [0] * len(runs)
    # A prompt of so few tokens is in one of eight caches by chance, and in the right one by design.
    assert runs["prefix_aware"]["cached_tokens"] > 1.2 * runs["round_robin"]["cached_tokens"]


def test_ten_models_on_two_gpus_by_need(tmp_path: Path) -> None:
    proof = Rehearsal(tmp_path, tmp_path, tmp_path)
    fast = ["--prefill-rate", "1e6", "--itl-base", "0.001", "--seat", str(tmp_path / "leases")]
    (tmp_path / "leases").mkdir()
    fast += ["--seat-weights", "8", "--seat-pool", "40"]
    tenants = {
        name: proof.replica(f"ten-{name}", name, [*fast, "--seat-gpus", f"GPU-{place % 2}"])
        for place, name in enumerate(eight.NAMES)
    }
    try:
        eight.started(tenants.values())
        front = services(tmp_path, tenants)
        try:
            eight.by_need(proof, front.url, 2.0)
        finally:
            front.stop()
        states = [eight.state(one) for one in tenants.values()]
    finally:
        for one in tenants.values():
            one.stop(signal.SIGKILL)
    (mixed,) = proof.figures["mixed"]
    assert mixed["errors"] == []
    assert sum(map(len, mixed["ttft"].values())) > 5
    assert states.count("AWAKE") <= 2


def test_one_process_at_a_time_serves_all_models(tmp_path: Path) -> None:
    proof = Rehearsal(tmp_path, tmp_path, tmp_path)
    alive: list[Process] = []

    def begin(name: str) -> Process:
        assert all(one.popen.poll() is not None for one in alive)
        one = proof.replica(f"whole-{len(alive)}-{name}", name, ["--prefill-rate", "1e6", "--itl-base", "0.001"])
        alive.append(one)
        wait_ready(one, 60)
        return one

    processes = sharing.OneProcess(begin)
    try:
        times = sharing.mixed(proof, processes.of, {"ann": 2.0, "bea": 6.0}, 2.0)
    finally:
        processes.stop()
    (figures,) = proof.figures["mixed"]
    assert figures["errors"] == []
    assert all(times.values())
    # Whoever waits has a turn, and those that wait together have one start between them.
    assert 2 <= len(processes.took) == len(alive) < sum(map(len, times.values()))
