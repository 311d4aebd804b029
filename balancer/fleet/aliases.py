"""Which members are one replica at two addresses: its name has an A and an AAAA record, or it is listed twice."""

import ipaddress
from collections.abc import Collection

from balancer.fleet.member import Member, Verdict


def sort_out(members: Collection[Member]) -> None:
    """Says of each member whether it is another's alias, and whether it is hidden: no replica that anybody listed.

    A member that passes with the identity of another is its alias, and gets no requests while that one may be used. DNS
    does not say which two addresses belong together; so where it gives both families, the second one is only shown
    where it passes as somebody else. (Where nobody says who he is: unless there are as many of each family.)
    """
    addresses = [member for member in members if member.listing.is_address_only]
    families = {_family(member) for member in (members if addresses else ())}
    leading = _leading(members) if len(families) > 1 else None
    is_paired = 2 * sum(_family(member) == 6 for member in members) == len(members)
    firsts: dict[str, list[Member]] = {}
    for member in sorted(members, key=lambda member: (leading is not None and _family(member) != leading, member.id)):
        is_passing = member.probe is Verdict.PASSING
        known = firsts.setdefault(member.identity, []) if member.identity else []
        member.alias_of = next(
            (
                first.name
                for first in known
                if _is_same(first, member) and (first.probe is Verdict.PASSING or first.is_leaving or not is_passing)
            ),
            "",
        )
        if member.identity and not member.alias_of:
            known.append(member)
        is_own = is_passing and (member.identity or not is_paired)
        is_second = leading is not None and _family(member) != leading and not is_own
        member.is_hidden = member.listing.is_address_only and (is_second or bool(member.alias_of))


def _leading(members: Collection[Member]) -> int:
    """The family in which replicas answer; IPv4 where both do, or none yet."""
    working = {_family(member) for member in members if member.has_passed}
    return 6 if 6 in working and 4 not in working else 4


def _family(member: Member) -> int:
    return 6 if ":" in member.host else 4


def _is_same(first: Member, other: Member) -> bool:
    """Does one identity mean one process? A seed alone may be given to many; with the time its start took it is not."""
    if first.url == other.url:
        return False  # whoever lists one address under two names means it
    if " " in (first.identity or ""):
        return True
    if first.port != other.port:
        return False
    if first.listing.is_address_only or other.listing.is_address_only:
        return _family(first) != _family(other)
    return _is_loopback(first.host) and _is_loopback(other.host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
