"""For the user: which of several service files share which GPU of this machine, and how much memory each may use."""

from collections.abc import Sequence

from balancer.operate.engines import capacity
from balancer.operate.engines.capacity import Gpu
from balancer.operate.recipe.memory_plan import Share, plan, shown
from balancer.operate.recipe.recipe import Recipe

_FRACTION = "--mem-fraction-static"


def described(recipes: Sequence[Recipe]) -> list[str]:
    """The plan for services with `gpu_share`, one table per GPU; empty if there is no such service or no free GPU."""
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
    shares = {recipe.spec.name: _share(recipe) for recipe in sharing} if tenants else {}
    lines: list[str] = []
    for index in sorted(tenants):
        gpu = there[index]
        size = gpu.memory_total / 1024
        if not size:
            lines.append(f"GPU {index} ({gpu.name}): the driver does not say how much memory it has")
            continue
        rows = plan(size, [shares[recipe.spec.name] for recipe in tenants[index]])
        lines += shown(f"GPU {index} ({gpu.name}, {size:.0f} GiB)", rows)
        said = {recipe.spec.name: _said(recipe) for recipe in tenants[index]}
        lines += [
            f"{row.name}: {_FRACTION} {said[row.name]:g} in its file is more than the others leave it"
            for row in rows
            if not row.problem and said[row.name] > row.fraction
        ]
    return lines


def _share(recipe: Recipe) -> Share:
    weights, kv = capacity.weight(recipe)
    each = max(1, recipe.gpus)
    return Share(recipe.spec.name, weights / each / 2**30 if weights is not None else None, kv // each)


def _said(recipe: Recipe) -> float:
    """The --mem-fraction-static in the service file; 0 if there is none."""
    flags = recipe.launch.flags if recipe.launch else ()
    said = 0.0
    for at, flag in enumerate(flags):
        name, has_value, value = flag.partition("=")
        if name == _FRACTION:
            try:
                said = float(value if has_value else "".join(flags[at + 1 : at + 2]))
            except ValueError:
                said = 0.0
    return said
