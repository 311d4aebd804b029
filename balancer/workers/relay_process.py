"""The composition root of one relay of several: clients on one side, replicas on the other, the coordinator beside."""

import asyncio
import gc
import socket
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from balancer.accounts.quota import Lacking
from balancer.accounts.store import IssuedKey, Keeper
from balancer.app import close_doors, cors_of, networks, wait_for
from balancer.config import Config
from balancer.contract.account import KeyTerms
from balancer.fleet.address import ReplicaAddress
from balancer.fleet.dial import Dialer
from balancer.fleet.discovery import Resolve
from balancer.fleet.lateness import Lateness
from balancer.observe.access_log import AccessLog
from balancer.observe.observer import Observer
from balancer.observe.record import Record
from balancer.observe.tally import MemberTally, Tallies
from balancer.observe.tracing import Tracing
from balancer.relay.auth import Key, Keys
from balancer.relay.deaths import Deaths
from balancer.relay.directory import Destination, Directory
from balancer.relay.doors import Doors
from balancer.relay.kept_responses import KeptResponses
from balancer.relay.metering import Meter, settle
from balancer.relay.pool import ConnectionPool
from balancer.relay.proxy import Proxy
from balancer.relay.reply import Reply
from balancer.relay.request import Request
from balancer.relay.sweep import Sweep
from balancer.relay.tls import Certificate, replica_context
from balancer.workers import counts
from balancer.workers.asking import Asking
from balancer.workers.board import Board
from balancer.workers.known import KnownReplica, KnownService
from balancer.workers.link import Message
from balancer.workers.messages import Asked, Told, record_fields
from balancer.workers.orders import Orders
from balancer.workers.remote_places import OtherRelays, RemotePlaces
from balancer.workers.shared_doors import SharedListener, SharedMemory

AT_ONCE = 250  # records, or keepers of answers, told in one message
MOST_USED = 100_000  # records kept while there is no coordinator


@dataclass(slots=True)
class _Facts:
    is_leaving: bool = False


