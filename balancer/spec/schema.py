"""SkyServe's service YAML as frozen models: its keys, and which of them have no effect here."""

import re
import shlex
from typing import Annotated, Any

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from balancer.spec.document import NoMeaning, Refused
from balancer.spec.kubernetes import Kubernetes
from balancer.spec.settings import PolicyName, ReadinessProbe

Cloud = Annotated[Any, NoMeaning("replicas run on this machine, not in a cloud")]
Spot = Annotated[Any, NoMeaning("there are no spot instances on owned hardware")]
Disk = Annotated[Any, NoMeaning("replicas use this machine's disks as they are")]
Sky = Annotated[Any, NoMeaning("it concerns SkyPilot's own machinery")]
Files = Annotated[Any, NoMeaning("nothing is copied: replicas run on this machine and see its files")]
Setup = Annotated[
    Any, NoMeaning("it is not run: what `run` needs must be installed here; SGLang comes with groundserve")
]
Image = Annotated[Any, NoMeaning("replicas run in this machine's own environment")]
Recovery = Annotated[Any, NoMeaning("a replica that dies is always started again")]
NO_POOLS = "job pools have no endpoint to serve; write `service:` with `replicas:`"
Pool = Annotated[Any, Refused(NO_POOLS)]
Stored = Annotated[Any, Refused("there is no secret store here; give the value with --secret NAME=VALUE")]


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


def _starts_with_slash(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("should start with a slash (/)")
    if not path.isprintable():
        raise ValueError("should be one line of printable characters")
    return path


def _fits_an_argument(script: str) -> str:
    # Linux's limit for one argument of a process, its terminating NUL included.
    if len(script.encode()) >= 128 << 10:
        raise ValueError("should be less than 128 KiB: move it into a script file")
    return script


def _folder(value: object) -> object:
    if isinstance(value, dict):
        raise ValueError("should be a folder: nothing is cloned here, so clone it and give its path")
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _check_size(data: object, depth: int = 0) -> int:
    """The number of values in parsed JSON. Raises ValueError for data that the balancer would refuse."""
    if depth > 40:
        raise ValueError("post_data should be smaller: at most 5,000 values, 40 deep")
    if isinstance(data, str) and "\0" in data:
        raise ValueError("post_data should not contain a NUL")
    parts = [*data, *data.values()] if isinstance(data, dict) else data if isinstance(data, list) else []
    count = 1 + sum(_check_size(part, depth + 1) for part in parts)
    if count > 5000:
        raise ValueError("post_data should be smaller: at most 5,000 values, 40 deep")
    return count


# More than anybody has: what is larger is a slip of the finger.
MOST_REPLICAS = 10_000

# Numbers may be text: `replicas: $REPLICAS` is filled in with a string.
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=MOST_REPLICAS)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(ge=0)]
Amount = Annotated[str | float | None, BeforeValidator(_no_bool)]
Port = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class Probe(ReadinessProbe):
    """`service.readiness_probe`: a path, or an object whose `post_data` may be a string that holds JSON."""

    path: Annotated[str, AfterValidator(_starts_with_slash)]

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"path": value}
        if isinstance(value, dict) and isinstance(value.get("post_data"), str):
            try:
                data = orjson.loads(value["post_data"])
            except orjson.JSONDecodeError:
                raise ValueError("post_data should be an object, or a string that holds JSON") from None
            _check_size(data)
            return value | {"post_data": data}
        return value


class LoadBalancer(_Section):
    """`service.load_balancer`."""

    # Seconds of silence allowed within an answer; x-groundserve calls it idle_timeout.
    stream_timeout_seconds: Annotated[float, BeforeValidator(_no_bool), Field(gt=0)] | None = None


class Tls(_Section):
    """`service.tls`: PEM files with the endpoint's key and certificate."""

    keyfile: str
    certfile: str


class ReplicaPolicy(_Section):
    """`service.replica_policy`: how many replicas, depending on load. Times are in seconds."""

    min_replicas: Count
    max_replicas: Count | None = None
    # Requests per second for one replica; by GPU type with instance_aware_least_load.
    target_qps_per_replica: Number | dict[str, Number] | None = None
    # How long the load must call for more, or fewer, replicas before their number changes.
    upscale_delay_seconds: Number = 300
    downscale_delay_seconds: Number = 1200
    num_overprovision: Count = 0
    base_ondemand_fallback_replicas: Spot = None
    dynamic_ondemand_fallback: Spot = None
    spot_placer: Spot = None


class Service(_Section):
    """`service:` as in SkyServe; the policy `prefix_aware` is our addition."""

    readiness_probe: Probe | None = None
    replicas: Count | None = None
    replica_policy: ReplicaPolicy | None = None
    load_balancing_policy: Annotated[PolicyName | None, BeforeValidator(_lower)] = None
    load_balancer: LoadBalancer = LoadBalancer()
    # The port that a replica listens on, if resources.ports does not give it.
    ports: Port | None = None
    tls: Tls | None = None
    pool: Pool = None
    workers: Pool = None


