"""An engine that nobody has: replicas are plain processes that outlive their controller. A program, too:

`python -m tests.operate.made_up_engine up ...` is groundserve with this engine beside its own, as `made-up`.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from balancer import cli
from balancer.contract.listing import ReplicaListing
from balancer.operate.engines.addresses import Addresses, AddressFlags, Listeners, open_listeners
from balancer.operate.engines.balancer_handle import BalancerHandle
from balancer.operate.engines.choose import ENGINES
from balancer.operate.engines.engine import Ended, Survivor
from balancer.operate.engines.local.balancer_handle import LocalBalancer
from balancer.operate.engines.ports import free_ports
from balancer.operate.recipe.recipe import Recipe
from balancer.operate.state.desired import Desired
from balancer.operate.state.service_folder import ServiceFolder


class MadeUpEngine:
    """An `Engine`. Who runs is written down in `folder`."""

    name = "made-up"
    most_replicas = 100
    outlives_controller = True
    is_kept_up = "MADE_UP_IS_KEPT_UP" in os.environ
    fields: Mapping[str, str] = {}

    def __init__(self, folder: ServiceFolder) -> None:
        self.changed = asyncio.Event()
        self._folder = folder
        self._file = folder.path / "made-up.json"
        self._ports: tuple[Addresses, Listeners] | None = None

    def suits(self, recipe: Recipe) -> bool:
        return False

    def fit(self, recipe: Recipe, running: int = 0) -> tuple[Recipe, list[str]]:
        return recipe, ["it is made up"]

    def placement(self, recipe: Recipe) -> list[str]:
        return []

    def take_down(self) -> None:
        for pid, *_ in self._written().values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._file.unlink(missing_ok=True)

    def prepare(self, recipe: Recipe, flags: AddressFlags, left: Desired | None) -> Addresses:
        self._ports = open_listeners(flags)
        return self._ports[0]

    def balancer(self, recipe: Recipe) -> BalancerHandle:
        assert self._ports is not None
        return LocalBalancer(self._folder, *self._ports, recipe, None, self.changed.set)

    async def found(self) -> tuple[Survivor, ...]:
        listings = self.running()
        return tuple(
            Survivor(id, replace(listings[id], version=version), digest)
            for id, (_, _, version, digest) in self._written().items()
        )

    async def start(self, id: int, recipe: Recipe) -> None:
        self._start(id, recipe)

    def _start(self, id: int, recipe: Recipe) -> None:
        (port,) = free_ports(1)
        invocation = recipe.invocation(id, port)
        nothing = subprocess.DEVNULL
        process = subprocess.Popen(
            invocation.argv,
            env={**os.environ, **invocation.envs},
            cwd=invocation.workdir,
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
            start_new_session=True,
        )
        self._write({**self._written(), id: (process.pid, port, recipe.version, recipe.digest)})

    async def stop(self, id: int, grace: float) -> None:
        written = self._written()
        if id in written:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(written.pop(id)[0], signal.SIGKILL)
            self._write(written)

    def running(self) -> Mapping[int, ReplicaListing]:
        return {
            id: ReplicaListing(f"made-up-{id}", f"http://127.0.0.1:{port}", id=id, launched_seconds=0, infra=self.name)
            for id, (_, port, _, _) in self._written().items()
        }

    def ended(self) -> tuple[Ended, ...]:
        return ()

    def lost(self, suspects: Collection[int]) -> Mapping[int, str]:
        return {}

    async def close(self) -> None:
        self._file.unlink(missing_ok=True)

    def _written(self) -> dict[int, tuple[int, int, int, str]]:
        """The process and the port of each replica, its version, and the digest of its recipe."""
        if not self._file.exists():
            return {}
        return {int(id): tuple(facts) for id, facts in json.loads(self._file.read_text()).items()}

    def _write(self, replicas: Mapping[int, tuple[int, int, int, str]]) -> None:
        self._file.write_text(json.dumps(replicas))


def main() -> int:
    ENGINES[MadeUpEngine.name] = MadeUpEngine
    # The command starts this folder's packages by themselves, wherever it is typed.
    assert Path("balancer").is_dir()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
