"""Which members are the same replica at two addresses: its name has A and AAAA records, or it is listed twice."""

import ipaddress
from collections.abc import Collection

from balancer.fleet.member import Member, Verdict


def sort_out(members: Collection[Member]) -> None:
    """Decides whether each member is an alias of another one, and whether it is hidden: not a replica of its own.

    A member that passes with the identity of another one is its alias, and gets no requests while that one can be used.
    DNS does not say which addresses belong together. So where it returns both IPv4 and IPv6, members of the second
    family are only shown if they pass with an identity of their own. (Replicas that report no identity: if the two
    families have different numbers of members.)
    """
    addresses = [member for member in members if member.listing.is_address_only]
    families = {_family(member) for member in (members if addresses else ())}
    leading = _leading(members) if len(families) > 1 else None
    is_paired = 2 * sum(_family(member) == 6 for member in members) == len(members)
    firsts: dict[tuple[str, int | None], list[tuple[_Kind, Member]]] = {}
    for member in sorted(members, key=lambda member: (leading is not None and _family(member) != leading, member.id)):
        is_passing = member.probe is Verdict.PASSING
        place = (member.identity or "", None if _is_unique(member.identity) else member.port)
        known = firsts.setdefault(place, []) if member.identity else []
        member.alias_of = next(
            (
                first.name
                for _, first in known
                if _is_same(first, member) and (first.probe is Verdict.PASSING or first.is_leaving or not is_passing)
            ),
            "",
        )
        if member.identity and not member.alias_of:
            _remember(known, member)
        is_own = is_passing and (member.identity or not is_paired)
        is_second = leading is not None and _family(member) != leading and not is_own
        member.is_hidden = member.listing.is_address_only and (is_second or bool(member.alias_of))


# By what, beside its URL, `sort_out` tells one possible first of an alias from another.
_Kind = tuple[bool, int, bool, bool]


def _remember(known: list[tuple[_Kind, Member]], member: Member) -> None:
    """Adds a member to those that others may be aliases of, unless earlier ones always take precedence over it.

    That is so once there are two of its kind with different URLs. So the list stays short, and a thousand replicas with
    one seed are not compared each with each.
    """
    may_be_first = member.probe is Verdict.PASSING or member.is_leaving
    kind = (member.listing.is_address_only, _family(member), _is_loopback(member.host), may_be_first)
    alike = [first.url for other, first in known if other == kind]
    if len(alike) < 2 and member.url not in alike:
        known.append((kind, member))


def _leading(members: Collection[Member]) -> int:
    """The address family in which replicas answer; IPv4 if both do, or neither yet."""
    working = {_family(member) for member in members if member.has_passed}
    return 6 if 6 in working and 4 not in working else 4


def _family(member: Member) -> int:
    return 6 if ":" in member.host else 4


def _is_same(first: Member, other: Member) -> bool:
    """Does the same identity mean the same process? Replicas may share a seed, but do not also start equally fast."""
    if first.url == other.url:
        return False  # one address under two names is deliberate
    if _is_unique(first.identity):
        return True
    if first.port != other.port:
        return False
    if first.listing.is_address_only or other.listing.is_address_only:
        return _family(first) != _family(other)
    return _is_loopback(first.host) and _is_loopback(other.host)


def _is_unique(identity: str | None) -> bool:
    """Does it tell how long the start took, beside the seed?"""
    return " " in (identity or "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
