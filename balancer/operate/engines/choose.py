"""Which engine runs a service, and what it takes to run on it."""

import asyncio
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from balancer.errors import ConfigError
from balancer.operate.engines.balancer_handle import Addresses, Front
from balancer.operate.engines.compose import balancer_handle
from balancer.operate.engines.compose import project as compose_project
from balancer.operate.engines.compose.balancer_handle import ComposeFront
from balancer.operate.engines.compose.engine import ComposeEngine
from balancer.operate.engines.compose.project import ROOT, Project
from balancer.operate.engines.engine import Engine
from balancer.operate.engines.local.balancer_handle import LocalFront
from balancer.operate.engines.local.engine import LocalEngine
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state.service_folder import Left, ServiceFolder

Kind = Literal["local", "compose"]
Asked = Literal["auto", "local", "compose"]


def chosen(asked: Asked, recipe: Recipe) -> Kind:
    """The engine that was asked for; `auto`: Docker only where there is no SGLang here that a child could run.

    Raises ConfigError when Compose cannot run this service here.
    """
    is_runnable = recipe.launch is None or importlib.util.find_spec("sglang") is not None
    if asked == "local" or (asked == "auto" and (is_runnable or not compose_project.has_engine())):
        return "local"
    if recipe.launch is None:
        raise ConfigError(
            f"{recipe.spec.source}: run: starts no SGLang that is understood, and Compose runs the replica's image: "
            "use --on local"
        )
    compose_project.check_engine()
    return "compose"


def project(recipe: Recipe, folder: ServiceFolder, where: Addresses) -> Project:
    """The Compose project of a service; raises ConfigError for addresses that it cannot have."""
    environ = balancer_handle.environ(where, recipe, folder)
    return Project(recipe.spec.name, _files(recipe, os.environ), environ)


def _files(recipe: Recipe, environ: Mapping[str, str]) -> list[Path]:
    """COMPOSE_FILE's, as `docker compose` takes it: whoever has overlays of their own names them all there."""
    if named := environ.get("COMPOSE_FILE"):
        return [ROOT / file for file in named.split(environ.get("COMPOSE_PATH_SEPARATOR", ":"))]
    return [ROOT / "compose.yaml", *([] if recipe.gpus else [ROOT / "docker" / "compose.cpu.yaml"])]


def parts(
    on: Project | None,
    recipe: Recipe,
    folder: ServiceFolder,
    where: Addresses,
    replica_key: Path | None,
    wake: asyncio.Event,
) -> tuple[Engine, Front]:
    """Engine and balancer of one service, in that project's containers or, without one, as our children.

    `replica_key` is the file with the key that our children ask for, if they do.
    """
    if on is None:
        return (
            LocalEngine(folder, replica_key, wake.set),
            LocalFront(folder, where, recipe, replica_key, wake.set),
        )
    folder.leave(Left(where.listen, where.admin))
    return ComposeEngine(on, folder, wake.set), ComposeFront(on, folder, where, recipe)
