import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from balancer.admin.routes import admin_app
from balancer.contract.listing import ReplicaListing
from balancer.contract.status import Snapshot
from balancer.contract.words import State
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.routing.admission import Admission
from balancer.routing.policies import RoundRobin
from balancer.service import ServiceFacts
from tests.lab.replica import LabReplica
from tests.observe.serving import run, serving
from tests.support.fleets import Clock, claimed, fail, fleet_of, listed, make_ready
from tests.support.until import until


class Admin:
    """The admin app over a fleet, asked without a socket."""

    def __init__(self, fleet: Fleet, *, key: str | None = None, **facts: Any) -> None:
        self.fleet = fleet
        self.facts = ServiceFacts(**facts)
        self.admission = Admission(fleet, RoundRobin())
        self.app: FastAPI = admin_app([self], key)

    def list_replicas(self, listing: Sequence[ReplicaListing]) -> None:
        self.fleet.reconcile(listing)

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def play() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
                return await client.request(method, path, **more)

        return asyncio.run(play())

    def status(self) -> dict[str, Any]:
        answer = self.ask("GET", "/status")
        assert answer.status_code == 200
        said: dict[str, Any] = answer.json()
        assert Snapshot.from_json(said).to_json() == said
        return said

    def put(self, *replicas: dict[str, Any], **more: Any) -> httpx.Response:
        return self.ask("PUT", "/replicas", json={"replicas": replicas, **more})


def replica(number: int, **more: Any) -> dict[str, Any]:
    return {"id": number, "name": f"r{number}", "endpoint": f"http://127.0.0.1:{8000 + number}"} | more


# Status


def test_status_tells_the_facts_of_service_and_replicas() -> None:
    clock = Clock()
    admin = Admin(fleet_of(3, clock), name="llava", endpoint="http://127.0.0.1:30001")
    fleet = admin.fleet
    clock.move(60)
    fail(fleet, fleet.members[2])
    fleet.members[1].cached_tokens_total, fleet.members[1].prompt_tokens_total = 30, 40
    clock.move(4)
    with claimed(fleet, fleet.members[1], fleet.members[2]) as third:
        fleet.drain(third)
        said = admin.status()
    assert said["service"] == {
        "name": "llava",
        "version": "1",
        "status": "READY",
        "uptime_seconds": 64.0,
        "endpoint": "http://127.0.0.1:30001",
        "policy": "round_robin",
        "ready": 1,
        "total": 3,
        "queue_depth": 0,
        "in_flight": 1,
        "arrived_total": 0,
        "turned_away_total": 0,
        "generating": 1,
        "generating_queued": 0,
    }
    assert [row["status"] for row in said["replicas"]] == ["READY", "EJECTED", "DRAINING"]
    first, second, third_row = said["replicas"]
    assert (first["cached_tokens_total"], first["prompt_tokens_total"]) == (30, 40)
    assert (second["ejected_for_seconds"], second["failures_total"]) == (6.0, 5)
    assert (third_row["in_flight"], third_row["requests_total"], third_row["launched_seconds"]) == (1, 1, 64.0)


@pytest.mark.parametrize(
    ("arrange", "facts", "status"),
    [
        (lambda _: None, {}, "READY"),
        (lambda fleet: fleet.refused(fleet.members[1]), {}, "READY"),
        (lambda fleet: [fleet.refused(member) for member in fleet.members.values()], {}, "REPLICA_INIT"),
        (lambda fleet: [fleet.drain(member) for member in fleet.members.values()], {}, "NO_REPLICA"),
        (lambda fleet: fleet.reconcile([]), {}, "NO_REPLICA"),
        (lambda fleet: fleet.reconcile([]), {"status": "CONTROLLER_INIT"}, "CONTROLLER_INIT"),
        (lambda fleet: fleet.reconcile([listed(1, state=State.PROVISIONING)]), {}, "REPLICA_INIT"),
        (lambda fleet: fleet.reconcile([listed(1, state=State.FAILED)]), {}, "FAILED"),
        (lambda fleet: fleet.reconcile([listed(1), listed(2, state=State.FAILED)]), {}, "READY"),
        (lambda fleet: fleet.reconcile([listed(3), listed(2, state=State.FAILED)]), {}, "REPLICA_INIT"),
        (
            lambda fleet: fleet.reconcile([listed(1, state=State.SHUTTING_DOWN), listed(2, state=State.FAILED)]),
            {},
            "FAILED",
        ),
        (lambda _: None, {"status": "FAILED"}, "FAILED"),
        (lambda _: None, {"is_leaving": True}, "SHUTTING_DOWN"),
    ],
)
def test_the_services_word_follows_from_its_replicas(
    arrange: Callable[[Fleet], object], facts: dict[str, Any], status: str
) -> None:
    admin = Admin(fleet_of(2, Clock()), **facts)
    arrange(admin.fleet)
    assert admin.status()["service"]["status"] == status


