"""The Kubernetes engine: a bare pod for each replica, balancers as a Deployment; both outlive their controller.

The controller runs wherever kubectl reaches the cluster, or as the Deployment of `groundserve manifests`, which applies
all that stands in the cluster, so that the controller there may do no more than look after pods.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from balancer.contract.listing import ReplicaListing
from balancer.contract.words import State
from balancer.errors import ConfigError
from balancer.inherited import tell
from balancer.operate.engines.addresses import Addresses, AddressFlags
from balancer.operate.engines.child import Child
from balancer.operate.engines.engine import CannotStart, Ended, Survivor
from balancer.operate.engines.first_words import FirstWords
from balancer.operate.engines.kubernetes import objects, replica_pods, standing
from balancer.operate.engines.kubernetes.balancer_handle import KubernetesBalancer
from balancer.operate.engines.kubernetes.cluster import Cluster, Pod
from balancer.operate.recipe.recipe import Invocation, Recipe
from balancer.operate.state import keys
from balancer.operate.state.desired import Desired
from balancer.operate.state.service_folder import ServiceFolder
from balancer.spec import text_file
from balancer.spec.schema import MOST_REPLICAS
from balancer.spec.service_file import parse

# Seconds between two questions for all pods of the service.
_LOOK = 2.0
# Seconds beyond its grace after which a pod that was told to end is removed whether its node answers or not.
_MARGIN = 20.0
# Seconds after which a log that broke off is followed again, and a pod that is still there removed again.
_AGAIN = 2.0


@dataclass(slots=True)
class _Replica:
    """`pods` are one for each of its nodes, the first of which serves."""

    pods: tuple[Pod, ...]
    seen: float  # loop time, in seconds
    words: FirstWords
    gone: asyncio.Event
    is_followed: bool = False
    is_stopping: bool = False
    end: Ended | None = None  # once a pod of it has ended, or is missing

    @property
    def first(self) -> Pod:
        return self.pods[0]

    @property
    def is_cut_off(self) -> bool:
        return any(pod.is_cut_off for pod in self.pods)

    @property
    def ends_in(self) -> float | None:
        """Seconds after which the first of its pods is killed, of those that were told to end; None if none was."""
        return min((pod.ends_in for pod in self.pods if pod.ends_in is not None), default=None)

    @property
    def is_half_placed(self) -> bool:
        """Does it hold a part of its nodes while no other is free?"""
        return any(pod.node for pod in self.pods) and any(pod.reason and not pod.node for pod in self.pods)


class KubernetesEngine:
    """An `Engine` that keeps logs and keys in `folder`."""

    name = "kubernetes"
    most_replicas = MOST_REPLICAS
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
        self._following: set[asyncio.Task[None]] = set()  # each appends a pod's output to its log
        # Why nobody says what runs, and since when; empty while the API server answers.
        self._silence = ""
        self._starting: set[int] = set()  # replicas whose pods are being created
        # Recipes, by digest: those of the starts under way, those whose Secret we made, and those that may have one, of
        # which nothing is known before the first look.
        self._begun: Counter[str] = Counter()
        self._with_secret: set[str] = set()
        self._may_have_secret: set[str] | None = None
        self._secrets = asyncio.Lock()  # so that none is removed that a start has just made
        self._written_down = ""  # in the cluster, of what the service is meant to be
        self._cannot_write = ""

    def suits(self, recipe: Recipe) -> bool:
        """Never: whoever has a cluster says so."""
        return False

    def fit(self, recipe: Recipe, running: int = 0) -> tuple[Recipe, list[str]]:
        section = objects.check(recipe)
        if self._cluster is not None and not self._cluster.is_where(section):
            raise ConfigError(
                f"{recipe.spec.source}: x-groundserve.kubernetes: the service stays in its namespace and cluster: take "
                "it down, and up again"
            )
        warnings = []
        if not recipe.gpus and "replica-cpu" not in section.image:
            warnings.append(f"{recipe.spec.source}: without resources.accelerators, a pod gets no GPU")
        kinds = "|".join(recipe.spec.accelerators)
        resources, nodes = f"{recipe.gpus}x {kinds}" if recipe.gpus else "1x CPU", recipe.spec.num_nodes
        resources = f"{nodes}x ({resources})" if nodes > 1 else resources
        return replace(recipe, resources=resources, fits=None, surroundings=objects.surroundings(recipe)), warnings

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
        stands: Callable[[Recipe], list[objects.Object]] | None = None
        if not self.is_kept_up:
            secret = {objects.ADMIN_KEY: key}
            if self._key is not None:
                secret[objects.REPLICA_KEY] = self._key
            if where.api_keys is not None:
                flag = f"--api-keys {where.api_keys}"
                secret[objects.API_KEYS] = text_file.read(Path(where.api_keys), flag, "a file with keys")

            def stands(one: Recipe) -> list[objects.Object]:
                return standing.without_controller(one, secret, is_open=where.is_open, api=self._api)

        self._balancer = KubernetesBalancer(self._here, self._folder, where, recipe, file, key, stands)
        return self._balancer

    @property
    def fields(self) -> Mapping[str, str]:
        return keys.bearing(self._key) if self._key is not None else {}

    @property
    def _here(self) -> Cluster:
        assert self._cluster is not None, "prepare comes first"
        return self._cluster

    async def found(self) -> tuple[Survivor, ...]:
        there = await self._here.pods()
        for id, pods in _by_id(there).items():
            if id in self._replicas:
                continue
            if not _is_whole(pods) or any(pod.is_over for pod in pods):
                await self._forget(pods)
            else:
                self._take(id, pods, FirstWords(self._folder.replica_log(id)))  # to which its output is appended anew
        self._note_balancers(there)
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return tuple(
            Survivor(id, self._listing(id), replica.first.labels[objects.DIGEST])
            for id, replica in self._replicas.items()
        )

    async def start(self, id: int, recipe: Recipe) -> None:
        if recipe.spec.num_nodes > 1 and (half := self._half_placed()):
            self._ended.append(_left_to(half[0], id))
            self.changed.set()
            return
        self._starting.add(id)
        self._begun[recipe.digest] += 1
        try:
            await self._start(id, recipe)
        finally:
            self._starting.discard(id)
            self._begun[recipe.digest] -= 1

    async def _start(self, id: int, recipe: Recipe) -> None:
        if not self._owner:
            self._owner = await self._here.uid("configmap", objects.config_map_name(recipe.spec.name))
        words = FirstWords(self._folder.replica_log(id))
        secret = await self._secret_of(recipe)
        made = replica_pods.pods_of(id, recipe, self._owner, secret)
        try:
            await self._here.create(made)
        except CannotStart:
            # Perhaps an earlier start, whose answer was lost. Of several pods some may be there.
            there = _by_id(await self._here.pods()).get(id, ())
            is_ours = all(pod.labels[objects.DIGEST] == recipe.digest for pod in there)
            is_new = all(pod.ends_in is None and not pod.is_over and not pod.is_cut_off for pod in there)
            if not (_is_whole(there) and is_ours and is_new):
                await self._forget(there)
                raise
        pods = _by_id(await self._here.pods()).get(id, ())
        if not _is_whole(pods):
            await self._forget(pods)
            raise CannotStart("its pod was removed by somebody else")
        self._take(id, pods, words)

    async def _secret_of(self, recipe: Recipe) -> str:
        """The name of the Secret that has the recipe's, which is made if it is not there. Raises CannotStart.

        Each has one of its own: pods of an old version start again while a new one comes. A controller in the cluster
        may not make any: there it stands beside the file, of which it knows one version only.
        """
        name = objects.secrets_name(recipe.spec.name)
        if self.is_kept_up:
            return name
        name, values = f"{name}-{recipe.digest}", standing.secrets_of(recipe)
        async with self._secrets:
            if values and recipe.digest not in self._with_secret:
                if self._may_have_secret is not None:
                    self._may_have_secret.add(recipe.digest)
                await self._here.apply([standing.secret_of_pods(name, recipe, values, self._owner)])
                self._with_secret.add(recipe.digest)
        return name

    async def _clear_secrets(self, pods: Collection[Pod]) -> None:
        """Removes the Secrets of recipes that no pod bears any more. Raises CannotStart."""
        if self.is_kept_up:
            return
        async with self._secrets:
            there = [*(pod for pod in pods if _id_of(pod) is not None), *(one.first for one in self._replicas.values())]
            kept = {pod.labels[objects.DIGEST] for pod in there} | set(+self._begun)
            if self._may_have_secret is None or not self._may_have_secret <= kept:
                self._with_secret &= kept  # before the removal, whose answer may be lost
                await self._here.remove("secret", "-l", objects.secrets_but(self._folder.name, kept))
                self._may_have_secret = kept if self._may_have_secret is None else self._may_have_secret & kept

    async def stop(self, id: int, grace: float) -> None:
        replica = self._replicas.get(id)
        if replica is None:
            return
        replica.is_stopping = True
        # The other pods of a replica have to stay until the first one has finished its answers.
        if not replica.is_cut_off:
            await self._here.delete(replica.first.name, grace=grace)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone(replica), grace + _MARGIN)
                return
        # Its node is gone, or hangs, which Kubernetes may say only later. Should it come back, it ends what the API no
        # longer knows.
        while not replica.gone.is_set():
            await self._forget(replica.pods)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(replica.gone.wait(), _AGAIN)

    async def _forget(self, pods: Collection[Pod]) -> None:
        """Removes what there is of a replica: it has all of its pods or none. Raises CannotStart.

        A pod whose node answers keeps its GPUs until its processes are gone. Removed by force, it would lie on in
        silence, and its successor find the GPUs in use; so it is killed, and gone a moment later.
        """
        if by_force := [pod.name for pod in pods if pod.is_cut_off or pod.is_over]:
            await self._here.forget(*by_force)
        if to_kill := [pod.name for pod in pods if pod.name not in by_force]:
            await self._here.delete(*to_kill, grace=0)

    async def _gone(self, replica: _Replica) -> None:
        """Returns when its pod is gone, or its node is."""
        while not replica.gone.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(replica.gone.wait(), 1)
            if replica.is_cut_off:
                raise TimeoutError

    def running(self) -> Mapping[int, ReplicaListing]:
        return {id: self._listing(id) for id in self._replicas}

    def _listing(self, id: int) -> ReplicaListing:
        replica = self._replicas[id]
        pod, words = replica.first, replica.words
        runs = all(each.phase == "Running" for each in replica.pods) and bool(pod.address)
        why = next((each.reason for each in replica.pods if each.reason), "")
        state, reason = words.state() if runs else (State.PROVISIONING, why)
        ends_in = replica.ends_in
        if ends_in is not None or replica.end is not None:
            state = State.SHUTTING_DOWN
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
            node=",".join(each.node for each in replica.pods if each.node),
            ends_in_seconds=None if replica.is_stopping else ends_in,
            state=state,
            reason=reason or self._silence,
        )

    def ended(self) -> tuple[Ended, ...]:
        ended, self._ended = self._ended, []
        return tuple(ended)

    def lost(self, suspects: Collection[int]) -> Mapping[int, str]:
        # Where another's node is gone, the first pod may go on answering probes.
        return {
            id: f"{next(pod.node for pod in replica.pods if pod.is_cut_off)} does not answer its cluster"
            for id, replica in self._replicas.items()
            if replica.is_cut_off and (id in suspects or not replica.first.is_cut_off)
        }

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        for replica in self._replicas.values():
            replica.gone.set()
        await asyncio.gather(*self._following)
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
                with contextlib.suppress(CannotStart):  # the next look tries again
                    await self._clear_secrets(pods)
            except Exception as failure:  # whatever it is, the next look comes
                self._silence = self._silence or (
                    f"since {time.strftime('%H:%M:%S')} it is unknown whether it runs: {failure}"
                )
            if self.is_kept_up:
                await self._write_down()

    async def _write_down(self) -> None:
        """Keeps in the cluster what the service is meant to be: the folder goes with this pod, by a drain, say."""
        try:
            desired = self._folder.desired
            text = desired.to_text() if desired is not None else ""
            if text and text != self._written_down:
                changed = {"data": {objects.DESIRED: text}}
                await self._here.patch("configmap", objects.state_name(self._folder.name), changed)
                self._written_down = text
            self._cannot_write = ""
        except (CannotStart, ConfigError) as failure:  # the next look tries again
            if not self._cannot_write:
                tell(sys.stderr, f"a controller in another pod would know an older state of the service: {failure}")
            self._cannot_write = str(failure)

    def _note_balancers(self, pods: Collection[Pod]) -> None:
        if self._balancer is not None:
            self._balancer.note(list(pods))

    async def _note(self, pods: Collection[Pod], asked: float) -> None:
        """These pods there are; the question was asked at that loop time."""
        by_id = _by_id(pods)
        strays = by_id.keys() - self._replicas.keys() - self._starting
        for id, replica in list(self._replicas.items()):
            there = by_id.get(id, ())
            over = next((pod for pod in there if pod.is_over), None)
            if _is_whole(there):
                replica.pods, replica.seen = there, asked
                if over is None:
                    self._keep_log(id, replica)
                    continue
            elif replica.seen >= asked:
                continue  # it was not there yet when it was asked
            removed = Ended(id, "its pod was removed by somebody else", is_blameless=True)
            replica.end = replica.end or (removed if over is None else _end_of(id, over))
            with contextlib.suppress(CannotStart):  # the next look finds it again
                await self._give_up(id, there)
        # The answer to their creation was lost, and nobody wants them any more.
        for id in strays - self._replicas.keys() - self._starting:
            with contextlib.suppress(CannotStart):  # likewise
                await self._forget(by_id[id])
        await self._uncross()

    async def _give_up(self, id: int, there: Collection[Pod]) -> None:
        """Removes what is left of it; it is gone once no pod of it runs any more. Raises CannotStart."""
        await self._forget(there)
        if any(not pod.is_over and not pod.is_cut_off for pod in there):
            return
        replica = self._replicas.pop(id)
        if not replica.is_stopping and replica.end is not None:
            self._ended.append(replica.end)
        replica.gone.set()
        self.changed.set()

    async def _uncross(self) -> None:
        """Of several replicas that hold a part of their nodes each, and wait for the others', only the first may."""
        half = self._half_placed()
        for id in half[1:]:
            replica = self._replicas[id]
            replica.end = _left_to(half[0], id)
            with contextlib.suppress(CannotStart):  # the next look finds it again
                await self._give_up(id, replica.pods)

    def _half_placed(self) -> list[int]:
        return [id for id, replica in sorted(self._replicas.items()) if replica.is_half_placed and not replica.end]

    def _keep_log(self, id: int, replica: _Replica) -> None:
        """Follows its output, once it prints any."""
        if replica.is_followed or replica.first.phase != "Running":
            return
        replica.is_followed = True
        following = asyncio.create_task(self._follow(id, replica))
        self._following.add(following)
        following.add_done_callback(self._following.discard)

    def _take(self, id: int, pods: tuple[Pod, ...], words: FirstWords) -> None:
        self._folder.trim_replica_logs({id, *self._replicas})
        if (former := self._replicas.get(id)) is not None:
            former.gone.set()  # else its output would be followed for ever
        self._replicas[id] = _Replica(pods, asyncio.get_running_loop().time(), words, asyncio.Event())

    async def _follow(self, id: int, replica: _Replica) -> None:
        """Appends the pod's output to the replica's log until the pod is gone; then removes what is left of it."""
        log, since = self._folder.replica_log(id), ""
        while not replica.gone.is_set():
            command = self._here.command("logs", "--follow", *([since] if since else []), replica.first.name)
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
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(replica.gone.wait(), _AGAIN)


