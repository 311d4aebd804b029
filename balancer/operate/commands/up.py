"""`groundserve up`: brings a service up, says how to use it, and is its controller until it goes down."""

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from rich.console import Console

from balancer.contract.status import ReplicaRow, Snapshot
from balancer.contract.words import ServiceStatus, Status
from balancer.errors import ConfigError
from balancer.inherited import ending
from balancer.operate.commands.progress import Lines, Moving
from balancer.operate.controller.controller import Controller
from balancer.operate.engines import choose
from balancer.operate.engines.balancer_handle import Addresses
from balancer.operate.engines.child import tail
from balancer.operate.engines.compose.project import Project
from balancer.operate.engines.engine import CannotStart
from balancer.operate.engines.local import machine
from balancer.operate.engines.local.ports import free_ports, is_free
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.operate.state import control_socket, keys
from balancer.operate.state.service_folder import Left, ServiceFolder
from balancer.spec.loopback import is_loopback_name
from balancer.spec.service_file import parse

# SkyServe's first port for endpoints; the next service takes the next pair that is free.
_FIRST_PORT = 30001
_LAST_PORT = 30999


def addresses(
    listen: str | None,
    admin: str | None,
    is_open: bool = False,
    api_keys: str | None = None,
    admin_key: str | None = None,
    left: Left | None = None,
) -> Addresses:
    """What was asked for, port 0 being any free one; else where it was left; else the first free pair from 30001 on.

    Raises ConfigError when a port that was asked for is taken, or an address wants a word on who may come in.
    """
    if admin is not None and not is_open and admin_key is None and not is_loopback_name(admin):
        raise ConfigError(
            f"--admin {admin} is not loopback: give --admin-key FILE, or say --open to let everyone who reaches it look"
        )
    if left is not None and listen in (None, left.listen) and admin in (None, left.admin):
        return Addresses(left.listen, left.admin, is_open, api_keys, admin_key)  # taken, by the service itself
    asked = [None if a is None else _usable(flag, a) for flag, a in (("--listen", listen), ("--admin", admin))]
    for port in range(_FIRST_PORT, _LAST_PORT, 2):
        pair = Addresses(
            asked[0] or f"127.0.0.1:{port}", asked[1] or f"127.0.0.1:{port + 1}", is_open, api_keys, admin_key
        )
        if all(asked) or all(is_free(*_split(address)) for address in (pair.listen, pair.admin)):
            return pair
    raise ConfigError(f"no two ports are free between {_FIRST_PORT} and {_LAST_PORT}: give --listen and --admin")


def run(
    first: Recipe,
    folder: ServiceFolder,
    where: Addresses,
    on: Project | None,
    progress: Lines,
    on_up: Callable[[], None],
) -> int:
    """Runs the service until it is told to end; the exit code. The caller holds the folder's lock.

    `on`: in containers of that Compose project; None: as our children. `on_up` is called once, when the service came up
    and all was said about it.
    """

    async def serve() -> int:
        return await _Up(first, folder, where, on, progress, on_up).run()

    return asyncio.run(serve())


