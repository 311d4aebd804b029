"""What controller and balancer tell each other about replicas: checked strictly, and each fact defined once."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter, ValidationError

from balancer.contract.listing import Listing, ReplicaListing, ServiceListing
from balancer.contract.status import ReplicaRow
from balancer.contract.words import Phase, ServiceStatus, State, Status
from balancer.errors import ConfigError
from tests.contract.altered import Altered

REPLICA = ReplicaListing(
    "r1", "http://127.0.0.1:8001", id=1, version=2, launched_seconds=3.5, infra="local", resources="1x L4", reason="so"
)
SERVICE = ServiceListing(
    name="s", version="1", endpoint="http://e", status="FAILED", reason="all of them ended", is_asleep=True
)
LISTING = Listing((REPLICA,), SERVICE)


def taken(body: dict[str, Any]) -> Listing:
    """As the admin port takes it."""
    return TypeAdapter(Listing).validate_python(body)


def test_round_trip() -> None:
    """What one side writes, the other reads."""
    assert taken(json.loads(json.dumps(LISTING.to_json()))) == LISTING
    assert taken({"replicas": []}) == Listing(())


EACH_KIND: list[Any] = [True, 1, 1.5, "1", "", [], [1], {}, {"a": 1}, None]


def refusal(body: dict[str, Any]) -> tuple[int | str, ...]:
    """Where the first thing is that is not taken; empty where all is."""
    try:
        taken(body)
    except ValidationError as error:
        return error.errors()[0]["loc"]
    except ConfigError:
        return ("replicas", 0, "endpoint")
    return ()


@pytest.mark.parametrize("name", [field.name for field in fields(ReplicaListing)])
@pytest.mark.parametrize("value", EACH_KIND)
def test_strict_facts(name: str, value: Any) -> None:
    """A fact is refused or taken as it was written, whatever its type: a string is no number, a number no boolean."""
    body = LISTING.to_json()
    body["replicas"][0][name] = value
    where = refusal(body)
    assert where[:3] in ((), ("replicas", 0, name))
    if not where:
        got = getattr(taken(body).replicas[0], name)
        assert (got, isinstance(got, bool)) == (value, isinstance(value, bool))


@pytest.mark.parametrize("name", [field.name for field in fields(ServiceListing)])
@pytest.mark.parametrize("value", EACH_KIND)
def test_strict_service(name: str, value: Any) -> None:
    """The same holds for what is said of the service."""
    body = LISTING.to_json()
    body["service"][name] = value
    where = refusal(body)
    assert where[:2] in ((), ("service", name))
    if not where:
        got = getattr(taken(body).service, name)
        assert (got, isinstance(got, bool)) == (value, isinstance(value, bool))


def test_service_status() -> None:
    """A service's status is one of SkyServe's words."""
    with pytest.raises(ValidationError, match="write one of CONTROLLER_INIT, REPLICA_INIT, READY"):
        taken({"replicas": [], "service": {"status": "FINE"}})


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1:8001", "ftp://a:1", "http://a:0", "http://u@a:1", "http://a:1/v1"])
def test_running_needs_address(endpoint: str) -> None:
    """A running replica has an address."""
    with pytest.raises(ConfigError, match="is not an address"):
        ReplicaListing("r1", endpoint)


@pytest.mark.parametrize("state", [state for state in State if state is not State.RUNNING])
def test_others_need_none(state: State) -> None:
    """A replica that does not run needs none."""
    assert ReplicaListing("r1", state=state).endpoint == ""


def test_phases() -> None:
    """Every status has a phase, and every phase a status."""
    assert {status.phase for status in Status} == set(Phase)
    assert {status.phase for status in ServiceStatus} == set(Phase)


def test_row() -> None:
    """A row has the facts of its listing, but for those that it overrides."""
    row = ReplicaRow.of(REPLICA, status=Status.EJECTED, in_flight=4, launched_seconds=9.0)
    assert row == ReplicaRow(
        "r1",
        "http://127.0.0.1:8001",
        id=1,
        version=2,
        launched_seconds=9.0,
        infra="local",
        resources="1x L4",
        reason="so",
        status=Status.EJECTED,
        in_flight=4,
    )


# A fact that nobody has thought of yet


def test_new_fact(tmp_path: Path) -> None:
    """A new fact is one line in the type and one in the table. It passes from the engine through controller and fleet
    to GET /status, the tables and the page's feed.
    """
    altered = Altered(tmp_path)
    listing = altered.told()
    assert listing["replicas"][0]["rack"] == "r7"
    with altered.balancer() as admin:
        assert httpx.put(f"{admin}/replicas", json=listing, trust_env=False).status_code == 200
        assert httpx.get(f"{admin}/status", trust_env=False).json()["replicas"][0]["rack"] == "r7"
        with httpx.stream("GET", f"{admin}/feed", trust_env=False) as feed:
            state = next(line for line in feed.iter_lines() if line.startswith("data: ") and '"decisions"' in line)
        assert json.loads(state.removeprefix("data: "))["replicas"][0]["rack"] == "r7"
        state_home = {"XDG_STATE_HOME": str(tmp_path), "GROUNDSERVE_ADMIN": admin}
        table = altered.printed("from balancer.cli import main; main(['status'])", **state_home)
    head, row = table.splitlines()[-2:]
    assert head.split()[5:8] == ["INFRA", "RESOURCES", "RACK"]
    assert "r7" in row.split()
