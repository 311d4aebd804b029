"""SGLang's admin requests to every replica, from the admin port."""

from typing import Any

import httpx
import orjson
import pytest

from tests.lab.replica import LabReplica
from tests.wire.running import House, on_uvloop, serving

CONFIG = {"admin_key": "the-admin-key", "replica_key": "the-replicas-key"}
ADAPTER = {"lora_name": "poems", "lora_path": "/adapters/poems"}


async def say(house: House, what: str, key: str = "the-admin-key", **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=house.balancer.admin_endpoint, trust_env=False) as client:
        return await client.post(f"/everywhere/{what}", headers={"Authorization": f"Bearer {key}"}, **more)


@on_uvloop
async def test_an_adapter_is_loaded_by_every_replica() -> None:
    async with (
        LabReplica(api_key="the-replicas-key") as a,
        LabReplica(api_key="the-replicas-key") as b,
        serving(a, b, config=CONFIG) as house,
    ):
        answer = await say(house, "load_lora_adapter", json=ADAPTER)
        assert answer.status_code == 200, answer.text
        assert [(said["replica"], said["status"]) for said in answer.json()["replicas"]] == [("a", 200), ("b", 200)]
        for replica in (a, b):
            (seen,) = replica.seen.requests
            assert (seen.target, orjson.loads(seen.body)) == ("/load_lora_adapter", ADAPTER)
            assert seen.header("authorization") == "Bearer the-replicas-key"


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("unload_lora_adapter", {"lora_name": "poems"}),
        ("abort_request", {"rid": "a-request"}),
        ("abort_request", {"abort_all": True}),
        ("flush_cache", {}),
    ],
)
@on_uvloop
async def test_what_an_admin_says_reaches_all(what: str, body: dict[str, Any]) -> None:
    """An abort too: the replica that has the request ends it, and the others know of none."""
    async with LabReplica() as a, LabReplica() as b, serving(a, b, config={"admin_key": "the-admin-key"}) as house:
        assert (await say(house, what, json=body)).status_code == 200
        for replica in (a, b):
            (seen,) = replica.seen.requests
            assert (seen.target, orjson.loads(seen.body)) == (f"/{what}", body)


@on_uvloop
async def test_one_that_does_not_accept_it_is_named() -> None:
    async with (
        LabReplica(api_key="the-replicas-key") as a,
        LabReplica(api_key="the-replicas-key") as b,
        serving(a, b, config=CONFIG) as house,
    ):
        b.next(1, status=400)
        answer = await say(house, "flush_cache")
        assert answer.status_code == 502
        assert [said["status"] for said in answer.json()["replicas"]] == [200, 400]


@on_uvloop
async def test_nobody_else_says_it_and_nothing_else_is_said() -> None:
    async with LabReplica(api_key="the-replicas-key") as a, serving(a, config=CONFIG) as house:
        assert (await say(house, "flush_cache", key="wrong")).status_code == 401
        assert (await say(house, "update_weights_from_disk", json={})).status_code == 422
        assert (await say(house, "flush_cache?service=other")).status_code == 404
        assert (await say(house, "flush_cache", content=b"x" * (65 << 10))).status_code == 413
        assert a.seen.requests == []
