"""Answers a request through an ASGI app: how FastAPI serves the few paths that are the balancer's own."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from balancer.relay.request import Headers, Request

Message = MutableMapping[str, Any]
App = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]


class Answer(Protocol):
    """What an answer is written to; a Reply, as a rule."""

    extra_fields: bytes

    def whole(self, status: int, headers: Headers, body: bytes) -> None: ...


async def answer(app: App, request: Request, reply: Answer) -> None:
    """Runs the app on a whole request and sends its answer in one piece."""
    status = 500
    headers: Headers = []
    body: list[bytes] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"".join(request.body), "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message.get("headers", ()))
        else:
            body.append(message.get("body", b""))

    await app(_scope(request), receive, send)
    # The app may answer on behalf of a replica; `whole` would drop this field, as it does from a replica's own answer.
    reply.extra_fields += b"".join(
        b"X-Replica-Id: %b\r\n" % value for name, value in headers if name == b"x-replica-id"
    )
    reply.whole(status, headers, b"".join(body))


def _scope(request: Request) -> Message:
    lines = (line.partition(b": ") for line in request.fields.split(b"\r\n") if line)
    raw_path, _, query = request.target.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": request.version,
        "method": request.method.decode("latin-1"),
        "scheme": "http",
        "path": request.path,
        "raw_path": raw_path,
        "query_string": query,
        "root_path": "",
        "headers": [(b"host", request.host), *((name.lower(), value) for name, _, value in lines)],
        "client": None,
        "server": None,
    }
