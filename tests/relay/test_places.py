"""The relay through its seam: whoever gives places stands behind it, be it a fleet in this process or not."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from balancer import errors
from balancer.fleet.address import ReplicaAddress
from balancer.fleet.outcome import Outcome
from balancer.observe.record import Record
from balancer.observe.tally import Tallies
from balancer.relay.cors import Cors
from balancer.relay.directory import Destination, Directory
from balancer.relay.doors import Doors
from balancer.relay.downstream import ClientConnection
from balancer.relay.proxy import Proxy
from balancer.routing.admission import Waiter
from balancer.routing.places import Attempt
from balancer.routing.prompt import Prompt
from balancer.service import ServiceFacts
from balancer.spec.settings import Settings
from tests.lab.replica import LabReplica
from tests.support.client import Client, chat, request
from tests.support.until import until
from tests.wire.running import on_uvloop


class OnePlace:
    """A place at one replica; notes what it is told."""

    reason = "the only one"
    matched = None
    waited = 0.25

    def __init__(self, replica: ReplicaAddress) -> None:
        self.replica = replica
        self.alive_at = 0.0
        self.is_answering = True
        self.told: list[str] = []
        self.heard_at = 0.0
        self.tokens: tuple[int | None, int | None] = (None, None)

    def away(self, now: float) -> float:
        return 0.0

    def away_for(self, now: float) -> float:
        return 0.0

    def doubted(self) -> None:
        self.told.append("doubted")
        self.alive_at = asyncio.get_running_loop().time()

    def heard(self, at: float) -> None:
        self.heard_at = at

    def begun(self, is_computed: bool) -> None:
        self.told.append("begun" if is_computed else "answered badly")

    def attempted(self, outcome: Outcome, attempt: Attempt) -> None:
        self.told.append(f"attempted: {outcome.value}")

    def end(self, outcome: Outcome | None, attempt: Attempt) -> None:
        self.told.append("broken off" if outcome is None else outcome.value)
        self.tokens = attempt.prompt_tokens, attempt.cached_tokens


class FewPlaces:
    """Gives one place after the other, and says no when there is none left."""

    def __init__(self, *replicas: ReplicaAddress) -> None:
        self.when_left: list[Callable[[ReplicaAddress], None]] = []
        self.waiters: list[Waiter] = []
        self.given: list[OnePlace] = []
        self._left = list(replicas)

    def claim_now(self, waiter: Waiter) -> OnePlace | None:
        return None

    async def claim(self, waiter: Waiter) -> OnePlace:
        self.waiters.append(waiter)
        if not self._left:
            raise errors.no_replica()
        self.given.append(OnePlace(self._left.pop(0)))
        return self.given[-1]

    def lives(self, replica: ReplicaAddress, since: float) -> bool:
        return False

    async def may_go_on(self, waiter: Waiter) -> bool:
        return bool(self._left)

    async def read(self, prompt: Prompt, key: object) -> None:
        prompt.read()


class Observer:
    def __init__(self) -> None:
        self.inter_token = Tallies().inter_token
        self.records: list[Record] = []

    def finished(self, record: Record) -> None:
        self.records.append(record)


async def answer_own(*_: object) -> None:
    raise AssertionError("no path of the balancer's own is asked for")


def at(replica: LabReplica) -> ReplicaAddress:
    return ReplicaAddress.of("far", replica.url)


class Relay:
    """The relay alone, in front of these places."""

    def __init__(self, places: FewPlaces, **settings: float) -> None:
        loop = asyncio.get_running_loop()
        self.places = places
        self.observer = Observer()
        self.destination = Destination(places, Settings(**settings), loop)
        proxy = Proxy(Directory([self.destination]), loop, self.observer, answer_own, Cors(()))
        self.doors = Doors(self.destination.settings, loop, proxy, ServiceFacts())
        self.url = ""
        self.clients: list[Client] = []

    async def client(self) -> Client:
        """A new connection, closed with the relay."""
        self.clients.append(await Client.open(self.url))
        return self.clients[-1]


@contextlib.asynccontextmanager
async def relaying(*replicas: ReplicaAddress, **settings: float) -> AsyncIterator[Relay]:
    relay = Relay(FewPlaces(*replicas), **settings)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: ClientConnection(relay.doors), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    relay.url = f"http://{host}:{port}"
    try:
        yield relay
    finally:
        for client in relay.clients:
            client.leave()
        server.close()
        relay.destination.pool.close()
        for connection in list(relay.doors.connections):
            connection.abort()
        await until(lambda: not relay.doors.connections)


@on_uvloop
async def test_request_is_relayed_to_its_place() -> None:
    """A request is relayed to the place that was given, and the place learns what happened."""
    async with LabReplica() as replica, relaying(at(replica)) as relay:
        client = await relay.client()
        await client.send(request(body=chat(stream=True, tokens=3)))
        answer = await client.answer()
        assert answer.status == 200
        assert answer.body.endswith(b"data: [DONE]\n\n")
        (place,) = relay.places.given
        assert place.told == ["begun", "answered"]
        assert place.heard_at >= relay.observer.records[0].received_at  # the loop counts milliseconds
        (record,) = relay.observer.records
        assert (record.member, record.reason, record.queued) == ("far", "the only one", 0.25)
        assert place.tokens == (record.prompt_tokens, record.cached_tokens)
        (waiter,) = relay.places.waiters
        assert waiter.is_generating
        assert waiter.prompt.path == "/v1/chat/completions"


@on_uvloop
async def test_where_nothing_listens_the_next_place_is_asked_for() -> None:
    async with LabReplica() as gone, LabReplica() as replica:
        gone.refuse()
        async with relaying(at(gone), at(replica)) as relay:
            client = await relay.client()
            await client.send(request(body=chat()))
            assert (await client.answer()).status == 200
            assert [place.told for place in relay.places.given] == [["refused"], ["begun", "answered"]]
            await client.send(request(body=chat()))
            assert (await client.answer()).error["code"] == "no_replica_ready"


@on_uvloop
async def test_a_place_is_given_back_when_its_client_leaves() -> None:
    async with LabReplica(token_interval=0.05) as replica, relaying(at(replica)) as relay:
        client = await relay.client()
        await client.send(request(body=chat(stream=True, tokens=1000)))
        await until(lambda: relay.places.given and "begun" in relay.places.given[0].told)
        client.leave()
        await until(lambda: relay.places.given[0].told == ["begun", "broken off"])
        await replica.seen.until(lambda seen: seen.generations_aborted == 1)


@on_uvloop
async def test_silent_answer() -> None:
    """A silent answer is checked through its place, which is told of the bytes that came meanwhile."""
    async with LabReplica(token_interval=0.6) as replica, relaying(at(replica), idle_timeout=0.5) as relay:
        loop = asyncio.get_running_loop()
        client = await relay.client()
        await client.send(request(body=chat(stream=True, tokens=2)))
        await until(lambda: relay.places.given and "begun" in relay.places.given[0].told)
        (place,) = relay.places.given
        while "answered" not in place.told:
            relay.destination.pool.sweep(loop.time())
            await asyncio.sleep(0.05)
        assert "doubted" in place.told
        assert place.told[-1] == "answered"
        assert place.heard_at


@on_uvloop
async def test_idle_connections_to_a_replica_that_left_are_closed() -> None:
    async with LabReplica() as replica, relaying(at(replica)) as relay:
        client = await relay.client()
        await client.send(request(body=chat()))
        assert (await client.answer()).status == 200
        (place,) = relay.places.given
        for tell in relay.places.when_left:
            tell(place.replica)
        assert relay.destination.pool.idle_connection(place.replica) is None
