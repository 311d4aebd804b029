"""`groundserve up`: brings a service up, prints how to use it, and is its controller until it goes down."""

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from rich.console import Console

from balancer.contract.status import ReplicaRow, Snapshot
from balancer.contract.words import Phase, ServiceStatus, Status
from balancer.errors import ConfigError
from balancer.inherited import ending
from balancer.operate.commands.progress import Lines, Moving
from balancer.operate.controller.controller import Controller
from balancer.operate.controller.wanted import Wanted
from balancer.operate.engines.child import tail
from balancer.operate.engines.engine import CannotStart, Engine
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.operate.state import control_socket
from balancer.operate.state.event_log import EventLog
from balancer.operate.state.service_folder import ServiceFolder
from balancer.spec.service_file import parse


def run(
    first: Recipe,
    folder: ServiceFolder,
    engine: Engine,
    progress: Lines,
    on_up: Callable[[], None],
) -> int:
    """Runs the service until it is asked to end, and returns the exit code. The caller holds the folder's lock.

    `engine` must be prepared. `on_up` is called once, when the service is up and the messages about it are printed.
    """

    async def serve() -> int:
        return await _Up(first, folder, engine, progress, on_up).run()

    return asyncio.run(serve())


def on_terminal(folder: ServiceFolder) -> Lines:
    """Progress on stdout: a moving table on a terminal, plain lines elsewhere."""
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
        engine: Engine,
        progress: Lines,
        on_up: Callable[[], None],
    ) -> None:
        self._recipe = first
        self._folder = folder
        self._engine = engine
        self._progress = progress
        self._on_up = on_up
        self._is_up = False
        self._failure = ""
        self._version = first.version
        self._began = time.monotonic()
        self._ended = asyncio.Event()
        self._balancer = engine.balancer(first)
        self._events = EventLog(folder.event_log, progress.say)
        self._controller = Controller(
            first.spec.name, Wanted(first), engine, self._balancer, progress.say, self._look, self._events.add
        )

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
                if self._engine.outlives_controller and self._controller.is_cleared:
                    self._folder.remove_detached_record()
                self._events.close()
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
        """Shows the snapshot, and notices when the service is up or has failed."""
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
        """Is its status unlikely to change soon? While others serve, a replica may wait for a GPU indefinitely."""
        if row.status.phase is Phase.READY or row.status is Status.FAILED:
            return True
        replica = self._controller.replicas.get(row.id)
        return replica is not None and replica.waits_for_gpu and self._controller.snapshot.service.ready > 0

    async def _greet(self, ready: int) -> None:
        name = self._recipe.spec.name
        self._progress.finish()
        count = "no replica" if ready == 0 else "1 replica" if ready == 1 else f"{ready} replicas"
        self._progress.say(
            f"\n{name} is up after {time.monotonic() - self._began:.0f} s: {count} at {self._balancer.endpoint}"
        )
        if ready:
            self._progress.say(f"try    {await self._example()}")
        self._progress.say(f"look   groundserve status {name}")
        self._progress.say(f"stop   groundserve down {name}   (or Ctrl-C where it was started)\n")
        self._on_up()

    async def _example(self) -> str:
        """An example command that this service answers."""
        try:
            # verify=False, because its certificate may be one that this machine does not trust.
            async with httpx.AsyncClient(trust_env=False, timeout=5, verify=False) as client:
                answer = await client.get(f"{self._balancer.endpoint}/v1/models")
            name = self._recipe.spec.name
            model = next(one["id"] for one in answer.json()["data"] if one.get("service", name) == name)
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
            return f"curl {self._balancer.endpoint}{self._recipe.readiness_probe.path}"
        # For "What is ...?" the smallest model's top two tokens tie in bfloat16, and the hardware decides.
        question = {"role": "user", "content": "Name the capital of France."}
        # Without a limit a small model may ramble for minutes on a CPU.
        body = {"model": model, "messages": [question], "max_tokens": 32, "temperature": 0}
        return (
            f"curl {self._balancer.endpoint}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            f"         -d '{json.dumps(body)}'"
        )

    async def _answer(self, request: Mapping[str, Any], say: control_socket.Say) -> Any:
        match request:
            case {"do": "status"}:
                return self._controller.snapshot.to_json()
            case {"do": "balancer"}:
                where = self._balancer
                return {"endpoint": where.endpoint, "admin": where.admin, "key_file": str(where.key_file)}
            case {"do": "admin key"}:
                return str(self._balancer.key_file)
            case {"do": "scale", "replicas": int(target)}:
                self._controller.scale(target)
                return None
            case {"do": "replace", "id": int(id)}:
                self._controller.replace_replica(id)
                return None
            case {"do": "replace balancer"}:
                await self._controller.replace_balancer()
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
                # The folder where `up` was run: with the one of this update, every replica would restart there.
                base=self._recipe.spec.base,
            )
            mode = request["mode"]
        except KeyError as missing:
            raise ConfigError(f"{name} runs under another version of groundserve: it wants {missing}") from None
        self._version = max(self._version, self._controller.wanted.newest.version) + 1
        fitted, warnings = await asyncio.to_thread(self._engine.fit, recipe(spec, self._version), running)
        for warning in warnings:
            say(f"warning: {warning}")
        say(f"{name} goes from version {self._controller.wanted.serving.version} to {self._version}, {mode}")
        result = await self._controller.update(fitted, mode)
        if result.superseded_by is not None:
            raise ConfigError(f"{name}: version {result.version} gave way to version {result.superseded_by}")
        if result.failure:
            raise ConfigError(f"{name} stays at version {self._controller.wanted.serving.version}: {result.failure}")
        return f"{name} is at version {result.version}"
