"""FastAPI routes of the admin port: status, the list of replicas, drain and undrain."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException as AnyHTTPException

from balancer.contract.listing import Listing, ReplicaListing
from balancer.errors import ConfigError, ServeError
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Member
from balancer.observe.snapshot import take_snapshot
from balancer.relay.auth import bears
from balancer.routing.admission import Admission
from balancer.service import ServiceFacts


class ErrorDetail(BaseModel):
    """What an error says, in OpenAI's shape."""

    message: str
    type: str
    code: str
    param: None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def error_responses(**when: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's entries for errors: `status_404="when it happens"`."""
    return {int(status[-3:]): {"model": ErrorBody, "description": text} for status, text in when.items()}


Number = Annotated[int, Path(ge=1)]
FORBIDDEN = error_responses(status_403="the Host names another machine than this one, or a page of another site asks")
UNCHANGED = error_responses(
    status_401="the admin key is missing or wrong",
    status_413="the Content-Length is missing or too large",
    status_422="the request is not valid",
)
NO_SUCH_REPLICA = UNCHANGED | error_responses(status_404="no replica has this number")


def admin_app(
    facts: ServiceFacts,
    fleet: Fleet,
    admission: Admission,
    list_replicas: Callable[[Sequence[ReplicaListing]], None],
    key: str | None,
) -> FastAPI:
    """The admin port's app. `list_replicas` is called with the list of `PUT /replicas`, and may raise ConfigError."""
    # FastAPI's own pages load scripts from a CDN, so they are empty on a machine without internet access.
    app = FastAPI(title="groundserve admin", docs_url=None, redoc_url=None, responses=FORBIDDEN)

    def with_key(request: Request) -> None:
        values = request.headers.getlist("authorization")
        if key is not None and not any(bears(value.encode("latin-1"), key) for value in values):
            raise HTTPException(401, "This wants the admin key: 'Authorization: Bearer KEY'.")

    changing = [Depends(with_key)]

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Any, error: AnyHTTPException) -> Response:
        answer = ServeError(error.status_code, "admin", str(error.detail))
        return Response(answer.body, answer.status, error.headers, media_type="application/json")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Any, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        answer = ServeError(422, "invalid", f"{where}: {first['msg']}")
        return Response(answer.body, answer.status, media_type="application/json")

    @app.exception_handler(ConfigError)
    async def unusable(_: Any, error: ConfigError) -> Response:
        answer = ServeError(422, "admin", str(error))
        return Response(answer.body, answer.status, media_type="application/json")

    @app.get("/status")
    async def status() -> Response:
        return JSONResponse(take_snapshot(facts, fleet, admission).to_json())

    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 as long as this process works, whatever the state of the replicas."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "no replica is ready, or the balancer is shutting down"}})
    async def ready() -> Response:
        is_ready = bool(fleet.available()) and not facts.is_leaving
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    def _member(number: int) -> Member:
        member = fleet.members.get(number)
        if member is None:
            known = ", ".join(map(str, sorted(fleet.members))) or "none"
            raise HTTPException(404, f"There is no replica {number}; known are: {known}.")
        return member

    def _row(member: Member) -> Response:
        rows = take_snapshot(facts, fleet, admission).replicas
        return JSONResponse(next(row for row in rows if row.id == member.id).to_json())

    @app.post("/replicas/{number}/drain", dependencies=changing, responses=NO_SUCH_REPLICA)
    async def drain(number: Number) -> Response:
        fleet.drain(member := _member(number))
        return _row(member)

    @app.post("/replicas/{number}/undrain", dependencies=changing, responses=NO_SUCH_REPLICA)
    async def undrain(number: Number) -> Response:
        fleet.undrain(member := _member(number))
        return _row(member)

    @app.put("/replicas", dependencies=changing, responses=UNCHANGED)
    async def replicas(listing: Listing) -> Response:
        list_replicas(listing.replicas)
        if listing.service is not None:
            facts.take(listing.service)
            fleet.is_asleep = listing.service.is_asleep
        return await status()

    return app
