"""What the coordinator tells the relays of the services, their replicas and the keys."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from balancer.accounts.store import IssuedKey, Keeper
from balancer.fleet.fleet import FIRST_LIST
from balancer.fleet.member import Member, Verdict
from balancer.relay.auth import Keys
from balancer.relay.kept_responses import KeptResponses
from balancer.service import Service
from balancer.services import Services
from balancer.workers.link import Message
from balancer.workers.messages import Told
from balancer.workers.told_deaths import ToldDeaths


class Telling:
    """`tell` tells all relays. `house` is called for a service of which replicas may have become known.

    `clock` gives the loop's time in seconds. `deaths` is for the relays that come later: once the coordinator was
    restarted, one relay comes after the other.
    """

    def __init__(
        self,
        services: Services,
        keys: Keys | None,
        tell: Callable[[Message], None],
        house: Callable[[str, Service], None],
        clock: Callable[[], float],
    ) -> None:
        self.members: dict[int, Member] = {}  # by what messages call them
        self.deaths = ToldDeaths(clock)
        self._services = services
        self._keys = keys
        self._tell = tell
        self._house = house
        self._clock = clock
        self._began = clock()
        self._numbers: dict[Member, int] = {}
        self._last_number = 0
        self._facts: dict[int, list[Any]] = {}
        self._states: dict[str, dict[str, Any]] = {}
        self._watched: dict[str, Service] = {}
        self._issued: Sequence[IssuedKey] = ()

    def is_told(self, service: Service | None) -> bool:
        """Is it known which replicas the service has, or too late to wait for that? None: the service is not known."""
        return service.fleet.is_told if service is not None else self._clock() - self._began >= FIRST_LIST

    def everything(self) -> Iterator[Message]:
        """What a relay that has just come is told. A service whose replicas are all known comes after them."""
        self.look_at_services()
        if self._keys is not None:
            yield self._keys_message(self._keys)
        for number, facts in self._facts.items():
            yield [Told.REPLICA, number, *facts]
        for ident, state in self._states.items():
            yield [Told.SERVICE, ident, state]
        yield from ([Told.DIED, *died] for died in self.deaths.lately())
        yield [Told.ALL]

    def responses(self, ident: str) -> KeptResponses | None:
        """Who keeps which answer of the service that messages call this, if it is served."""
        for service, destination in zip(self._services.all, self._services.destinations, strict=True):
            if self._services.ident(service) == ident:
                return destination.responses
        return None

    def keeper(self, id_: str) -> Keeper | None:
        """Who keeps that answer of /v1/responses, of any service, if a relay has told that since this process began."""
        for destination in self._services.destinations:
            if (known := destination.responses.known(id_)) is not None:
                replica, key = known
                return Keeper(replica.name, replica.authority.decode("latin-1"), key)
        return None

    def keys_changed(self, issued: Sequence[IssuedKey]) -> None:
        """Tells which keys are given out now."""
        self._issued = issued
        if self._keys is not None:
            self._tell(self._keys_message(self._keys))

    def _keys_message(self, keys: Keys) -> Message:
        return [
            Told.KEYS,
            keys.are_wanted,
            [[k.name, k.digest.hex(), k.terms.to_json(), k.issue] for k in self._issued],
        ]

    def tick(self) -> None:
        """Tells what has changed."""
        self.look_at_services()
        for number, member in list(self.members.items()):
            self._tell_facts(number, member, self._facts[number][0])

    def service(self, ident: str) -> Service | None:
        """The service that messages call this, if it has, or may have, requests."""
        if ident not in self._watched:
            self.look_at_services()
        return self._watched.get(ident)

    def seen(self, ident: str) -> Service | None:
        """The same as of the last look."""
        return self._watched.get(ident)

    def look_at_services(self) -> None:
        """Notes which services have come and gone, and tells what has changed of them."""
        staying = {self._services.ident(service): service for service in self._services.still_here()}
        for ident, service in staying.items():
            if self._watched.get(ident) is not service:
                self._watched[ident] = service
                self._watch(ident, service)
        for ident in self._watched.keys() - staying.keys():
            for member in self._watched.pop(ident).fleet.members.values():
                self._left(member)
        states = {self._services.ident(service): _state_of(service) for service in self._services.all}
        for ident, state in states.items():
            if self._states.get(ident) != state:
                self._tell([Told.SERVICE, ident, state])
        for ident in self._states.keys() - states.keys():
            self._tell([Told.PARTED, ident])
        self._states = states

    def _watch(self, ident: str, service: Service) -> None:
        def joined(member: Member) -> None:
            self.number_of(member, ident)
            self._house(ident, service)

        service.fleet.when_left.append(self._left)
        service.fleet.when_joined.append(joined)
        for member in service.fleet.members.values():
            self.number_of(member, ident)
        self._house(ident, service)

    def number_of(self, member: Member, ident: str) -> int:
        """What messages call the member. All relays know it by the time that they hear of this number."""
        if (number := self._numbers.get(member)) is None:
            self._last_number += 1
            number = self._numbers[member] = self._last_number
            self.members[number] = member
            self._tell_facts(number, member, ident)
        return number

    def _tell_facts(self, number: int, member: Member, ident: str) -> None:
        facts = _facts_of(member, ident)
        if self._facts.get(number) != facts:
            self._facts[number] = facts
            self._tell([Told.REPLICA, number, *facts])

    def _left(self, member: Member) -> None:
        if (number := self._numbers.pop(member, None)) is not None:
            del self.members[number], self._facts[number]
            self._tell([Told.GONE, number])


def _state_of(service: Service) -> dict[str, Any]:
    return {
        "name": service.facts.name,
        "is_told": service.fleet.is_told,
        "settings": service.settings.model_dump(mode="json"),
        "models": list(service.fleet.models),
        "has_replica": service.has_replica,
        "reads_prompts": service.admission.policy.reads_prompts,
        "replica_key": service.replica_key,
    }


def _facts_of(member: Member, ident: str) -> list[Any]:
    tenancy = member.tenancy
    before, away_since, is_resting = 0.0, None, False
    if tenancy is not None:
        away_since = tenancy.away_since if tenancy.state.is_away else None
        before, is_resting = tenancy.away(tenancy.away_since), tenancy.is_away
    verdict = member.ready.verdict
    is_passing = None if verdict is Verdict.UNKNOWN else verdict is Verdict.PASSING
    return [
        ident,
        member.name,
        member.url,
        member.alive_at,
        member.last_byte_at,
        member.passed_at,
        is_passing,
        before,
        away_since,
        is_resting,
        member.is_leaving,
        member.reasoning_parser,
    ]
