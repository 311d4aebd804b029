"""The playground's requests, passed on to our own serving port: the same limits, queue and policy as for any other."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from balancer.errors import ServeError

SENT = ("authorization",)
SENT_WITH_BODY = ("authorization", "content-type", "content-length")
RETURNED = ("content-type", "retry-after", "x-request-id", "x-replica-id", "x-route-reason")


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "as the endpoint answers"},
    "5XX": {"description": "as the endpoint answers, or that it does not"},
}


def playground_router(endpoint: str, client: httpx.AsyncClient) -> APIRouter:
    """Routes under /playground. The page calls only these, so it needs nothing from another origin."""
    router = APIRouter(prefix="/playground")

    @router.get("/v1/models", responses=RESPONSES)
    async def models(request: Request) -> Response:
        """The endpoint's list of models."""
        return await _pass_on(request, client, endpoint + "/v1/models")

    @router.post("/v1/chat/completions", responses=RESPONSES)
    async def chat(request: Request) -> Response:
        """A chat through the endpoint; a stream is passed on as it arrives."""
        return await _pass_on(request, client, endpoint + "/v1/chat/completions")

    return router


async def _pass_on(request: Request, client: httpx.AsyncClient, url: str) -> Response:
    has_body = request.method == "POST"
    sent = SENT_WITH_BODY if has_body else SENT
    headers = {name: request.headers[name] for name in sent if name in request.headers}
    is_read = asyncio.Event()
    message = client.build_request(
        request.method,
        url,
        headers={**headers, "X-Route-Explain": "1", "Accept-Encoding": "identity"},
        content=_body_of(request, is_read) if has_body else None,
    )
    sending = asyncio.ensure_future(client.send(message, stream=True))
    leaving = asyncio.ensure_future(_left(request, is_read))
    try:
        await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            return Response(status_code=499)  # nobody reads it
        answer = sending.result()
    except httpx.HTTPError:
        refusal = ServeError(502, "endpoint_unreachable", "The endpoint did not answer; the balancer's log says why.")
        return Response(refusal.body, refusal.status, media_type="application/json")
    finally:
        for task in (sending, leaving):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving
    kept = {name: answer.headers[name] for name in RETURNED if name in answer.headers}
    fresh = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_pieces(answer), answer.status_code, kept | fresh)


async def _body_of(request: Request, is_read: asyncio.Event) -> AsyncIterator[bytes]:
    async for piece in request.stream():
        yield piece
    is_read.set()


async def _left(request: Request, is_read: asyncio.Event) -> None:
    """Returns when the browser has gone: then the request must neither wait in the queue nor occupy a replica."""
    if request.method == "POST":
        await is_read.wait()
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.aiter_raw():
            yield piece
    except httpx.HTTPError:
        return  # the endpoint broke the stream off, and said so in the stream
    finally:
        await answer.aclose()
