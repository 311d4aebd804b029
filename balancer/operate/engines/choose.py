"""Which engine runs a service. This is the only file that knows the engines by name."""

from collections.abc import Callable

from balancer.errors import ConfigError
from balancer.operate.engines.compose.engine import ComposeEngine
from balancer.operate.engines.engine import Engine
from balancer.operate.engines.kubernetes.engine import KubernetesEngine
from balancer.operate.engines.local.engine import LocalEngine
from balancer.operate.engines.slurm.engine import SlurmEngine
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state.service_folder import ServiceFolder
from balancer.operate.state.state_file import BrokenState

AUTO = "auto"

# The engines by their names for --on. AUTO picks the first one that suits the service.
ENGINES: dict[str, Callable[[ServiceFolder], Engine]] = {
    "local": LocalEngine,
    "compose": ComposeEngine,
    "slurm": SlurmEngine,
    "kubernetes": KubernetesEngine,
}
# Those whose replicas use this machine's GPUs.
HERE = ("local", "compose")


def choose_engine(name: str, recipe: Recipe, folder: ServiceFolder) -> Engine:
    """The engine with this name. AUTO: the one that already runs the service, else the first that suits it here.

    Raises ConfigError if there is no such engine, or if another one runs the service.
    """
    if folder.is_detached and (left := folder.desired) is not None:
        if name not in (AUTO, left.engine):
            raise ConfigError(
                f"{folder.name} serves on without its controller, on {left.engine}: groundserve down {folder.name} "
                f"ends it, --on {left.engine} takes it up again"
            )
        return _named(left.engine, folder)
    if name != AUTO:
        return _named(name, folder)
    engines = [make(folder) for make in ENGINES.values()]
    return next((engine for engine in engines if engine.suits(recipe)), engines[0])


def take_down_detached(folder: ServiceFolder) -> None:
    """Takes down a service that still serves although its controller is gone; raises ConfigError."""
    try:
        desired = folder.desired
    except BrokenState:
        names = list(ENGINES)  # it may belong to any engine
    else:
        names = [desired.engine] if desired is not None else []
    for name in names:
        _named(name, folder).take_down()
    folder.remove_desired()


def _named(name: str, folder: ServiceFolder) -> Engine:
    if name not in ENGINES:
        raise ConfigError(f"{folder.name}: there is no engine {name}, only {' and '.join(ENGINES)}")
    return ENGINES[name](folder)
