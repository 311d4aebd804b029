"""What relays and the coordinator tell each other: the kinds of messages, and how what they carry is written.

A message is a list: its kind, then what the kind's comment names.
"""

import enum
from collections.abc import Hashable
from operator import attrgetter
from typing import Any

from balancer.errors import ServeError
from balancer.observe.record import Record
from balancer.routing.admission import Waiter
from balancer.routing.ranked_queue import Bulk


class Asked(enum.IntEnum):
    """What a relay says. `call` is a number that the answer repeats."""

    HELLO = 0  # places that it holds: [id, service, replica's name, URL, is generating], its entries
    CLAIM = 1  # id of the place, service, flags, owner, arrival; unless all are None: blocks, again, name
    #            and URL of the only replica
    LEAVE = 2  # id: the client left while it waited
    BEGUN = 3  # id, is computed
    END = 4  # id, outcome or None, status, full for, prompt tokens, cached tokens, texts
    MAY_GO_ON = 5  # call, service, is generating, again
    DOUBTED = 6  # id
    CONTINUES = 7  # call, id
    OWN_PATH = 8  # call, method, target, version, path, host, fields
    ENTER = 9  # call, name of the key
    LEFT = 10  # the call that entered
    TAKE = 11  # call, name of the key, bytes of the prompt, most tokens of the answer
    DIED = 12  # service, the replica's name and Host field, digest, when, identifier
    ACQUITTED = 13  # service, digest
    USED = 14  # records of requests whose use is kept
    SEEN = 15  # what it counted and saw since it last told, as a mapping
    ACCEPTING = 16  # nothing: it has opened its doors
    KEPT = 17  # service, number of the replica, id of an answer that it keeps, issue of the key
    KEEPS = 19  # service, the same three of each answer; by a relay that heard of them before this coordinator
    KEEPER = 18  # call, id of an answer of which the relay knows nothing


# Each of these waits for an answer.
QUESTIONS = frozenset(
    (Asked.CLAIM, Asked.MAY_GO_ON, Asked.CONTINUES, Asked.OWN_PATH, Asked.ENTER, Asked.TAKE, Asked.KEEPER)
)

# Flags of a claim
GENERATING, WAITED_FOR, STREAMED = 1, 2, 4


class Told(enum.IntEnum):
    """What the coordinator says."""

    PLACE = 0  # id, number of the replica, reason, matched, waited, number of the claim, wants begun
    REFUSED = 1  # id, error
    ANSWER = 2  # call, value
    ERROR = 3  # call, error
    REPLICA = 4  # number, service, name, URL, and the facts that change: alive at, last byte at, passed at,
    #              is passing or None (not asked yet), away before, away since or None, is resting, is leaving,
    #              its reasoning parser
    GONE = 5  # number of the replica
    SERVICE = 6  # name, state as a mapping; it says whether all its replicas were told
    PARTED = 7  # name
    KEYS = 8  # are wanted, issued keys: [name, digest, terms, issue]
    DIED = 9  # service, the replica's name and Host field, digest, when, identifier
    ACQUITTED = 10  # service, digest
    ORIGINS = 11  # connections of clients at other relays
    KEPT = 13  # service, number of the replica, id of an answer that it keeps, issue of the key
    ALL = 12  # nothing: all that the coordinator knows was told


# Owners: the names of keys, with or without bulk priority, and the addresses of clients


def owner_text(owner: Hashable) -> str:
    if isinstance(owner, bytes):
        return "c" + owner.decode("latin-1")
    return f"b{owner}" if isinstance(owner, Bulk) else f"k{owner}"


def owner_of(text: str) -> str | bytes:
    kind, rest = text[0], text[1:]
    return rest.encode("latin-1") if kind == "c" else Bulk(rest) if kind == "b" else rest


# What a waiter has been through. Replicas have names and URLs here: numbers are those of one coordinator only, and
# a question is asked again should that be restarted.

Again = list[Any]


def again_of(waiter: Waiter, tried: list[tuple[str, str]]) -> Again | None:
    """None for one that is new."""
    if not (waiter.tried or waiter.rounds or waiter.waited or waiter.number):
        return None
    return [tried, waiter.waited, waiter.held_until, waiter.rounds, waiter.number, waiter.full_for]


def restore(waiter: Waiter, again: Again) -> None:
    """Everything but the members that it has tried, which each side knows differently."""
    _, waiter.waited, waiter.held_until, waiter.rounds, waiter.number, waiter.full_for = again


# Errors


def error_fields(error: ServeError) -> list[Any]:
    return [error.status, error.code, error.message, error.kind, error.retry_after, error.closes, error.allow]


def error_of(fields: list[Any]) -> ServeError:
    status, code, message, kind, retry_after, closes, allow = fields
    return ServeError(status, code, message, kind=kind, retry_after=retry_after, closes=closes, allow=allow)


# Records

_NAMES = [name for name in Record.__dataclass_fields__ if name != "trace"]  # traces are the relays' own
record_fields = attrgetter(*_NAMES)


def record_of(fields: list[Any]) -> Record:
    said = dict(zip(_NAMES, fields, strict=True))
    record = Record(said["id"], said["method"], said["path"], said["received_at"])
    for name, value in said.items():
        setattr(record, name, tuple(value) if name == "retries" else value)
    return record
