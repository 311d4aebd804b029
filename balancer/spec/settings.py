"""The balancer's settings: meaning, unit and default of each, for `x-groundserve:` and `--set key=value`."""

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from balancer.errors import ConfigError

PolicyName = Literal["round_robin", "least_load", "prefix_aware", "instance_aware_least_load"]


def _field_name(name: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise ValueError("should be the name of a header")
    return name


def _field_value(value: str) -> str:
    if not value.isprintable():
        raise ValueError("should be one line of printable characters")
    return value


FieldName = Annotated[str, AfterValidator(_field_name)]
FieldValue = Annotated[str, AfterValidator(_field_value)]


class ReadinessProbe(BaseModel):
    """The service's own readiness probe, with the keys of SkyServe's `readiness_probe`. Times are in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str = Field("/health", description="path that answers 200 when a replica can serve")
    post_data: dict[str, Any] | None = Field(None, description="JSON body; with one the probe is a POST")
    headers: dict[FieldName, FieldValue] = Field({}, description="headers sent with the probe")
    initial_delay_seconds: float = Field(1200, gt=0, description="time a new replica has to become ready")
    timeout_seconds: float = Field(15, gt=0, description="time one probe may take")
    endpoint_probe_interval_seconds: float = Field(10, gt=0, description="time between two probes")
    consecutive_failure_threshold_timeout: float = Field(180, gt=0, description="failing this long is FAILED_PROBING")


class Settings(BaseModel):
    """All settings of one balancer. Times are in seconds, sizes in bytes.

    The process has one object: `renew` changes it in place, so that all parts see the new values.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    # The relay
    max_body_bytes: int = Field(64 << 20, gt=0, description="largest request body; beyond: 413")
    max_buffered_bytes: int = Field(
        1 << 30,
        gt=0,
        description="bytes held of requests, and of answers that may continue; beyond: 503, for the client with most",
    )
    max_head_bytes: int = Field(64 << 10, gt=0, description="largest request head; beyond: 431")
    head_timeout: float = Field(30, gt=0, description="time a request head may take to arrive; beyond: 408")
    body_timeout: float = Field(
        30, gt=0, description="silence allowed in a request body, which must average 1 KiB/s after 30 s; beyond: 408"
    )
    keep_alive_timeout: float = Field(75, gt=0, description="time an idle client connection is kept")
    send_timeout: float = Field(
        300, gt=0, description="time a client may read nothing of its answer before it is cut off"
    )
    max_connections_per_client: int = Field(
        2048, gt=0, description="open connections of one address (IPv6: one /64), trusted proxies excepted; beyond: 429"
    )
    connect_timeout: float = Field(2, gt=0, description="time a connection to a replica may take")
    first_byte_timeout: float = Field(
        600,
        gt=0,
        description="time a replica has to begin its answer, or, alive, to go on with it; beyond: another is asked, "
        "else 504 or a broken stream",
    )
    idle_timeout: float = Field(
        120,
        gt=0,
        description="silence of a replica without a sign of life; beyond: another is asked, else 502 or a broken "
        "stream",
    )
    websocket_idle_timeout: float = Field(
        300, gt=0, description="time a WebSocket may be silent in both directions before it is closed"
    )
    keep_alive_comments: float = Field(
        0, ge=0, description="time between comment lines to a client whose stream has not begun; 0: none"
    )
    upstream_keep_alive: float = Field(
        4, gt=0, description="how long an idle connection to a replica is kept; less than SGLang's own 5 s"
    )
    retry_sent: Literal["never", "once"] = Field(
        "once",
        description="how often a generating POST is sent again when its replica died, or let it wait for too long, "
        "before the client had any of it",
    )
    continue_broken: bool = Field(
        True, description="continue a streamed answer at another replica when its own breaks amid it"
    )
    max_continued_bytes: int = Field(
        1 << 20, gt=0, description="bytes of a streamed answer that are kept for that; a longer one breaks"
    )
    count_streams: bool = Field(
        True,
        description="ask replicas for the token counts of streams whose clients do not, and keep that event from them",
    )
    admin_paths: bool = Field(False, description="relay SGLang's admin paths to holders of the admin key")
    base_path: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9._~-]*[A-Za-z0-9_~-])*$",
        description="a path under which all paths are served too, such as /llm, for proxies that keep it",
    )
    trusted_proxies: tuple[str, ...] = Field(
        (), description="addresses or networks of proxies whose X-Forwarded-* fields are kept"
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="origins of web pages that may call the endpoint; '*' for all"
    )

    aliases: tuple[str, ...] = Field(
        (), description="further names for this service's model, where one endpoint serves several"
    )

    strict_model: bool = Field(
        False, description="refuse models that this service does not have, though it is the only one: 404"
    )

    # Turns on GPUs that replicas share
    gpu_slice: float = Field(
        2, gt=0, description="shortest turn while others wait, the first service's for all behind one endpoint"
    )
    max_turn_over: float = Field(
        1, ge=0, description="time by which a turn may be longer, so that answers which end by then are not interrupted"
    )
    priority: int = Field(0, description="models of a higher one have their turns first, and longer ones")
    min_awake: int = Field(0, ge=0, description="replicas that keep their GPUs though others wait")
    idle_after: float | None = Field(
        None, gt=0, description="a replica that dozes unused for so long moves its weights to host memory; none: never"
    )

    # Admission
    max_in_flight: int | None = Field(
        None, gt=0, description="generating requests a replica may hold; none: as many as it says itself"
    )
    max_pending: int | None = Field(
        None, gt=0, description="requests a replica may hold that it has not begun to answer; none: no such limit"
    )
    queue_size: int = Field(
        1024, ge=0, description="requests that may wait for room; beyond: 429, for whoever has most of them"
    )
    queue_timeout: float = Field(
        60, gt=0, description="time a request may wait for room; beyond, or on arrival where it would be longer: 429"
    )
    start_wait: float = Field(
        600, ge=0, description="time a generating request waits for a replica that is being started"
    )

    # The fleet
    ready_interval: float = Field(1, gt=0, description="time between two probes of a replica's /ready")
    ready_timeout: float = Field(5, gt=0, description="time /ready may take")
    silence_timeout: float = Field(
        60,
        gt=0,
        description="silence of a replica with requests before it is asked whether it lives, and time to say so",
    )
    ejection_time: float = Field(10, gt=0, description="how long a replica is ejected; the n-th time n times as long")
    max_ejection_time: float = Field(
        300, gt=0, description="longest ejection, and the time without one after which the count begins anew"
    )

    # Leaving
    drain_grace: float = Field(5, ge=0, description="time the port stays open after SIGTERM, while /ready answers 503")
    drain_timeout: float = Field(600, ge=0, description="time answers in flight have after that")

    def renew(self, other: "Settings") -> None:
        """Takes over the values of `other`."""
        for name in type(self).model_fields:
            setattr(self, name, getattr(other, name))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "x-groundserve") -> "Settings":
        """Settings from the keys of a file or command line. Raises ConfigError with one line that names the key."""
        for key in values:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.0)
                raise ConfigError(f"{where}: unknown key '{key}'; the nearest known one is '{near[0]}'")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as failure:
            first = failure.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{where}: {key}: {first['msg'].lower()} (given: {first['input']!r})") from None
