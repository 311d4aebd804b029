"""Replicas that are killed and replicas that are stopped, under requests."""

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.images import data_url, seen_in
from tests.e2e.running import Balancer, Replica, is_running
from tests.support.until import wait_until

pytestmark = pytest.mark.last
GRACE = 5.0  # seconds that a replica goes on serving after SIGTERM


def generate(url: str, tokens: int, timeout: float = 120) -> httpx.Response:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    return httpx.post(f"{url}/generate", json={"text": "Hello", "sampling_params": sampling}, timeout=timeout)


class Sparse:
    """A request each 0.7 s, whatever becomes of the one before; what became of each, by when it was sent."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._askers: list[threading.Thread] = []
        self._metronome = threading.Thread(target=self._run)
        self.outcomes: dict[float, int | str] = {}
        self._metronome.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._askers.append(threading.Thread(target=self._ask, args=(time.monotonic(),)))
            self._askers[-1].start()
            self._stop.wait(0.7)

    def _ask(self, sent: float) -> None:
        try:
            self.outcomes[sent] = generate(self._url, 4).status_code
        except httpx.HTTPError as error:
            self.outcomes[sent] = type(error).__name__

    def stop(self) -> None:
        self._stop.set()
        self._metronome.join()
        for asker in self._askers:
            asker.join()


def test_a_killed_replica_is_missed_by_nobody_and_comes_back(balancer: Balancer, replicas: list[Replica]) -> None:
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(generate(balancer.url, 200).status_code)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    wait_until(lambda: sum(r.figure("sglang:num_running_reqs") for r in replicas) >= 1, "requests run", 60)
    children = replicas[0].offspring()
    assert len(children) >= 2
    replicas[0].process.kill()
    replicas[0].process.wait()
    # Sent to the dead one: they only generate, so they are sent once more. All later ones go to the other at once.
    assert [generate(balancer.url, 4).status_code for _ in range(6)] == [200] * 6
    assert balancer.statuses() == ["NOT_READY", "READY"]
    for asker in askers:
        asker.join()
    assert statuses == [200] * 4
    wait_until(lambda: not any(is_running(pid) for pid in children), "its children are gone too", 15)
    replicas[0].restart()
    replicas[0].wait_ready()
    balancer.wait_all_ready()
    assert [generate(balancer.url, 4).status_code for _ in range(4)] == [200] * 4


def test_killed_replica_with_image_workers(eyes: str, tiny_llava: Replica) -> None:
    """A killed replica with image workers leaves no process behind, and its port is free."""
    assert seen_in(eyes, data_url("red")) == "red"
    children = tiny_llava.offspring()
    names = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children]
    assert any(b"launch_server" in name for name in names), "SGLang forks its image workers"
    tiny_llava.process.kill()
    tiny_llava.process.wait()
    wait_until(lambda: not any(is_running(pid) for pid in children), "all its processes are gone", 30)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", tiny_llava.port))
        again.listen()


def test_stopping_a_replica_behind_the_balancer_loses_no_request(balancer: Balancer, replicas: list[Replica]) -> None:
    traffic = Sparse(balancer.url)
    wait_until(lambda: len(traffic.outcomes) >= 3, "requests are answered", 60)
    replicas[1].process.send_signal(signal.SIGTERM)
    assert replicas[1].process.wait(timeout=60) == 0
    enough = len(traffic.outcomes) + 4
    wait_until(lambda: len(traffic.outcomes) >= enough, "requests are answered after the replica has gone", 60)
    traffic.stop()
    assert set(traffic.outcomes.values()) == {200}
    assert balancer.statuses() == ["READY", "NOT_READY"]


def test_stopping_replica(pair: list[Replica]) -> None:
    """A stopping replica serves on for a while and then finishes what it has."""
    replica = next(replica for replica in pair if replica.process.poll() is None)
    replica.wait_ready()
    fail_a_health_check(replica)
    answers: list[Any] = []
    long = threading.Thread(target=lambda: answers.append(generate(replica.url, 150).json()))
    long.start()
    wait_until(lambda: replica.figure("sglang:num_running_reqs") >= 1, "the long request runs", 60)
    stopped = time.monotonic()
    replica.process.send_signal(signal.SIGTERM)
    wait_until(lambda: httpx.get(f"{replica.url}/ready", timeout=5).status_code == 503, "/ready says 503 at once", 1)
    traffic = Sparse(replica.url)
    assert replica.process.wait(timeout=120) == 0
    traffic.stop()
    long.join()
    assert answers[0]["meta_info"]["completion_tokens"] == 150
    within = [outcome for sent, outcome in traffic.outcomes.items() if sent < stopped + GRACE]
    assert len(within) >= 5
    assert set(within) == {200}


def fail_a_health_check(replica: Replica) -> None:
    """Leaves the replica marked unhealthy, which makes SGLang's own SIGTERM cut whatever is in flight."""
    scheduler = replica.scheduler()
    os.kill(scheduler, signal.SIGSTOP)
    try:
        # A minute is what `python -m replica` lets SGLang wait for its token.
        assert httpx.get(f"{replica.url}/health_generate", timeout=90).status_code == 503
    finally:
        os.kill(scheduler, signal.SIGCONT)
    assert not replica.is_ready()
