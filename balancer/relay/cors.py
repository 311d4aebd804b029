"""Web pages: which may use the endpoint from a browser, and what their browsers are told about it."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from balancer import errors
from balancer.relay.hosts import is_public_name
from balancer.relay.request import Request

MAX_AGE = b"600"
EXPOSED = b"X-Request-Id, Request-Id, X-Replica-Id, X-Route-Reason, Retry-After, WWW-Authenticate, Allow, Date"
READING = frozenset((b"GET", b"HEAD", b"OPTIONS"))
OWN_SITE = frozenset((b"same-origin", b"none"))


class Cors:
    """Pages of the `origins` may use and read everything, pages of others nothing.

    Where the service `has_keys`, a page of another site lacks one, and that is enough. Where it has none, and
    `is_loopback` says that only this machine reaches the port, that machine's browser must not lend itself.
    """

    def __init__(self, origins: Sequence[str], has_keys: bool = False, is_loopback: bool = False) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)
        self._names = frozenset(urlsplit(origin).netloc.encode().lower() for origin in origins)
        self._is_for_all = has_keys or b"*" in self._origins
        self._is_loopback = is_loopback

    def _allowed(self, request: Request) -> bytes | None:
        if not request.origin or not self._origins:
            return None
        if b"*" in self._origins:
            return b"*"
        return request.origin if request.origin in self._origins else None

    def check(self, request: Request) -> None:
        """Raises ServeError for what a page of a site that nobody named has its reader's browser send.

        The rules are those of Go's CrossOriginProtection: a browser says where the page is, in Sec-Fetch-Site or, an
        old one or without https, in Origin; other programs say neither. A key cannot be sent without a preflight.
        """
        if self._is_for_all:
            return
        host = request.host
        if self._is_loopback and is_public_name(host) and not request.is_from_proxy and host.lower() not in self._names:
            # A page of another site can have its own name point at this machine, and would be of this origin then.
            raise errors.foreign_host(host.decode("latin-1"))
        if not request.origin and not request.fetch_site:
            return
        if request.credentials or (request.method in READING and not request.asks_for_method):
            return
        if request.fetch_site in OWN_SITE or self._allowed(request) is not None:
            return
        if not request.fetch_site and request.origin.partition(b"://")[2].lower() == host.lower():
            return
        raise errors.foreign_page(request.origin.decode("latin-1"))

    def is_preflight(self, request: Request) -> bool:
        """A browser asks whether it may send the real request; no key comes with that."""
        return request.asks_for_method and request.method == b"OPTIONS" and self._allowed(request) is not None

    def fields(self, request: Request) -> bytes:
        """Header lines for any answer to this request."""
        allowed = self._allowed(request)
        if allowed is None:
            return b""
        vary = b"" if allowed == b"*" else b"Vary: Origin\r\n"
        return b"Access-Control-Allow-Origin: %b\r\nAccess-Control-Expose-Headers: %b\r\n%b" % (allowed, EXPOSED, vary)

    def preflight(self, request: Request) -> bytes:
        """Header lines that say what the browser may send: what it asked for."""
        wanted = b"authorization, content-type"
        for line in request.fields.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"access-control-request-headers":
                wanted = value.strip()
        return (
            b"Access-Control-Allow-Methods: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n"
            b"Access-Control-Allow-Headers: %b\r\nAccess-Control-Max-Age: %b\r\n" % (wanted, MAX_AGE)
        )
