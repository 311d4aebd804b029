"""Which replica keeps which answer of /v1/responses, for the requests that build on it, ask for it or cancel it."""

import json
import re
from collections import OrderedDict
from typing import Final, Protocol

from balancer.accounts.ledger import Ledger
from balancer.accounts.store import Keeper
from balancer.fleet.address import ReplicaAddress
from balancer.observe.record import Record, RequestObserver
from balancer.relay.answer_relay import AnswerRelay
from balancer.relay.downstream import ClientConnection
from balancer.relay.places import Place
from balancer.relay.reply import Reply
from balancer.relay.request import Request
from balancer.relay.requested_model import fields_in_json

RESPONSES: Final = "/v1/responses"
MOST = 100_000  # answers remembered: the ones used last
BEGINNING = 4 << 10  # bytes of an answer in which its id stands
_ID = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_-]{1,128})"')
_PATH = re.compile(r"/v1/responses/(resp_[A-Za-z0-9_-]{1,128})(/cancel)?")
FIELD = "previous_response_id"
_QUOTED = b'"previous_response_id"'
_ESCAPED = re.compile(rb"\\u00[567]")  # begins every escaped letter of that name, and few escapes of text
UNREADABLE: Final = "?"  # stands for an id that is no text, or lies beyond what is looked through


class Hearers(Protocol):
    """Others who get requests that build on these answers."""

    def learned(self, id_: str, replica: ReplicaAddress, key: str) -> None: ...


class Noted:
    """Implements Hearers: notes them for the processes that come after this one."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def learned(self, id_: str, replica: ReplicaAddress, key: str) -> None:
        self._ledger.note_answer(id_, Keeper(replica.name, replica.authority.decode("latin-1"), key))


class KeptResponses:
    """The replicas by the ids of their answers. Each belongs to the issue of the key that it was made with (`key`).

    What is learned here is told to the `hearers`, if there are any; `is_heard` says that it came from one of them.
    """

    def __init__(self, hearers: Hearers | None = None) -> None:
        self._hearers = hearers
        self._known: OrderedDict[str, tuple[ReplicaAddress, str]] = OrderedDict()

    def learn(self, id_: str, replica: ReplicaAddress, key: str, is_heard: bool = False) -> None:
        """Clients may choose an answer's id: another key's answer stays that key's."""
        if (known := self._known.get(id_)) is not None and known[1] != key:
            return
        if self._hearers is not None and not is_heard:
            self._hearers.learned(id_, replica, key)
        self._known[id_] = replica, key
        if len(self._known) > MOST:
            self._known.popitem(last=False)

    def keeper(self, id_: str, key: str) -> ReplicaAddress | None:
        """The replica that has it, if it was made with this key."""
        known = self._known.get(id_)
        if known is None or known[1] != key:
            return None
        self._known.move_to_end(id_)
        return known[0]

    def all(self) -> list[tuple[str, ReplicaAddress, str]]:
        """Id, replica and key of each, the ones used last at the end."""
        return [(id_, replica, key) for id_, (replica, key) in self._known.items()]

    def known(self, id_: str) -> tuple[ReplicaAddress, str] | None:
        """The replica that has it, and the key that it was made with; None if that is unknown."""
        return self._known.get(id_)

    def forget(self, replica: ReplicaAddress) -> None:
        """The replica left, and what it kept with it."""
        for id_ in [id_ for id_, (keeper, _) in self._known.items() if keeper is replica]:
            del self._known[id_]


class ResponseRelay(AnswerRelay):
    """Relays an answer of /v1/responses, and notes by its first bytes who keeps it: the next request may come soon."""

    __slots__ = ("_kept",)

    def __init__(
        self,
        place: Place,
        request: Request,
        reply: Reply,
        record: Record,
        client: ClientConnection,
        observer: RequestObserver,
        most_kept: int,
        kept: KeptResponses,
    ) -> None:
        super().__init__(place, request, reply, record, client, observer, most_kept)
        self._kept = kept

    def on_body(self, data: bytes, now: float) -> None:
        if self._record.first_byte is None and (found := _ID.search(data, 0, BEGINNING)):
            self._kept.learn(found[1].decode(), self._place.replica, self._request.issue)
        super().on_body(data, now)


def kept_id(request: Request) -> str:
    """The id of the answer that a request is about or builds on; empty if there is none.

    Its body is looked through only once.
    """
    if request.kept_id is None:
        request.kept_id = _kept_id(request)
    return request.kept_id


def _kept_id(request: Request) -> str:
    if found := _PATH.fullmatch(request.path):
        return found[1]
    if request.path != RESPONSES:
        return ""
    body = request.body[0] if len(request.body) == 1 else b"".join(request.body)
    if b"\0" in body[:4]:  # a replica reads UTF-16 and UTF-32 too
        try:
            body = body.decode(json.detect_encoding(body)).encode()
        except UnicodeError:  # to replace what is wrong takes seconds where much is
            return UNREADABLE
    if _QUOTED not in body and _ESCAPED.search(body) is None:
        return ""
    named = [*fields_in_json(body, (FIELD,))]
    last = named[-1] if named else None  # which a replica takes
    if last is None:
        return ""
    return last if isinstance(last, str) else UNREADABLE
