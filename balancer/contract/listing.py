"""The list of a service's replicas that the controller sends to the balancer: the body of `PUT /replicas`.

A fact about a replica is defined once, in `ReplicaFacts`. The request, the fleet, `GET /status` and the page's feed
pass it on without naming it. It is named again only in the engine that knows it and where it is shown: the columns of
operate/commands/table.py, and `FACTS` in admin/page/page.js.
"""

from dataclasses import KW_ONLY, dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, Strict

from balancer.contract.words import ServiceStatus, State
from balancer.errors import ConfigError

# For input from outside: "1" is not an integer, and 1 is not a boolean.
StrictBool = Annotated[bool, Strict()]
StrictInt = Annotated[int, Strict()]
StrictFloat = Annotated[float, Strict()]


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """What is passed on unchanged about a replica, all the way from its engine to a person."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.:\[\]-]+$")]
    endpoint: Annotated[
        str,
        Field(description="empty while it has none; a RUNNING replica has one"),
        AfterValidator(lambda url: url.rstrip("/")),
    ] = ""
    _: KW_ONLY
    id: Annotated[StrictInt, Field(ge=1)] | None = None
    version: StrictInt = 1
    launched_seconds: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)] | None = None  # its age
    infra: str = "-"  # what runs it: "local", "compose", "slurm (gpu)" with the partition
    resources: str = "-"  # on what: "1x CPU", "1x L4"
    reason: str = ""  # why it is in its state, in one line; empty if there is nothing to say
    leased: str = ""  # the GPUs that it has: "GPU 0 (L4, GPU-...)"; empty if none, or unknown
    node: str = ""  # which of several hosts it runs on; empty where there is only one, or while it has none
    # How long until its engine ends it, as Slurm does at a job's time limit; None if nothing does.
    ends_in_seconds: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaListing(ReplicaFacts):
    """One replica, as the controller or DNS lists it. Raises ConfigError if its endpoint is not an address."""

    is_address_only: ClassVar[bool] = False  # listed by DNS: its replica may have other addresses, too
    state: State = State.RUNNING
    has_to_move: StrictBool = False  # its node is to be emptied, for `reason`: it serves until its successor does

    def __post_init__(self) -> None:
        if not self.endpoint and self.state is not State.RUNNING:
            return
        try:
            parts = urlsplit(self.endpoint)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            usable = usable and parts.netloc.isascii() and self.endpoint == f"{parts.scheme}://{parts.netloc}"
            usable = usable and "@" not in self.endpoint
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(f"replica '{self.endpoint}' is not an address: write http://HOST:PORT")


def _service_word(word: str) -> str:
    if word and word not in list(ServiceStatus):
        raise ValueError(f"write one of {', '.join(ServiceStatus)}, or nothing")
    return word


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceListing:
    """The service as a whole, as the controller tells it; None, or an empty status, leaves it to the balancer."""

    name: str | None = None
    version: StrictInt | str | None = None
    endpoint: str | None = None
    status: Annotated[str, AfterValidator(_service_word)] = ""
    reason: str = ""
    is_asleep: Annotated[
        StrictBool, Field(description="scaled to zero: a generating request makes the controller start a replica")
    ] = False
    share: Annotated[
        StrictFloat, Field(gt=0, le=1, description="which part of each limit this balancer may use, beside others")
    ] = 1.0


@dataclass(frozen=True, slots=True)
class Listing:
    """The whole list; a replica that is not on it is gone."""

    replicas: tuple[ReplicaListing, ...]
    service: ServiceListing | None = None

    def to_json(self) -> dict[str, Any]:
        service = flat(self.service) if self.service is not None else None
        return {"replicas": [flat(replica) for replica in self.replicas], "service": service}


@cache
def _names(row: type[Any]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(row))


def flat(row: Any) -> dict[str, Any]:
    """The fields of a dataclass. `asdict` copies what is in them, which takes six times as long for 1,000 replicas."""
    kind: Any = type(row)
    return {name: getattr(row, name) for name in _names(kind)}
