"""Divides GPUs among the services that share them: those that come up, and those that are meant to be up already."""

from collections.abc import Sequence
from pathlib import Path

from balancer.errors import ConfigError
from balancer.operate.engines import capacity, shared_memory
from balancer.operate.recipe.recipe import FRACTION, Recipe, fraction, recipe
from balancer.operate.state.desired import Version
from balancer.operate.state.service_folder import ServiceFolder, folders, state_root
from balancer.operate.state.state_file import BrokenState
from balancer.spec.service_file import Spec, parse


def divide(coming: Sequence[Recipe]) -> list[str]:
    """Writes down the share of each of these that shares GPUs and says none itself, and returns lines that tell.

    A service alone that was never planned with others gets none. Raises ConfigError if one does not fit.
    """
    coming = [one for one in coming if one.spec.operation.gpu_share and one.launch is not None]
    if not coming:
        return []
    mine = {one.spec.name: ServiceFolder(state_root(), one.spec.name) for one in coming}
    others = [one for one in map(_sharing, folders(state_root())) if one is not None and one.spec.name not in mine]
    if len(coming) == 1 and not others and all(folder.planned_fraction is None for folder in mine.values()):
        return []
    there = [_fitted(one) for one in (*others, *coming)]
    up = {}
    for one in others:
        folder = ServiceFolder(state_root(), one.spec.name)
        share = fraction(one) or folder.planned_fraction
        if share and folder.is_up():
            up[one.spec.name] = share
    lines = []
    for name, share in shared_memory.fractions(there, up).items():
        if name in mine:
            mine[name].write_planned_fraction(share)
            lines.append(f"{name}: {FRACTION} {share:g}, as planned for all that share its GPU")
    return lines


def _sharing(folder: ServiceFolder) -> Recipe | None:
    """The recipe of a service that is meant to be up and shares GPUs."""
    try:
        desired = folder.desired
        version = desired.version(desired.serving) if desired is not None else None
        if desired is None or version is None:
            return None
        made = recipe(_spec(version, folder.name, Path(desired.base)))
    except (BrokenState, ConfigError):
        return None
    return made if made.spec.operation.gpu_share and made.launch is not None else None


def _spec(version: Version, name: str, base: Path) -> Spec:
    """Its secrets are not known here, and do not matter."""
    secrets = dict.fromkeys(version.secrets, "")
    return parse(version.text, source=version.source, name=name, envs=version.envs, secrets=secrets, base=base)


def _fitted(made: Recipe) -> Recipe:
    return capacity.fit(made)[0]
