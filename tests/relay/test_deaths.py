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


def test_innocents() -> None:
    """Two kills do not condemn forty requests that were there at both."""
    deaths = Deaths(all_dead)
    died(deaths, 0, *others(40))
    died(deaths, 1, *others(40))
    assert not any(deaths.kills(request, 2) for request in others(40))


def test_alike() -> None:
    """Forty requests that are alike are forty."""
    deaths = Deaths(all_dead)
    died(deaths, 0, *[KILLER] * 40)
    died(deaths, 1, *[KILLER] * 40)
    assert not deaths.kills(KILLER, 2)


def test_in_common() -> None:
    """Of many at each death the one in common is found."""
    deaths = Deaths(all_dead)
    died(deaths, 0, KILLER, *others(40)[:20])
    died(deaths, 1, KILLER, *others(40)[20:])
    assert deaths.kills(KILLER, 2)
    assert not deaths.kills(others(1)[0], 2)


def test_one_death() -> None:
    """One death condemns nobody, however often it is noted."""
    deaths = Deaths(all_dead)
    victim = died(deaths, 0, KILLER)
    deaths.note(victim, KILLER, 0.1)
    assert not deaths.kills(KILLER, 1)


def test_acquitted() -> None:
    """A request that came to its end elsewhere is acquitted."""
    deaths = Deaths(all_dead)
    died(deaths, 0, KILLER)
    deaths.acquit(KILLER)
    died(deaths, 1, KILLER)
    assert not deaths.kills(KILLER, 2)


def test_alive() -> None:
    """A replica that lives after all did not die."""
    alive: set[ReplicaAddress] = set()
    deaths = Deaths(lambda one, _: one in alive)
    first = died(deaths, 0, KILLER)
    died(deaths, 1, KILLER)
    assert deaths.kills(KILLER, 2)
    alive.add(first)
    assert not deaths.kills(KILLER, 2)


def test_bounded() -> None:
    """Deaths are forgotten, and none takes much memory."""
    deaths = Deaths(all_dead)
    died(deaths, 0, KILLER)
    died(deaths, REMEMBERED + 1, KILLER, *others(MOST + 9))
    assert not deaths.kills(KILLER, REMEMBERED + 2)
    assert not deaths.kills(others(MOST + 9)[-1], REMEMBERED + 2)
    assert not deaths, "one is left"


def test_digest() -> None:
    """A request is known by its path and body, whatever the pieces."""
    assert digest_of("/generate", [b"poi", b"son"]) == KILLER
    assert digest_of("/encode", [b"poison"]) != KILLER
