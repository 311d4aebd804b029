"""Which requests pass for killers of replicas: those of two deaths that have hardly anything else in common."""

from balancer.fleet.address import ReplicaAddress
from balancer.relay.deaths import FEW, MOST, REFUSED, REMEMBERED, Deaths, digest_of

KILLER = digest_of("/generate", [b"poison"])


def replica(name: str) -> ReplicaAddress:
    return ReplicaAddress.of(name, "http://127.0.0.1:1")


def others(count: int) -> list[bytes]:
    return [digest_of("/generate", [b"%d" % number]) for number in range(count)]


def died(deaths: Deaths, at: float, *requests: bytes) -> ReplicaAddress:
    victim = replica("a")
    for request in requests:
        deaths.note(victim, request, at)
    return victim


def all_dead(*_: object) -> bool:
    return False


def test_two_deaths_refuse_a_request() -> None:
    """A request that was at two replicas as they died, with few others, is refused for a minute."""
    deaths = Deaths(all_dead)
    died(deaths, 0, KILLER, *others(FEW - 2))
    assert not deaths
    died(deaths, 10, KILLER, *others(FEW - 2))
    assert deaths
    assert deaths.kills(KILLER, 10 + REFUSED - 1)
    assert not deaths.kills(KILLER, 10 + REFUSED)


def test_two_kills_do_not_condemn_forty_innocents() -> None:
    deaths = Deaths(all_dead)
    died(deaths, 0, *others(40))
    died(deaths, 1, *others(40))
    assert not any(deaths.kills(request, 2) for request in others(40))


def test_forty_that_are_alike_are_forty() -> None:
    deaths = Deaths(all_dead)
    died(deaths, 0, *[KILLER] * 40)
    died(deaths, 1, *[KILLER] * 40)
    assert not deaths.kills(KILLER, 2)


def test_of_many_at_each_death_the_one_in_common_is_found() -> None:
    deaths = Deaths(all_dead)
    died(deaths, 0, KILLER, *others(40)[:20])
    died(deaths, 1, KILLER, *others(40)[20:])
    assert deaths.kills(KILLER, 2)
    assert not deaths.kills(others(1)[0], 2)


def test_one_death_condemns_nobody() -> None:
    deaths = Deaths(all_dead)
    victim = died(deaths, 0, KILLER)
    deaths.note(victim, KILLER, 0.1)
    assert not deaths.kills(KILLER, 1)


def test_what_ended_well_elsewhere_is_acquitted() -> None:
    deaths = Deaths(all_dead)
    died(deaths, 0, KILLER)
    deaths.acquit(KILLER)
    died(deaths, 1, KILLER)
    assert not deaths.kills(KILLER, 2)


def test_a_replica_that_lives_after_all_did_not_die() -> None:
    alive: set[ReplicaAddress] = set()
    deaths = Deaths(lambda one, _: one in alive)
    first = died(deaths, 0, KILLER)
    died(deaths, 1, KILLER)
    assert deaths.kills(KILLER, 2)
    alive.add(first)
    assert not deaths.kills(KILLER, 2)


def test_deaths_are_forgotten_and_none_takes_much_memory() -> None:
    deaths = Deaths(all_dead)
    died(deaths, 0, KILLER)
    died(deaths, REMEMBERED + 1, KILLER, *others(MOST + 9))
    assert not deaths.kills(KILLER, REMEMBERED + 2)
    assert not deaths.kills(others(MOST + 9)[-1], REMEMBERED + 2)
    assert not deaths, "one is left"


def test_a_request_is_known_by_path_and_body_whatever_its_pieces() -> None:
    assert digest_of("/generate", [b"poi", b"son"]) == KILLER
    assert digest_of("/encode", [b"poison"]) != KILLER
