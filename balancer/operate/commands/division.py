"""Divides GPUs among the services that share them: those that come up, and those that are meant to be up already."""

from collections.abc import Collection, Sequence
from pathlib import Path

from balancer.errors import ConfigError
from balancer.operate.engines import capacity, shared_memory
from balancer.operate.recipe.recipe import FRACTION, Recipe, fraction, recipe
from balancer.operate.state.desired import Version
from balancer.operate.state.service_folder import ServiceFolder, folders, state_root
from balancer.spec.service_file import Spec, parse


def divide(coming: Sequence[Recipe]) -> list[str]:
    """Writes down the share of each of these that shares GPUs and says none itself, and returns lines that tell.

    A service alone that was never planned with others gets none; one that an earlier controller left running keeps what
    it has. Raises ConfigError if one does not fit.
    """
    given, lines = shares(coming)
    for name, share in given.items():
        ServiceFolder(state_root(), name).write_planned_fraction(share)
    return lines


def shares(coming: Sequence[Recipe]) -> tuple[dict[str, float], list[str]]:
    """What `divide` would write down, by the services' names, and the lines that tell."""
    coming = [one for one in coming if one.spec.operation.gpu_share and one.launch is not None]
    if not coming:
        return {}, []
    mine = {one.spec.name: ServiceFolder(state_root(), one.spec.name) for one in coming}
    others, warnings = _others(mine)
    if len(coming) == 1 and not others and all(folder.planned_fraction is None for folder in mine.values()):
        return {}, warnings
    in_force = {
        name: share for name, folder in mine.items() if folder.is_detached and (share := folder.planned_fraction)
    }
    for one in others:
        folder = ServiceFolder(state_root(), one.spec.name)
        if _serves(folder):
            in_force[folder.name] = fraction(one) or folder.planned_fraction or 0.0
    there = [capacity.on_gpus(one) for one in (*others, *coming)]
    given, left_out = shared_memory.fractions(there, list(mine), in_force)
    told = [f"{name}: {FRACTION} {share:g}, as planned for all that share its GPU" for name, share in given.items()]
    return given, [*warnings, *(_left_out(*one) for one in left_out), *told]


def _others(mine: Collection[str]) -> tuple[list[Recipe], list[str]]:
    """The other services that are meant to be up and share GPUs, and warnings of those that nobody can tell it of.

    Raises ConfigError if such a one may be up.
    """
    found, warnings = [], []
    for folder in folders(state_root()):
        if folder.name in mine:
            continue
        try:
            one = _sharing(folder)
        except ConfigError as failure:
            if _serves(folder):
                raise
            warnings.append(_left_out(folder.name, str(failure)))
        else:
            found += [one] if one is not None else []
    return found, warnings


def _serves(folder: ServiceFolder) -> bool:
    """May replicas of it have their share of a GPU now?"""
    return folder.is_up() or folder.is_detached


def _left_out(name: str, why: str) -> str:
    return f"warning: {name}, which is meant to run here, is left out of the division: {why}"


def _sharing(folder: ServiceFolder) -> Recipe | None:
    """The recipe of a service that is meant to be up and shares GPUs. Raises ConfigError if it cannot be made."""
    desired = folder.desired
    version = desired.version(desired.serving) if desired is not None else None
    if desired is None or version is None:
        return None
    made = recipe(_spec(version, folder.name, Path(desired.base)))
    return made if made.spec.operation.gpu_share and made.launch is not None else None


def _spec(version: Version, name: str, base: Path) -> Spec:
    """Its secrets are not known here, and do not matter."""
    secrets = dict.fromkeys(version.secrets, "")
    return parse(version.text, source=version.source, name=name, envs=version.envs, secrets=secrets, base=base)
