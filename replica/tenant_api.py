"""The routes that a replica that shares its GPUs adds in front of SGLang's own, and those of SGLang that it closes.

    GET  /lease                        its state, its GPUs, who else is there and who waits, times of its swaps
    POST /lease/wake, doze, sleep      does that and answers the same; ?within=SECONDS (10) is the maximum wait, and
                                       ?memory=SECONDS (5 at most) that for memory that others are about to give back
    GET  /alive                        200 in every state but BROKEN, without a key

All but /alive require the replica's key, if it has one. A balancer sends its name in the header X-Balancer, and orders
the turns for as long as it is heard from. SGLang's own routes for memory and pausing are closed: after a release,
a request that reaches SGLang's scheduler kills it.
"""

import asyncio
import json
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from replica.tenant import State, Tenant

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BALANCER = b"x-balancer"
LONGEST = 600  # seconds that an order may give itself
_ORDERS = {"/lease/wake": State.AWAKE, "/lease/doze": State.DOZING, "/lease/sleep": State.ASLEEP}
_CLOSED = ("/release_memory_occupation", "/resume_memory_occupation", "/pause_generation", "/continue_generation")
_HEALTH = ("/health", "/health_generate")
# Routes that are safe while memory is released. Requests to generate wait in SGLang's tokenizer until the replica is
# awake; the others here use neither KV cache nor weights. All other routes are refused until then.
_HARMLESS = (
    *("/generate", "/encode", "/classify", "/v1", "/api", "/invocations", "/vertex_generate", "/tokenize"),
    *("/detokenize", "/abort_request", "/parse_function_call", "/separate_reasoning", "/freeze_gc", "/ping"),
    *("/metrics", "/model_info", "/get_model_info", "/server_info", "/get_server_info", "/get_load", "/docs"),
    *("/openapi.json", "/ready"),
)


class Alive:
    """Wraps SGLang's whole app, including its check of the key: answers /alive, and runs the tenant."""

    def __init__(self, app: App, tenant: Tenant) -> None:
        self._app = app
        self._tenant = tenant
        self._life: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._life is None:
            self._life = asyncio.get_running_loop().create_task(self._tenant.live())
        if scope["type"] == "http" and scope["path"] == "/alive":
            is_well = self._tenant.state is not State.BROKEN
            await _answer(send, 200 if is_well else 503, {"state": self._tenant.state})
        else:
            await self._app(scope, receive, send)


class Gate:
    """Behind the check of the key: takes orders, and refuses what must not reach a replica that is not awake."""

    def __init__(self, app: App, tenant: Tenant) -> None:
        self._app = app
        self._tenant = tenant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, tenant = scope["path"].rstrip("/"), self._tenant
        if path == "/lease" or path.startswith("/lease/"):
            await self._lease(scope, path, send)
        elif path in _CLOSED:
            said = f"{path} is closed: this replica shares its GPU; POST /lease/wake and /lease/doze are what to ask"
            await _answer(send, 403, {"error": said})
        elif tenant.is_up or (tenant.is_leaving and path in (*_HEALTH, "/ready")):
            await self._app(scope, receive, send)
        elif path in _HEALTH:
            await _answer(send, 200, {"state": tenant.state})
        elif path == "/ready":
            # Without a balancer it wakes for a request; a balancer has to wake it first.
            await _answer(send, 503 if tenant.is_ordered else 200, {"state": tenant.state})
        elif not path or any(path == one or path.startswith(f"{one}/") for one in _HARMLESS):
            await self._app(scope, receive, send)
        else:
            said = f"{path} is not answered while this replica is {tenant.state}: others have its GPU"
            await _answer(send, 503, {"error": said}, {"retry-after": "1"})

    async def _lease(self, scope: Scope, path: str, send: Send) -> None:
        name = next((value for header, value in scope["headers"] if header == BALANCER), b"")
        method = scope["method"]
        if path == "/lease" and method == "GET":
            self._heard(name)
            await _answer(send, 200, self._tenant.to_json())
        elif path in _ORDERS and method == "POST":
            query = scope.get("query_string", b"")
            within, memory = _seconds(query, "within", 10), _seconds(query, "memory", LONGEST)
            if within is None or memory is None:
                await _answer(send, 400, {"error": f"within and memory are numbers of seconds, at most {LONGEST}"})
                return
            self._heard(name)
            is_done = await self._tenant.order(_ORDERS[path], within, memory)
            await _answer(send, 200 if is_done else 503, self._tenant.to_json())
        else:
            is_known = path == "/lease" or path in _ORDERS
            error = "GET /lease; POST /lease/wake, /lease/doze, /lease/sleep"
            await _answer(send, 405 if is_known else 404, {"error": error})

    def _heard(self, name: bytes) -> None:
        if name:
            self._tenant.heard(name.decode("latin-1")[:100])


def _seconds(query: bytes, name: str, default: float) -> float | None:
    """What the query gives for this name; None if it is no number from 0 to LONGEST."""
    given = urllib.parse.parse_qs(query.decode("latin-1")).get(name)
    try:
        seconds = float(given[-1]) if given else default
    except ValueError:
        return None
    return seconds if 0 <= seconds <= LONGEST else None


async def _answer(send: Send, status: int, said: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
    body = json.dumps(said).encode()
    head = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    fields = [(name.encode(), value.encode()) for name, value in head.items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
