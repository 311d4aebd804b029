"""A client that leaves: the real SGLang stops generating for it."""

import httpx
import pytest

from tests.e2e.running import Balancer, Replica
from tests.support.until import wait_until

ABORTED = "sglang:num_aborted_requests_total"
LONG = {"text": "Once upon a time", "sampling_params": {"temperature": 0, "max_new_tokens": 2000, "ignore_eos": True}}


def aborted(replicas: list[Replica]) -> float:
    return sum(replica.figure(ABORTED) for replica in replicas)


def in_flight(balancer: Balancer) -> int:
    count: int = httpx.get(f"{balancer.admin_url}/status", timeout=10).json()["service"]["in_flight"]
    return count


def test_leaving_a_stream_aborts_the_generation(balancer: Balancer, replicas: list[Replica]) -> None:
    before = aborted(replicas)
    with httpx.stream("POST", f"{balancer.url}/generate", json={**LONG, "stream": True}, timeout=60) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    wait_until(lambda: aborted(replicas) == before + 1, "the generation is aborted", 30)
    wait_until(lambda: in_flight(balancer) == 0, "nothing is in flight", 5)


def test_leaving_before_the_headers_aborts_the_generation(balancer: Balancer, replicas: list[Replica]) -> None:
    before = aborted(replicas)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{balancer.url}/generate", json=LONG, timeout=2)
    wait_until(lambda: aborted(replicas) == before + 1, "the generation is aborted", 30)
    wait_until(lambda: in_flight(balancer) == 0, "nothing is in flight", 5)
