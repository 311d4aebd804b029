"""FastAPI routes of the admin port: status, the list of replicas, drain and undrain."""

import hmac
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from balancer.errors import ConfigError, ServeError
from balancer.fleet.fleet import Fleet
from balancer.fleet.member import Listed, Member
from balancer.routing.admission import Admission
from balancer.views.snapshot import ServiceFacts, take_snapshot


class ListedReplica(BaseModel):
    """One replica of `PUT /replicas`, as an engine lists it."""

    model_config = ConfigDict(extra="ignore")

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

    model_config = ConfigDict(extra="ignore")

    name: str | None = None
    version: int | str | None = None
    endpoint: str | None = None
    status: str = ""
    reason: str = ""
    is_asleep: bool = Field(False, description="a generating request that finds no replica makes the engine start one")


class Replicas(BaseModel):
    """The body of `PUT /replicas`: the whole list; who is missing from it is gone."""

    model_config = ConfigDict(extra="ignore")

    service: ServiceWord | None = None
    replicas: list[ListedReplica]


def admin_app(
    facts: ServiceFacts,
    fleet: Fleet,
    admission: Admission,
    list_replicas: Callable[[Sequence[Listed]], None],
    admin_key: Callable[[], str | None],
) -> FastAPI:
    """The admin port's app. `list_replicas` takes the list of `PUT /replicas`; it raises ConfigError."""
    app = FastAPI(title="groundserve admin")

    def with_key(authorization: Annotated[str, Header()] = "") -> None:
        key = admin_key()
        if key is not None and not hmac.compare_digest(authorization.encode(), f"Bearer {key}".encode()):
            raise HTTPException(401, "This wants the admin key: 'Authorization: Bearer KEY'.")

    changing = [Depends(with_key)]

    @app.exception_handler(HTTPException)
    async def refused(_: Any, error: HTTPException) -> Response:
        said = ServeError(error.status_code, "admin", str(error.detail))
        return Response(said.body, said.status, media_type="application/json")

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

    @app.get("/ready")
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

    @app.post("/replicas/{number}/drain", dependencies=changing)
    async def drain(number: int) -> Response:
        fleet.drain(member := _member(number))
        return _row(member)

    @app.post("/replicas/{number}/undrain", dependencies=changing)
    async def undrain(number: int) -> Response:
        fleet.undrain(member := _member(number))
        return _row(member)

    @app.put("/replicas", dependencies=changing)
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
