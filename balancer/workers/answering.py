"""The coordinator's end of its links to the relays: answers what they ask, and adds up what they saw."""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from balancer import errors
from balancer.accounts.accounts import Accounts
from balancer.errors import ServeError
from balancer.fleet.member import Member
from balancer.fleet.outcome import Outcome
from balancer.observe.tally import Tallies
from balancer.relay import asgi
from balancer.relay.auth import Keys
from balancer.relay.kept_responses import KeptResponses
from balancer.relay.metering import Meter
from balancer.relay.request import Headers, Request
from balancer.routing.admission import Waiter
from balancer.routing.places import Place
from balancer.routing.prompt import Prompt
from balancer.service import Service
from balancer.services import Services
from balancer.workers import counts
from balancer.workers.link import Link, Message
from balancer.workers.messages import (
    GENERATING,
    QUESTIONS,
    STREAMED,
    WAITED_FOR,
    Asked,
    Told,
    error_fields,
    owner_of,
    record_of,
    restore,
)
from balancer.workers.telling import Telling

log = logging.getLogger("groundserve")

OUTCOMES = {outcome.value: outcome for outcome in Outcome}
FEW = 64  # connections: a client with no more is not told of to other relays


@dataclass(slots=True)
class _Attempt:
    """Implements balancer.routing.places.Attempt."""

    replica_status: int
    full_for: int | None
    prompt_tokens: int | None
    cached_tokens: int | None
    texts: int


