"""Browsers: preflights answered here, and our own fields on every answer, once the service names `cors_origins`."""

from collections.abc import Sequence

from balancer.relay.request import Headers, Request

MAX_AGE = b"600"


class Cors:
    """Does nothing at all without origins; then the replicas' own CORS fields are theirs."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)

    def _allowed(self, request: Request) -> bytes | None:
        if not request.origin or not self._origins:
            return None
        if b"*" in self._origins:
            return b"*"
        return request.origin if request.origin in self._origins else None

    def is_preflight(self, request: Request) -> bool:
        """A browser asks whether it may send the real request; no key comes with that."""
        return (
            request.method == b"OPTIONS"
            and b"access-control-request-method:" in request.fields.lower()
            and self._allowed(request) is not None
        )

    def fields(self, request: Request) -> bytes:
        """Header lines for any answer to this request."""
        allowed = self._allowed(request)
        if allowed is None:
            return b""
        exposed = b"X-Request-Id, X-Replica-Id, X-Route-Reason"
        vary = b"" if allowed == b"*" else b"Vary: Origin\r\n"
        return b"Access-Control-Allow-Origin: %b\r\nAccess-Control-Expose-Headers: %b\r\n%b" % (
            allowed,
            exposed,
            vary,
        )

    def preflight(self, request: Request) -> Headers:
        """What the browser may send: what it asked for."""
        wanted = b"authorization, content-type"
        for line in request.fields.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"access-control-request-headers":
                wanted = value.strip()
        return [
            (b"Access-Control-Allow-Methods", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
            (b"Access-Control-Allow-Headers", wanted),
            (b"Access-Control-Max-Age", MAX_AGE),
        ]

    def without_foreign(self, headers: Headers) -> Headers:
        """A replica's fields without its CORS fields, where this service has its own."""
        if not self._origins:
            return headers
        return [(name, value) for name, value in headers if not name.lower().startswith(b"access-control-")]
