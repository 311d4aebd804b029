"""SGLang's own admin requests, sent to every replica of a service; what each answers is gathered."""

import asyncio
from typing import Annotated, Any, Literal, Protocol

import httpx
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member

PATIENCE = 300.0  # seconds for one replica: an adapter may have to be fetched
LARGEST = 64 << 10  # bytes of a request, and of an answer that is shown
What = Literal["load_lora_adapter", "unload_lora_adapter", "flush_cache", "abort_request"]


class Everywhere(Protocol):
    """A service, as far as these requests need it."""

    @property
    def fleet(self) -> Fleet: ...

    @property
    def replica_key(self) -> str | None: ...


def add_everywhere(
    app: FastAPI, chosen: Any, guarded: list[Any], client: httpx.AsyncClient, responses: dict[int | str, Any]
) -> None:
    """`chosen` finds the service that a request is about; `client` asks the replicas, with their key."""

    async def one(member: Member, key: str | None, what: str, body: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            answer = await client.post(f"{member.url}/{what}", content=body, headers=headers, timeout=PATIENCE)
        except (httpx.HTTPError, OSError) as failure:
            return {"replica": member.name, "status": None, "answer": f"{type(failure).__name__}: {failure}"}
        return {"replica": member.name, "status": answer.status_code, "answer": answer.text[:LARGEST]}

    @app.post("/everywhere/{what}", dependencies=guarded, responses=responses)
    async def everywhere(what: What, request: Request, service: Annotated[Everywhere, Depends(chosen)]) -> Response:
        """Sends the body to this path of every replica that has joined. 200 if all of them accepted it, else 502.

        A replica that starts later knows nothing of it: say it again then.
        """
        body = await request.body()
        if len(body) > LARGEST:
            raise HTTPException(413, f"The body is over {LARGEST} bytes: none of these requests is so large.")
        # A replica that is listed at two addresses is asked once: it would refuse the same adapter the second time.
        members = [member for _, member in sorted(service.fleet.members.items()) if not member.alias_of]
        key = service.replica_key
        told = await asyncio.gather(*(one(member, key, what, body) for member in members))
        is_done = bool(told) and all(said["status"] is not None and said["status"] < 300 for said in told)
        return JSONResponse({"replicas": told}, 200 if is_done else 502)
