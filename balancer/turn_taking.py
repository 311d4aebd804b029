"""Orders the turns on shared GPUs: asks routing/turns.py who has which GPU next, and tells the replicas.

It sees all services of this process, so that their models share GPUs whoever started them. It looks when something
happens that can change the answer, and when the next turn is over. While nobody shares, nothing here runs.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from balancer.fleet.member import Member
from balancer.fleet.tenancy import Said, Tenancy, TenantState
from balancer.routing.turns import Need, Rules, Stage, Swap, Tenant, Turns
from balancer.service import Service

log = logging.getLogger("groundserve")

LEAST_PAUSE = 0.01  # seconds between two looks, however much happens
# How many seconds an order may take. A doze waits for the present step of the model, on a CPU up to a minute; a wake
# waits for the turn, which a replica may have that this balancer does not know, or not yet, as while it starts.
DOZE, WAKE = 70.0, 3.0
# More, where weights are moved; but a wake waits no longer for its turn, without which it moves none.
WITH_WEIGHTS = 70.0
# Seconds that a wake waits for memory where nobody is about to give some back; and for how many seconds after a replica
# was lost its memory may still be freed.
QUICK, FREEING = 0.2, 5.0
# Seconds until a failed wake is tried again: after another had the turn, and after memory was short.
SOON, LATER = 0.25, 5.0
AHEAD = 1 << 10  # the priority of a replica that is leaving and still has requests


@dataclass(slots=True)
class _One:
    """A replica that shares its GPUs, with its service."""

    service: Service
    member: Member
    tenancy: Tenancy


class TurnTaking:
    """The turns of the members of `services`, which is asked anew at each look."""

    def __init__(self, services: Callable[[], Iterable[Service]], rules: Callable[[], Rules]) -> None:
        self.swaps_total = 0
        self._services = services
        self._rules = rules
        self._turns = Turns(rules())
        self._shares = False
        self._seats: dict[str, tuple[str, ...]] = {}  # the GPUs of each replica that shares, at the last look
        self._left_at: dict[str, float] = {}  # by GPU, when one that shared it was last lost, or left
        self._next: asyncio.TimerHandle | None = None
        self._next_at = self._looked_at = 0.0
        self._orders: set[asyncio.Task[None]] = set()
        self._is_stopped = False

    def watch(self, service: Service) -> None:
        """Takes in one more service."""
        service.admission.when_waiting.append(self.look)
        service.admission.turn_in = partial(self.turn_in, service)
        service.fleet.when_shared.append(lambda: self._shared(service))

    def _shared(self, service: Service) -> None:
        self._shares = True
        if self.look not in service.fleet.when_room:
            service.fleet.when_room.append(self.look)

    def turn_in(self, service: Service) -> float:
        """In how many seconds the service's model will probably have its turn; 0 if nobody knows."""
        now = asyncio.get_running_loop().time()
        tried = [one.tenancy.retry_at - now for one in self._of(service) if one.tenancy.cannot_wake]
        if tried:
            return max(0.0, min(tried))
        tenants, needs = self._stock(now)
        seconds = self._turns.expected(now, service.facts.name, [tenant for tenant, _ in tenants.values()], needs)
        return 0.0 if math.isinf(seconds) else seconds

    async def stop(self) -> None:
        """Ends orders that are under way; the replicas then see to their turns by themselves."""
        self._is_stopped = True
        if self._next is not None:
            self._next.cancel()
        for order in self._orders:
            order.cancel()
        await asyncio.gather(*self._orders, return_exceptions=True)

    def tick(self, now: float) -> None:
        """Puts replicas to sleep that have dozed unused for long, and looks again. Call it a few times a second."""
        if not self._shares:
            return
        for one in self._all():
            idle_after, tenancy = one.service.settings.idle_after, one.tenancy
            if tenancy.cannot_wake and now >= tenancy.retry_at:
                tenancy.cannot_wake = ""  # the next request tries again
            if idle_after is None or tenancy.state is not TenantState.DOZING or tenancy.is_told or tenancy.is_lost:
                continue
            is_wanted = one.member.generating or one.service.admission.queue_depth
            if not is_wanted and now - max(tenancy.idle_since, tenancy.away_since) > idle_after:
                self._begin(self._tell(one, "sleep", DOZE + WITH_WEIGHTS), one)
        self.look()

    # Who is next

    def look(self) -> None:
        """Something happened that may change whose turn it is: looks soon."""
        if self._shares:
            self._look_at(self._looked_at + LEAST_PAUSE)

    def _look_at(self, when: float) -> None:
        if self._is_stopped:
            return
        if self._next is not None:
            if self._next_at <= when:
                return
            self._next.cancel()
        self._next, self._next_at = asyncio.get_running_loop().call_at(when, self._look), when

    def _look(self) -> None:
        self._next = None
        now = self._looked_at = asyncio.get_running_loop().time()
        self._note_lost(now)
        tenants, needs = self._stock(now)
        self._turns.rules = self._rules()
        swaps = self._turns.decide(now, [tenant for tenant, _ in tenants.values()], needs)
        for swap in swaps:
            self._swap(swap, {id: one for id, (_, one) in tenants.items()})
        if not math.isinf(self._turns.due_in):
            self._look_at(now + max(LEAST_PAUSE, self._turns.due_in))

    def _note_lost(self, now: float) -> None:
        """Notes on which GPUs one that shared them is there no more."""
        seats = {f"{one.service.facts.name}/{one.member.id}": one.tenancy.gpus for one in self._all()}
        for key in self._seats.keys() - seats.keys():
            self._left_at |= dict.fromkeys(self._seats[key], now)
        self._seats = seats

    def _stock(self, now: float) -> tuple[dict[str, tuple[Tenant, _One]], dict[str, Need]]:
        """All replicas that share, and what is wanted of their models."""
        tenants: dict[str, tuple[Tenant, _One]] = {}
        needs: dict[str, Need] = {}
        for service in self._services():
            self._take_stock(service, now, tenants, needs)
        return tenants, needs

    def _take_stock(
        self, service: Service, now: float, tenants: dict[str, tuple[Tenant, _One]], needs: dict[str, Need]
    ) -> None:
        """Adds the service's replicas that share, and what is wanted of its model."""
        name, settings = service.facts.name, service.settings
        available = service.fleet.available()
        waiting, oldest, awake, shares = service.admission.queue_depth, service.admission.oldest(), 0, False
        for one in self._of(service):
            member, tenancy = one.member, one.tenancy
            model, stage = name, _stage(tenancy)
            if stage is not Stage.DOZING:
                if member in available:
                    awake += 1
                else:  # it has its GPUs, and does not serve
                    model = f"{name}, not in service: {member.name}"
            elif member.is_leaving:
                if not member.generating:
                    continue
                model = f"{name}, leaving: {member.name}"
                needs[model] = Need(member.generating, tenancy.away_since, AHEAD)
            elif now < tenancy.retry_at or not member.is_resting:
                continue
            elif member.generating:
                waiting += member.generating
                oldest = min(oldest, tenancy.away_since)
            shares = True
            left = math.inf if tenancy.usual is None else tenancy.usual
            key = f"{name}/{member.id}"
            tenant = Tenant(key, model, tenancy.gpus, stage, tenancy.since, member.generating, left)
            tenants[key] = tenant, one
        if shares:
            if awake < settings.min_awake and not waiting:
                waiting, oldest = 1, now
            needs[name] = Need(waiting, oldest, settings.priority, settings.min_awake)

    def _of(self, service: Service) -> Iterable[_One]:
        for member in service.fleet.members.values():
            tenancy = member.tenancy
            if tenancy is not None and not tenancy.is_lost and not member.alias_of and not member.is_hidden:
                yield _One(service, member, tenancy)

    def _all(self) -> Iterable[_One]:
        return [one for service in self._services() for one in self._of(service)]

    # What they are told

    def _swap(self, swap: Swap, ones: dict[str, _One]) -> None:
        wakes, doze = ones[swap.wake], [ones[id] for id in swap.doze]
        for one in doze:
            one.service.fleet.moved(one.member, TenantState.DOZING)  # from now on it gets no more requests
        self._begin(self._carry_out(wakes, doze), wakes, *doze)

    def _begin(self, order: Coroutine[Any, Any, object], *ones: _One) -> None:
        for one in ones:
            one.tenancy.told()
        task = asyncio.ensure_future(self._finish(order))
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)

    async def _finish(self, order: Coroutine[Any, Any, object]) -> None:
        try:
            await order
        except Exception:
            log.exception("an order to take turns failed; the replicas are asked how they stand")
        self.look()

    async def _carry_out(self, wakes: _One, doze: list[_One]) -> None:
        began = asyncio.get_running_loop().time()
        try:
            answers = await asyncio.gather(*(self._tell(one, "doze", DOZE) for one in doze))
            if any(said is not None and not said.state.is_away for said in answers):
                return  # it could not, and keeps its turn
            if await self._wake(wakes):
                self.swaps_total += 1
                self._turns.swapped(wakes.tenancy.gpus, asyncio.get_running_loop().time() - began)
        finally:
            wakes.tenancy.is_told = False

    async def _wake(self, one: _One) -> bool:
        """Wakes it; where memory is short, others that doze on its GPUs fall asleep first."""
        clock = asyncio.get_running_loop().time
        is_last = False
        while True:
            is_asleep = one.tenancy.state is TenantState.ASLEEP
            memory = None if is_last or self._is_freeing(one.tenancy.gpus, clock()) else QUICK
            said = await self._tell(one, "wake", WAKE, WITH_WEIGHTS if is_asleep else 0.0, memory)
            if said is not None and said.state is TenantState.AWAKE:
                return True
            if said is None or not said.problem:
                one.tenancy.retry_at = clock() + SOON
                return False
            one.tenancy.told()
            if await self._make_room(one, said.lacks):
                continue
            if memory is None:
                one.tenancy.cannot_wake = said.problem
                one.tenancy.retry_at = clock() + LATER  # making room may have taken minutes
                log.warning("replica %s: %s; nobody else there can give memory back", one.member.name, said.problem)
                return False
            is_last = True  # somebody who is unknown here may give some back

    def _is_freeing(self, gpus: Iterable[str], now: float) -> bool:
        """May the memory of one that is gone be freed soon?"""
        self._note_lost(now)
        return any(now - self._left_at.get(gpu, -math.inf) < FREEING for gpu in gpus)

    async def _make_room(self, one: _One, lacks: Mapping[str, int]) -> bool:
        """Puts others that doze on its GPUs to sleep until they have given back what it lacks.

        Those without requests go first, the longest unused before others. Returns whether any gave something back.
        """
        gave, left = False, dict(lacks)
        for other in sorted(self._all(), key=lambda other: (other.member.generating > 0, other.tenancy.idle_since)):
            tenancy = other.tenancy
            short = {gpu for gpu, size in left.items() if size > 0} or set(one.tenancy.gpus)  # not told: any of them
            if tenancy.state is not TenantState.DOZING or tenancy.is_told or tenancy.is_lost:
                continue
            if not short & set(tenancy.gpus):
                continue
            said = await self._tell(other, "sleep", DOZE + WITH_WEIGHTS)
            if said is None:
                return True  # it is lost, and its memory with it
            if said.state is TenantState.ASLEEP:
                gave = True
                left = {gpu: size - said.weights.get(gpu, 0) for gpu, size in left.items()}
                if max(left.values(), default=0) <= 0:
                    return True
        return gave

    async def _tell(
        self, one: _One, what: str, within: float, more: float = 0.0, memory: float | None = None
    ) -> Said | None:
        """Gives an order and notes what came of it; None if no answer came. `more`, `memory`: see MemberWatch.order."""
        one.tenancy.told()
        try:
            said = await one.service.prober.order(one.member, what, within, more, memory)
        finally:
            one.tenancy.is_told = False
        if said is None:
            one.service.fleet.lost(one.member)
        else:
            one.service.fleet.said(one.member, said)
        return said


def _stage(tenancy: Tenancy) -> Stage:
    if tenancy.is_told or tenancy.state is TenantState.STARTING:
        return Stage.BUSY
    return Stage.AWAKE if tenancy.state is TenantState.AWAKE else Stage.DOZING