def _left_to(first: int, id: int) -> Ended:
    return Ended(id, f"it leaves free nodes to replica {first}, which has a part of its own", waits_for_gpu=True)


def _end_of(id: int, pod: Pod) -> Ended:
    """Evicted, preempted or deleted by somebody else: that is no failure of its own."""
    if pod.exit_code is None:
        return Ended(id, pod.last_words or "its pod ended", is_blameless=True, counts_if_never_ready=True)
    return replace(Ended.by(id, pod.exit_code, pod.last_words), is_blameless=pod.ends_in is not None)


def _by_id(pods: Collection[Pod]) -> dict[int, tuple[Pod, ...]]:
    """The pods of each replica, by rank."""
    found: dict[int, list[Pod]] = {}
    for pod in sorted(pods, key=_rank_of):
        if (id := _id_of(pod)) is not None:
            found.setdefault(id, []).append(pod)
    return {id: tuple(each) for id, each in found.items()}


def _is_whole(pods: Collection[Pod]) -> bool:
    """Is there one on each node?"""
    wanted = next(iter(pods)).labels.get(objects.NODES, "1") if pods else ""
    return str(len(pods)) == wanted


def _rank_of(pod: Pod) -> int:
    rank = pod.labels.get(objects.RANK, "0")
    return int(rank) if rank.isdecimal() else 0


def _id_of(pod: Pod) -> int | None:
    """None unless it is a replica's and bears all that we write on one: others may use our labels, too."""
    number, version = pod.labels.get(objects.ID, ""), pod.labels.get(objects.VERSION, "")
    is_ours = pod.component in ("replica", objects.PART) and version.isdecimal() and objects.DIGEST in pod.labels
    return int(number) if is_ours and number.isdecimal() else None
