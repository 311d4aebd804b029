"""Models that share a GPU, over real sockets: the balancer orders their turns, and every request is answered."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson

from balancer.config import Config
from balancer.contract.listing import ReplicaListing
from balancer.fleet.member import Member
from balancer.routing.turns import Rules, Turns
from balancer.spec.settings import Settings
from replica.tenant import State
from tests.lab.card import Held
from tests.lab.replica import LabReplica
from tests.lab.tenant import GIB, Seat
from tests.support.client import CHAT
from tests.support.program import BalancerProgram
from tests.support.until import until
from tests.wire.running import NOT_AWAITED, House, on_uvloop, serving

GPU = "GPU-a"
BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}


@contextlib.asynccontextmanager
async def seat(
    folder: Path, *models: str, card: float = 0.0, memory: float = 0.1, lingers: float = 0.0, **knobs: Any
) -> AsyncIterator[list[LabReplica]]:
    """A replica for each of these models, started one after the other on one GPU.

    card: its memory in GiB; 0: as much as all of their weights take, and one KV cache.
    """
    size = card or len(models) * 10 + 30.0
    place = Seat(folder, (GPU,), gpu_slice=0.5, card=size, weights=10.0, pool=30.0, memory=memory, lingers=lingers)
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(LabReplica(served_model=model, seat=place, **knobs)) for model in models]


@contextlib.asynccontextmanager
async def sharing(sharers: list[LabReplica], **settings: Any) -> AsyncIterator[tuple[House, httpx.AsyncClient]]:
    """A service for each of these replicas, behind one endpoint. `settings` of a list are one for each service."""
    ours = {"ready_interval": 0.05, "gpu_slice": 0.3}

    def of(number: int) -> dict[str, Any]:
        return ours | {name: value[number] if isinstance(value, list) else value for name, value in settings.items()}

    def listed(sharer: LabReplica) -> tuple[ReplicaListing, ...]:
        return (ReplicaListing(f"{sharer.knobs.served_model}-1", sharer.url, id=1),)

    others = tuple(
        Config(name=one.knobs.served_model, replicas=listed(one), settings=Settings(**of(number)))
        for number, one in enumerate(sharers[1:], 1)
    )
    first = {"name": sharers[0].knobs.served_model, "others": others, "replicas": listed(sharers[0])}
    async with serving(ready=NOT_AWAITED, config=first, **of(0)) as house:
        services = house.balancer.services.all
        await until(lambda: all(one.has_told_models for one in services), "all say what they serve")
        await until(lambda: all(one.fleet.serving() for one in services), lambda: states(house))
        async with httpx.AsyncClient(base_url=house.url, trust_env=False, timeout=20) as client:
            yield house, client


async def doze(sharer: LabReplica) -> None:
    assert sharer.sharing is not None
    assert await sharer.sharing.tenant.order(State.DOZING, 10)


def members(house: House) -> list[Member]:
    return [member for service in house.balancer.services.all for member in service.fleet.members.values()]


def states(house: House) -> list[str]:
    return [member.status(asyncio.get_running_loop().time()).value for member in members(house)]


async def ask(client: httpx.AsyncClient, model: str, tokens: int = 5) -> str:
    answer = await client.post(CHAT, json=BODY | {"model": model, "max_tokens": tokens})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-replica-id"] == f"{model}-1"
    return str(answer.json()["choices"][0]["message"]["content"])


@on_uvloop
async def test_alternating_and_at_once(tmp_path: Path) -> None:
    """Three models on one GPU answer in turn and at once, and one at a time is awake."""
    async with seat(tmp_path, "a", "b", "c") as sharers, sharing(sharers) as (house, client):
        assert sorted(states(house)) == ["DOZING", "DOZING", "READY"]
        whole = [await ask(client, model) for model in "abc"]
        assert len(set(whole)) == 1
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(entry["id"], entry["status"]) for entry in listed] == list(zip("abc", states(house), strict=True))
        for _ in range(3):
            assert [await ask(client, model) for model in "abc"] == whole
        assert await asyncio.gather(*(ask(client, model) for model in "abc" * 5)) == whole * 5
        assert house.balancer.services.turn_taking.swaps_total >= 11
        rows = (await client.get(f"{house.balancer.admin_endpoint}/status?service=a")).json()["replicas"]
        assert rows[0]["gpus"] == [GPU]
        assert rows[0]["turns"]


@on_uvloop
async def test_idle_holder_gives_way_at_once(tmp_path: Path) -> None:
    async with seat(tmp_path, "a", "b") as sharers, sharing(sharers, gpu_slice=30) as (_, client):
        began = time.monotonic()
        for model in "abab":
            await ask(client, model)
        assert time.monotonic() - began < 15


async def streamed(client: httpx.AsyncClient, model: str, tokens: int, pieces: list[str]) -> str:
    """Reads a stream into `pieces` as it comes; returns the whole text."""
    body = BODY | {"model": model, "max_tokens": tokens, "stream": True}
    async with client.stream("POST", CHAT, json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = orjson.loads(line[6:])
                assert "error" not in event, event
                pieces.append((event["choices"][0]["delta"].get("content") or "") if event["choices"] else "")
    return "".join(pieces)


@on_uvloop
async def test_preempted_stream(tmp_path: Path) -> None:
    """A stream whose model loses its turn amid it goes on later to the very same text."""
    async with seat(tmp_path, "a", "b", token_interval=0.02) as sharers, sharing(sharers) as (house, client):
        whole = await ask(client, "a", 100)
        pieces: list[str] = []
        stream = asyncio.ensure_future(streamed(client, "a", 100, pieces))
        await until(lambda: len(pieces) > 5, "it has begun")
        assert await ask(client, "b", 5)
        assert len(pieces) < 95
        assert await stream == whole
        assert sharers[0].sharing is not None
        assert sharers[0].sharing.tenant.swaps.wakes >= 1
        assert members(house)[0].failures_total == 0


@on_uvloop
async def test_clocks_stand_still(tmp_path: Path) -> None:
    """No timeout of a request runs while its model has no turn."""
    short = {"first_byte_timeout": 0.6, "idle_timeout": 0.6, "silence_timeout": 0.3, "queue_timeout": 0.6}
    async with (
        seat(tmp_path, "a", "b", token_interval=0.1) as sharers,
        sharing(sharers, gpu_slice=[1.5, 1.5], **short) as (house, client),
    ):
        asked = [asyncio.ensure_future(streamed(client, model, 30, [])) for model in "ab"]
        assert len(set(await asyncio.gather(*asked))) == 1
        assert house.balancer.services.turn_taking.swaps_total >= 3


@on_uvloop
async def test_balancer_started_anew(tmp_path: Path) -> None:
    """A new balancer knows at once which models those serve that doze for the one before it."""
    async with seat(tmp_path, "a", "b") as sharers:
        for _ in range(2):
            async with sharing(sharers) as (house, client):
                assert states(house) == ["DOZING", "READY"]
                assert await ask(client, "a")
                assert await ask(client, "b")


@on_uvloop
async def test_wait_beyond_start_wait(tmp_path: Path) -> None:
    """A wait for a turn ends clearly, in the queue and amid a stream, and says when to come back."""
    async with (
        seat(tmp_path, "a", "b", token_interval=0.05) as sharers,
        sharing(sharers, min_awake=[0, 1], start_wait=0.5) as (house, client),
    ):
        await until(lambda: states(house) == ["DOZING", "READY"], lambda: states(house))
        refused = await client.post(CHAT, json=BODY | {"model": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_awake")
        assert int(refused.headers["retry-after"]) >= 1
        assert await ask(client, "b")


@on_uvloop
async def test_pinned_model_keeps_its_gpu(tmp_path: Path) -> None:
    async with (
        seat(tmp_path, "a", "b") as sharers,
        sharing(sharers, min_awake=[1, 0], start_wait=0.6) as (house, client),
    ):
        await until(lambda: states(house) == ["READY", "DOZING"], lambda: states(house))
        assert (await client.post(CHAT, json=BODY | {"model": "b"})).status_code == 503
        assert states(house) == ["READY", "DOZING"]


@on_uvloop
async def test_idle_after(tmp_path: Path) -> None:
    """One that dozes unused moves its weights away, and wakes for a request."""
    async with seat(tmp_path, "a", "b") as sharers, sharing(sharers, idle_after=[0.3, None]) as (house, client):
        await ask(client, "b")
        await until(lambda: states(house) == ["ASLEEP", "READY"], lambda: states(house))
        assert sharers[0].sharing is not None
        assert "weights" in sharers[0].sharing.engine.released
        assert await ask(client, "a")
        assert states(house) == ["READY", "DOZING"]


@on_uvloop
async def test_killed_amid_its_turn(tmp_path: Path) -> None:
    """Who is awake is killed amid an answer: the other, which waits, is awake in a moment."""
    async with (
        seat(tmp_path, "a", "b", token_interval=0.05) as sharers,
        sharing(sharers, gpu_slice=30, queue_timeout=1) as (_, client),
    ):
        await ask(client, "a", 2)
        lost = asyncio.ensure_future(client.post(CHAT, json=BODY | {"model": "a", "max_tokens": 2000}))
        await until(lambda: sharers[0].generating == 1, "it generates")
        waiting = asyncio.ensure_future(ask(client, "b"))
        await asyncio.sleep(0.1)
        killed = time.monotonic()
        sharers[0].fall()
        assert await waiting
        assert time.monotonic() - killed < 5
        assert (await lost).status_code in (502, 503)


@on_uvloop
async def test_wake_from_sleep_behind_one_out_of_sight(tmp_path: Path) -> None:
    """One that sleeps is told to wake while another has the turn unseen: once that is seen, it is told to doze."""
    async with seat(tmp_path, "a", "b") as sharers, sharing(sharers, idle_after=[None, 0.3]) as (house, client):
        await ask(client, "a")
        await until(lambda: states(house) == ["READY", "ASLEEP"], lambda: states(house))
        sharers[0].refuse()
        sharers[0].drop_connections()
        await until(lambda: states(house)[0] == "NOT_READY", lambda: states(house))
        asked = asyncio.ensure_future(ask(client, "b"))
        asleep = sharers[1].sharing
        assert asleep is not None
        await until(lambda: asleep.tenant.wanted is State.AWAKE, "it is told to wake")
        await sharers[0].accept()
        assert await asked
        sharers[0].refuse()  # it listens on another socket than before, which would count as left open


@on_uvloop
async def test_killed_while_it_dozes(tmp_path: Path) -> None:
    async with seat(tmp_path, "a", "b") as sharers, sharing(sharers, queue_timeout=1) as (house, client):
        await ask(client, "b")
        sharers[0].fall()
        await until(lambda: states(house) == ["NOT_READY", "READY"], lambda: states(house))
        assert (await client.post(CHAT, json=BODY | {"model": "a"})).status_code == 503
        assert await ask(client, "b")


@on_uvloop
async def test_strangers_on_one_gpu(tmp_path: Path) -> None:
    """Two endpoints that know nothing of each other share a GPU, and nobody waits for ever."""
    async with seat(tmp_path, "a", "b") as sharers, sharing(sharers[:1]) as (house, client):
        with BalancerProgram([sharers[1].url]) as stranger:
            await until(stranger.is_listening, "it listens", 30)
            for _ in range(3):
                theirs = client.post(f"{stranger.url}{CHAT}", json=BODY)
                assert (await asyncio.gather(ask(client, "a"), theirs))[1].status_code == 200
            stranger.process.kill()
            await stranger.ended()
        assert await ask(client, "a")
        assert states(house) == ["READY"]


@on_uvloop
async def test_drained_amid_anothers_turn(tmp_path: Path) -> None:
    """One that is to leave and still has a request has its turn ahead of others."""
    async with seat(tmp_path, "a", "b", token_interval=0.02) as sharers, sharing(sharers) as (house, client):
        pieces: list[str] = []
        stream = asyncio.ensure_future(streamed(client, "a", 60, pieces))
        await until(lambda: len(pieces) > 5, "it has begun")
        others = [asyncio.ensure_future(ask(client, "b", 40)) for _ in range(3)]
        await until(lambda: states(house)[0] == "DOZING", lambda: states(house))
        fleet = house.balancer.services.all[0].fleet
        fleet.drain(members(house)[0])
        assert states(house)[0] == "DRAINING"
        await stream
        await asyncio.gather(*others)
        assert states(house)[0] == "SHUTTING_DOWN"


@on_uvloop
async def test_fairness(tmp_path: Path) -> None:
    """However much one model is asked, another waits no longer than the bound says."""
    async with (
        seat(tmp_path, "a", "b", "c", token_interval=0.01) as sharers,
        sharing(sharers, priority=[2, 0, 0], gpu_slice=0.2, max_turn_over=0.1) as (_, client),
    ):
        ends = time.monotonic() + 6
        waits: dict[str, list[float]] = {"b": [], "c": []}

        async def keep_busy() -> None:
            while time.monotonic() < ends:
                await ask(client, "a", 20)

        async def now_and_then(model: str) -> None:
            while time.monotonic() < ends:
                asked = time.monotonic()
                await ask(client, model, 1)
                waits[model].append(time.monotonic() - asked)

        await asyncio.gather(*(keep_busy() for _ in range(6)), now_and_then("b"), now_and_then("c"))
        turns = Turns(Rules(0.2, 0.1))
        # On a busy machine a swap takes longer than what the replicas report, so the slack is a second.
        assert max(map(max, waits.values())) < turns.bound(2, 0.1, 2) + 1, waits
        assert min(map(len, waits.values())) >= 2, waits


@on_uvloop
async def test_what_needs_no_gpu_wakes_nobody(tmp_path: Path) -> None:
    async with seat(tmp_path, "a", "b") as sharers, sharing(sharers) as (house, client):
        await ask(client, "b")
        counted = await client.post("/tokenize", json={"model": "a", "prompt": "Hello"})
        assert counted.status_code == 200, counted.text
        assert states(house) == ["DOZING", "READY"]
        assert (await client.get("/ready")).status_code == 200


@on_uvloop
async def test_short_of_memory(tmp_path: Path) -> None:
    """Where memory is short, one that dozes unused falls asleep; where nobody can, the client is told the numbers."""
    async with seat(tmp_path, "a", "b", "c") as sharers, sharing(sharers) as (house, client):
        for model in "cba":
            await ask(client, model)
        stranger = Held(tmp_path, GPU, 60 * GIB)
        await doze(sharers[0])
        stranger.take(10 * GIB)  # as much as a model's weights
        assert await ask(client, "b")
        assert states(house) == ["DOZING", "READY", "ASLEEP"]
        await doze(sharers[1])
        stranger.take(11 * GIB)  # more than the weights of the two that doze
        house.complaints.clear()
        refused = await client.post(CHAT, json=BODY | {"model": "c"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_not_awake")
        assert "free and it takes" in refused.json()["error"]["message"]
        assert "nobody else there can give memory back" in house.complaints[-1]
        stranger.close()
        fleet = house.balancer.services.all[2].fleet
        await until(lambda: not fleet.why_away(), "it may be tried again", 20)
        assert [bool(await ask(client, model)) for model in "abc"]
        house.complaints.clear()


@on_uvloop
async def test_room_for_a_wake(tmp_path: Path) -> None:
    """As many fall asleep as a wake lacks memory, and it waits for no memory that nobody is about to give back."""
    async with seat(tmp_path, *"abcd", memory=5.0) as sharers, sharing(sharers) as (house, client):
        for model in "abcd":
            await ask(client, model)
        stranger = Held(tmp_path, GPU, 70 * GIB)
        await doze(sharers[3])
        stranger.take(20 * GIB)
        began = time.monotonic()
        assert await ask(client, "a")
        assert time.monotonic() - began < 4
        assert states(house) == ["READY", "ASLEEP", "ASLEEP", "DOZING"]
        stranger.close()


@on_uvloop
async def test_room_is_made_on_the_gpu_that_lacks_it(tmp_path: Path) -> None:
    """A wake on two GPUs lacks memory of one: who dozes on the other keeps its weights, unused for longer though."""
    weights = {"weights": 10.0, "pool": 30.0, "memory": 1.0, "gpu_slice": 0.5, "card": 50.0}
    async with (
        LabReplica(served_model="a", seat=Seat(tmp_path, ("GPU-a",), **weights)) as a,
        LabReplica(served_model="b", seat=Seat(tmp_path, ("GPU-b",), **weights)) as b,
        LabReplica(served_model="c", seat=Seat(tmp_path, ("GPU-a", "GPU-b"), **weights)) as c,
        sharing([a, b, c]) as (house, client),
    ):
        for model in "cab":
            await ask(client, model)
        stranger = Held(tmp_path, "GPU-b", 50 * GIB)
        await doze(b)
        stranger.take(5 * GIB)
        assert await ask(client, "c")
        assert states(house) == ["DOZING", "ASLEEP", "READY"]
        stranger.close()


@on_uvloop
async def test_wake_after_a_kill_waits_for_its_memory(tmp_path: Path) -> None:
    """Nobody is put to sleep for memory that a killed replica is about to lose."""
    async with seat(tmp_path, *"abc", memory=5.0, lingers=1.0) as sharers, sharing(sharers) as (house, client):
        for model in "abc":
            await ask(client, model)
        sharers[2].fall()
        await until(lambda: "READY" not in states(house), lambda: states(house))
        assert await ask(client, "a")
        assert states(house)[:2] == ["READY", "DOZING"]


@on_uvloop
async def test_start_beside_weights_of_others(tmp_path: Path) -> None:
    """One that starts where the weights of those that doze leave no room gets it: they move them away in turn."""
    async with seat(tmp_path, *"abc", card=45.0, memory=1.0) as sharers, sharing(sharers) as (house, client):
        assert states(house) == ["ASLEEP", "ASLEEP", "READY"]
        for model in "abc":
            assert await ask(client, model)


@on_uvloop
async def test_strict_model() -> None:
    """A strict service refuses models that it has not, though it is the only one."""
    async with LabReplica() as replica, serving(replica, strict_model=True) as house:
        await until(lambda: house.balancer.service.has_told_models, "it says what it serves")
        async with httpx.AsyncClient(base_url=house.url, trust_env=False) as client:
            unknown = await client.post(CHAT, json=BODY | {"model": "gpt-5"})
            assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
            assert (await client.post(CHAT, json=BODY | {"model": "lab"})).status_code == 200
            assert (await client.post("/generate", json={"text": "Hi"})).status_code == 200
