"""What every request to the admin port passes first: rules against hostile web pages, and security headers."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from balancer.errors import ServeError
from balancer.relay.hosts import is_public_name
from balancer.spec.loopback import is_loopback_name

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Who uses the service, and how much: more than everybody who reaches the port needs to see.
PRIVATE = ("/keys", "/usage", "/v1/organization/")
# Its requests are passed on to the serving port, which has limits and keys of its own.
PLAYGROUND = "/playground/"
MAX_BODY = 1 << 20
BODY_TIMEOUT = 30.0  # seconds of silence allowed inside a body

POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"permissions-policy": b"camera=(), geolocation=(), microphone=()",
}


class Guard:
    """An ASGI app around that of the admin port. Checking the admin key is left to the routes.

    `is_loopback`: the port can only be reached from this machine; `has_key`: there is an admin key; `is_private`: the
    port can only be reached from this machine and, where it is a container's, from containers beside it.
    `may_play`: whoever reaches this port may ask the endpoint too.
    """

    def __init__(
        self,
        app: App,
        is_loopback: bool,
        has_key: bool,
        is_private: bool = False,
        may_play: Callable[[], bool] = lambda: True,
    ) -> None:
        self._app = app
        self._is_loopback = is_loopback
        self._has_key = has_key
        self._has_public_name = has_key and not is_private
        self._may_play = may_play

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    *HEADERS.items(),
                    (b"content-security-policy", POLICY),
                ]
            await send(message)

        is_read = False

        async def receive_in_time() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            async with asyncio.timeout(BODY_TIMEOUT):
                message = await receive()
            is_read = not message.get("more_body", False)
            return message

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive_in_time, send_with_headers)
        else:
            await _answer(refusal, send_with_headers)

    def _refusal(self, scope: Message) -> ServeError | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        # DNS rebinding: another site's name may point at this machine, and its pages would count as same-origin.
        if self._is_loopback and not is_loopback_name(host):
            return _forbidden(f"This port answers to this machine only, not to {host!r}: ask for http://localhost.")
        if not self._has_public_name and is_public_name(host.encode("latin-1")):
            return _forbidden(
                f"This port answers to no public name such as {host!r}: ask for http://localhost, for its address, or "
                "for a name without a dot."
            )
        if scope["path"].startswith(PLAYGROUND) and not self._may_play():
            return _forbidden(
                "The endpoint is for its own machine and asks for no key, so this port's playground is closed: issue a "
                "key, or give the balancer --api-keys."
            )
        is_open = self._is_loopback or self._has_key
        if scope["method"] in SAFE_METHODS:
            if is_open or not scope["path"].startswith(PRIVATE):
                return None
            return _forbidden("Others can reach this port, so keys and usage want a key: start it with --admin-key.")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return _forbidden("A page of another site may change nothing here.")
        if scope["path"].startswith(PLAYGROUND):
            return None
        if not is_open:
            return _forbidden("Others can reach this port, so changes want a key: start the balancer with --admin-key.")
        length = headers.get(b"content-length", "0")
        if b"transfer-encoding" in headers or not length.isdecimal() or int(length) > MAX_BODY:
            return ServeError(413, "body_too_large", f"Send a Content-Length of at most {MAX_BODY} bytes here.")
        return None


def _forbidden(message: str) -> ServeError:
    return ServeError(403, "forbidden", message)


async def _answer(error: ServeError, send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(error.body))]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": error.body})