class Answering:
    """All relays. `app` answers the balancer's own paths; `changed` is called when a relay came, left or accepts."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        services: Services,
        tallies: Tallies,
        keys: Keys | None,
        meter: Meter,
        app: asgi.App,
        changed: Callable[[], None],
        accounts: Accounts | None = None,
    ) -> None:
        self.loop = loop
        self.tallies = tallies
        self.keys = keys
        self.meter = meter
        self.app = app
        self.accounts = accounts
        self.relays: set[Relay] = set()
        self.entered: Counter[str] = Counter()  # requests in progress by the name of their key, if that has a limit
        self.changed = changed
        self.telling = Telling(services, keys, self.tell, self._house, loop.time)
        self._news = asyncio.Event()  # it may be known now which replicas a service has
        self._server: asyncio.Server | None = None

    async def start(self, listener: socket.socket) -> None:
        self.telling.look_at_services()
        self._server = await self.loop.create_unix_server(self._relay, sock=listener)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for relay in list(self.relays):
            relay.link.close()

    def _relay(self) -> Link:
        relay = Relay(self)
        return relay.link

    def tell(self, message: Message, but: "Relay | None" = None) -> None:
        """Tells all relays but one."""
        for relay in self.relays:
            if relay is not but:
                relay.link.send(message)

    def introduce(self, relay: "Relay") -> None:
        """Tells everything to a relay that has just come."""
        for message in self.telling.everything():
            relay.link.send(message)

    def tick(self, _now: float) -> None:
        """Tells what has changed. Call it a few times a second."""
        self.telling.tick()
        self._tell_origins()
        self._wake()

    def _house(self, ident: str, service: Service) -> None:
        for relay in self.relays:
            relay.house(ident, service)
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def once_told(self, ident: str) -> Service | None:
        """The service that messages call this, once it is known which replicas it has; None if there is none."""
        service = self.telling.service(ident)
        while not self.telling.is_told(service):
            await self._news.wait()  # it has just been looked
            service = self.telling.seen(ident)
        return service

    def _tell_origins(self) -> None:
        totals: Counter[str] = Counter()
        for relay in self.relays:
            totals.update(relay.origins)
        many = {origin: count for origin, count in totals.items() if count > FEW}
        for relay in self.relays:
            relay.tell_origins({origin: count - relay.origins.get(origin, 0) for origin, count in many.items()})

    # What relays say together

    def count_keys(self) -> None:
        """Adds up the requests in progress by key."""
        if self.keys is not None:
            totals: Counter[str] = Counter()
            for relay in self.relays:
                totals.update(relay.by_key)
            for key in self.keys:
                key.in_flight = totals[key.name]


class Relay:
    """One relay, and what it holds."""

    def __init__(self, all_relays: Answering) -> None:
        self.is_accepting = False
        self.origins: Mapping[str, int] = {}
        self.by_key: Mapping[str, int] = {}
        self.link = Link(all_relays.loop, self._take, self._ended)
        self._all = all_relays
        self._places: dict[int, Place] = {}
        self._homeless: dict[int, list[Any]] = {}  # places at replicas that this coordinator does not know yet
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._entries: dict[int, str] = {}
        self._origins_told: Mapping[str, int] = {}
        self._does: dict[int, Callable[..., None]] = {
            Asked.CLAIM: self._claim,
            Asked.END: self._end,
            Asked.BEGUN: self._begun,
            Asked.LEAVE: self._leave,
            Asked.MAY_GO_ON: self._may_go_on,
            Asked.DOUBTED: self._doubted,
            Asked.CONTINUES: self._continues,
            Asked.OWN_PATH: self._own_path,
            Asked.ENTER: self._enter,
            Asked.LEFT: self._left,
            Asked.TAKE: self._take_from_quota,
            Asked.DIED: self._died,
            Asked.ACQUITTED: self._acquitted,
            Asked.USED: self._used,
            Asked.SEEN: self._seen,
            Asked.ACCEPTING: self._accepting,
            Asked.KEPT: self._kept,
            Asked.KEEPS: self._keeps,
            Asked.KEEPER: self._keeper,
            Asked.HELLO: self._hello,
        }

    def _take(self, message: Message) -> None:
        try:
            self._does[message[0]](*message[1:])
        except Exception:
            log.exception("a relay's message failed here")
            if message[0] in QUESTIONS:
                self._failed(message[1])

    def _hello(self, places: list[list[Any]], entries: list[list[Any]]) -> None:
        everyone = self._all
        everyone.introduce(self)  # first: what is told meanwhile is part of it
        everyone.relays.add(self)
        for place in places:
            self._homeless[place[0]] = place
        for ident in {place[1] for place in places}:
            if (service := everyone.telling.service(ident)) is not None:
                self.house(ident, service)
        for call, key in entries:
            self._entries[call] = key
            everyone.entered[key] += 1
        everyone.changed()

    def house(self, ident: str, service: Service) -> None:
        """Counts the places at replicas of this service that are known by now."""
        if not self._homeless:
            return
        members = _members_by_name(service)
        for number, where, name, url, is_generating in list(self._homeless.values()):
            if where == ident and (member := members.get((name, url))) is not None:
                del self._homeless[number]
                self._places[number] = service.places.hold(member, is_generating)

    def _ended(self) -> None:
        everyone = self._all
        everyone.relays.discard(self)
        for task in list(self._tasks.values()):
            task.cancel()
        for place in self._places.values():
            place.end(None, _NOTHING)
        self._places.clear()
        everyone.entered.subtract(self._entries.values())
        everyone.count_keys()
        everyone.changed()

    def _accepting(self) -> None:
        self.is_accepting = True
        self._all.changed()

    # Places

    def _claim(self, number: int, ident: str, *said: Any) -> None:
        service = self._all.telling.service(ident)
        if not self._all.telling.is_told(service):
            self._start(number, self._claim_once_told(number, ident, *said))
        elif (wait := self._claim_at(service, number, ident, *said)) is not None:
            self._start(number, wait)

    async def _claim_once_told(self, number: int, ident: str, *said: Any) -> None:
        service = await self._all.once_told(ident)
        if (wait := self._claim_at(service, number, ident, *said)) is not None:
            await wait

    def _claim_at(
        self,
        service: Service | None,
        number: int,
        ident: str,
        flags: int,
        owner: str,
        arrived_at: float,
        blocks: list[int] | None = None,
        again: list[Any] | None = None,
        only: list[str] | None = None,
    ) -> Coroutine[Any, Any, None] | None:
        """Gives the place or refuses it; returns what has to be awaited where neither can be done at once."""
        if service is None:
            self._refuse(number, errors.no_replica())
            return None
        prompt = Prompt.of(blocks or [], flags & STREAMED != 0)
        is_generating, is_waited_for = flags & GENERATING != 0, flags & WAITED_FOR != 0
        waiter = Waiter(prompt, is_generating, [], is_waited_for, owner_of(owner), arrived_at)
        if again is not None:
            self._restore(waiter, again, service)
        if only is not None:
            if (keeper := _members_by_name(service).get((only[0], only[1]))) is None:
                self._refuse(number, errors.keeper_gone(""))
                return None
            waiter.only = keeper.address
        place = service.places.claim_now(waiter)
        if place is None:
            return self._wait_for(number, service, ident, waiter)
        self._give(number, place, ident)
        return None

    def _restore(self, waiter: Waiter, again: list[Any], service: Service) -> None:
        restore(waiter, again)
        members = _members_by_name(service)
        waiter.tried = [members[name, url] for name, url in again[0] if (name, url) in members]

    def _give(self, number: int, place: Place, ident: str) -> None:
        self._places[number] = place
        replica = self._all.telling.number_of(place.member, ident)
        self.link.send(
            [Told.PLACE, number, replica, place.reason, place.matched, place.waited, place.number, place.wants_begun]
        )

    async def _wait_for(self, number: int, service: Service, ident: str, waiter: Waiter) -> None:
        try:
            place = await service.places.claim(waiter)
            while not service.fleet.has(place.member):  # it has left since the place was given
                place.end(None, _NOTHING)
                place = await service.places.claim(waiter)
        except ServeError as error:
            self._refuse(number, error)
        else:
            self._give(number, place, ident)

    def _refuse(self, number: int, error: ServeError) -> None:
        self.link.send([Told.REFUSED, number, error_fields(error)])

    def _start(self, number: int, work: Any) -> None:
        task = self._all.loop.create_task(self._guarded(number, work))
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _guarded(self, number: int, work: Any) -> None:
        try:
            await work
        except Exception:
            log.exception("a relay's question failed here")
            self._failed(number)

    def _failed(self, number: int) -> None:
        if (place := self._places.pop(number, None)) is not None:
            place.end(None, _NOTHING)
        error = ServeError(500, "internal_error", "The balancer failed on this request; its log says why.")
        self.link.send([Told.ERROR, number, error_fields(error)])

    def _leave(self, number: int) -> None:
        if (place := self._places.pop(number, None)) is not None:
            place.end(None, _NOTHING)
        elif (task := self._tasks.get(number)) is not None:
            task.cancel()

    def _begun(self, number: int, is_computed: bool) -> None:
        if (place := self._places.get(number)) is not None:
            place.begun(is_computed)

    def _end(
        self,
        number: int,
        outcome: str | None,
        status: int,
        full_for: int | None,
        prompt: int | None,
        cached: int | None,
        texts: int,
    ) -> None:
        place = self._places.pop(number, None)
        if place is None:
            self._homeless.pop(number, None)
        else:
            attempt = _Attempt(status, full_for, prompt, cached, texts)
            place.end(None if outcome is None else OUTCOMES[outcome], attempt)

    def _may_go_on(self, call: int, ident: str, is_generating: bool, again: list[Any]) -> None:
        async def answer() -> None:
            if (service := await self._all.once_told(ident)) is None:
                self.link.send([Told.ANSWER, call, [False, None]])
                return
            waiter = Waiter(Prompt.of([], False), is_generating)
            self._restore(waiter, again, service)
            may = await service.places.may_go_on(waiter)
            state = [waiter.waited, waiter.held_until, waiter.rounds, waiter.number, waiter.full_for]
            self.link.send([Told.ANSWER, call, [may, [bool(waiter.tried), *state]]])

        self._start(call, answer())

    def _doubted(self, number: int) -> None:
        if (place := self._places.get(number)) is not None:
            place.doubted()

    def _continues(self, call: int, number: int) -> None:
        async def answer() -> None:
            does = False
            if (homeless := self._homeless.get(number)) is not None:
                await self._all.once_told(homeless[1])
            if (place := self._places.get(number)) is not None:
                does = await place.continues()
            self.link.send([Told.ANSWER, call, does])

        self._start(call, answer())

    # The balancer's own paths

    def _own_path(self, call: int, method: str, target: str, version: str, path: str, host: str, fields: str) -> None:
        request = Request(method.encode("latin-1"), target.encode("latin-1"), version, self._all.loop.time())
        request.path, request.host, request.fields = path, host.encode("latin-1"), fields.encode("latin-1")

        async def answer() -> None:
            answered = _Answered()
            await asgi.answer(self._all.app, request, answered)
            self.link.send([Told.ANSWER, call, answered.to_json()])

        self._start(call, answer())

    # Keys

    def _enter(self, call: int, name: str) -> None:
        everyone = self._all
        key = everyone.keys.named(name) if everyone.keys is not None else None
        if key is not None and everyone.entered[name] >= key.limit * key.share:
            self.link.send([Told.ERROR, call, error_fields(errors.key_at_limit(key.limit))])
            return
        everyone.entered[name] += 1
        self._entries[call] = name
        self.link.send([Told.ANSWER, call, None])

    def _left(self, call: int) -> None:
        if (name := self._entries.pop(call, None)) is not None:
            self._all.entered[name] -= 1

    def _take_from_quota(self, call: int, name: str, prompt: int, answer: int | None) -> None:
        everyone = self._all
        key = everyone.keys.named(name) if everyone.keys is not None else None
        said: list[Any] = [0, None, 0.0, ""]
        if key is not None and (quota := key.quota) is not None:
            tokens, lacking, at = everyone.meter.take(quota, prompt, answer)
            why = None if lacking is None else [lacking.what, lacking.limit, lacking.wait]
            said = [tokens, why, at, quota.fields().decode("latin-1")]
        self.link.send([Told.ANSWER, call, said])

    # What it saw. Messages are JSON: what is a pair or a triple there comes as a list, and compiled code minds.

    def _died(self, *said: Any) -> None:
        if self._all.telling.deaths.learn([*said]):
            self._all.tell([Told.DIED, *said], but=self)

    def _kept(self, ident: str, replica: int, id_: str, key: str) -> None:
        if self._is_news(self._all.telling.responses(ident), replica, id_, key):
            self._all.tell([Told.KEPT, ident, replica, id_, key], but=self)

    def _keeps(self, ident: str, kept: list[list[Any]]) -> None:
        """Is not passed on: most of it the other relays know, and they ask for the rest."""
        responses = self._all.telling.responses(ident)
        for replica, id_, key in kept:
            self._is_news(responses, replica, id_, key)

    def _is_news(self, responses: KeptResponses | None, replica: int, id_: str, key: str) -> bool:
        """Learns who keeps the answer. Returns False if that was known, or the answer is another key's."""
        member = self._all.telling.members.get(replica)
        if responses is None or member is None or responses.keeper(id_, key) is member.address:
            return False
        responses.learn(id_, member.address, key)
        return responses.keeper(id_, key) is member.address

    def _keeper(self, call: int, id_: str) -> None:
        async def answer() -> None:
            accounts, found = self._all.accounts, self._all.telling.keeper(id_)
            if found is None and accounts is not None:
                found = await accounts.keeper(id_)
            self.link.send([Told.ANSWER, call, [found.replica, found.address, found.key] if found else None])

        self._start(call, answer())

    def _acquitted(self, ident: str, digest: str) -> None:
        self._all.telling.deaths.acquit(digest)
        self._all.tell([Told.ACQUITTED, ident, digest], but=self)

    def _used(self, records: Iterable[list[Any]]) -> None:
        for fields in records:
            self._all.meter.finished(record_of(fields))

    def _seen(self, seen: dict[str, Any]) -> None:
        everyone = self._all
        for number, at in seen["heard"]:
            if (member := everyone.telling.members.get(number)) is not None:
                member.last_byte_at = max(at, member.last_byte_at)
        counts.add(everyone.tallies, seen["counts"])
        self.origins, self.by_key = seen["origins"], seen["keys"]
        everyone.count_keys()

    def tell_origins(self, elsewhere: Mapping[str, int]) -> None:
        if elsewhere != self._origins_told:
            self._origins_told = elsewhere
            self.link.send([Told.ORIGINS, elsewhere])


class _Answered:
    """Takes an app's answer, as balancer.relay.reply.Reply does."""

    def __init__(self) -> None:
        self.extra_fields = b""
        self._whole: list[Any] = []

    def whole(self, status: int, headers: Headers, body: bytes) -> None:
        fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
        self._whole = [status, fields, body.decode("latin-1")]

    def to_json(self) -> list[Any]:
        return [*self._whole, self.extra_fields.decode("latin-1")]


_NOTHING = _Attempt(0, None, None, None, 1)


def _members_by_name(service: Service) -> dict[tuple[str, str], Member]:
    """By name and URL, which the replicas keep when a coordinator is started anew."""
    return {(member.name, member.url): member for member in service.fleet.members.values()}
