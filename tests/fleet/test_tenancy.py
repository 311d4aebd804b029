"""What the fleet knows of replicas that share their GPUs."""

import asyncio
from pathlib import Path

import pytest

from balancer.contract.words import Status
from balancer.fleet.fleet import Fleet
from balancer.fleet.tenancy import Said, Tenancy, TenantState
from tests.fleet.watched import INTERVAL, until_status, watched
from tests.lab.replica import LabReplica
from tests.lab.tenant import Seat
from tests.support.fleets import Clock, claimed, fleet_of
from tests.support.until import until

AWAKE, DOZING, ASLEEP = TenantState.AWAKE, TenantState.DOZING, TenantState.ASLEEP
GPUS = ("GPU-a",)


def sharing(clock: Clock, state: TenantState = AWAKE) -> Fleet:
    fleet = fleet_of(1, clock)
    fleet.said(fleet.members[1], Said(state, GPUS))
    return fleet


def test_dozing_is_no_failure() -> None:
    """Whatever its probes say, one that dozes is DOZING; it gets no requests, and can be woken for them."""
    clock = Clock()
    fleet = sharing(clock)
    member = fleet.members[1]
    fleet.moved(member, DOZING)
    member.refusing = True
    member.service.surely_failed(clock())
    clock.move(10_000)
    assert member.status(clock()) is Status.DOZING
    assert (fleet.available(), fleet.resting(), fleet.can_wake()) == ([], [member], True)
    fleet.moved(member, ASLEEP)
    assert member.status(clock()) is Status.ASLEEP
    fleet.moved(member, AWAKE)
    # The failure before counts no more than it did then: its time stood still.
    assert member.status(clock()) is Status.NOT_READY


def test_lost() -> None:
    """One that does not answer is not dozing any more, until it says so again."""
    clock = Clock()
    fleet = sharing(clock, DOZING)
    member = fleet.members[1]
    fleet.lost(member)
    member.ready.surely_failed(clock())
    assert member.status(clock()) is Status.NOT_READY
    fleet.said(member, Said(DOZING, GPUS))
    assert member.status(clock()) is Status.DOZING


def test_orders_before_answers() -> None:
    """What it says while it is told to change counts for nothing: it may have been said before."""
    clock = Clock()
    fleet = sharing(clock)
    member = fleet.members[1]
    assert member.tenancy is not None
    fleet.moved(member, DOZING)
    member.tenancy.told()
    fleet.said(member, Said(AWAKE, GPUS))
    assert member.status(clock()) is Status.DOZING


def test_doze_forgets_prefixes() -> None:
    clock = Clock()
    fleet = sharing(clock)
    told: list[str] = []
    fleet.when_dozed.append(lambda member: told.append(member.name))
    for state in (DOZING, ASLEEP, AWAKE, DOZING):
        fleet.moved(fleet.members[1], state)
    assert told == ["r1", "r1"]


def test_absences() -> None:
    """Absences add up, and an answer's usual time is without them."""
    clock = Clock()
    fleet = sharing(clock)
    member, tenancy = fleet.members[1], fleet.members[1].tenancy
    assert tenancy is not None
    with claimed(fleet):
        clock.move(1)
        for away in (10, 20):
            fleet.moved(member, DOZING)
            clock.move(away)
            fleet.moved(member, AWAKE)
        clock.move(2)
    assert (tenancy.away(clock()), tenancy.wakes, tenancy.usual) == (30, 2, 3)
    assert [round(end - began) for began, end in tenancy.turns(clock())] == [1, 0, 2]
    clock.move(2000)
    assert len(tenancy.turns(clock())) == 1


@pytest.mark.parametrize(
    "body",
    [{}, {"state": "BROKEN", "gpus": ["a"]}, {"state": "AWAKE"}, {"state": "AWAKE", "gpus": [1]}, {"state": 1}],
)
def test_other_answers(body: dict[str, object]) -> None:
    """What is no answer of a replica that shares is not taken for one."""
    assert Said.of(body) is None


def test_what_keeps_it() -> None:
    """Who starts on its GPU, and what it lacks, is shown as the reason."""
    others = [{"state": "DOZING", "note": "x"}, {"state": "STARTING", "note": "llava on port 1"}]
    said = Said.of({"state": "DOZING", "gpus": ["GPU-a"], "for": 2.5, "problem": None, "others": others})
    assert said == Said(DOZING, GPUS, 2.5, "", "llava on port 1")
    clock = Clock()
    fleet = sharing(clock)
    fleet.said(fleet.members[1], said)
    assert fleet.members[1].trouble(clock()) == "its GPU is taken until llava on port 1 has started"
    assert Tenancy(GPUS, DOZING, 0.0, problem="it cannot wake").why_away == "it cannot wake"


def test_heartbeat(tmp_path: Path) -> None:
    """A replica that shares hears its balancer, is asked for no token while it dozes, and found dead at once."""

    async def play() -> None:
        async with LabReplica(seat=Seat(tmp_path)) as replica, watched(replica) as fleet:
            await until_status(fleet, 1, Status.READY)
            assert replica.sharing is not None
            tenant = replica.sharing.tenant
            await until(lambda: tenant.is_ordered, "it hears the balancer")
            assert await tenant.order(tenant.state.DOZING, 10)
            await until_status(fleet, 1, Status.DOZING)
            probes = [probe.target for probe in replica.seen.probes]
            await asyncio.sleep(10 * INTERVAL)
            later = [probe.target for probe in replica.seen.probes][len(probes) :]
            assert set(later) == {"/lease"}
            replica.fall()
            await until_status(fleet, 1, Status.NOT_READY)

    asyncio.run(play())
