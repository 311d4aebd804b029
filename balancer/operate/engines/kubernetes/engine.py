"""The Kubernetes engine: a bare pod for each replica, balancers as a Deployment; both outlive their controller.

The controller runs wherever kubectl reaches the cluster, or as the Deployment of `groundserve manifests`, which applies
all that stands in the cluster, so that the controller there may do no more than look after pods.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from balancer.contract.listing import ReplicaListing
from balancer.contract.words import State
from balancer.errors import ConfigError
from balancer.operate.engines.addresses import Addresses, AddressFlags
from balancer.operate.engines.child import Child
from balancer.operate.engines.engine import CannotStart, Ended, Survivor
from balancer.operate.engines.first_words import FirstWords
from balancer.operate.engines.kubernetes import objects
from balancer.operate.engines.kubernetes.balancer_handle import KubernetesBalancer
from balancer.operate.engines.kubernetes.cluster import Cluster, Pod
from balancer.operate.recipe.recipe import Invocation, Recipe
from balancer.operate.state import keys
from balancer.operate.state.desired import Desired
from balancer.operate.state.service_folder import ServiceFolder
from balancer.spec import text_file
from balancer.spec.service_file import parse

# Seconds between two questions for all pods of the service.
_LOOK = 2.0
# Seconds beyond its grace after which a pod that was told to end is removed whether its node answers or not.
_MARGIN = 20.0
# Seconds after which a log that broke off is followed again.
_AGAIN = 2.0


@dataclass(slots=True)
class _Replica:
    pod: Pod
    seen: float  # loop time, in seconds
    words: FirstWords
    gone: asyncio.Event
    following: asyncio.Task[None] | None = None
    is_stopping: bool = False


class KubernetesEngine:
    """An `Engine` that keeps logs and keys in `folder`."""

    name = "kubernetes"
    outlives_controller = True

    def __init__(self, folder: ServiceFolder) -> None:
        self.changed = asyncio.Event()
        # A cluster that ends its controller's pod starts another one.
        self.is_kept_up = objects.IS_KEPT_UP in os.environ
        self._folder = folder
        self._cluster: Cluster | None = None
        self._addresses: Addresses | None = None
        self._balancer: KubernetesBalancer | None = None
        self._key: str | None = None  # that replicas require
        self._api: tuple[int, int] | None = None
        self._owner = ""
        self._replicas: dict[int, _Replica] = {}
        self._ended: list[Ended] = []
        self._watching: asyncio.Task[None] | None = None
        # Why nobody says what runs, and since when; empty while the API server answers.
        self._silence = ""
        self._secrets: Mapping[str, str] = {}  # as they were last applied

    def suits(self, recipe: Recipe) -> bool:
        """Never: whoever has a cluster says so."""
        return False

    def fit(self, recipe: Recipe, running: int = 0) -> tuple[Recipe, list[str]]:
        section = objects.check(recipe)
        warnings = []
        if not recipe.gpus and "replica-cpu" not in section.image:
            warnings.append(f"{recipe.spec.source}: without resources.accelerators, a pod gets no GPU")
        kinds = "|".join(recipe.spec.accelerators)
        return replace(recipe, resources=f"{recipe.gpus}x {kinds}" if recipe.gpus else "1x CPU", fits=None), warnings

    def placement(self, recipe: Recipe) -> list[str]:
        return ["Kubernetes decides which node a replica runs on"]

    def take_down(self) -> None:
        desired = self._folder.desired
        version = desired.version(desired.serving) if desired is not None else None
        if version is None:
            return
        spec = parse(version.text, source=version.source, name=self._folder.name, envs=version.envs)
        Cluster(spec.name, objects.of(spec)).take_down()

    def prepare(self, recipe: Recipe, flags: AddressFlags, left: Desired | None = None) -> Addresses:
        section = objects.check(recipe)
        if flags.join is not None:
            raise ConfigError(f"--join {flags.join}: on Kubernetes each service has balancers of its own")
        here = objects.endpoint(recipe.spec)
        admin = f"{objects.balancers_name(recipe.spec.name)}.{section.namespace}"
        if flags.listen not in (None, here) or flags.admin not in (None, admin):
            raise ConfigError(
                "--listen, --admin: a Service has the endpoint: see x-groundserve.kubernetes.service_type"
            )
        if not flags.is_open and flags.api_keys is None:
            raise ConfigError(
                "on Kubernetes: give --api-keys FILE, or say --open to let everyone who reaches it use it"
            )
        self._cluster = Cluster(recipe.spec.name, section)
        self._api = self._cluster.check()
        if objects.has_replica_key(recipe):
            given = os.environ.get(keys.KEY_FILE)
            self._key = keys.given(Path(given), keys.KEY_FILE) if given else keys.drawn(self._folder.replica_key_file)
        self._addresses = flags.resolved(here, admin)
        return self._addresses

    def balancer(self, recipe: Recipe) -> KubernetesBalancer:
        where = self._addresses
        assert where is not None, "prepare comes first"
        file = Path(where.admin_key).absolute() if where.admin_key else self._folder.admin_key_file
        key = keys.given(file, "--admin-key") if where.admin_key else keys.drawn(file)
        standing = None
        if not self.is_kept_up:
            secret = {objects.ADMIN_KEY: key}
            if self._key is not None:
                secret[objects.REPLICA_KEY] = self._key
            if where.api_keys is not None:
                flag = f"--api-keys {where.api_keys}"
                secret[objects.API_KEYS] = text_file.read(Path(where.api_keys), flag, "a file with keys")
            standing = objects.standing(recipe, secret, is_open=where.is_open, api=self._api)
            self._secrets = objects.secrets_of(recipe)
        self._balancer = KubernetesBalancer(self._here, self._folder, where, recipe, file, key, standing)
        return self._balancer

    @property
    def fields(self) -> Mapping[str, str]:
        return keys.bearing(self._key) if self._key is not None else {}

    @property
    def _here(self) -> Cluster:
        assert self._cluster is not None, "prepare comes first"
        return self._cluster

    async def found(self) -> tuple[Survivor, ...]:
        pods = await self._here.pods()
        for pod in pods:
            id = _id_of(pod)
            if id is None or id in self._replicas:
                continue
            if pod.is_over:
                await self._here.forget(pod.name)
            if pod.is_over or pod.ends_in is not None:
                continue
            self._take(id, pod, FirstWords.of_running(self._folder.replica_log(id)))
        self._note_balancers(pods)
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return tuple(
            Survivor(id, self._listing(id), replica.pod.labels[objects.DIGEST])
            for id, replica in self._replicas.items()
        )

    async def start(self, id: int, recipe: Recipe) -> None:
        if not self._owner:
            self._owner = await self._here.uid("configmap", objects.config_map_name(recipe.spec.name))
        await self._bring_secrets(recipe)
        words = FirstWords(self._folder.replica_log(id))
        name = objects.pod_name(recipe.spec.name, id)
        try:
            await self._here.create(objects.replica(id, recipe, self._owner))
        except CannotStart as failure:
            if "alreadyexists" not in str(failure).replace(" ", "").lower():
                raise
            # An earlier start, whose answer was lost.
            there = next((pod for pod in await self._here.pods() if pod.name == name), None)
            if there is None or there.labels.get(objects.DIGEST) != recipe.digest or there.is_over or there.is_cut_off:
                await self._here.forget(name)
                raise
        pod = next((pod for pod in await self._here.pods() if pod.name == name), None)
        if pod is None:
            raise CannotStart("its pod was removed by somebody else")
        self._take(id, pod, words)

    async def _bring_secrets(self, recipe: Recipe) -> None:
        secrets = objects.secrets_of(recipe)
        if not self.is_kept_up and secrets != self._secrets:
            await self._here.apply(objects.secret_objects(recipe))
            self._secrets = secrets

    async def stop(self, id: int, grace: float) -> None:
        replica = self._replicas.get(id)
        if replica is None:
            return
        replica.is_stopping = True
        name = replica.pod.name
        if not replica.pod.is_cut_off:
            await self._here.delete(name, grace)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone(replica), grace + _MARGIN)
                return
        # Its node is gone, or hangs. Should it come back, it ends what the API no longer knows.
        await self._here.forget(name)
        await replica.gone.wait()

    async def _gone(self, replica: _Replica) -> None:
        """Returns when its pod is gone, or its node is."""
        while not replica.gone.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(replica.gone.wait(), 1)
            if replica.pod.is_cut_off:
                raise TimeoutError

    def running(self) -> Mapping[int, ReplicaListing]:
        return {id: self._listing(id) for id in self._replicas}

    def _listing(self, id: int) -> ReplicaListing:
        replica = self._replicas[id]
        pod, words = replica.pod, replica.words
        runs = pod.phase == "Running" and bool(pod.address)
        state, reason = words.state() if runs else (State.PROVISIONING, pod.reason)
        # The name that the balancer gives to replicas it finds through DNS, so that each replica has one name only.
        host = f"[{pod.address}]" if ":" in pod.address else pod.address
        place = f"{host}:{objects.PORT}" if runs else pod.name
        return ReplicaListing(
            place,
            f"http://{place}" if runs else "",
            id=id,
            version=int(pod.labels[objects.VERSION]),
            launched_seconds=pod.age + asyncio.get_running_loop().time() - replica.seen,
            infra=self.name,
            resources=words.resources or "-",
            leased=words.leased,
            node=pod.node,
            ends_in_seconds=pod.ends_in if not replica.is_stopping else None,
            state=state,
            reason=reason or self._silence,
        )

    def ended(self) -> tuple[Ended, ...]:
        ended, self._ended = self._ended, []
        return tuple(ended)

    def lost(self, suspects: Collection[int]) -> Mapping[int, str]:
        return {
            id: f"{replica.pod.node} does not answer its cluster"
            for id, replica in self._replicas.items()
            if id in suspects and replica.pod.is_cut_off
        }

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if not self.is_kept_up:
            await self._here.remove_all()

    async def _watch(self) -> None:
        """Asks for all pods of the service, again and again; nothing has ended while nobody says so."""
        while True:
            await asyncio.sleep(_LOOK)
            asked = asyncio.get_running_loop().time()
            try:
                pods = await self._here.pods()
                self._silence = ""
                await self._note(pods, asked)
                self._note_balancers(pods)
            except Exception as failure:  # whatever it is, the next look comes
                self._silence = self._silence or (
                    f"since {time.strftime('%H:%M:%S')} it is unknown whether it runs: {failure}"
                )

    def _note_balancers(self, pods: Collection[Pod]) -> None:
        if self._balancer is not None:
            self._balancer.note(list(pods))

    async def _note(self, pods: Collection[Pod], asked: float) -> None:
        """These pods there are; the question was asked at that loop time."""
        there = {id: pod for pod in pods if (id := _id_of(pod)) is not None}
        for id, replica in list(self._replicas.items()):
            pod = there.get(id)
            if pod is not None:
                replica.pod, replica.seen = pod, asked
                if pod.is_over:
                    with contextlib.suppress(CannotStart):  # the next look finds it again
                        await self._here.forget(pod.name)
                        self._over(id, _end_of(id, pod))
                elif replica.following is None and pod.phase == "Running":
                    replica.following = asyncio.create_task(self._follow(id, replica))
            elif replica.seen < asked:
                self._over(id, Ended(id, "its pod was removed by somebody else", is_blameless=True))

    def _over(self, id: int, how: Ended) -> None:
        replica = self._replicas.pop(id)
        if not replica.is_stopping:
            self._ended.append(how)
        replica.gone.set()
        self.changed.set()

    def _take(self, id: int, pod: Pod, words: FirstWords) -> None:
        self._folder.trim_replica_logs({id, *self._replicas})
        self._replicas[id] = _Replica(pod, asyncio.get_running_loop().time(), words, asyncio.Event())

    async def _follow(self, id: int, replica: _Replica) -> None:
        """Appends the pod's output to the replica's log until the pod is gone; then removes what is left of it."""
        log, since = self._folder.replica_log(id), ""
        while not replica.gone.is_set():
            command = self._here.command("logs", "--follow", *([since] if since else []), replica.pod.name)
            with contextlib.suppress(CannotStart):
                child = await Child.start(Invocation(tuple(command), {}, self._folder.path), log, lambda: None)
                over = asyncio.create_task(replica.gone.wait())
                printed = asyncio.create_task(child.ended())
                try:
                    await asyncio.wait((over, printed), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    over.cancel()
                    if child.code is None:
                        await child.kill()
            since = f"--since={_AGAIN:.0f}s"
            await asyncio.sleep(_AGAIN)


def _end_of(id: int, pod: Pod) -> Ended:
    """Evicted, preempted or deleted by somebody else: that is no failure of its own."""
    if pod.exit_code is None:
        return Ended(id, pod.last_words or "its pod ended", is_blameless=True)
    return replace(Ended.by(id, pod.exit_code, pod.last_words), is_blameless=pod.ends_in is not None)


def _id_of(pod: Pod) -> int | None:
    """None unless it is a replica's and bears all that we write on one: others may use our labels, too."""
    number, version = pod.labels.get(objects.ID, ""), pod.labels.get(objects.VERSION, "")
    is_ours = pod.component == "replica" and version.isdecimal() and objects.DIGEST in pod.labels
    return int(number) if is_ours and number.isdecimal() else None
