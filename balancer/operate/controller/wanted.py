"""How many replicas of each version are wanted, given manual scaling, autoscaling and updates.

Pure: no processes, no sockets, and times come from the controller.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from balancer.errors import ConfigError
from balancer.operate.controller import rollout
from balancer.operate.controller.autoscale import Autoscaler, rule_for
from balancer.operate.controller.plan import Replica
from balancer.operate.controller.rollout import Mode, RolloutStatus
from balancer.operate.engines.engine import Survivor
from balancer.operate.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Load:
    """Generating requests: those that arrived since the last look, those at replicas, and those that wait for one.

    `turned_away` counts those refused since the last look because everything was full.
    """

    arrived: int = 0
    in_flight: int = 0
    queued: int = 0
    turned_away: int = 0


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """How an update ended; `failure` is empty if it succeeded."""

    version: int
    failure: str = ""


class Wanted:
    """The wanted number of replicas, the version that serves, and the version that is being rolled out, if any."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipes = {recipe.version: recipe}
        self.target = recipe.spec.min_replicas
        self.serving = recipe
        self.coming: Recipe | None = None
        self._mode: Mode = "rolling"
        self._is_switched = False
        self._autoscaler = _autoscaler(recipe)

    @property
    def newest(self) -> Recipe:
        return self.coming or self.serving

    @property
    def is_asleep(self) -> bool:
        """Is the service scaled to zero because there is no load?"""
        return self.target == 0 and self._autoscaler is not None

    @property
    def hidden(self) -> int | None:
        """The version whose replicas the balancer must not know about yet, so that they get no requests."""
        if self.coming is None or self._mode == "rolling" or self._is_switched:
            return None
        return self.coming.version

    def adopt(self, survivors: Collection[Survivor]) -> None:
        """Continues where an earlier controller stopped: with its versions, and an update to our recipe if they differ.

        The recipes of those other versions are unknown, so a replica of them that ends is restarted with our recipe.
        """
        ours, digest = self.serving, self.serving.digest
        alike = {survivor.listing.version for survivor in survivors if survivor.digest == digest}
        others = {survivor.listing.version for survivor in survivors} - alike
        for version in others:
            self.recipes[version] = replace(ours, version=version)
        newest = max(alike | others)
        version = newest if newest in alike else newest + 1
        ours = self.recipes[version] = replace(ours, version=version)
        if others:
            self.serving, self.coming = self.recipes[max(others)], ours
        else:
            self.serving = ours

    def scale(self, target: int) -> None:
        """Sets the target; raises ConfigError if the service autoscales or the machine or script does not allow it."""
        recipe = self.newest
        name, policy = recipe.spec.name, recipe.spec.service.replica_policy
        if policy is not None and recipe.spec.autoscales:
            upper = "as many as fit" if policy.max_replicas is None else policy.max_replicas
            raise ConfigError(
                f"{name} scales with its load, {policy.min_replicas} to {upper}: "
                "change its replica_policy with groundserve update"
            )
        if recipe.fixed_port is not None and target > 1:
            raise ConfigError(f"{name} listens on port {recipe.fixed_port} only: it can have one replica")
        if recipe.fits is not None and target > recipe.fits:
            raise ConfigError(f"{name} with {target} replicas does not fit: this machine holds {recipe.fits}")
        self.target = target

    def update(self, recipe: Recipe, mode: Mode) -> None:
        """Makes this version the wanted one; raises ConfigError if it cannot be rolled out in this mode."""
        if self.coming is not None:
            raise ConfigError(f"{recipe.spec.name} is being updated to version {self.coming.version}: wait for its end")
        total = self.target if recipe.spec.autoscales else recipe.spec.min_replicas
        has_new_probe = recipe.readiness_probe != self.serving.readiness_probe and not recipe.starts_like(self.serving)
        obstacle = self._obstacle(recipe, 2 * total)
        if has_new_probe and obstacle:
            raise ConfigError(
                f"replicas and readiness_probe change together, and {obstacle}: update with the new readiness_probe "
                "alone first, or take the service down and up again"
            )
        if mode == "blue_green" and obstacle:
            raise ConfigError(f"{obstacle}: use --mode rolling")
        if mode == "rolling" and has_new_probe:
            raise ConfigError("replicas and readiness_probe change together: use --mode blue_green")
        self.recipes[recipe.version] = recipe
        self._autoscaler = _autoscaler(recipe)
        self.target = total
        if recipe.starts_like(self.serving):
            self.serving = recipe
        else:
            self.coming, self._mode, self._is_switched = recipe, mode, False

    def _obstacle(self, recipe: Recipe, total: int) -> str:
        """Why that many replicas, of both versions, cannot run side by side; empty if they can."""
        if recipe.fits is not None and recipe.fits < total:
            wants = f"blue_green wants both versions side by side, {total} replicas"
            return f"{wants}, and this machine holds {recipe.fits}"
        if recipe.fixed_port is not None and recipe.fixed_port == self.serving.fixed_port:
            return f"both versions would listen on port {recipe.fixed_port}"
        return ""

    def counts(
        self, replicas: Collection[Replica], load: Load, now: float
    ) -> tuple[Mapping[int, int], UpdateResult | None]:
        """How many replicas of each version to run now; and, once, the result of an update that has just ended."""
        # Recipes of versions without replicas are no longer needed.
        present = {self.serving.version, self.newest.version, *(replica.version for replica in replicas)}
        self.recipes = {version: recipe for version, recipe in self.recipes.items() if version in present}
        if self._autoscaler is not None:
            self.target = self._autoscaler.target(
                now, self.target, load.arrived, load.in_flight, load.queued, load.turned_away
            )
        if self.coming is None:
            return {self.serving.version: self.target}, None
        step = rollout.next_step(self._mode, replicas, self.coming.version, self.target, self._surge())
        if self.hidden is not None and step.old == 0:
            # Our own probes have passed. Now the balancer has to find the new ones ready before the old ones may go.
            self._is_switched = True
            return {self.serving.version: self.target, self.coming.version: self.target}, None
        counts = {self.serving.version: step.old, self.coming.version: step.new}
        if step.status is RolloutStatus.IN_PROGRESS:
            return counts, None
        result = UpdateResult(self.coming.version, step.reason)
        if step.status is RolloutStatus.DONE:
            self.serving = self.coming
        else:
            self._autoscaler = _autoscaler(self.serving)
        self.coming = None
        return counts, result

    def _surge(self) -> int:
        """How many replicas may run beyond the wanted number: as many as fit, or one if that is unknown."""
        assert self.coming is not None
        if self.coming.fixed_port is not None and self.coming.fixed_port == self.serving.fixed_port:
            return 0
        return 1 if self.coming.fits is None else max(0, self.coming.fits - self.target)


def _autoscaler(recipe: Recipe) -> Autoscaler | None:
    rule = rule_for(recipe.spec, recipe.fits, recipe.resources)
    return None if rule is None else Autoscaler(rule)
