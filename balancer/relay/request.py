"""One request: checked as the client sent it, and rewritten for a replica."""

import ipaddress
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final
from urllib.parse import unquote_to_bytes

from balancer import errors
from balancer.errors import ServeError
from balancer.fleet.address import ReplicaAddress
from balancer.relay.auth import Key, bearer_token
from balancer.relay.hosts import is_host
from balancer.relay.paths import REALTIME, WAITED_FOR, PathKind, kind_of
from balancer.routing.ranked_queue import Bulk

Headers = list[tuple[bytes, bytes]]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade http2-settings".split()
)
GENERATING_METHODS: Final = (b"POST", b"PUT")  # SGLang takes both for /generate, /encode, /classify and /v1/rerank
_AUTHORITY_ENDS = re.compile(rb"[/?#]")
MAX_FORWARDED = 256  # only this many bytes at the end of X-Forwarded-For are read
MAX_DIGITS: Final = 20  # of the parser's largest Content-Length; it would accept any number of leading zeros
KEY_PROTOCOL = b"openai-insecure-api-key."
_MODEL = re.compile(rb"[?&]model=([^&]{1,512})")
REQUEST_ID = re.compile(rb"[\w.-]{1,128}")
# The Via field for a request, by its HTTP version (RFC 9110 section 7.6.3).
VIA: Final = {"1.0": b"1.0 groundserve", "1.1": b"1.1 groundserve"}
# Fields that describe the original client besides X-Forwarded-For, -Proto and -Host: kept only from trusted proxies.
HEARSAY = frozenset(
    b"forwarded x-real-ip x-client-ip x-cluster-client-ip true-client-ip cf-connecting-ip x-forwarded x-forwarded-by "
    b"x-forwarded-port x-forwarded-prefix x-forwarded-scheme x-forwarded-server x-forwarded-ssl front-end-https "
    b"x-original-host x-original-uri x-original-url x-rewrite-url".split()
)
_START = os.urandom(6).hex().encode()
_count = itertools.count(1)


def _forked() -> None:
    """Requests of processes that have the same parent need identifiers of their own."""
    global _START
    _START = os.urandom(6).hex().encode()


os.register_at_fork(after_in_child=_forked)


def new_request_id() -> bytes:
    """A counter makes it unique in this process, a random prefix drawn at start makes it unique elsewhere."""
    return b"%b-%x" % (_START, next(_count))


