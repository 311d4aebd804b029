"""The balancers of a service as a Deployment: Kubernetes keeps them up, and they outlive their controller."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from balancer.errors import ConfigError
from balancer.operate.engines.addresses import Addresses
from balancer.operate.engines.child import Child
from balancer.operate.engines.engine import CannotStart
from balancer.operate.engines.kubernetes import objects
from balancer.operate.engines.kubernetes.cluster import Cluster, Pod
from balancer.operate.engines.ports import free_ports
from balancer.operate.engines.several_balancers import SeveralBalancers
from balancer.operate.recipe.recipe import Invocation, Recipe
from balancer.operate.state.service_folder import ServiceFolder

# Starts of a balancer that never answered after which it is given up.
_STARTS = 3
# Seconds between two attempts to reach a pod from outside.
_AGAIN = 2.0
# Seconds between two looks at whether they are gone.
_LOOK = 0.5


class KubernetesBalancer(SeveralBalancers):
    """The pods of the Deployment. Outside of the cluster each is reached by `kubectl port-forward`.

    `stands` says what the service consists of, which is applied unless the cluster's own controller runs it.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: ServiceFolder,
        where: Addresses,
        recipe: Recipe,
        key_file: Path,
        key: str,
        stands: Callable[[Recipe], list[objects.Object]] | None,
    ) -> None:
        super().__init__(where.admin, key_file, key)
        self._cluster = cluster
        self._folder = folder
        self._where = where
        self._recipe = recipe
        self._stands = stands
        self._is_applied = False
        self._pods: dict[str, Pod] = {}
        self._forwards: dict[str, _Forward] = {}

    @property
    def endpoint(self) -> str:
        return self._where.endpoint(self._recipe)

    def note(self, pods: Sequence[Pod]) -> None:
        """These are the pods of the service now."""
        self._pods = {pod.name: pod for pod in pods if pod.component == "balancer"}
        if self._pods:
            self.starts = max(self.starts, 1 + sum(pod.restarts for pod in self._pods.values()))

    def addresses(self) -> Mapping[str, str]:
        there = {
            f"{pod.name}/{pod.restarts}": pod
            for pod in self._pods.values()
            if pod.phase == "Running" and pod.address and not pod.is_cut_off
        }
        if self._stands is None:
            return {name: f"{pod.address}:{objects.ADMIN_PORT}" for name, pod in there.items()}
        for name in self._forwards.keys() - there.keys():
            self._forwards.pop(name).close()
        for name, pod in there.items():
            if name not in self._forwards:
                command = self._cluster.command("port-forward", "--address", "127.0.0.1", f"pod/{pod.name}")
                self._forwards[name] = _Forward(command, self._folder.path)
        return {name: f"127.0.0.1:{forward.port}" for name, forward in self._forwards.items()}

    async def keep_up(self) -> None:
        """Applies what stands in the cluster, the first time; then Kubernetes keeps it up."""
        for pod in self._pods.values():
            if not self.has_answered and pod.restarts >= _STARTS:
                raise CannotStart(f"the balancer cannot start: {pod.last_words}")
        if self._stands is not None and not self._is_applied:
            await self._cluster.apply(self._stands(self._recipe))
            self._is_applied = True

    async def renew(self, recipe: Recipe) -> None:
        """They look at their file themselves, within a minute of the ConfigMap's change. With another image, say,
        Kubernetes replaces them, one after the other.
        """
        if self._stands is not None:
            before, wanted = ([*self._stands(one)] for one in (self._recipe, recipe))
            await self._cluster.apply(wanted)
            there = {(one["kind"], one["metadata"]["name"]) for one in wanted}
            for one in before:
                kind, name = one["kind"], one["metadata"]["name"]
                if (kind, name) not in there:
                    await self._cluster.remove(kind.lower(), name)
        self._recipe = recipe

    async def replace(self) -> None:
        """One after the other, each only when the one before is ready."""
        if self._stands is None:
            deployment = f"deployment/{objects.balancers_name(self._recipe.spec.name)}"
            raise ConfigError(
                f"the controller in the cluster looks after replicas: kubectl rollout restart {deployment}"
            )
        await self._cluster.restart(objects.balancers_name(self._recipe.spec.name))

    async def stop(self, hurry: asyncio.Event) -> None:
        """Tells all to end, and returns when they have finished their answers, or at once if `hurry` is set."""
        name = objects.balancers_name(self._recipe.spec.name)
        await self._cluster.remove("deployment", name)
        is_hurried = False
        while there := [pod for pod in await self._cluster.pods() if pod.component == "balancer"]:
            if hurry.is_set() and not is_hurried:
                is_hurried = True
                await asyncio.gather(*(self._cluster.forget(pod.name) for pod in there))
            await asyncio.gather(
                *(self._cluster.forget(pod.name) for pod in there if pod.is_cut_off or pod.ends_in == 0)
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(hurry.wait(), _LOOK) if not is_hurried else await asyncio.sleep(_LOOK)
        for forward in self._forwards.values():
            forward.close()
        await self.leave()


class _Forward:
    """`kubectl port-forward` to one pod, started again whenever it ends."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        (self.port,) = free_ports(1)
        self._command = (*command, f"{self.port}:{objects.ADMIN_PORT}")
        self._folder = folder
        self._task = asyncio.create_task(self._run())

    def close(self) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(CannotStart):
                child = await Child.start(
                    Invocation(self._command, {}, self._folder), self._folder / "port-forward.log", lambda: None
                )
                try:
                    await child.ended()
                except asyncio.CancelledError:
                    await child.kill()
                    raise
            await asyncio.sleep(_AGAIN)