def on_terminal(folder: ServiceFolder) -> Lines:
    """Progress for whoever looks at our output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        return Lines(sys.stdout)
    return Moving(console, lambda id: next(iter(tail(folder.replica_log(id), 1)), ""))


class _Up:
    """One service from its start to its end."""

    def __init__(
        self,
        first: Recipe,
        folder: ServiceFolder,
        where: Addresses,
        on: Project | None,
        progress: Lines,
        on_up: Callable[[], None],
    ) -> None:
        self._recipe = first
        self._folder = folder
        self._is_contained = on is not None
        self._progress = progress
        self._on_up = on_up
        self._is_up = False
        self._failure = ""
        self._version = first.version
        self._began = time.monotonic()
        self._ended = asyncio.Event()
        wake = asyncio.Event()
        self._replica_key = None if on is not None else keys.for_replicas(first, folder.replica_key_file)
        engine, self._front = choose.parts(on, first, folder, where, self._replica_key, wake)
        self._controller = Controller(first.spec.name, first, engine, self._front, wake, progress.say, self._look)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in ending():
            loop.add_signal_handler(number, self._signalled)
        async with control_socket.serving(self._folder.socket, self._answer):
            try:
                await self._controller.run()
            except CannotStart as failure:
                self._failure = str(failure)
            finally:
                self._progress.finish()
                if self._is_contained:
                    self._folder.left_nothing()
                self._ended.set()
        if self._failure:
            self._progress.say(f"groundserve: {self._recipe.spec.name} failed: {self._failure}")
            return 1
        self._progress.say(f"{self._recipe.spec.name} is down")
        return 0

    def _signalled(self) -> None:
        self._progress.finish()
        self._progress.say("stopping: answers in flight are finished first; once more ends at once")
        self._controller.close()

    def _look(self, snapshot: Snapshot) -> None:
        """Has what is shown, and finds out when the service came up or cannot."""
        self._progress.show(snapshot)
        if self._is_up or self._failure:
            return
        service = snapshot.service
        if service.status is ServiceStatus.CONTROLLER_INIT:
            return
        if service.status is ServiceStatus.FAILED:
            self._failure = f"{service.reason}\n  everything it said: groundserve logs {self._recipe.spec.name}"
            self._controller.close()
        elif service.total == self._controller.wanted.target and all(map(self._is_settled, snapshot.replicas)):
            self._is_up = True
            self._greeting = asyncio.create_task(self._greet(service.ready))

    def _is_settled(self, row: ReplicaRow) -> bool:
        """Will it stay as it is for long? Who waits for a GPU may do so for ever, beside others that serve."""
        if row.status in (Status.READY, Status.FAILED):
            return True
        replica = self._controller.replicas.get(row.id)
        return replica is not None and replica.waits_for_gpu and self._controller.snapshot.service.ready > 0

    async def _greet(self, ready: int) -> None:
        name = self._recipe.spec.name
        self._progress.finish()
        count = "no replica" if ready == 0 else "1 replica" if ready == 1 else f"{ready} replicas"
        self._progress.say(
            f"\n{name} is up after {time.monotonic() - self._began:.0f} s: {count} at {self._front.endpoint}"
        )
        if ready:
            self._progress.say(f"try    {await self._example()}")
        self._progress.say(f"look   groundserve status {name}")
        self._progress.say(f"stop   groundserve down {name}   (or Ctrl-C where it was started)\n")
        self._on_up()

    async def _example(self) -> str:
        """A command that this very service answers."""
        try:
            # Its own certificate may be one that nobody here knows.
            async with httpx.AsyncClient(trust_env=False, timeout=5, verify=False) as client:
                answer = await client.get(f"{self._front.endpoint}/v1/models")
                model = answer.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return f"curl {self._front.endpoint}{self._recipe.readiness_probe.path}"
        # Asked "What is ...?", the smallest model's first two choices tie in bfloat16, and the hardware decides.
        question = {"role": "user", "content": "Name the capital of France."}
        # Without a limit a small model may ramble for minutes on a CPU.
        body = {"model": model, "messages": [question], "max_tokens": 32, "temperature": 0}
        return (
            f"curl {self._front.endpoint}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            f"         -d '{json.dumps(body)}'"
        )

    async def _answer(self, request: Mapping[str, Any], say: control_socket.Say) -> Any:
        match request:
            case {"do": "status"}:
                return self._controller.snapshot.to_json()
            case {"do": "admin key"}:
                return str(self._front.key_file)
            case {"do": "scale", "replicas": int(target)}:
                self._controller.scale(target)
                return None
            case {"do": "replace", "id": int(id)}:
                self._controller.replace_replica(id)
                return None
            case {"do": "update"}:
                return await self._update(request, say)
            case {"do": "down"}:
                self._controller.close()
                await self._ended.wait()
                return None
        raise ConfigError(
            f"{self._recipe.spec.name} runs under another version of groundserve: take it down and up again"
        )

    async def _update(self, request: Mapping[str, Any], say: control_socket.Say) -> str:
        name, running = self._recipe.spec.name, self._controller.wanted.target
        try:
            spec = parse(
                request["text"],
                source=request["source"],
                name=name,
                envs=request["envs"],
                secrets=request["secrets"],
                # Where `up` was typed: an update typed elsewhere would start every replica anew in that other folder.
                base=self._recipe.spec.base,
            )
            mode = request["mode"]
        except KeyError as missing:
            raise ConfigError(f"{name} runs under another version of groundserve: it wants {missing}") from None
        self._version = max(self._version, self._controller.wanted.newest.version) + 1
        made = recipe(spec, self._version)
        if self._replica_key is not None and made.launch is not None and keys.brings_its_own(made):
            raise ConfigError(
                f"{name}: its replicas ask for a key of this service, and now `run:` brings one of its own: take it "
                "down and up again"
            )
        made, warnings = await asyncio.to_thread(machine.fitted_here, made, running)
        for warning in warnings:
            say(f"warning: {warning}")
        say(f"{name} goes from version {self._controller.wanted.serving.version} to {self._version}, {mode}")
        outcome = await self._controller.update(made, mode)
        if outcome.failure:
            raise ConfigError(f"{name} stays at version {self._controller.wanted.serving.version}: {outcome.failure}")
        return f"{name} is at version {outcome.version}"


def _usable(flag: str, address: str) -> str:
    host, port = _split(address)
    if not host or not 0 <= port < 65536:
        raise ConfigError(f"{flag} {address}: write HOST:PORT, as in 127.0.0.1:30001")
    if port == 0:
        return f"{address.rpartition(':')[0]}:{free_ports(1)[0]}"
    if not is_free(host, port):
        raise ConfigError(f"{flag} {address}: the port is in use: stop what listens there, or give another one")
    return address


def _split(address: str) -> tuple[str, int]:
    """Host and port; port -1 where there is none."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port) if port.isdecimal() else -1
