"""FastAPI routes of the admin port: status, the list of replicas, drain and undrain."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, HTTPException, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException

from balancer.errors import ConfigError, ServeError
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Listed, Member
from balancer.observe.snapshot import ServiceFacts, take_snapshot
from balancer.relay.auth import bears
from balancer.routing.admission import Admission


class ListedReplica(BaseModel):
    """One replica of `PUT /replicas`, as an engine lists it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: int | None = Field(None, ge=1)
    name: str = Field(min_length=1, max_length=200, pattern=r"^[\w.:\[\]-]+$")
    endpoint: str = Field("", description="empty while it has none; a RUNNING one has")
    version: int = 1
    infra: str = "-"
    resources: str = "-"
    launched_seconds: float | None = Field(None, ge=0, allow_inf_nan=False)
    state: Literal["PROVISIONING", "RUNNING", "FAILED", "SHUTTING_DOWN"] = "RUNNING"
    reason: str = ""

    def listed(self) -> Listed:
        return Listed(
            self.name,
            self.endpoint.rstrip("/"),
            self.id,
            self.version,
            self.infra,
            self.resources,
            self.launched_seconds,
            self.state,
            self.reason,
        )


class ServiceWord(BaseModel):
    """What an engine says of the service as a whole."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: str | None = None
    version: int | str | None = None
    endpoint: str | None = None
    status: str = ""
    reason: str = ""
    is_asleep: bool = Field(False, description="a generating request that finds no replica makes the engine start one")


class Replicas(BaseModel):
    """The body of `PUT /replicas`: the whole list; who is missing from it is gone."""

    model_config = ConfigDict(extra="ignore", strict=True)

    service: ServiceWord | None = None
    replicas: list[ListedReplica]


class Said(BaseModel):
    """What an error says."""

    message: str
    type: str
    code: str
    param: None


class Refusal(BaseModel):
    """The body of every error."""

    error: Said


def refusals(**why: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's entries for errors: `status_404="when"`."""
    return {int(status[-3:]): {"model": Refusal, "description": when} for status, when in why.items()}


Number = Annotated[int, Path(ge=1)]
REFUSED = refusals(status_403="this machine's port is asked for by another name, or by a page of another site")
UNCHANGED = refusals(
    status_401="the admin key is missing or wrong",
    status_413="no Content-Length, or a large one",
    status_422="not valid",
)
UNKNOWN = UNCHANGED | refusals(status_404="no replica has this number")


def admin_app(
    facts: ServiceFacts,
    fleet: Fleet,
    admission: Admission,
    list_replicas: Callable[[Sequence[Listed]], None],
    admin_key: Callable[[], str | None],
) -> FastAPI:
    """The admin port's app. `list_replicas` takes the list of `PUT /replicas`; it raises ConfigError."""
    # No pages of FastAPI's: they are empty where their scripts, which come from a CDN, cannot be had.
    app = FastAPI(title="groundserve admin", docs_url=None, redoc_url=None, responses=REFUSED)

    def with_key(request: Request) -> None:
        key = admin_key()
        borne = request.headers.getlist("authorization")
        if key is not None and not any(bears(one.encode("latin-1"), key) for one in borne):
            raise HTTPException(401, "This wants the admin key: 'Authorization: Bearer KEY'.")

    changing = [Depends(with_key)]

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Any, error: AnyHTTPException) -> Response:
        said = ServeError(error.status_code, "admin", str(error.detail))
        return Response(said.body, said.status, error.headers, media_type="application/json")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Any, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = ServeError(422, "invalid", f"{where}: {first['msg']}")
        return Response(said.body, said.status, media_type="application/json")

    @app.get("/status")
    async def status() -> Response:
        return JSONResponse(take_snapshot(facts, fleet, admission).to_json())

    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 while this process works, whatever the replicas do."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "no replica is ready, or the balancer is leaving"}})
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

    @app.post("/replicas/{number}/drain", dependencies=changing, responses=UNKNOWN)
    async def drain(number: Number) -> Response:
        fleet.drain(member := _member(number))
        return _row(member)

    @app.post("/replicas/{number}/undrain", dependencies=changing, responses=UNKNOWN)
    async def undrain(number: Number) -> Response:
        fleet.undrain(member := _member(number))
        return _row(member)

    @app.put("/replicas", dependencies=changing, responses=UNCHANGED)
    async def replicas(wanted: Replicas) -> Response:
        try:
            list_replicas([replica.listed() for replica in wanted.replicas])
        except ConfigError as error:
            raise HTTPException(422, str(error)) from None
        if wanted.service is not None:
            said = wanted.service
            facts.name = said.name or facts.name
            facts.version = str(said.version or facts.version)
            facts.endpoint = said.endpoint or facts.endpoint
            facts.status, facts.reason = said.status, said.reason
            fleet.is_asleep = said.is_asleep
        return await status()

    return app