@dataclass(slots=True, init=False, eq=False)
class Request:
    """What the relay needs to know about a request. `fields` are the header lines to pass on, with their line ends.

    `__init__` is written out, because mypyc compiles that, and not what `dataclass` makes.
    """

    method: bytes
    target: bytes
    version: str
    received_at: float
    body: list[bytes]
    id: bytes
    path: str
    kind: PathKind
    host: bytes
    fields: bytes
    credentials: tuple[bytes, ...]  # all that it carries, each as the value of an Authorization field
    authorization: bytes  # the one that is passed on, where the replica has no key of its own
    origin: bytes
    fetch_site: bytes  # Sec-Fetch-Site: how the browser relates the page that sent it to this site
    asks_for_method: bool  # has Access-Control-Request-Method, as a CORS preflight does
    is_from_proxy: bool  # from a trusted proxy
    length: int | None
    is_chunked: bool
    expects_continue: bool
    keeps_alive: bool
    wants_explanation: bool
    traceparent: bytes  # W3C trace context, as the client sent it
    opens_websocket: bool  # from its answer on, the connection carries WebSocket frames
    model: bytes  # as named by the X-Model field or a WebSocket's query; most requests name it in the body
    key: Key | None
    client: bytes  # its IPv4 address or IPv6 /64, packed
    address: bytes  # the client's whole address, as text
    body_size: int
    held: int  # bytes that it adds to the total of buffered bytes over all requests
    kept_id: str | None  # of the answer of /v1/responses that it is about, once somebody has looked
    refusal: ServeError | None

    def __init__(self, method: bytes, target: bytes, version: str, received_at: float, address: bytes = b"") -> None:
        self.method = method
        self.target = target
        self.version = version
        self.received_at = received_at
        self.address = address
        self.body = []
        self.id = b""
        self.path = "/"
        self.kind = PathKind.ADMIN
        self.host = b""
        self.fields = b""
        self.credentials = ()
        self.authorization = b""
        self.origin = b""
        self.fetch_site = b""
        self.asks_for_method = False
        self.is_from_proxy = False
        self.length = None
        self.is_chunked = False
        self.expects_continue = False
        self.keeps_alive = True
        self.wants_explanation = False
        self.traceparent = b""
        self.opens_websocket = False
        self.model = b""
        self.key = None
        self.client = b""
        self.body_size = 0
        self.held = 0
        self.kept_id = None
        self.refusal = None

    @property
    def owner(self) -> str | bytes:
        """The sender for fair sharing: the name of its API key or, without keys, its client."""
        if (key := self.key) is None:
            return self.client
        return Bulk(key.name) if key.is_bulk else key.name

    @property
    def issue(self) -> str:
        """The issue of its API key, to which belongs what is kept for it; empty without a key."""
        return self.key.issue if self.key is not None else ""

    @property
    def is_generating(self) -> bool:
        return self.kind is PathKind.GENERATING and (self.method in GENERATING_METHODS or self.opens_websocket)

    @property
    def is_waited_for(self) -> bool:
        """May it wait for minutes while a replica starts?"""
        return self.path in WAITED_FOR and self.method in GENERATING_METHODS

    def replace_field(self, name: bytes, value: bytes | None) -> None:
        """Passes on this value of a field instead of the client's; None: no such field."""
        lines = [line for line in self.fields.splitlines(keepends=True) if line.partition(b":")[0].lower() != name]
        self.fields = b"".join(lines) + (b"" if value is None else b"%b: %b\r\n" % (name, value))

    def head_for(self, replica: ReplicaAddress, api_key: bytes | None) -> bytes:
        """The request's head for this replica; the body follows unchanged."""
        authorization = b"Bearer " + api_key if api_key is not None else self.authorization
        return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b%b%b\r\n" % (
            self.method,
            self.target,
            replica.authority,
            self.fields,
            b"Authorization: %b\r\n" % authorization if authorization else b"",
            b"Content-Length: %d\r\n" % self.body_size if self.length is not None or self.is_chunked else b"",
        )


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a client's connection."""

    address: bytes
    is_trusted: bool
    scheme: bytes
    # What counts as one client: an IPv4 address, or an IPv6 /64, which is what one household has.
    origin: bytes = b""
    # X-Forwarded-For and -Proto lines for the replica: the same for all requests of a connection.
    forwarded: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lines = b"x-forwarded-for: %b\r\nx-forwarded-proto: %b\r\n" % (self.address, self.scheme)
        object.__setattr__(self, "forwarded", lines)

    @classmethod
    def of(cls, address: str, is_tls: bool, trusted: Sequence[Network]) -> "Peer":
        try:
            parsed = _parsed(address.partition("%")[0])
        except ValueError:
            return cls(b"unknown", False, b"https" if is_tls else b"http")
        is_trusted = any(parsed in network for network in trusted)
        return cls(str(parsed).encode(), is_trusted, b"https" if is_tls else b"http", _origin(parsed))


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    parsed = ipaddress.ip_address(address)
    return parsed.ipv4_mapped or parsed if isinstance(parsed, ipaddress.IPv6Address) else parsed


