"""FastAPI routes of the admin port: status, the list of replicas, drain and undrain."""

from collections.abc import Sequence
from typing import Annotated, Any, Protocol

import httpx
from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException as AnyHTTPException

from balancer.accounts.accounts import Accounts
from balancer.admin.account_routes import add_accounts
from balancer.admin.everywhere import add_everywhere
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
Name = Annotated[str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
FORBIDDEN = error_responses(status_403="the Host names another machine than this one, or a page of another site asks")
UNCHANGED = error_responses(
    status_401="the admin key is missing or wrong",
    status_413="the Content-Length is missing or too large",
    status_422="the request is not valid",
)
NO_SUCH_SERVICE = error_responses(status_404="no service has this name")
NO_SUCH_REPLICA = UNCHANGED | error_responses(status_404="no replica has this number, or no service this name")


class Administered(Protocol):
    """A service, as the admin port knows it."""

    @property
    def facts(self) -> ServiceFacts: ...

    @property
    def fleet(self) -> Fleet: ...

    @property
    def admission(self) -> Admission: ...

    def list_replicas(self, listing: Sequence[ReplicaListing]) -> None:
        """An engine says which replicas there are. Raises ConfigError."""


class Guests(Protocol):
    """Services that come and go while the process runs."""

    def join(self, name: str, text: str, replica_key: str | None) -> None:
        """Serves one more, or goes on with it by what its file says now. Raises ConfigError."""

    async def part(self, name: str) -> int:
        """Takes one off the endpoint; how many requests it still has. Raises ConfigError."""


class Guest(BaseModel):
    """A service that is to be served here too."""

    file: str  # the text of its service file
    replica_key: str | None = None  # what its replicas ask for


def admin_app(
    services: Sequence[Administered],
    key: str | None,
    guests: Guests | None = None,
    accounts: Accounts | None = None,
    client: httpx.AsyncClient | None = None,
) -> FastAPI:
    """The admin port's app. Requests are about the first service unless they name another (`?service=NAME`).

    Changes, keys and usage want the admin key if there is one. Keys and what replicas have loaded cannot be changed
    without one, because then every user of the machine could.
    """
    # FastAPI's own pages load scripts from a CDN, so they are empty on a machine without internet access.
    app = FastAPI(title="groundserve admin", docs_url=None, redoc_url=None, responses=FORBIDDEN)

    def with_key(request: Request) -> None:
        values = request.headers.getlist("authorization")
        if key is not None and not any(bears(value.encode("latin-1"), key) for value in values):
            raise HTTPException(401, "This wants the admin key: 'Authorization: Bearer KEY'.")

    def only_with_key() -> None:
        if key is None:
            raise HTTPException(
                403, "Without an admin key nobody may do this: start the balancer with --admin-key FILE."
            )

    changing = [Depends(with_key)]
    guarded = [Depends(only_with_key), *changing]

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

    def chosen(
        service: Annotated[str | None, Query(description="its name; without one: the first")] = None,
    ) -> Administered:
        for one in services:
            if service in (None, one.facts.name):
                return one
        known = ", ".join(one.facts.name for one in services)
        raise HTTPException(404, f"There is no service {service!r}; known are: {known}.")

    def _snapshot(service: Administered) -> dict[str, Any]:
        return take_snapshot(service.facts, service.fleet, service.admission).to_json()

    @app.get("/status", responses=NO_SUCH_SERVICE)
    async def status(service: Annotated[Administered, Depends(chosen)]) -> Response:
        return JSONResponse(_snapshot(service))

    @app.get("/services")
    async def all_services() -> Response:
        """What `/status` says, of each service."""
        return JSONResponse([_snapshot(service) for service in services])

    @app.get("/health")
    async def health() -> dict[str, str]:
        """200 as long as this process works, whatever the state of the replicas."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "no replica is ready, or the balancer is shutting down"}})
    async def ready() -> Response:
        is_ready = any(service.fleet.available() for service in services) and not services[0].facts.is_leaving
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    def _member(service: Administered, number: int) -> Member:
        fleet = service.fleet
        member = fleet.members.get(number)
        if member is None:
            known = ", ".join(map(str, sorted(fleet.members))) or "none"
            raise HTTPException(404, f"There is no replica {number}; known are: {known}.")
        return member

    def _row(service: Administered, member: Member) -> Response:
        rows = take_snapshot(service.facts, service.fleet, service.admission).replicas
        return JSONResponse(next(row for row in rows if row.id == member.id).to_json())

    @app.post("/replicas/{number}/drain", dependencies=changing, responses=NO_SUCH_REPLICA)
    async def drain(number: Number, service: Annotated[Administered, Depends(chosen)]) -> Response:
        service.fleet.drain(member := _member(service, number))
        return _row(service, member)

    @app.post("/replicas/{number}/undrain", dependencies=changing, responses=NO_SUCH_REPLICA)
    async def undrain(number: Number, service: Annotated[Administered, Depends(chosen)]) -> Response:
        service.fleet.undrain(member := _member(service, number))
        return _row(service, member)

    @app.put("/replicas", dependencies=changing, responses=UNCHANGED | NO_SUCH_SERVICE)
    async def replicas(listing: Listing, service: Annotated[Administered, Depends(chosen)]) -> Response:
        service.list_replicas(listing.replicas)
        if listing.service is not None:
            service.facts.take(listing.service)
            service.fleet.is_asleep = listing.service.is_asleep
            service.fleet.take_share(listing.service.share)
        return JSONResponse(_snapshot(service))

    absent = error_responses(status_404="neither keys nor usage are kept here (--state)")
    add_accounts(app, accounts, changing, guarded, UNCHANGED | absent)
    if client is not None:
        partly = error_responses(status_502="not every replica accepted it")
        add_everywhere(app, chosen, guarded, client, UNCHANGED | NO_SUCH_SERVICE | partly)
    if guests is not None:
        add_guests(app, guests, changing)
    return app


def add_guests(app: FastAPI, guests: Guests, changing: Sequence[Any]) -> None:
    """Routes by which a controller has its service served here too, and takes it off again."""

    @app.put("/services/{name}", dependencies=changing, responses=UNCHANGED)
    async def join(name: Name, guest: Guest) -> dict[str, str]:
        guests.join(name, guest.file, guest.replica_key)
        return {"service": name}

    @app.delete("/services/{name}", dependencies=changing, responses=UNCHANGED)
    async def part(name: Name) -> dict[str, int]:
        """Its new requests get 404 from now on. Ask again until it has none `in_flight`."""
        return {"in_flight": await guests.part(name)}
