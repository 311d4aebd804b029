import math

import pytest

from tests.lab.model import ModelSettings, QueueFull, ReplicaModel
from tests.lab.request import Request
from tests.lab.test_model import tokens
from tests.lab.virtual import VirtualReplicas, measure


def test_requests_finish_in_order() -> None:
    """Requests come back in the order, and at the times, at which they finish."""
    fleet = VirtualReplicas([ReplicaModel() for _ in range(3)])
    requests = [Request(tokens(50, f"r{number}"), 200 - 10 * number) for number in range(12)]
    for number, request in enumerate(requests):
        fleet.submit(number % 3, request)
    finished = []
    for index, request in fleet.run():
        assert request.finished_at == fleet.now
        assert requests.index(request) % 3 == index
        finished.append(fleet.now)
    assert len(finished) == 12
    assert finished == sorted(finished)


def test_a_fleet_of_one_does_what_its_model_does_alone() -> None:
    def requests() -> list[Request]:
        return [Request(tokens(50 + 7 * number, f"r{number % 3}"), 20 + number) for number in range(30)]

    alone, alone_requests = ReplicaModel(), requests()
    fleet, fleet_requests = VirtualReplicas([ReplicaModel()]), requests()
    for number, (one, other) in enumerate(zip(alone_requests, fleet_requests, strict=True)):
        alone.submit(one, number * 0.05)
        list(fleet.run(number * 0.05))
        fleet.submit(0, other)
    while alone.next_time() < math.inf:
        alone.advance(alone.next_time())
    list(fleet.run())
    assert [one.finished_at for one in alone_requests] == [other.finished_at for other in fleet_requests]


def test_submitting_meanwhile() -> None:
    """What the caller submits between two results arrives at that moment of virtual time."""
    fleet = VirtualReplicas([ReplicaModel()])
    fleet.submit(0, Request(tokens(10, "first"), 5))
    later: Request | None = None
    for _, request in fleet.run():
        if later is None:
            later = Request(tokens(10, "second"), 5)
            fleet.submit(0, later)
            assert later.arrived_at == request.finished_at
    assert later is not None
    assert later.finished_at is not None


def test_time_passes_without_anything_to_do() -> None:
    fleet = VirtualReplicas([ReplicaModel()])
    assert list(fleet.run(5.0)) == []
    assert fleet.now == 5.0


def test_a_client_that_leaves_comes_back_aborted() -> None:
    fleet = VirtualReplicas([ReplicaModel()])
    request = Request(tokens(10, "a"), 1000)
    fleet.submit(0, request)
    assert list(fleet.run(1.0)) == []
    fleet.abort(0, request)
    assert list(fleet.run(2.0)) == [(0, request)]
    assert request.aborted


def test_a_full_queue_is_the_callers_to_handle() -> None:
    fleet = VirtualReplicas([ReplicaModel(ModelSettings(max_running_requests=1, max_queued_requests=0))])
    with pytest.raises(QueueFull):
        fleet.submit(0, Request(tokens(10, "b"), 5))


def test_measurement_is_complete() -> None:
    """The measurement runs as many requests as it says, and finds its groups' prefixes cached."""
    rate, cached = measure(replicas=4, requests=400)
    assert rate > 0
    assert 0.6 < cached < 500 / 600
