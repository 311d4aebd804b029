"""What the admin port says of itself, and how strictly it takes what it is told."""

from typing import Any

import pytest

from balancer.fleet.fleet import Fleet
from tests.admin.test_routes import Admin, replica
from tests.lab.replica import LabReplica
from tests.security.test_admin_port import ask
from tests.support.fleets import Clock, fleet_of
from tests.wire.running import on_uvloop, serving

NO_BOOLEANS = ["yes", "true", 1, 0, "", None, [], {}]
WRONG: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *[("body.service.is_asleep", {}, {"service": {"is_asleep": value}}) for value in NO_BOOLEANS],
    ("body.service.name", {}, {"service": {"name": 5}}),
    *[("body.service.share", {}, {"service": {"share": value}}) for value in ("0.5", True, 0, 1.5, None)],
    ("body.service.version", {}, {"service": {"version": True}}),
    ("body.service.status", {}, {"service": {"status": None}}),
    ("body.replicas.0.id", {"id": "1"}, {}),
    ("body.replicas.0.id", {"id": True}, {}),
    ("body.replicas.0.id", {"id": 1.0}, {}),
    ("body.replicas.0.version", {"version": "2"}, {}),
    ("body.replicas.0.launched_seconds", {"launched_seconds": "30"}, {}),
    ("body.replicas.0.launched_seconds", {"launched_seconds": True}, {}),
    ("body.replicas.0.endpoint", {"endpoint": 8000}, {}),
]


@pytest.mark.parametrize(("where", "replicas", "service"), WRONG)
def test_nothing_is_taken_for_what_it_is_not(where: str, replicas: dict[str, Any], service: dict[str, Any]) -> None:
    admin = Admin(fleet_of(2, Clock()))
    before, was_asleep = dict(admin.fleet.members), admin.fleet.is_asleep
    answer = admin.put(replica(1, **replicas), **service)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith(where)
    assert (admin.fleet.members, admin.fleet.is_asleep) == (before, was_asleep)


def test_true_and_false_and_whole_numbers_are_taken() -> None:
    admin = Admin(fleet_of(0, Clock()))
    for is_asleep in (True, False):
        said = {"service": {"is_asleep": is_asleep, "version": 2}}
        assert admin.put(replica(1, launched_seconds=30), **said).status_code == 200
        assert admin.fleet.is_asleep is is_asleep


def test_the_share_of_each_limit_is_taken_up_at_once() -> None:
    admin = Admin(fleet_of(1, Clock(), max_in_flight=5))
    limits = []
    for share in (0.5, 1, 0.125):
        assert admin.put(replica(1), service={"share": share}).status_code == 200
        limits.append([member.limit for member in admin.fleet.members.values()])
    assert limits == [[3], [5], [1]]


def _fleet() -> Fleet:
    return fleet_of(1, Clock())


@pytest.mark.parametrize(
    ("method", "path", "key", "more", "status"),
    [
        ("GET", "/ready", None, {}, 503),
        ("POST", "/replicas/9/drain", None, {}, 404),
        ("POST", "/replicas/9/undrain", None, {}, 404),
        ("POST", "/replicas/x/drain", None, {}, 422),
        ("POST", "/replicas/1/drain", "k", {}, 401),
        ("PUT", "/replicas", "k", {"json": {"replicas": []}}, 401),
        ("PUT", "/replicas", None, {"json": {}}, 422),
    ],
)
def test_what_it_answers_it_has_documented(
    method: str, path: str, key: str | None, more: dict[str, Any], status: int
) -> None:
    admin = Admin(fleet_of(0, Clock()) if path == "/ready" else _fleet(), key=key)
    answer = admin.ask(method, path, **more)
    assert answer.status_code == status
    described = admin.ask("GET", "/openapi.json").json()["paths"]
    route = described["/replicas/{number}/" + path.rpartition("/")[2] if "drain" in path else path]
    assert str(status) in route[method.lower()]["responses"]
    if status != 503:
        assert set(answer.json()) == {"error"}


def test_unknown_paths() -> None:
    """Unknown paths are refused with an error of the common shape."""
    for method, path, status in (("GET", "/none", 404), ("GET", "/docs", 404), ("PUT", "/status", 405)):
        answer = Admin(_fleet()).ask(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == "admin"
        assert status == 404 or answer.headers["allow"] == "GET"


@pytest.mark.parametrize(
    ("borne", "status"),
    [
        ([("Authorization", "Bearer k")], 200),
        ([("authorization", "bearer k")], 200),
        ([("Authorization", "Basic x"), ("Authorization", "Bearer k")], 200),
        ([("Authorization", "k")], 401),
        ([("Authorization", "Bearer kk")], 401),
        ([], 401),
    ],
)
def test_the_admin_key_is_read_as_api_keys_are(borne: list[tuple[str, str]], status: int) -> None:
    assert Admin(_fleet(), key="k").ask("POST", "/replicas/1/drain", headers=borne).status_code == status


@on_uvloop
async def test_the_playgrounds_streams_ask_proxies_not_to_collect_them() -> None:
    async with LabReplica() as lab, serving(lab) as house:
        answer = await ask(house, "POST", "/playground/v1/chat/completions", json={"messages": [], "stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