def _origin(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
    return address.packed[:8]  # an IPv4 address has only four bytes


@lru_cache(maxsize=4096)
def _client_said(forwarded_for: bytes) -> tuple[bytes, bytes]:
    """The client that a trusted proxy names, and its address as text, empty if that is none.

    The last address is the one that connected to the proxy.
    """
    address = forwarded_for.rpartition(b",")[2].strip()
    try:
        parsed = _parsed(address.decode())
    except ValueError:
        return address[:64], b""  # some proxies write something else, which still identifies one client
    return _origin(parsed), str(parsed).encode()


def read_head(request: Request, headers: Headers, peer: Peer) -> None:
    """Checks a request's head and decides which header fields are passed on, with lines of our own added.

    Raises ServeError for a head that is malformed, contradictory or not supported.
    """
    kept: list[bytes] = []
    dropped: set[bytes] = set()
    hosts = 0
    encoding = b""
    forwarded: dict[bytes, bytes] = {}
    authorizations: tuple[bytes, ...] = ()
    api_keys: tuple[bytes, ...] = ()
    upgrade = protocols = b""
    for name, value in headers:
        lowered = name.lower()
        action = _ACTIONS.get(lowered)
        if action is None:
            kept.append(b"%b: %b\r\n" % (name, value))
        elif action == "host":
            hosts += 1
            request.host = value.strip()
        elif action == "length":
            if len(value) > MAX_DIGITS:
                raise errors.bad_request("A Content-Length of so many digits is none.")
            request.length = int(value)
        elif action == "encoding":
            encoding += value.strip().lower()  # two fields form a list, which is more than 'chunked' alone
        elif action == "upgrade":
            upgrade = value.strip().lower()
        elif action == "protocols":
            protocols += b", " + value
        elif action == "connection":
            dropped.update(token.strip().lower() for token in value.split(b","))
        elif action == "forwarded" and peer.is_trusted:
            forwarded[lowered] = b"%b, %b" % (forwarded[lowered], value) if lowered in forwarded else value
        elif action == "hearsay" and peer.is_trusted:
            kept.append(b"%b: %b\r\n" % (name, value))
        elif action == "request-id" and REQUEST_ID.fullmatch(value):
            request.id = value
        elif action == "authorization":
            authorizations += (value,)
        elif action == "api-key":
            # Anthropic's clients send this on /v1/messages; SGLang only accepts a bearer token.
            api_keys += (b"Bearer " + value,)
        elif action == "origin":
            request.origin = b"%b, %b" % (request.origin, value) if request.origin else value
            kept.append(b"%b: %b\r\n" % (name, value))
        elif action == "expect":
            # HTTP/1.0 has no interim answers, whatever the client asks for.
            request.expects_continue = value.strip().lower() == b"100-continue" and request.version == "1.1"
        elif action == "fetch-site":
            request.fetch_site = value.strip()
            kept.append(b"%b: %b\r\n" % (name, value))
        elif action == "traceparent":
            request.traceparent = b"-" if request.traceparent else value.strip()  # two of them are none
            kept.append(b"%b: %b\r\n" % (name, value))
        elif action == "asks-for-method":
            request.asks_for_method = True
            kept.append(b"%b: %b\r\n" % (name, value))
        elif action == "model":
            request.model = value.strip()
        elif action == "explain":
            request.wants_explanation = value.strip() == b"1"
    if not request.id:
        request.id = new_request_id()
    if request.version not in ("1.0", "1.1"):
        raise errors.bad_request(f"HTTP/{request.version} is not spoken here.")
    if encoding:
        request.is_chunked = True
        if encoding != b"chunked" or request.version == "1.0":
            raise errors.bad_request("Only the transfer encoding 'chunked' is accepted, and only in HTTP/1.1.")
    if hosts > 1 or (hosts == 0 and request.version == "1.1"):
        raise errors.bad_request("A request needs exactly one Host field.")
    if request.host and not is_host(request.host):
        raise errors.bad_request("The Host field is no name or address with or without a port.")
    if protocols:
        api_keys += _protocols(protocols, kept)
    if authorizations or api_keys:
        request.credentials = borne = authorizations + api_keys
        request.authorization = borne[0] if len(borne) == 1 else next(filter(bearer_token, borne), borne[0])
    request.is_from_proxy = peer.is_trusted
    said = forwarded.get(b"x-forwarded-for")
    request.client, address = _client_said(said[-MAX_FORWARDED:]) if said else (peer.origin, b"")
    request.address = address or peer.address
    if dropped and not dropped <= _ACTIONS.keys():
        # Connection only removes fields that would be passed on; it cannot hide those that the balancer itself reads.
        kept = [line for line in kept if line.partition(b":")[0].lower() not in dropped]
    _read_target(request)
    if upgrade == b"websocket" and b"upgrade" in dropped and request.path == REALTIME:
        _open_websocket(request, kept)
    kept.append(_forwarded(request, forwarded, peer))
    request.fields = b"".join(kept)


def _read_target(request: Request) -> None:
    target = request.target
    if request.method == b"CONNECT":
        return  # its target is not a path; the method is refused later
    if not target.startswith(b"/") and target != b"*":
        scheme, found, rest = target.partition(b"://")
        if not found or scheme.lower() not in (b"http", b"https"):
            raise errors.bad_request("The request target is not a path.")
        end = _AUTHORITY_ENDS.search(rest)
        request.host, target = (rest, b"/") if end is None else (rest[: end.start()], rest[end.start() :])
        if not is_host(request.host):
            raise errors.bad_request("The request target names no host.")
    if b"#" in target:
        raise errors.bad_request("A request target has no fragment.")  # some servers cut it off, others do not
    path, mark, query = target.partition(b"?")
    request.path, request.kind, sent = kind_of(path)
    if sent != request.target:
        request.target = sent + mark + query


def _protocols(protocols: bytes, kept: list[bytes]) -> tuple[bytes, ...]:
    """Passes on a WebSocket's subprotocols; returns the credentials among them, as OpenAI's browser clients send them:
    a page cannot set other fields of this request.
    """
    names = [name for part in protocols.split(b",") if (name := part.strip())]
    others = [name for name in names if not name.startswith(KEY_PROTOCOL)]
    if others:
        kept.append(b"Sec-WebSocket-Protocol: %b\r\n" % b", ".join(others))
    return tuple(b"Bearer " + name[len(KEY_PROTOCOL) :] for name in names if name.startswith(KEY_PROTOCOL))


def _open_websocket(request: Request, kept: list[bytes]) -> None:
    """Marks a request that opens a WebSocket. Whatever else asks for an upgrade is an ordinary request."""
    if request.method != b"GET" or request.version != "1.1" or request.length or request.is_chunked:
        return
    request.opens_websocket = True
    request.keeps_alive = False  # frames may follow, or their client sends some too early: no further request
    if not request.model and (named := _MODEL.search(request.target)):
        request.model = unquote_to_bytes(named[1])
    kept.append(b"Upgrade: websocket\r\nConnection: Upgrade\r\n")


def _forwarded(request: Request, known: dict[bytes, bytes], peer: Peer) -> bytes:
    """The request's id, Via and X-Forwarded-* lines, for the replica's log; what a trusted proxy sent is kept."""
    if not known:
        ours, host = peer.forwarded, request.host
    else:
        before = known.get(b"x-forwarded-for")
        ours = b"x-forwarded-for: %b\r\nx-forwarded-proto: %b\r\n" % (
            b"%b, %b" % (before, peer.address) if before else peer.address,
            known.get(b"x-forwarded-proto", peer.scheme),
        )
        host = known.get(b"x-forwarded-host", request.host)
    return b"X-Request-Id: %b\r\nVia: %b\r\n%bx-forwarded-host: %b\r\n" % (request.id, VIA[request.version], ours, host)


_ACTIONS: Final[dict[bytes, str]] = {
    **dict.fromkeys(HOP_BY_HOP, "drop"),
    **dict.fromkeys(HEARSAY, "hearsay"),
    b"upgrade": "upgrade",
    b"sec-websocket-protocol": "protocols",
    b"connection": "connection",
    b"transfer-encoding": "encoding",
    b"content-length": "length",
    b"host": "host",
    b"expect": "expect",
    b"authorization": "authorization",
    b"x-api-key": "api-key",
    b"origin": "origin",
    b"x-request-id": "request-id",
    b"x-forwarded-for": "forwarded",
    b"x-forwarded-proto": "forwarded",
    b"x-forwarded-host": "forwarded",
    b"x-route-explain": "explain",
    b"x-model": "model",
    b"sec-fetch-site": "fetch-site",
    b"access-control-request-method": "asks-for-method",
    b"traceparent": "traceparent",
}
