"""Which replica keeps which answer of /v1/responses, for the requests that build on it, ask for it or cancel it."""

import re
from collections import OrderedDict
from typing import Protocol

from balancer.fleet.address import ReplicaAddress
from balancer.observe.record import Record, RequestObserver
from balancer.relay.answer_relay import AnswerRelay
from balancer.relay.downstream import ClientConnection
from balancer.relay.places import Place
from balancer.relay.reply import Reply
from balancer.relay.request import Request
from balancer.relay.requested_model import fields_in_json

RESPONSES = "/v1/responses"
MOST = 100_000  # answers remembered: the ones used last
BEGINNING = 4 << 10  # bytes of an answer in which its id stands
_ID = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_-]{1,128})"')
_PATH = re.compile(r"/v1/responses/(resp_[A-Za-z0-9_-]{1,128})(/cancel)?")
FIELD = "previous_response_id"
_QUOTED = b'"previous_response_id"'


class Hearers(Protocol):
    """Others who get requests that build on these answers."""

    def learned(self, id_: str, replica: ReplicaAddress, key: str) -> None: ...


class KeptResponses:
    """The replicas by the ids of their answers. Each belongs to the key that it was made with.

    What is learned here is told to the `hearers`, if there are any; `is_heard` says that it came from one of them.
    """

    def __init__(self, hearers: Hearers | None = None) -> None:
        self._hearers = hearers
        self._known: OrderedDict[str, tuple[ReplicaAddress, str]] = OrderedDict()

    def learn(self, id_: str, replica: ReplicaAddress, key: str, is_heard: bool = False) -> None:
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
            key = self._request.key
            self._kept.learn(found[1].decode(), self._place.replica, key.name if key else "")
        super().on_body(data, now)


def kept_id(request: Request) -> str:
    """The id of the answer that a request is about or builds on; empty if there is none."""
    if found := _PATH.fullmatch(request.path):
        return found[1]
    if request.path != RESPONSES:
        return ""
    body = request.body[0] if len(request.body) == 1 else b"".join(request.body)
    if _QUOTED not in body:
        return ""
    names = [name for name in fields_in_json(body, (FIELD,)) if isinstance(name, str)]
    return names[-1] if names else ""
