"""Several services behind one endpoint: each request goes to the service whose model it names."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import httpx
import pytest

from balancer.__main__ import config_from, parse
from balancer.config import Config
from balancer.contract.listing import ReplicaListing
from balancer.errors import ConfigError
from balancer.spec.settings import Settings
from tests.lab.replica import LabReplica
from tests.support.client import CHAT
from tests.support.until import until
from tests.wire.running import House, on_uvloop, serving

BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}


def other(name: str, *replicas: LabReplica, **settings: Any) -> Config:
    listings = tuple(ReplicaListing(f"{name}-{n}", one.url, id=n) for n, one in enumerate(replicas, 1))
    return Config(name=name, replicas=listings, settings=Settings(ready_interval=0.05, **settings))


@contextlib.asynccontextmanager
async def two(**settings: Any) -> AsyncIterator[tuple[House, LabReplica, LabReplica, httpx.AsyncClient]]:
    """The services `lab` and `eyes`, whose replicas serve the models lab and org/eyes."""
    async with LabReplica() as first, LabReplica(served_model="org/eyes") as second:
        others = (other("eyes", second, aliases=("gpt-4o-mini",)),)
        async with serving(first, config={"name": "lab", "others": others}, **settings) as house:
            services = house.balancer.services.all
            await until(lambda: all(one.has_told_models for one in services), "both say what they serve")
            async with httpx.AsyncClient(base_url=house.url, trust_env=False, timeout=10) as client:
                yield house, first, second, client


@on_uvloop
async def test_the_model_decides() -> None:
    async with two() as (_, first, second, client):
        for model, replica in (("lab", first), ("org/eyes", second), ("eyes", second), ("gpt-4o-mini", second)):
            before = len(replica.seen.requests)
            answer = await client.post(CHAT, json=BODY | {"model": model})
            assert answer.status_code == 200, answer.text
            assert len(replica.seen.requests) == before + 1, model
        answer = await client.post("/generate", json={"text": "Hi"}, headers={"X-Model": "eyes"})
        assert answer.headers["x-replica-id"] == "eyes-1"


@on_uvloop
async def test_a_model_that_nobody_has_is_told_so_with_what_there_is() -> None:
    async with two() as (_, first, second, client):
        before = len(first.seen.requests) + len(second.seen.requests)
        unknown = await client.post(CHAT, json=BODY | {"model": "gpt-5"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        assert "There are: eyes, gpt-4o-mini, lab, org/eyes." in unknown.json()["error"]["message"]
        nameless = await client.post("/generate", json={"text": "Hi"})
        assert (nameless.status_code, nameless.json()["error"]["code"]) == (400, "model_not_named")
        anthropic = await client.post("/v1/messages", json=BODY | {"model": "gpt-5"})
        assert anthropic.json()["error"]["type"] == "not_found_error"
        assert len(first.seen.requests) + len(second.seen.requests) == before


@on_uvloop
async def test_models_lists_all_with_their_states() -> None:
    async with two() as (_, _, second, client):
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list"
        rows = [(entry["id"], entry["service"], entry["status"]) for entry in listed["data"]]
        assert rows == [
            ("lab", "lab", "READY"),
            ("org/eyes", "eyes", "READY"),
            ("eyes", "eyes", "READY"),
            ("gpt-4o-mini", "eyes", "READY"),
        ]
        assert {entry["root"] for entry in listed["data"] if entry["service"] == "eyes"} == {"org/eyes"}
        one = await client.get("/v1/models/org/eyes")
        assert one.headers["x-replica-id"] == "eyes-1"
        await second.stop()
        gone = (await client.get("/v1/models")).json()["data"]
        assert [entry["id"] for entry in gone] == [entry["id"] for entry in listed["data"]]


@on_uvloop
async def test_ollamas_clients_see_the_models_of_all_services() -> None:
    async with two() as (_, _, _, client):
        listed = (await client.get("/api/tags")).json()["models"]
        assert [entry["model"] for entry in listed] == ["lab", "org/eyes", "eyes", "gpt-4o-mini"]
        for entry in listed:
            assert entry["name"] == entry["model"]
            assert datetime.fromisoformat(entry["modified_at"]).tzinfo
            assert isinstance(entry["size"], int)
            assert isinstance(entry["digest"], str)
            assert entry["details"]["family"]


@on_uvloop
async def test_a_model_that_was_replaced_by_another_is_gone() -> None:
    async with two() as (house, _, _, client), LabReplica(served_model="org/new") as new:
        admin = house.balancer.admin_endpoint
        listing = {"replicas": [{"id": 2, "name": "eyes-2", "endpoint": new.url}]}
        assert (await client.put(f"{admin}/replicas?service=eyes", json=listing)).status_code == 200
        await until(lambda: "org/new" in house.balancer.services.all[1].names(), "the new one is known")
        assert (await client.post(CHAT, json=BODY | {"model": "org/new"})).status_code == 200
        assert (await client.post(CHAT, json=BODY | {"model": "org/eyes"})).status_code == 404


@on_uvloop
async def test_one_models_queue_never_holds_up_another() -> None:
    async with two() as (house, _, second, client):
        eyes = house.balancer.services.all[1]
        await second.stop()
        await until(lambda: not eyes.fleet.available(), "eyes is down")
        waiting = [asyncio.ensure_future(client.post(CHAT, json=BODY | {"model": "eyes"})) for _ in range(2)]
        await until(lambda: eyes.admission.queue_depth == 2, "they wait for it to come back")
        served = await client.post(CHAT, json=BODY | {"model": "lab"})
        assert served.status_code == 200
        eyes.settings.queue_timeout = 0.1
        assert [(await one).status_code for one in waiting] == [503, 503]
        assert (await client.get("/ready")).status_code == 200


@on_uvloop
async def test_a_model_that_may_still_come_is_not_called_unknown() -> None:
    async with LabReplica() as lab:
        config = {"name": "lab", "others": (other("eyes"),)}
        async with (
            serving(lab, config=config) as house,
            httpx.AsyncClient(base_url=house.url, trust_env=False) as client,
        ):
            await until(lambda: house.balancer.services.all[0].has_told_models, "lab says what it serves")
            answer = await client.post(CHAT, json=BODY | {"model": "org/eyes"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica_ready")
            assert int(answer.headers["retry-after"]) > 0
            assert (await client.post(CHAT, json=BODY | {"model": "lab"})).status_code == 200


@on_uvloop
async def test_the_admin_port_knows_both() -> None:
    async with two() as (house, _, _, client):
        admin = house.balancer.admin_endpoint
        rows = (await client.get(f"{admin}/services")).json()
        assert [row["service"]["name"] for row in rows] == ["lab", "eyes"]
        assert (await client.get(f"{admin}/status")).json()["service"]["name"] == "lab"
        assert (await client.get(f"{admin}/status?service=eyes")).json()["replicas"][0]["name"] == "eyes-1"
        unknown = await client.get(f"{admin}/status?service=ears")
        assert (unknown.status_code, "known are: lab, eyes" in unknown.text) == (404, True)
        drained = await client.post(f"{admin}/replicas/1/drain?service=eyes")
        assert drained.json()["name"] == "eyes-1"
        assert (await client.post(CHAT, json=BODY | {"model": "lab"})).status_code == 200
        assert (await client.post(f"{admin}/replicas/1/undrain?service=eyes")).status_code == 200
        listing = {"replicas": [{"id": 4, "name": "eyes-4", "endpoint": "http://127.0.0.1:9"}]}
        put = await client.put(f"{admin}/replicas?service=eyes", json=listing)
        assert [row["name"] for row in put.json()["replicas"]] == ["eyes-4"]
        metrics = (await client.get(f"{admin}/metrics")).text
        assert 'groundserve_queue_depth{service="eyes"} 0\n' in metrics
        assert 'groundserve_replicas{service="lab",status="READY"} 1\n' in metrics
        async with client.stream("GET", f"{admin}/feed?service=eyes") as feed:
            async for line in feed.aiter_lines():
                if line.startswith('data: {"service":{'):
                    assert '"name":"eyes"' in line
                    break


FILE = "service: {readiness_probe: /health}\nx-groundserve: {ready_interval: 0.05}\n"


@on_uvloop
async def test_a_service_joins_and_parts_while_others_serve() -> None:
    """A service that parts gets no new requests, and is gone once its requests are answered."""
    async with (
        LabReplica() as first,
        LabReplica(served_model="org/eyes", token_interval=0.05) as second,
        serving(first, config={"name": "lab"}) as house,
        httpx.AsyncClient(trust_env=False) as client,
    ):
        admin, chat = house.balancer.admin_endpoint, house.url + CHAT
        assert (await client.post(chat, json=BODY | {"model": "any"})).status_code == 200  # one service takes any name
        for text in (FILE, FILE + "# the same once more\n"):
            joined = await client.put(f"{admin}/services/eyes", json={"file": text})
            assert (joined.status_code, joined.json()) == (200, {"service": "eyes"})
        listing = {"replicas": [{"id": 1, "name": "eyes-1", "endpoint": second.url}]}
        assert (await client.put(f"{admin}/replicas?service=eyes", json=listing)).status_code == 200
        await until(lambda: house.balancer.services.all[1].has_told_models, "eyes says what it serves")
        assert (await client.post(chat, json=BODY | {"model": "any"})).status_code == 404
        assert (await client.post(chat, json=BODY | {"model": "lab"})).status_code == 200
        streaming = BODY | {"model": "org/eyes", "stream": True, "max_tokens": 20}
        async with client.stream("POST", chat, json=streaming) as stream:
            assert stream.headers["x-replica-id"] == "eyes-1"
            parted = await client.delete(f"{admin}/services/eyes")
            assert parted.json() == {"in_flight": 1}
            # The first service is alone again, and accepts any name.
            other = await client.post(chat, json=BODY | {"model": "org/eyes"})
            assert other.headers["x-replica-id"] == "a"
            text = "".join([piece async for piece in stream.aiter_text()])
        assert text.endswith("data: [DONE]\n\n")
        assert (await client.delete(f"{admin}/services/eyes")).json() == {"in_flight": 0}
        assert [row["service"]["name"] for row in (await client.get(f"{admin}/services")).json()] == ["lab"]


@on_uvloop
async def test_what_cannot_join_or_part_is_told_why() -> None:
    async with (
        LabReplica() as lab,
        serving(lab, config={"name": "lab"}) as house,
        httpx.AsyncClient(base_url=house.balancer.admin_endpoint, trust_env=False) as client,
    ):
        for name, file, said in (
            ("lab", FILE, "lab is what this balancer was started for"),
            ("eyes", "service: {readiness_probe: /health}\nx-groundserve: {quue_size: 1}\n", "queue_size"),
            ("eyes", "run: x\n", "no `service:` section"),
        ):
            answer = await client.put(f"/services/{name}", json={"file": file})
            assert (answer.status_code, said in answer.text) == (422, True), answer.text
        assert (await client.delete("/services/lab")).status_code == 422
        assert (await client.delete("/services/nobody")).json() == {"in_flight": 0}
        assert (await client.put("/services/..%2Fx", json={"file": FILE})).status_code in (404, 422)
        assert len(house.balancer.services.all) == 1


def test_services_are_named_on_the_command_line() -> None:
    flags = ["--replica", "lab=127.0.0.1:1", "--replica", "lab=127.0.0.1:2", "--discover", "eyes=dns://eyes:8000"]
    config = config_from(parse(flags))
    both = {one.name: one for one in (config, *config.others)}
    assert both["eyes"].discover == "dns://eyes:8000"
    assert [listing.name for listing in both["lab"].replicas] == ["lab-1", "lab-2"]
    assert both["lab"].settings is both["eyes"].settings
    (only,) = (config_from(parse(["--replica", "one=127.0.0.1:1"])),)
    assert (only.name, only.others) == ("one", ())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replica", "a=127.0.0.1:1", "--replica", "127.0.0.1:2"], "for all of them, or for none"),
        (["--discover", "dns://a:1", "--discover", "dns://b:1"], "each with a name of its own"),
        (["--discover", "a=dns://a:1", "--replica", "a=127.0.0.1:1"], "of a exclude each other"),
        (["--discover", "dns://a:1", "--replica", "127.0.0.1:1"], "--replica and --discover exclude each other"),
    ],
)
def test_names_that_contradict_each_other_are_refused(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_from(parse(flags))
