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
from balancer.spec.schema import MOST_REPLICAS


@dataclass(frozen=True, slots=True)
class Load:
    """Generating requests: those that arrived since the last look, those at replicas, and those that wait for one.

    `turned_away` counts those refused since the last look because everything was full. `unknown_seconds` is how long
    nobody knew the load before that.
    """

    arrived: int = 0
    in_flight: int = 0
    queued: int = 0
    turned_away: int = 0
    unknown_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """How an update ended. `failure` is empty if it succeeded, `failed` is the id of the replica that did not start.

    `superseded_by` is the version that took its place.
    """

    version: int
    failure: str = ""
    superseded_by: int | None = None
    failed: int | None = None


class Wanted:
    """The wanted number of replicas, the version that serves, and the version that is being rolled out, if any."""

    def __init__(
        self,
        recipe: Recipe,
        target: int | None = None,
        coming: Recipe | None = None,
        mode: Mode = "rolling",
        before: int | None = None,
        *,
        is_switched: bool = False,
    ) -> None:
        """Of a service that ran before: `target` replicas, and an update to `coming`; `before`: the target without it.

        `is_switched`: the balancer had found out about the replicas of a blue-green update.
        Without a `target` the recipe says how many there are to be, or where the load decides, what was left running.
        """
        self.recipes = {made.version: made for made in (recipe, coming) if made is not None}
        self.serving = recipe
        self.coming = coming
        self.mode: Mode = mode
        self.is_switched = is_switched
        # Versions that were given up before anybody but us knew their replicas.
        self._unseen: frozenset[int] = frozenset()
        self._autoscaler = _autoscaler(self.newest)
        self._follows_what_is_left = target is None and self._autoscaler is not None
        self.target = self._allowed(recipe.spec.min_replicas if target is None else target)
        # How many replicas there are to be if the update fails.
        self.before = self.target if before is None else before

    @property
    def newest(self) -> Recipe:
        return self.coming or self.serving

    @property
    def is_asleep(self) -> bool:
        """Is the service scaled to zero because there is no load?"""
        return self.target == 0 and self._autoscaler is not None

    @property
    def hidden(self) -> frozenset[int]:
        """The versions whose replicas the balancer must not know about, so that they get no requests."""
        if self.coming is None or self.mode == "rolling" or self.is_switched:
            return self._unseen
        return self._unseen | {self.coming.version}

    def _allowed(self, target: int) -> int:
        """The number closest to `target` that the newest recipe allows."""
        target = min(target, MOST_REPLICAS)
        if self._autoscaler is not None:
            target = self._autoscaler.clipped(target)
        if self.newest.fixed_port is not None:
            target = min(target, 1)
        return target if self.newest.fits is None else min(target, self.newest.fits)

    def adopt(self, survivors: Collection[Survivor]) -> Mapping[int, int]:
        """Continues where an earlier controller stopped; returns the version of each survivor by its id.

        Survivors that started as one of our recipes would are of that version, whatever they were called. The recipes
        of others are unknown: they are replaced, and one that ends is restarted with our recipe.
        """
        known = [made for made in (self.serving, self.coming) if made is not None]
        versions: dict[int, int] = {}
        strangers: set[int] = set()
        for survivor in survivors:
            alike = [made.version for made in known if made.digest == survivor.digest]
            called = survivor.listing.version
            versions[survivor.id] = called if called in alike or not alike else alike[0]
            if not alike:
                strangers.add(survivor.id)
        others = {versions[id] for id in strangers}
        for version in others:
            self.recipes.setdefault(version, replace(self.serving, version=version))
        if self._follows_what_is_left:
            self.target = self.before = self._allowed(len(survivors))
        if self.coming is not None or not survivors:
            return versions
        called_alike = {survivor.listing.version for survivor in survivors if survivor.id not in strangers}
        newest = max(called_alike | others)
        version = max(self.serving.version, newest if newest in called_alike else newest + 1)
        ours = self.serving = self.recipes[version] = replace(self.serving, version=version)
        if others:
            # The mode that we know is that of the last update.
            self.serving, self.coming, self.mode = self.recipes[max(others)], ours, "rolling"
        return {id: was if id in strangers else version for id, was in versions.items()}

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
            raise ConfigError(f"{name} with {target} replicas does not fit: there is room for {recipe.fits}")
        self.target = self.before = target

    def update(self, recipe: Recipe, mode: Mode, is_restart: bool = False) -> int | None:
        """Makes this version the wanted one, also while another is being rolled out, which it supersedes.

        Returns the version whose replicas already are what this recipe starts, and so are of this version from now on;
        None if there is none, or `is_restart`: then all are replaced. Raises ConfigError if it cannot be rolled out in
        this mode.
        """
        total = self.target if recipe.spec.autoscales or is_restart else recipe.spec.min_replicas
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
        if self.coming is None:
            self.before = self.target
        superseded, self._autoscaler, self.target = self.coming, _autoscaler(recipe), total
        if recipe.starts_like(self.serving) and not is_restart:
            self._drop_coming()
            before, self.serving, self.before = self.serving, recipe, total
            return before.version
        is_the_same = superseded is not None and mode == self.mode and recipe.starts_like(superseded)
        if superseded is not None and is_the_same and not is_restart:
            self.coming = recipe
            return superseded.version
        self._drop_coming()
        self.coming, self.mode, self.is_switched = recipe, mode, False
        return None

    def abort(self) -> UpdateResult:
        """Goes back to the version that served before the update; raises ConfigError if none is under way."""
        if self.coming is None:
            raise ConfigError(f"{self.serving.spec.name} is at version {self.serving.version} and not being updated")
        result = UpdateResult(self.coming.version, "the update was aborted")
        self._go_back()
        return result

    def _drop_coming(self) -> None:
        """Its replicas stay as long as they are needed, those that nobody else has seen not even that long."""
        self._unseen = self.hidden
        self.coming = None

    def _go_back(self) -> None:
        self._drop_coming()
        self._autoscaler = _autoscaler(self.serving)
        # Where the load decides, it has done so in the meantime.
        self.target = self._allowed(self.before if self._autoscaler is None else self.target)

    def _obstacle(self, recipe: Recipe, total: int) -> str:
        """Why that many replicas, of both versions, cannot run side by side; empty if they can."""
        if recipe.fits is not None and recipe.fits < total:
            wants = f"blue_green wants both versions side by side, {total} replicas"
            return f"{wants}, and there is room for {recipe.fits}"
        if recipe.fixed_port is not None and recipe.fixed_port == self.serving.fixed_port:
            return f"both versions would listen on port {recipe.fixed_port}"
        return ""

    def counts(
        self, replicas: Collection[Replica], load: Load | None, now: float
    ) -> tuple[Mapping[int, int], UpdateResult | None]:
        """How many replicas of each version to run now; and, once, the result of an update that has just ended.

        Without a load, which a silent balancer does not tell, as many as before.
        """
        # Recipes of versions without replicas are no longer needed.
        present = {self.serving.version, self.newest.version, *(replica.version for replica in replicas)}
        self.recipes = {version: recipe for version, recipe in self.recipes.items() if version in present}
        self._unseen &= present
        if self._autoscaler is not None and load is not None:
            self._autoscaler.skip(load.unknown_seconds)
            self.target = self._autoscaler.target(
                now, self.target, load.arrived, load.in_flight, load.queued, load.turned_away
            )
        if self.coming is None:
            return self._only_serving(replicas), None
        # A service that sleeps starts one replica, to see whether it would wake.
        total = 1 if self.is_asleep else self.target
        # A lower number is for the new version; the old one keeps its own until the new one has shown that it runs.
        old = max(total, self._old_limit())
        if self.mode == "rolling" and not any(r.version == self.coming.version and r.is_proven for r in replicas):
            total = old
        step = rollout.next_step(self.mode, replicas, self.coming.version, total, self._surge())
        if self.coming.version in self.hidden and step.old == 0:
            # Our own probes have passed. Now the balancer has to find the new ones ready before the old ones may go.
            self.is_switched = True
            return {**self._kept(replicas, old), self.coming.version: total}, None
        if step.status is RolloutStatus.IN_PROGRESS:
            staying = old if self.mode == "blue_green" and step.old else step.old
            new = min(step.new, 1 if self.is_asleep else self.target)
            return {**self._kept(replicas, staying), self.coming.version: new}, None
        result = UpdateResult(self.coming.version, step.reason, failed=step.failed)
        if step.status is RolloutStatus.DONE:
            counts = {**self._kept(replicas, 0), self.coming.version: step.new}
            self.serving, self.coming, self.before = self.coming, None, self.target
            return counts, result
        self._go_back()
        return self._only_serving(replicas), result

    def _only_serving(self, replicas: Collection[Replica]) -> Mapping[int, int]:
        """Without an update only one version is wanted. Replicas of others serve until they are replaced."""
        mine = self.serving.version
        if all(replica.version == mine for replica in replicas):
            return {mine: self.target}
        step = rollout.next_step("rolling", replicas, mine, self.target, self._surge())
        if step.status is RolloutStatus.FAILED:
            return {**self._kept(replicas, 0), mine: self.target}
        return {**self._kept(replicas, step.old), mine: step.new}

    def _kept(self, replicas: Collection[Replica], total: int) -> dict[int, int]:
        """How many replicas to keep of each version but the newest: `total`, or fewer where there are not so many.

        Versions that were given up keep those that are ready; only the version that serves is started again.
        """
        counts: dict[int, int] = {}
        serving, newest = self.serving.version, self.newest.version
        for version in sorted({replica.version for replica in replicas} - {serving, newest}, reverse=True):
            ready = sum(replica.version == version and replica.is_wanted and replica.is_ready for replica in replicas)
            counts[version] = 0 if version in self._unseen else min(ready, total)
            total -= counts[version]
        if serving != newest:
            counts[serving] = min(total, self._old_limit())
        return counts

    def _old_limit(self) -> int:
        """How many replicas of the old version there are at the most during an update, if none is ready yet."""
        return self.target if self._autoscaler is not None else self.before

    def _surge(self) -> int:
        """How many replicas may run beyond the wanted number: as many as fit, or one if that is unknown."""
        newest = self.newest
        others = (made for made in self.recipes.values() if made.version != newest.version)
        if newest.fixed_port is not None and any(made.fixed_port == newest.fixed_port for made in others):
            return 0
        return 1 if newest.fits is None else max(0, newest.fits - self.target)


def _autoscaler(recipe: Recipe) -> Autoscaler | None:
    rule = rule_for(recipe.spec, recipe.fits, recipe.resources)
    return None if rule is None else Autoscaler(rule)
