"""CORS: which web pages may use the endpoint from a browser, and which headers tell the browser so."""

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
    """Pages of the `origins` may use and read everything, pages of other sites nothing.

    If the service `has_keys`, that needs no check, because another site's page has no key. If not, `check` refuses such
    pages, and if `is_private` (only this machine, and containers beside ours, reach the port), also public host names
    that point here.
    """

    def __init__(self, origins: Sequence[str], has_keys: bool = False, is_private: bool = False) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)
        self._names = frozenset(urlsplit(origin).netloc.encode().lower() for origin in origins)
        self._is_for_all = has_keys or b"*" in self._origins
        self._is_private = is_private

    def _allowed(self, request: Request) -> bytes | None:
        if not request.origin or not self._origins:
            return None
        if b"*" in self._origins:
            return b"*"
        return request.origin if request.origin in self._origins else None

    def check(self, request: Request) -> None:
        """Raises ServeError for a request that a browser sends on behalf of a page whose site is not allowed.

        The rules are those of Go's CrossOriginProtection: a browser says where the page is from, in Sec-Fetch-Site or,
        if it is old or does not use https, in Origin; other programs send neither. Requests with credentials pass,
        because a page cannot send a key without a preflight. A WebSocket, though, it opens without one, names what it
        likes as a key there, and reads what comes.
        """
        if self._is_for_all:
            return
        host = request.host
        if self._is_private and is_public_name(host) and not request.is_from_proxy and host.lower() not in self._names:
            # Another site can point its own name at this machine, and its pages would then be of this origin.
            raise errors.foreign_host(host.decode("latin-1"))
        if not request.origin and not request.fetch_site:
            return
        is_harmless = request.credentials or (request.method in READING and not request.asks_for_method)
        if is_harmless and not request.opens_websocket:
            return
        if request.fetch_site in OWN_SITE or self._allowed(request) is not None:
            return
        if not request.fetch_site and request.origin.partition(b"://")[2].lower() == host.lower():
            return
        raise errors.foreign_page(request.origin.decode("latin-1"))

    def is_preflight(self, request: Request) -> bool:
        """Does a browser ask whether an allowed page may send the real request? It sends no key with that."""
        return request.asks_for_method and request.method == b"OPTIONS" and self._allowed(request) is not None

    def fields(self, request: Request) -> bytes:
        """The CORS header lines for any answer to this request."""
        allowed = self._allowed(request)
        if allowed is None:
            return b""
        vary = b"" if allowed == b"*" else b"Vary: Origin\r\n"
        return b"Access-Control-Allow-Origin: %b\r\nAccess-Control-Expose-Headers: %b\r\n%b" % (allowed, EXPOSED, vary)

    def preflight(self, request: Request) -> bytes:
        """Header lines that allow any served method, and the header fields that the browser asked for."""
        wanted = b"authorization, content-type"
        for line in request.fields.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"access-control-request-headers":
                wanted = value.strip()
        return (
            b"Access-Control-Allow-Methods: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS\r\n"
            b"Access-Control-Allow-Headers: %b\r\nAccess-Control-Max-Age: %b\r\n" % (wanted, MAX_AGE)
        )
