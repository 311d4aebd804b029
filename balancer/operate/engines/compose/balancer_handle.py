"""The balancer as compose.yaml's service `balancer`: Docker restarts it if it dies, and it outlives its controller."""

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

from balancer.contract.listing import Listing
from balancer.contract.status import Snapshot
from balancer.errors import ConfigError
from balancer.operate.engines.addresses import Addresses
from balancer.operate.engines.balancer_handle import BalancerHandle, service_file_for
from balancer.operate.engines.child import tail
from balancer.operate.engines.compose.project import Project
from balancer.operate.engines.engine import CannotStart
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state import keys
from balancer.operate.state.service_folder import ServiceFolder
from balancer.operate.state.state_file import write_whole

# Seconds without an answer after which the balancer is started again, and the number of restarts by Docker after which
# one that has never answered is given up.
_PATIENCE = 5.0
_STARTS = 3
# Seconds that Docker waits beyond the balancer's own drain_timeout before it kills it.
_STOP_MARGIN = 30
# Seconds without an answer, docker compose up notwithstanding, after which the container hangs and is killed.
_HUNG = 30.0


def environ(where: Addresses, recipe: Recipe, folder: ServiceFolder) -> dict[str, str]:
    """The variables that compose.yaml uses; raises ConfigError for addresses that it cannot publish."""
    host, _, port = where.listen.rpartition(":")
    admin_host, _, admin_port = where.admin.rpartition(":")
    if admin_host != "127.0.0.1":
        raise ConfigError(f"--admin {where.admin}: a container's admin port is published on 127.0.0.1 only: give that")
    if host not in ("127.0.0.1", "[::1]", "localhost") and not where.is_open and where.api_keys is None:
        raise ConfigError(
            f"--listen {where.listen} is not loopback: give --api-keys FILE, or say --open to let everyone who reaches "
            "it use it"
        )
    return {
        "BIND": "127.0.0.1" if host == "localhost" else host,
        "PORT": port,
        "ADMIN_PORT": admin_port,
        "API_KEYS_FILE": str(Path(where.api_keys).absolute()) if where.api_keys else "",
        "ADMIN_KEY_FILE": str(_admin_key_file(where, folder)),
        "STOP_GRACE_PERIOD": f"{recipe.spec.settings.drain_timeout + _STOP_MARGIN:.0f}s",
    }


def admin_key(folder: ServiceFolder) -> str:
    """The key of the service's admin port: generated once, so that it stays valid for a balancer that keeps running."""
    # Readable for the container's user; other users of this machine cannot enter the folder.
    return keys.drawn(folder.admin_key_file, 0o644)


def _admin_key_file(where: Addresses, folder: ServiceFolder) -> Path:
    return Path(where.admin_key).absolute() if where.admin_key else folder.admin_key_file


class ComposeBalancer(BalancerHandle):
    """The service `balancer` of a project; its service file lies in `folder`."""

    def __init__(self, project: Project, folder: ServiceFolder, where: Addresses, recipe: Recipe) -> None:
        key = keys.given(Path(where.admin_key), "--admin-key") if where.admin_key else admin_key(folder)
        super().__init__(where.admin, _admin_key_file(where, folder), key)
        self._project = project
        self._folder = folder
        self._where = where
        self._recipe = recipe
        self._looked_at = float("-inf")  # loop time, in seconds
        self._heard_at = float("inf")  # likewise: its last answer, or its last end
        self._following: asyncio.Task[None] | None = None

    @property
    def endpoint(self) -> str:
        return self._where.endpoint(self._recipe)

    async def keep_up(self) -> None:
        """Runs `compose up`, and again after _PATIENCE s without an answer; Docker restarts a container that dies."""
        now = asyncio.get_running_loop().time()
        if now - self._looked_at < _PATIENCE:
            return
        self._looked_at = now
        if not self.has_answered and await self._is_hopeless():
            raise CannotStart(f"the balancer cannot start: {next(iter(tail(self._folder.balancer_log, 1)), '')}")
        if now - self._heard_at > _HUNG:
            self._heard_at = now
            await self._project.compose("kill", "balancer")
        await self._up()

    async def renew(self, recipe: Recipe) -> None:
        has_moved = recipe.spec.tls != self._recipe.spec.tls
        self._folder.write_service_file(service_file_for(recipe))
        self._recipe = recipe  # only now: a file that could not be written leaves it as it was
        if has_moved:
            await self._up()

    async def replace(self) -> None:
        """Recreates the container; Docker owns the port, so it is closed meanwhile."""
        await self._up("--force-recreate")

    async def tell(self, listing: Listing) -> Snapshot | None:
        snapshot = await super().tell(listing)
        if snapshot is not None:
            self._looked_at = self._heard_at = asyncio.get_running_loop().time()
        return snapshot

    async def stop(self, hurry: asyncio.Event) -> None:
        stopping = asyncio.create_task(self._project.compose("stop", "balancer", extra=self._stop_time))
        hurrying = asyncio.create_task(hurry.wait())
        await asyncio.wait((stopping, hurrying), return_when=asyncio.FIRST_COMPLETED)
        with contextlib.suppress(CannotStart):
            if not stopping.done():
                await self._project.compose("kill", "balancer")
            await stopping
        hurrying.cancel()
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._client.aclose()

    @property
    def _stop_time(self) -> float:
        """Seconds that its container may take to stop, also when it is recreated."""
        return self._recipe.spec.settings.drain_timeout + _STOP_MARGIN

    async def _up(self, *flags: str) -> None:
        """Starts the container if there is none, and recreates it if its settings have changed."""
        self._folder.write_service_file(service_file_for(self._recipe))
        overlay = self._folder.path / "balancer.json"
        write_whole(overlay, json.dumps({"services": {"balancer": self._overlay()}}))
        await self._project.compose(
            "up", "-d", "--no-deps", *flags, "balancer", overlays=[overlay], extra=self._stop_time
        )
        self.starts += 1
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(self._follow())

    def _overlay(self) -> dict[str, Any]:
        environment = {"BALANCER_SERVICE": "/service/service.yaml", "BALANCER_POLICY": "", "BALANCER_SET": ""}
        volumes = [f"{self._folder.service_file.parent}:/service:ro"]
        if self._recipe.spec.tls is not None:
            certificate, key = self._recipe.spec.tls
            environment |= {
                "BALANCER_TLS_CERT": f"/certificate/{certificate.name}",
                "BALANCER_TLS_KEY": f"/certificate-key/{key.name}",
            }
            volumes += [f"{certificate.parent}:/certificate:ro", f"{key.parent}:/certificate-key:ro"]
        return {"environment": environment, "volumes": [volume.replace("$", "$$") for volume in volumes]}

    async def _is_hopeless(self) -> bool:
        there = await self._project.containers("balancer")
        return bool(there) and there[0].restarts >= _STARTS

    async def _follow(self) -> None:
        for container in await self._project.containers("balancer"):
            await self._project.follow(container.id, self._folder.balancer_log)
