"""What the controller tells the balancer of a service and its replicas: the body of `PUT /replicas`.

A fact about a replica has one home, `ReplicaFacts`. From there it goes by itself into the request, the fleet, `GET
/status` and the page's feed. It is named again only where an engine finds it out and where it is shown: the columns of
operate/commands/table.py, the `FACTS` of admin/page/page.js.
"""

from dataclasses import KW_ONLY, asdict, dataclass
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, Strict

from balancer.contract.words import ServiceStatus, State
from balancer.errors import ConfigError

# From outside: "1" is no whole number, and 1 is not true.
StrictBool = Annotated[bool, Strict()]
StrictInt = Annotated[int, Strict()]
StrictFloat = Annotated[float, Strict()]


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """What is said of a replica unchanged, all the way from its engine to a person."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[\w.:\[\]-]+$")]
    endpoint: Annotated[
        str,
        Field(description="empty while it has none; a RUNNING one has"),
        AfterValidator(lambda url: url.rstrip("/")),
    ] = ""
    _: KW_ONLY
    id: Annotated[StrictInt, Field(ge=1)] | None = None
    version: StrictInt = 1
    launched_seconds: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)] | None = None  # its age
    infra: str = "-"  # where it runs: "local", "compose"
    resources: str = "-"  # on what: "1x CPU", "1x L4"
    reason: str = ""  # why it is as it is, in one line; empty when there is nothing to say


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaListing(ReplicaFacts):
    """One replica as an engine or discovery lists it. Raises ConfigError for an endpoint that is no address."""

    is_address_only: ClassVar[bool] = False
    state: State = State.RUNNING

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
    """What an engine says of the service as a whole; None, or an empty status: what the balancer knows itself."""

    name: str | None = None
    version: StrictInt | str | None = None
    endpoint: str | None = None
    status: Annotated[str, AfterValidator(_service_word)] = ""
    reason: str = ""
    is_asleep: Annotated[
        StrictBool, Field(description="a generating request that finds no replica makes the engine start one")
    ] = False


@dataclass(frozen=True, slots=True)
class Listing:
    """The whole list: a replica that is missing from it is gone."""

    replicas: tuple[ReplicaListing, ...]
    service: ServiceListing | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