def test_panic_is_ready_for_it_serves() -> None:
    admin = Admin(fleet_of(2, Clock()))
    first, second = admin.fleet.members.values()
    fail(admin.fleet, first)
    admin.fleet.refused(second)
    service = admin.status()["service"]
    assert (service["status"], service["ready"]) == ("READY", 0)
    assert admin.ask("GET", "/ready").status_code == 200


def test_ready_and_health() -> None:
    """/ready says whether a request could be served, /health whether this process works."""
    admin = Admin(fleet_of(1, Clock()))
    assert [admin.ask("GET", path).status_code for path in ("/ready", "/health")] == [200, 200]
    admin.fleet.refused(admin.fleet.members[1])
    assert [admin.ask("GET", path).status_code for path in ("/ready", "/health")] == [503, 200]
    make_ready(admin.fleet, admin.fleet.members[1])
    admin.facts.is_leaving = True
    assert [admin.ask("GET", path).status_code for path in ("/ready", "/health")] == [503, 200]


# Drain


def test_drain_and_undrain_answer_with_the_replicas_new_row() -> None:
    admin = Admin(fleet_of(2, Clock()))
    answer = admin.ask("POST", "/replicas/2/drain")
    assert (answer.status_code, answer.json()["id"], answer.json()["status"]) == (200, 2, "SHUTTING_DOWN")
    assert [member.id for member in admin.fleet.available()] == [1]
    assert admin.ask("POST", "/replicas/2/drain").json()["status"] == "SHUTTING_DOWN"
    assert admin.ask("POST", "/replicas/2/undrain").json()["status"] == "READY"
    assert len(admin.fleet.available()) == 2


@pytest.mark.parametrize("verb", ["drain", "undrain"])
def test_an_unknown_replica_is_a_404_that_names_the_known_ones(verb: str) -> None:
    answer = Admin(fleet_of(2, Clock())).ask("POST", f"/replicas/7/{verb}")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "There is no replica 7; known are: 1, 2."


# The list


def test_put_replicas() -> None:
    """PUT /replicas makes the list the fleet and answers with the status."""
    admin = Admin(fleet_of(2, Clock()))
    kept = admin.fleet.members[2]
    answer = admin.put(
        replica(2, version=3, infra="local", resources="1x L4", launched_seconds=30),
        replica(5, state="PROVISIONING", reason="pulling"),
        service={"name": "llava", "version": 3, "endpoint": "http://e:1"},
    )
    assert answer.status_code == 200
    assert answer.json() == admin.status()
    second, fifth = answer.json()["replicas"]
    assert admin.fleet.members[2] is kept
    assert {key: second[key] for key in ("id", "version", "infra", "resources", "launched_seconds", "status")} == {
        "id": 2,
        "version": 3,
        "infra": "local",
        "resources": "1x L4",
        "launched_seconds": 30.0,
        "status": "READY",
    }
    assert (fifth["id"], fifth["status"], fifth["reason"]) == (5, "PROVISIONING", "pulling")
    assert [answer.json()["service"][key] for key in ("name", "version", "endpoint")] == ["llava", "1,3", "http://e:1"]


def test_an_age_goes_on_between_two_lists() -> None:
    clock = Clock()
    admin = Admin(fleet_of(0, clock))
    admin.put(replica(1, launched_seconds=30))
    clock.move(12)
    assert admin.status()["replicas"][0]["launched_seconds"] == 42.0


def test_an_empty_list_is_a_service_scaled_to_zero() -> None:
    admin = Admin(fleet_of(2, Clock()))
    assert admin.put().json()["service"]["status"] == "NO_REPLICA"
    assert admin.fleet.members == {}


