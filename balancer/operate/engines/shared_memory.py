"""For the user: which of several service files share which GPU of this machine, and how much memory each may use."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from balancer.errors import ConfigError
from balancer.operate.engines import capacity
from balancer.operate.engines.capacity import Gpu
from balancer.operate.recipe.memory_plan import Row, Share, plan, shown
from balancer.operate.recipe.recipe import FRACTION, Recipe, fraction

NOTHING_GIVEN: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Plan:
    """How the services that share one GPU divide it; no rows if the driver does not say how much memory it has."""

    gpu: Gpu
    rows: tuple[Row, ...]


def plans(recipes: Sequence[Recipe], given: Mapping[str, float] = NOTHING_GIVEN) -> list[Plan]:
    """One for each GPU that services with `gpu_share` would share; recipes are fitted.

    `given`: the share of the card that services which are up already have, by their names. Raises ConfigError.
    """
    sharing = [recipe for recipe in recipes if recipe.spec.operation.gpu_share and recipe.launch is not None]
    there: dict[int, Gpu] = {}
    tenants: dict[int, list[Recipe]] = {}
    for recipe in sharing:
        groups = capacity.seats(capacity.seated_for(recipe)) if recipe.gpus else []
        there |= {gpu.index: gpu for group in groups for gpu in group if gpu.held_by is None}
        free = [[gpu.index for gpu in group] for group in groups if all(gpu.held_by is None for gpu in group)]
        # Replicas spread in the same way: first to the GPUs with the fewest.
        free.sort(key=lambda group: max(len(tenants.get(index, [])) for index in group))
        for group in free[: max(1, recipe.spec.min_replicas)]:
            for index in group:
                tenants.setdefault(index, []).append(recipe)
    shares = {one.spec.name: _share(one, given.get(one.spec.name, 0.0)) for one in sharing} if tenants else {}
    return [
        Plan(gpu, tuple(plan(gpu.memory_total / 1024, [shares[recipe.spec.name] for recipe in tenants[index]])))
        if (gpu := there[index]).memory_total
        else Plan(gpu, ())
        for index in sorted(tenants)
    ]


def described(recipes: Sequence[Recipe]) -> list[str]:
    """The plans as tables; empty if no service shares, or no GPU is free."""
    said = {recipe.spec.name: fraction(recipe) for recipe in recipes}
    lines: list[str] = []
    for made in plans(recipes):
        gpu = made.gpu
        if not made.rows:
            lines.append(f"GPU {gpu.index} ({gpu.name}): the driver does not say how much memory it has")
            continue
        lines += shown(f"GPU {gpu.index} ({gpu.name}, {gpu.memory_total / 1024:.0f} GiB)", made.rows)
        lines += [
            f"{row.name}: {FRACTION} {said[row.name]:g} in its file is more than the others leave it"
            for row in made.rows
            if not row.problem and said[row.name] > row.fraction
        ]
    return lines


def fractions(
    recipes: Sequence[Recipe], coming: Collection[str], up: Mapping[str, float] = NOTHING_GIVEN
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """What to give as --mem-fraction-static to each that comes up, shares and says none itself, by its name.

    `up`: what those of the recipes have whose replicas run already. Also returns who is neither and has no place in the
    plan, each with the reason. Raises ConfigError, with the numbers, if one that comes up does not fit, or one that is
    up takes nobody knows how much.
    """
    said = {recipe.spec.name for recipe in recipes if fraction(recipe)}
    given: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for made in plans(recipes, up):
        names = {row.name for row in made.rows}
        card = f"GPU {made.gpu.index} ({made.gpu.memory_total / 1024:.0f} GiB)"
        for row in made.rows:
            if row.name in up:
                if row.problem and not up[row.name]:
                    raise ConfigError(f"{row.name} is up, and shares {card}: {row.problem}")
            elif row.problem and row.name not in coming:
                left_out[row.name] = row.problem
            elif row.problem and row.name not in said:
                what = "is to share" if row.weights is None else "does not fit on"
                raise ConfigError(
                    f"{row.name} {what} {card}: {row.problem}{_together(row.name, [one for one in up if one in names])}"
                )
            elif row.name in coming and row.name not in said:
                given[row.name] = min(row.fraction, given.get(row.name, 1.0))
    return given, list(left_out.items())


def _together(name: str, up: Sequence[str]) -> str:
    """What to do about those that are up."""
    if not up:
        return ""
    downs = " ".join(up)
    return f"; groundserve down {downs}, and bring {'it' if len(up) == 1 else 'them'} up together with {name}"


def _share(recipe: Recipe, given: float) -> Share:
    assert recipe.launch is not None
    try:
        weights, kv = capacity.weight(recipe)
    except ConfigError as failure:
        return Share(recipe.spec.name, None, given=given, problem=str(failure))
    each, model = max(1, recipe.gpus), recipe.launch.model
    gib = weights / each / 2**30 if weights is not None else None
    return Share(recipe.spec.name, gib, kv // each, given, "" if Path(model).is_absolute() else model)
