"""Which model's replica has a shared GPU now: which one dozes and which wakes instead. Pure; the clock is passed in.

Replicas that share a GPU keep their weights there and take turns with the rest of its memory. A swap costs a fraction
of a second and the dozing replica's cached prefixes, so a turn lasts a while though others wait. Three rules decide:

- A model with requests and no replica awake gets a GPU: a free one, else an idle replica's, else that of a replica
  whose turn is over.
- A turn is over after its slice: at least `gpu_slice`, longer if its model has more requests or a higher priority than
  the one that waits, and long enough that swaps take less than `swap_share` of the time. Running answers that can end
  within `max_turn_over` more may do so; longer ones are interrupted and go on in the next turn.
- The highest priority goes first, then the model that has waited longest; but a model that was passed over often enough
  goes before all.

So no model waits longer than `Turns.bound` if nothing starts, nothing is pinned and swaps take no longer than they did.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

# Need and priority make a turn at most _LONGEST times `gpu_slice`. A lead in priority counts for at most _STEPS.
_LONGEST = 4.0
_STEPS = 3
# The weight of the newest swap in the estimated cost of a swap.
_NEWEST = 0.3


class Stage(Enum):
    AWAKE = auto()
    # Falling asleep, waking or starting: it has its GPUs, and cannot be asked for them.
    BUSY = auto()
    # Can be woken.
    DOZING = auto()


@dataclass(frozen=True, slots=True)
class Tenant:
    """A replica that shares its GPUs. `since`: when it entered its stage, by the clock that `decide` is given."""

    id: str
    model: str
    gpus: tuple[str, ...]
    stage: Stage
    since: float
    in_flight: int = 0
    # Estimated seconds until it has answered the requests in flight.
    seconds_left: float = math.inf


@dataclass(frozen=True, slots=True)
class Need:
    """The demand for a model. `waiting`: requests at no replica or a dozing one; `oldest`: when the first came."""

    waiting: int = 0
    oldest: float = math.inf
    priority: int = 0
    # At least this many of its replicas stay awake.
    min_awake: int = 0


@dataclass(frozen=True, slots=True)
class Swap:
    """`wake` gets the GPUs of those in `doze`, which must doze first; there are none if its GPUs are free."""

    wake: str
    doze: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """Times in seconds."""

    gpu_slice: float = 2.0
    max_turn_over: float = 1.0
    swap_share: float = 0.1


class Turns:
    """Remembers what swaps cost, and how often each model was passed over."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        # In how many seconds the next swap is due, if nothing else changes; inf: none.
        self.due_in = math.inf
        self._cost: dict[str, float] = {}  # seconds that recent swaps took on each GPU
        self._passed: dict[str, int] = {}  # by waiting model: turns given to others on GPUs that it could use

    def swapped(self, gpus: Iterable[str], seconds: float) -> None:
        """A swap took that long, including the prompts that had to be computed again."""
        for gpu in gpus:
            known = self._cost.get(gpu, seconds)
            self._cost[gpu] = known + _NEWEST * (seconds - known)

    def decide(self, now: float, tenants: Sequence[Tenant], needs: Mapping[str, Need]) -> list[Swap]:
        """The swaps to begin now. Until a swap is done, pass its tenants as BUSY."""
        self.due_in = math.inf
        holders = _holders(tenants)
        pinned = _pinned(tenants, needs)
        claimed: set[str] = set()
        swaps: list[Swap] = []
        for model in self._in_order(now, tenants, needs):
            swap = self._for(now, model, tenants, needs, holders, pinned, claimed)
            if swap is not None:
                swaps.append(swap)
        self._count(swaps, tenants, needs)
        return swaps

    def slice(self, holder: Tenant, needs: Mapping[str, Need], waits: str) -> float:
        """The minimum length of the holder's turn while that model waits, in seconds."""
        mine, other = needs.get(holder.model, Need()), needs.get(waits, Need())
        by_need = (holder.in_flight + mine.waiting) / max(1, other.waiting)
        by_priority = 2.0 ** max(-_STEPS, min(mine.priority - other.priority, _STEPS))
        longer = min(_LONGEST, max(1.0, by_need * by_priority))
        return max(self.rules.gpu_slice * longer, self._least(holder.gpus))

    def bound(self, rivals: int, longest_swap: float, steps: int = _STEPS) -> float:
        """The maximum wait of a model for a GPU that `rivals` others want too, in seconds.

        `steps`: by how much the highest priority among those exceeds its own.
        """
        share = self.rules.swap_share
        turn = max(_LONGEST * self.rules.gpu_slice, longest_swap * (1 - share) / share)
        turns = rivals + 1 + (_limit(rivals, steps) if steps else 0)
        return turns * (turn + self.rules.max_turn_over + longest_swap)

    def expected(self, now: float, model: str, tenants: Sequence[Tenant], needs: Mapping[str, Need]) -> float:
        """In how many seconds the model will have its turn, if nothing else changes; inf if its GPUs are pinned.

        What remains of the present turn counts, and a turn for each model that goes before it on the same GPUs.
        """
        needs = dict(needs) | {
            model: replace(needs.get(model, Need()), waiting=max(1, needs.get(model, Need()).waiting))
        }
        holders, pinned = _holders(tenants), _pinned(tenants, needs)
        order = self._in_order(now, tenants, needs)
        before = order[: order.index(model)] if model in order else order
        up = {tenant.model for tenant in tenants if tenant.stage is not Stage.DOZING}
        soonest = math.inf
        for tenant in tenants:
            if tenant.model != model or tenant.stage is not Stage.DOZING:
                continue
            gpus = set(tenant.gpus)
            in_the_way = [holder for gpu in gpus if (holder := holders.get(gpu)) is not None]
            if any(holder.id in pinned for holder in in_the_way):
                continue
            busy = any(holder.stage is Stage.BUSY for holder in in_the_way)
            left = max((self._left(now, holder, needs, model) for holder in in_the_way), default=0.0)
            rivals = [
                one for one in before if one not in up and any(gpus & set(t.gpus) for t in tenants if t.model == one)
            ]
            turns = sum(self.slice(replace(tenant, model=rival, in_flight=0), needs, model) for rival in rivals)
            least = max(self.rules.gpu_slice, self._least(gpus)) if busy else left
            soonest = min(soonest, least + turns)
        return soonest

    def _least(self, gpus: Iterable[str]) -> float:
        """The shortest turn whose swap takes no more than `swap_share` of swap and turn together."""
        cost = max((self._cost.get(gpu, 0.0) for gpu in gpus), default=0.0)
        return cost * (1 - self.rules.swap_share) / self.rules.swap_share

    def _in_order(self, now: float, tenants: Sequence[Tenant], needs: Mapping[str, Need]) -> list[str]:
        """The models that want a turn: those with no replica awake first."""
        here = {tenant.model for tenant in tenants}
        up = {tenant.model for tenant in tenants if tenant.stage is not Stage.DOZING}
        wanting = [model for model, need in needs.items() if model in here and need.waiting]

        def rank(model: str) -> tuple[bool, bool, float, float]:
            need = needs[model]
            rivals = len(here) - 1
            is_overdue = self._passed.get(model, 0) >= _limit(rivals, _steps(model, needs))
            return model in up, not is_overdue, -need.priority if not is_overdue else 0.0, need.oldest - now

        return sorted(wanting, key=rank)

    def _for(
        self,
        now: float,
        model: str,
        tenants: Sequence[Tenant],
        needs: Mapping[str, Need],
        holders: Mapping[str, Tenant],
        pinned: set[str],
        claimed: set[str],
    ) -> Swap | None:
        """Wakes the best of the model's replicas, if one can be woken now; else claims the GPUs that it gets next.

        GPUs claimed for one model do not go to any model after it in the order.
        """
        if any(tenant.model == model and tenant.stage is Stage.BUSY for tenant in tenants):
            return None  # its turn is about to begin
        is_more = any(tenant.model == model and tenant.stage is Stage.AWAKE for tenant in tenants)
        best: tuple[float, Tenant, list[Tenant]] | None = None
        for tenant in tenants:
            if tenant.model != model or tenant.stage is not Stage.DOZING or claimed & set(tenant.gpus):
                continue
            in_the_way = {holder.id: holder for gpu in tenant.gpus if (holder := holders.get(gpu)) is not None}
            if any(holder.id in pinned or holder.stage is Stage.BUSY for holder in in_the_way.values()):
                continue
            if is_more and not all(self._wants_less(holder, needs, model) for holder in in_the_way.values()):
                continue
            wait = max((self._left(now, holder, needs, model) for holder in in_the_way.values()), default=0.0)
            if best is None or wait < best[0]:
                best = wait, tenant, list(in_the_way.values())
        if best is None:
            return None
        wait, wakes, doze = best
        claimed |= set(wakes.gpus)
        if wait > 0:
            self.due_in = min(self.due_in, wait)
            return None
        claimed |= {gpu for holder in doze for gpu in holder.gpus}  # its other GPUs are free once it dozes
        return Swap(wakes.id, tuple(holder.id for holder in doze))

    def _left(self, now: float, holder: Tenant, needs: Mapping[str, Need], waits: str) -> float:
        """Seconds until the holder can be asked for its GPUs; 0 if it can be asked now."""
        if not holder.in_flight and not needs.get(holder.model, Need()).waiting:
            return 0.0
        over = now - holder.since - self.slice(holder, needs, waits)
        if over < 0:
            return -over
        left = self.rules.max_turn_over - over
        return max(0.0, left) if holder.in_flight and holder.seconds_left <= left else 0.0

    def _wants_less(self, holder: Tenant, needs: Mapping[str, Need], model: str) -> bool:
        """May a model that is awake elsewhere have this holder's GPU, too?"""
        mine = needs.get(holder.model, Need())
        if mine.priority > needs[model].priority:
            return False
        return 2 * (holder.in_flight + mine.waiting) <= needs[model].waiting

    def _count(self, swaps: Sequence[Swap], tenants: Sequence[Tenant], needs: Mapping[str, Need]) -> None:
        known = {tenant.id: tenant for tenant in tenants}
        woken = {known[swap.wake].model for swap in swaps}
        taken = {gpu for swap in swaps for gpu in known[swap.wake].gpus}
        up = {tenant.model for tenant in tenants if tenant.stage is not Stage.DOZING} | woken
        for model in list(self._passed):
            if model in up or not needs.get(model, Need()).waiting:
                del self._passed[model]
        for model in {tenant.model for tenant in tenants if taken & set(tenant.gpus)} - up:
            if needs.get(model, Need()).waiting:
                self._passed[model] = self._passed.get(model, 0) + 1


def _holders(tenants: Sequence[Tenant]) -> dict[str, Tenant]:
    """Who has each GPU."""
    # Where one is awake and another is about to be, nobody else may ask for the GPU: who is BUSY stands for both.
    up = sorted((one for one in tenants if one.stage is not Stage.DOZING), key=lambda one: one.stage is Stage.BUSY)
    return {gpu: tenant for tenant in up for gpu in tenant.gpus}


def _pinned(tenants: Sequence[Tenant], needs: Mapping[str, Need]) -> set[str]:
    """The replicas that may not doze, so that `min_awake` of their model stay awake."""
    pinned: set[str] = set()
    for model, need in needs.items():
        up = sorted(tenant.id for tenant in tenants if tenant.model == model and tenant.stage is not Stage.DOZING)
        pinned |= set(up[: need.min_awake])
    return pinned


def _steps(model: str, needs: Mapping[str, Need]) -> int:
    highest = max(need.priority for need in needs.values())
    return min(_STEPS, max(0, highest - needs[model].priority))


def _limit(rivals: int, steps: int) -> int:
    """How many turns others may have before a waiting model goes before all."""
    return max(1, rivals) * (1 + steps)