class RelayProcess:
    """Relay `number`; `address` is the coordinator's."""

    def __init__(
        self,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        number: int,
        address: str,
        board: Board,
        look_up: Resolve,
    ) -> None:
        self.config = config
        self.loop = loop
        self.facts = _Facts()
        self.certificate = Certificate(config.tls_cert, config.tls_key) if config.tls_cert and config.tls_key else None
        self.keys = _keys(config)
        self.asking = Asking(loop, address)
        self.asking.listener = self
        self._tls = replica_context(config.replica_ca)
        self.tallies = Tallies()  # of what the coordinator has not been told yet
        self._used: deque[Record] = deque(maxlen=MOST_USED)
        if config.state is not None:
            self.tallies.when_counted.append(self._note_use)
        self.tracing = Tracing(config.otlp, config.name) if config.otlp else None
        if self.tracing is not None:
            self.tallies.when_counted.append(self.tracing.finished)
        self.lateness = Lateness(loop, self.tallies.loop_lag.note)
        self.dialer = Dialer(look_up, self.lateness.within)
        self.access_log = AccessLog(1, config.is_log_json)
        self.destinations: list[Destination] = []
        self._by_ident: dict[str, tuple[KnownService, Destination]] = {}
        self._others: dict[str, OtherRelays] = {}
        self._leaving: list[ConnectionPool] = []  # of services that have parted
        for ident in map(str, range(1 + len(config.others))):
            self._add(ident)
        limits = _Limits(self.asking)
        observer = Observer(self.access_log, self.tallies)
        self.proxy = Proxy(
            Directory(self.destinations, self._keeper_of),
            loop,
            observer,
            self._answer_own,
            cors_of(config, self.keys),
            self.keys,
            config.admin_key,
            Meter(loop.time, self.keys, elsewhere=_Quotas(self.asking) if config.state is not None else None),
            self.tracing is not None,
            limits,
        )
        trusted = networks(self.settings.trusted_proxies)
        self.doors = Doors(self.settings, loop, self.proxy, self.facts, trusted)
        self.doors.share = self._memory = SharedMemory(board, number)
        self._board, self._number = board, number
        self._listener: SharedListener | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def settings(self) -> Any:
        return self.destinations[0].settings

    # Its life

    async def run(self, listener: socket.socket, orders: Orders, last_call: float) -> None:
        """Serves until it is told to leave, then finishes its requests. `last_call`: as for balancer.app.Balancer."""
        self.lateness.start()
        sweep = Sweep(self._jobs())
        self._tasks = [self.loop.create_task(self.asking.run()), self.loop.create_task(sweep.run())]
        await self._until_ready(orders.leaving)
        context = self.certificate.context if self.certificate else None
        self._listener = SharedListener(self.doors, listener, context, self._board, self._number)
        self.asking.is_accepting = True
        self.asking.send([Asked.ACCEPTING])
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        await orders.leaving.wait()
        self.facts.is_leaving = self.asking.is_leaving = True
        if orders.released.is_set():
            self._listener.close()
        await close_doors(self.doors, self._listener, self.settings, last_call, orders.hurry)
        await self._stop(sweep)

    async def _until_ready(self, leaving: asyncio.Event) -> None:
        """Opens the doors once the coordinator has told all and, with `accept_when_ready`, a replica is ready."""
        while not self.asking.knows_all.is_set() and not leaving.is_set():
            await wait_for(self.asking.knows_all, 0.05)
        deadline = self.loop.time() + self.config.accept_when_ready
        while self.loop.time() < deadline and not leaving.is_set():
            if any(service.has_replica for service, _ in self._by_ident.values()):
                return
            await wait_for(leaving, 0.02)

    async def _stop(self, sweep: Sweep) -> None:
        await sweep.do("what the coordinator counts")
        await self.asking.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for destination in self.destinations:
            destination.pool.close()
        await self.dialer.close()
        self.lateness.stop()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
        self.access_log.flush()

    def _jobs(self) -> dict[str, Any]:
        jobs: dict[str, Any] = {
            "client connections": self._sweep_doors,
            "the access log": lambda _: self.access_log.flush_some(),
            "connections to replicas": self._sweep_pools,
            "what the coordinator counts": lambda _: self._tell(),
        }
        if (keys := self.keys) is not None:
            jobs["API keys"] = lambda _: keys.reload()
        if (certificate := self.certificate) is not None:
            jobs["the certificate"] = lambda _: certificate.reload()
        return jobs

    def _sweep_doors(self, now: float) -> None:
        self.doors.sweep(now)
        if (most := self._memory.owed(self.settings.max_buffered_bytes)) is not None:
            self.doors.make_room_for_others(most)
        self.doors.buffered_elsewhere = self._memory.tell(self.doors.buffered)
        if self._listener is not None:
            self._listener.count()

    def _sweep_pools(self, now: float) -> None:
        for destination in self.destinations:
            destination.pool.sweep(now)
        for pool in list(self._leaving):
            pool.sweep(now)
            if not pool.busy:
                pool.close()
                self._leaving.remove(pool)

    def _tell(self) -> bool:
        """Tells the coordinator what there is to count, in pieces. Returns whether there is more."""
        if not self.asking.is_up:
            return False
        if self._tell_kept() or self.tallies.count_some():
            return True
        if used := self._used:
            some = [used.popleft() for _ in range(min(AT_ONCE, len(used)))]
            self.asking.send([Asked.USED, [record_fields(record) for record in some]])
            self.asking.flush()
            if used:
                return True
        seen = {
            "counts": counts.take_out(self.tallies),
            "heard": self.asking.heard_since(),
            "origins": {origin.decode("latin-1"): count for origin, count in self.doors.origins.items()},
            "keys": {key.name: key.in_flight for key in self.keys or () if key.in_flight},
        }
        self.asking.send([Asked.SEEN, seen])
        staying = {known.name for known in self.asking.by_address.values()}
        for name in self.tallies.members.keys() - staying:
            del self.tallies.members[name]
        return False

    def _note_use(self, record: Record) -> None:
        if record.model:
            self._used.append(record)

    def _tell_kept(self) -> bool:
        """Tells a new coordinator who keeps which answer, in pieces; other relays ask it. Returns if there was one."""
        there = self.asking.by_address
        for ident, (service, _) in self._by_ident.items():
            if service.is_told and (untold := self._others[ident].untold):
                some = [untold.popleft() for _ in range(min(AT_ONCE, len(untold)))]
                kept = [[there[replica].number, id_, key] for id_, replica, key in some if replica in there]
                self.asking.send([Asked.KEEPS, ident, kept])
                self.asking.flush()
                return True
        return False

    # What the coordinator tells

    def greeted(self) -> None:
        for service, _ in self._by_ident.values():
            service.is_told = False
        for others in self._others.values():
            others.greeted()

    def told(self, message: Message) -> None:
        match message:
            case [Told.SERVICE, ident, state]:
                self._renew(ident, state)
            case [Told.PARTED, ident]:
                self._part(ident)
            case [Told.KEYS, are_wanted, issued]:
                self._take_up(are_wanted, issued)
            case [Told.DIED, ident, name, authority, digest, at, _]:
                if ident in self._by_ident and self._others[ident].deaths.learn(message[1:]):
                    self._died_elsewhere(self._by_ident[ident][1], name, authority, bytes.fromhex(digest), at)
            case [Told.KEPT, ident, number, id_, key]:
                replica = self.asking.replicas.get(number)
                if replica is not None and ident in self._by_ident:
                    self._by_ident[ident][1].responses.learn(id_, replica.address, key, is_heard=True)
            case [Told.ACQUITTED, ident, digest]:
                if ident in self._by_ident:
                    self._others[ident].deaths.acquit(digest)
                    self._by_ident[ident][1].deaths.acquit(bytes.fromhex(digest), is_heard=True)
            case [Told.ORIGINS, elsewhere]:
                self.doors.origins_elsewhere = {o.encode("latin-1"): count for o, count in elsewhere.items()}

    def _died_elsewhere(self, destination: Destination, name: str, authority: str, digest: bytes, at: float) -> None:
        """Notes what another relay has seen. All that it tells of a replica that has left since is of the same one."""
        host = authority.encode("latin-1")
        replica = destination.places.named(name, host) or destination.deaths.victim(name, host)
        destination.deaths.note(replica or ReplicaAddress.of(name, f"//{authority}"), digest, at, is_heard=True)

    def met(self, replica: KnownReplica) -> None:
        self.tallies.members.setdefault(replica.name, MemberTally())

    def left(self, replica: KnownReplica) -> None:
        if (found := self._by_ident.get(replica.service)) is not None:
            for hook in found[1].places.when_left:
                hook(replica.address)

    def _add(self, ident: str) -> tuple[KnownService, Destination]:
        settings = self.config.settings if ident == "0" else self.config.settings.model_copy()
        service = KnownService(ident, settings)
        places = RemotePlaces(service, self.asking, self.loop)
        destination = Destination(places, settings, self.loop, None, self._tls, self.dialer, service)
        self._others[ident] = others = OtherRelays(ident, self.asking, self.loop.time)
        destination.deaths, destination.responses = Deaths(places.lives, others), KeptResponses(others)
        self.destinations.append(destination)
        self._by_ident[ident] = service, destination
        return service, destination

    def _renew(self, ident: str, state: dict[str, Any]) -> None:
        service, destination = self._by_ident.get(ident) or self._add(ident)
        before = service.settings.model_copy()
        service.take(state)
        key = state["replica_key"]
        destination.replica_key = key.encode() if key else None
        settings = service.settings
        if state["is_told"] and not service.is_told:
            service.is_told = True
            self.asking.all_met(ident)
            if self.config.state is None:  # else all but what is untold is on the disk
                untold = self._others[ident].untold
                untold.clear()
                untold.extend(destination.responses.all())
            self._tell_kept()
        if ident == "0":
            if settings.trusted_proxies != before.trusted_proxies:
                self.doors.trust(networks(settings.trusted_proxies))
            self.proxy.cors = cors_of(replace(self.config, settings=settings), self.keys)

    def _part(self, ident: str) -> None:
        if (found := self._by_ident.pop(ident, None)) is not None:
            del self._others[ident]
            self.destinations.remove(found[1])
            self._leaving.append(found[1].pool)

    def _take_up(self, are_wanted: bool, issued: list[list[Any]]) -> None:
        if self.keys is None:
            return
        keys = []
        for name, digest, terms, issue in issued:
            terms["models"] = tuple(terms["models"])
            keys.append(IssuedKey(name, bytes.fromhex(digest), KeyTerms(**terms), issue))
        self.keys.take_up(keys, self.loop.time())
        self.keys.are_wanted = are_wanted
        self.proxy.cors = cors_of(self.config, self.keys)

    async def _keeper_of(self, id_: str) -> Keeper | None:
        found = await self.asking.ask(Asked.KEEPER, id_)
        return Keeper(*found) if found else None

    async def _answer_own(self, request: Request, reply: Reply) -> None:
        method, target, host, fields = (
            word.decode("latin-1") for word in (request.method, request.target, request.host, request.fields)
        )
        answer = await self.asking.ask(Asked.OWN_PATH, method, target, request.version, request.path, host, fields)
        status, fields, body, extra = answer
        reply.extra_fields += extra.encode("latin-1")
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
        reply.whole(status, headers, body.encode("latin-1"))


class _Limits:
    """Implements balancer.relay.proxy.SharedLimits."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self._calls: dict[Request, int] = {}

    async def enter(self, request: Request, key: Key) -> None:
        asking = self._asking
        self._calls[request] = call = asking.new_number()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asking.wait(call, [Asked.ENTER, call, key.name], answer)
        try:
            await answer
        finally:
            asking.forget(call)
        asking.entries[call] = key.name

    def left(self, request: Request) -> None:
        if (call := self._calls.pop(request, None)) is not None:
            self._asking.entries.pop(call, None)
            self._asking.send([Asked.LEFT, call])


class _Quotas:
    """Implements balancer.relay.metering.Quotas."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking

    async def take(self, key: Key, prompt: int, answer: int | None, reply: Reply, record: Record) -> None:
        tokens, lacking, at, fields = await self._asking.ask(Asked.TAKE, key.name, prompt, answer)
        settle(tokens, Lacking(*lacking) if lacking else None, at, fields.encode("latin-1"), reply, record)


def _keys(config: Config) -> Keys | None:
    """The keys of the file; those that are issued come from the coordinator."""
    if config.state is not None:
        return Keys(config.api_keys, config.wants_keys or config.api_keys is not None)
    return Keys(config.api_keys) if config.api_keys else None
