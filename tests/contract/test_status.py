import json
from dataclasses import asdict

import pytest

from balancer.contract.listing import Listing, ReplicaListing, ServiceListing
from balancer.contract.status import ReplicaRow, ServiceRow, Snapshot
from balancer.contract.words import ServiceStatus, Status

SERVICE = ServiceRow(
    name="tiny",
    version="1,2",
    status=ServiceStatus.READY,
    uptime_seconds=12.5,
    endpoint="http://127.0.0.1:30001",
    policy="round_robin",
    ready=1,
    total=1,
    queue_depth=3,
    in_flight=2,
)
REPLICA = ReplicaRow(
    id=1,
    name="tiny-1",
    version=2,
    endpoint="http://127.0.0.1:40001",
    launched_seconds=60.0,
    infra="local",
    resources="1x CPU",
    status=Status.READY,
    in_flight=2,
    requests_total=7,
    failures_total=1,
    ejected_for_seconds=0.0,
    cached_tokens_total=10,
    prompt_tokens_total=20,
)


def test_json_has_exactly_the_promised_fields() -> None:
    promised_service = (
        "name version status uptime_seconds endpoint policy ready total queue_depth in_flight "
        "arrived_total turned_away_total generating generating_queued"
    )
    promised_replica = (
        "id name endpoint version launched_seconds infra resources status in_flight requests_total failures_total "
        "ejected_for_seconds cached_tokens_total prompt_tokens_total continues"
    )
    shape = Snapshot(SERVICE, (REPLICA,)).to_json()
    assert list(shape) == ["service", "replicas"]
    assert list(shape["service"]) == promised_service.split()
    assert list(shape["replicas"][0]) == promised_replica.split()


def test_a_snapshot_survives_json() -> None:
    snapshot = Snapshot(SERVICE, (REPLICA,))
    assert Snapshot.from_json(json.loads(json.dumps(snapshot.to_json()))) == snapshot


def test_a_reason_is_there_only_when_there_is_one() -> None:
    failed = ReplicaRow.from_json(REPLICA.to_json() | {"status": "FAILED", "reason": "exited with 1"})
    assert failed.to_json()["reason"] == "exited with 1"
    assert "reason" not in REPLICA.to_json()


def test_unknown_fields_of_a_newer_balancer_are_left_out() -> None:
    assert ServiceRow.from_json(SERVICE.to_json() | {"colour": "green"}) == SERVICE


@pytest.mark.parametrize(
    "answer", [{}, {"service": {}, "replicas": []}, {"service": SERVICE.to_json(), "replicas": [{"id": 1}]}]
)
def test_an_answer_of_another_shape_is_refused(answer: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="status"):
        Snapshot.from_json(answer)


def test_a_list_of_replicas_has_all_their_fields() -> None:
    replica = ReplicaListing("tiny-1", "http://127.0.0.1:40001", node="h1", ends_in_seconds=5.0)
    for listing in (Listing((replica,)), Listing((replica,), ServiceListing(name="tiny", share=0.5))):
        assert json.loads(json.dumps(listing.to_json())) == json.loads(json.dumps(asdict(listing)))