class Resources(_Section):
    """`resources:` of one replica: keys that are checked against this machine, and keys for clouds."""

    accelerators: Any = None
    ports: Any = None
    # Cores, and GB of memory; "4+" means at least 4.
    cpus: Amount = None
    memory: Amount = None
    any_of: list["Resources"] = []
    ordered: list["Resources"] = []
    cloud: Cloud = None
    region: Cloud = None
    zone: Cloud = None
    infra: Cloud = None
    instance_type: Cloud = None
    max_hourly_cost: Cloud = None
    labels: Cloud = None
    accelerator_args: Cloud = None
    network_tier: Cloud = None
    autostop: Cloud = None
    priority: Cloud = None
    priority_class: Cloud = None
    image_id: Image = None
    use_spot: Spot = None
    job_recovery: Recovery = None
    disk_size: Disk = None
    disk_tier: Disk = None
    ephemeral_storage: Disk = None
    local_disk: Disk = None
    volumes: Disk = None


def _slurm_time(value: object) -> object:
    # YAML reads 12:00:00 without quotes as a number of seconds, in base 60.
    if isinstance(value, bool | int | float) or not re.fullmatch(r"\d+(-\d+)?(:\d+){0,2}|UNLIMITED", str(value)):
        raise ValueError("should be text as sbatch takes it, in quotes: '12:00:00', '2-00:00:00', or '90' for minutes")
    return value


def _word(value: str) -> str:
    if not re.fullmatch(r"[\w.,:+@=\[\]-]+", value) or value.startswith("-"):
        raise ValueError("should be one word as sbatch takes it")
    return value


def _node_folder(value: str) -> str:
    if not value.startswith(("/", "$", "~")):
        raise ValueError("should be a whole path on each node's own disk, such as /scratch/$USER")
    return value


def _words(value: str) -> str:
    try:
        shlex.split(value)
    except ValueError:
        raise ValueError("should be the beginning of a command, such as apptainer exec --nv image.sif") from None
    return value


Word = Annotated[str, AfterValidator(_word)]


class Slurm(_Section):
    """`x-groundserve.slurm`: what one replica's job asks of Slurm, in sbatch's own words."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    # The job's time limit, as in '2-00:00:00'.
    time: Annotated[str | None, BeforeValidator(_slurm_time)] = None
    # Instead of gpu:N, where N is what the replica takes.
    gres: Word | None = None
    # Nodes that get no replica, as in 'h1,h[3-5]'.
    exclude: Word | None = None
    # Put before the replica's command, which then runs in that container.
    container: Annotated[str | None, AfterValidator(_words)] = None
    # A folder on each node's own disk, to which models are copied from the shared file system first.
    local_models: Annotated[str | None, AfterValidator(_node_folder)] = None


class Operation(_Section):
    """The keys of `x-groundserve:` about starting and scaling replicas. Times are in seconds."""

    restart_backoff: float = Field(
        1, ge=0, description="wait before a replica that died starts again; doubles each time"
    )
    max_restart_backoff: float = Field(60, ge=0, description="longest such wait")
    restart_limit: int = Field(
        5,
        ge=1,
        description="failures in a row after which a replica of a version that never served is given up; three at the "
        "most for one that was never ready",
    )
    stable_after: float = Field(60, ge=0, description="time being ready after which earlier failures are forgotten")
    min_ready: float = Field(
        10, ge=0, description="time a replica of a new version has to stay ready before an update counts it"
    )
    stop_grace: float = Field(20, ge=0, description="time an idle replica has to end after SIGTERM; then SIGKILL")
    successor_lead: float = Field(
        1800,
        ge=0,
        description="time before a replica's time limit at which its successor starts; at most half of what it has",
    )
    slurm: Slurm | None = Field(None, description="what jobs of `--on slurm` ask for: [Slurm](slurm.md)")
    gpu_share: bool = Field(False, description="replicas share their GPUs, by turns, with other services that say so")
    target_in_flight_per_replica: float | None = Field(
        None, gt=0, description="autoscaling by generating requests in flight and waiting, instead of requests a second"
    )
    kubernetes: Kubernetes | None = Field(
        None, description="what pods of `--on kubernetes` are made of: [Kubernetes](kubernetes.md)"
    )


class Task(_Section):
    """The whole file."""

    name: str | None = None
    service: Service
    resources: Resources = Resources()
    envs: dict[str, Any] | None = None
    secrets: dict[str, Any] | list[str] | None = None
    workdir: Annotated[str | None, BeforeValidator(_folder)] = None
    setup: Setup = None
    run: Annotated[str, AfterValidator(_fits_an_argument)] | None = None
    num_nodes: Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=1024)] = 1
    x_groundserve: dict[str, Any] | None = Field(default=None, alias="x-groundserve")
    file_mounts: Files = None
    file_mounts_mapping: Sky = None
    volumes: Disk = None
    volume_mounts: Disk = None
    managed_secrets: Stored = None
    event_callback: Sky = None
    inputs: Sky = None
    outputs: Sky = None
    config: Sky = None
    api_server_access: Sky = None
    pool: Pool = None