@pytest.mark.parametrize(
    ("replicas", "said"),
    [
        ([replica(1, endpoint="127.0.0.1:80")], "replica '127.0.0.1:80' is not an address: write http://HOST:PORT"),
        ([replica(1), replica(1, name="x")], "two replicas have the same id"),
        ([replica(1), replica(2, name="r1")], "two replicas have the same name"),
        ([replica(0)], "body.replicas.0.id: Input should be greater than or equal to 1"),
        ([replica(1, name="a b")], "body.replicas.0.name: String should match pattern"),
        ([replica(1, state="LOST")], "body.replicas.0.state: Input should be 'PROVISIONING'"),
        ([{"id": 1}], "body.replicas.0.name: Field required"),
        ([replica(1, launched_seconds=-1)], "body.replicas.0.launched_seconds: Input should be greater"),
    ],
)
def test_bad_list(replicas: list[dict[str, Any]], said: str) -> None:
    """A bad list is refused with one line and changes nothing."""
    admin = Admin(fleet_of(2, Clock()))
    before = dict(admin.fleet.members)
    answer = admin.put(*replicas)
    assert answer.status_code == 422
    message = answer.json()["error"]["message"]
    assert message.startswith(said)
    assert "\n" not in message
    assert admin.fleet.members == before


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b'{"replicas": 5}'])
def test_a_body_that_is_no_list_is_refused_in_one_line(body: bytes) -> None:
    answer = Admin(fleet_of(1, Clock())).ask("PUT", "/replicas", content=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith("body")


def test_replica_without_an_endpoint() -> None:
    """A replica that has no place yet is listed without an endpoint."""
    admin = Admin(fleet_of(0, Clock()))
    answer = admin.put(replica(1, endpoint="", state="PROVISIONING"))
    assert answer.status_code == 200
    assert [(row["endpoint"], row["status"]) for row in answer.json()["replicas"]] == [("", "PROVISIONING")]
    refused = admin.put(replica(1, endpoint=""))
    assert refused.status_code == 422, "one that runs has a place"
    assert "write http://HOST:PORT" in refused.json()["error"]["message"]


def test_a_service_asleep_says_so_and_has_no_replica() -> None:
    admin = Admin(fleet_of(1, Clock()))
    answer = admin.put(service={"is_asleep": True})
    assert answer.json()["service"]["status"] == "NO_REPLICA"
    assert admin.fleet.is_starting(), "who asks waits for a replica to come"
    admin.put(service={})
    assert not admin.fleet.is_starting()


# The admin key


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/replicas/1/drain"), ("POST", "/replicas/1/undrain"), ("PUT", "/replicas")]
)
@pytest.mark.parametrize("sent", [None, "Bearer wrong", "Bearer ", "s3cret"])
def test_changes_want_the_admin_key(method: str, path: str, sent: str | None) -> None:
    admin = Admin(fleet_of(1, Clock()), key="s3cret")
    headers = {} if sent is None else {"Authorization": sent}
    answer = admin.ask(method, path, headers=headers, json={"replicas": []})
    assert answer.status_code == 401
    assert answer.json()["error"]["message"] == "This wants the admin key: 'Authorization: Bearer KEY'."
    assert [member.draining for member in admin.fleet.members.values()] == [False]
    right = admin.ask(method, path, headers={"Authorization": "Bearer s3cret"}, json={"replicas": []})
    assert right.status_code == 200


def test_reading_wants_no_key() -> None:
    admin = Admin(fleet_of(1, Clock()), key="s3cret")
    assert [admin.ask("GET", path).status_code for path in ("/status", "/ready", "/health")] == [200] * 3


def test_status_is_the_same_for_members_that_come_and_go() -> None:
    """Ids stay what they were, and rows are in their order."""
    admin = Admin(fleet_of(0, Clock()))
    seen: list[Member] = []
    for listing in itertools.permutations([1, 2, 3]):
        rows = admin.put(*map(replica, listing)).json()["replicas"]
        assert [row["id"] for row in rows] == [1, 2, 3]
        seen = seen or [admin.fleet.members[number] for number in (1, 2, 3)]
        assert [admin.fleet.members[number] for number in (1, 2, 3)] == seen


def test_controllers_message_expires() -> None:
    """The controller's last message is forgotten once it sends none any more."""

    async def main() -> None:
        lab = LabReplica()
        async with lab, serving(lab, discover=f"dns://{lab.host}:{lab.port}", replicas=()) as balancer:
            last = {"service": {"status": "SHUTTING_DOWN", "reason": "so it was told", "is_asleep": True}}
            async with httpx.AsyncClient(base_url=balancer.admin_endpoint, trust_env=False) as client:
                assert (await client.put("/replicas", json={"replicas": [], **last})).status_code == 200
                said = (await client.get("/status")).json()["service"]
                assert (said["status"], said["reason"], said["total"]) == ("SHUTTING_DOWN", "so it was told", 0)
                assert balancer.service.discovery is not None
                balancer.service.discovery._listings_until = 0.0  # as if long ago
                await until(balancer.service.fleet.available)
                said = (await client.get("/status")).json()["service"]
                assert (said["status"], "reason" in said) == ("READY", False)

    run(main())
