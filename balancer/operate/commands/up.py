"""`groundserve up`: brings a service up, prints how to use it, and is its controller until it goes down."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from balancer.contract.status import ReplicaRow, Snapshot
from balancer.contract.words import Phase, ServiceStatus, Status
from balancer.errors import ConfigError
from balancer.inherited import ending
from balancer.operate.commands.begin import Beginning, spec_of
from balancer.operate.commands.boot import is_enabled
from balancer.operate.commands.division import shares
from balancer.operate.commands.progress import Lines, Moving, Told
from balancer.operate.controller.controller import Controller
from balancer.operate.controller.rollout import Mode
from balancer.operate.engines import capacity
from balancer.operate.engines.addresses import Addresses
from balancer.operate.engines.child import tail
from balancer.operate.engines.choose import HERE
from balancer.operate.engines.engine import CannotStart
from balancer.operate.recipe.recipe import planned_fraction, recipe, with_fraction
from balancer.operate.state import control_socket
from balancer.operate.state.desired import Desired, Version, Versions
from balancer.operate.state.event_log import EventLog
from balancer.operate.state.service_folder import ServiceFolder
from balancer.operate.state.state_file import BrokenState


def run(begin: Beginning, addresses: Addresses, progress: Lines, on_up: Callable[[], None]) -> int:
    """Runs the service until it is asked to end, and returns the exit code. The caller holds the folder's lock.

    The engine must be prepared. `on_up` is called once, when the service is up and the messages about it are printed.
    """

    async def serve() -> int:
        return await _Up(begin, addresses, progress, on_up).run()

    return asyncio.run(serve())


def on_terminal(folder: ServiceFolder) -> Lines:
    """Progress on stdout: a moving table on a terminal, plain lines elsewhere."""
    console = Console(highlight=False)
    if not console.is_terminal:
        return Lines(sys.stdout)
    return Moving(console, lambda id: next(iter(tail(folder.replica_log(id), 1)), ""))


class _Up:
    """One service from its start to its end."""

    def __init__(self, begin: Beginning, addresses: Addresses, progress: Lines, on_up: Callable[[], None]) -> None:
        first = begin.wanted.serving
        self._recipe = first
        self._begin = begin
        self._addresses = addresses
        self._folder = begin.folder
        self._engine = begin.engine
        self._progress = progress
        self._on_up = on_up
        self._is_up = False
        self._is_wanted_no_more = False
        self._failure = ""
        self._began = time.monotonic()
        self._ended = asyncio.Event()
        self._versions = Versions(begin.versions, begin.wanted.newest.version)
        self._secrets = dict(begin.secrets)
        self._written: Desired | None = None
        self._is_unwritten = False
        self._watching: set[Told] = set()
        self._balancer = self._engine.balancer(first)
        self._events = EventLog(self._folder.event_log, progress.say)
        self._controller = Controller(
            begin.name,
            begin.wanted,
            self._engine,
            self._balancer,
            progress.say,
            self._look,
            self._events.add,
            capacity.failed_gpus if self._engine.name in HERE else None,
        )

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in ending():
            loop.add_signal_handler(number, self._signalled, number)
        self._folder.write_desired(self._desired())
        async with control_socket.serving(self._folder.socket, self._answer):
            try:
                await self._controller.run()
            except CannotStart as failure:
                self._failure = str(failure)
            finally:
                self._progress.finish()
                self._write_the_end()
                self._events.close()
                self._ended.set()
        if self._failure:
            self._progress.say(f"groundserve: {self._recipe.spec.name} failed: {self._failure}")
            return 1
        self._progress.say(f"{self._recipe.spec.name} is down")
        return 0

    def _signalled(self, number: signal.Signals) -> None:
        # The others also come from a machine that shuts down.
        self._is_wanted_no_more |= number is signal.SIGINT
        self._progress.finish()
        if number is signal.SIGTERM and self._engine.is_kept_up:
            self._progress.say("ending: all goes on until the next controller takes it up")
            self._controller.leave()
            return
        self._progress.say("stopping: answers in flight are finished first; once more ends at once")
        self._controller.close()

    def _look(self, snapshot: Snapshot) -> None:
        """Shows the snapshot, and notices when the service is up or has failed."""
        self._progress.show(snapshot)
        for watching in self._watching:
            watching.show(snapshot)
        self._write()
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
        """Is its status unlikely to change soon?

        While others serve, a replica may wait for a GPU indefinitely: here, or in its engine's queue.
        """
        if row.status.phase is Phase.READY or row.status is Status.FAILED:
            return True
        replica = self._controller.replicas.get(row.id)
        is_waiting = replica is not None and (replica.waits_for_gpu or replica.is_queued)
        return is_waiting and self._controller.snapshot.service.ready > 0

    async def _greet(self, ready: int) -> None:
        name = self._recipe.spec.name
        self._progress.finish()
        count = "no replica" if ready == 0 else "1 replica" if ready == 1 else f"{ready} replicas"
        self._progress.say(
            f"\n{name} is up after {time.monotonic() - self._began:.0f} s: {count} at {self._balancer.endpoint}"
        )
        if ready:
            self._progress.say(await self._to_try())
        self._progress.say(f"look   groundserve status {name}")
        self._progress.say(f"stop   groundserve down {name}   (or Ctrl-C where it was started)\n")
        self._on_up()

    async def _to_try(self) -> str:
        """A command that this service answers, and how to come by a key if it wants one."""
        name, endpoint = self._recipe.spec.name, self._balancer.endpoint
        try:
            # verify=False, because its certificate may be one that this machine does not trust.
            async with httpx.AsyncClient(trust_env=False, timeout=5, verify=False) as client:
                answer = await client.get(f"{endpoint}/v1/models")
            if answer.status_code == 401:
                example = f'try    curl {endpoint}/v1/models -H "Authorization: Bearer $KEY"'
                issue = f"key    groundserve keys add WHOSE -n {name}   gives one out; nobody gets in without"
                return f"{issue}\n{example}" if self._addresses.api_keys is None else example
            model = next(one["id"] for one in answer.json()["data"] if one.get("service", name) == name)
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
            return f"try    curl {endpoint}/health"  # what serves no models may answer nothing else that is relayed
        # For "What is ...?" the smallest model's top two tokens tie in bfloat16, and the hardware decides.
        question = {"role": "user", "content": "Name the capital of France."}
        # Without a limit a small model may ramble for minutes on a CPU.
        body = {"model": model, "messages": [question], "max_tokens": 32, "temperature": 0}
        return (
            f"try    curl {endpoint}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            f"         -d '{json.dumps(body)}'"
        )

    async def _answer(self, request: Mapping[str, Any], say: control_socket.Say) -> Any:
        if self._engine.is_kept_up:
            self._refuse_what_would_not_last(request["do"])
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
            case {"do": "abort"}:
                return self._abort()
            case {"do": "rollback", "version": int() | None as number, "mode": "rolling" | "blue_green" as mode}:
                return await self._roll_back(number, mode, say)
            case {"do": "restart"}:
                return await self._restart(say)
            case {"do": "down"}:
                self._is_wanted_no_more = True
                self._controller.close()
                await self._ended.wait()
                return None
        raise ConfigError(
            f"{self._recipe.spec.name} runs under another version of groundserve: take it down and up again"
        )

    def _refuse_what_would_not_last(self, word: str) -> None:
        """The next controller would begin with the file that its cluster has. Raises ConfigError."""
        what = f"{self._begin.name} is what its cluster was given"
        if word in ("update", "rollback"):
            raise ConfigError(f"{what}: change the file, and apply what groundserve manifests prints of it")
        if word == "down":
            raise ConfigError(f"{what}: kubectl delete -f with that takes it down, replicas included")

    async def _update(self, request: Mapping[str, Any], say: control_socket.Say) -> str:
        try:
            secrets, mode = request["secrets"], request["mode"]
            version = Version(0, request["text"], request["source"], request["envs"], tuple(sorted(secrets)))
        except KeyError as missing:
            name = self._begin.name
            raise ConfigError(f"{name} runs under another version of groundserve: it wants {missing}") from None
        return await self._roll_out(version, secrets, mode, say)

    def _abort(self) -> str:
        result = self._controller.abort()
        self._write()
        version = self._controller.wanted.serving.version
        return f"{self._begin.name} goes back to version {version}: the update to version {result.version} is aborted"

    async def _roll_back(self, number: int | None, mode: Mode, say: control_socket.Say) -> str:
        name, wanted = self._begin.name, self._controller.wanted
        if number is None and wanted.coming is not None:
            return self._abort()
        version = self._versions.earlier(wanted.serving.version, number)
        if version is None:
            known = ", ".join(map(str, self._versions.served)) or "none"
            which = "no earlier version" if number is None else f"no version {number}"
            raise ConfigError(f"{name} has {which} to go back to; these have served: {known}")
        say(f"{name} gets the file of version {version.number} again")
        return await self._roll_out(version, self._secrets, mode, say)

    async def _restart(self, say: control_socket.Say) -> str:
        serving = self._controller.wanted.serving.version
        version = self._versions.file_of(serving)
        done = await self._roll_out(version, self._secrets, "rolling", say, is_restart=True)
        self._versions.replaced(serving)
        self._write()
        return done

    async def _roll_out(
        self,
        file: Version,
        secrets: Mapping[str, str],
        mode: Mode,
        say: control_socket.Say,
        is_restart: bool = False,
    ) -> str:
        """Makes this file the next version, and returns what came of it."""
        name, wanted = self._begin.name, self._controller.wanted
        # The folder where `up` was run: with the one of this update, every replica would restart there.
        spec = spec_of(file, name, secrets, self._recipe.spec.base)
        number = self._versions.next_number(wanted.newest.version)
        made = recipe(spec, number)
        given, lines = await asyncio.to_thread(shares, [made])
        for line in lines:
            say(line)
        made = with_fraction(made, given.get(name))
        fitted, warnings = await asyncio.to_thread(self._engine.fit, made, wanted.target)
        for warning in warnings:
            say(f"warning: {warning}")
        watching = Told(self._controller.snapshot, say)
        self._versions.add(replace(file, number=number))
        say(f"{name} goes from version {wanted.serving.version} to {number}, {mode}")
        self._watching.add(watching)
        try:
            result = await self._controller.update(fitted, mode, is_restart)
        finally:
            self._watching.discard(watching)
        self._write()
        if result.superseded_by is not None:
            raise ConfigError(f"{name}: version {number} gave way to version {result.superseded_by}")
        if result.failure:
            log = "" if result.failed is None else f"\n  everything it said: groundserve logs {name} {result.failed}"
            raise ConfigError(f"{name} stays at version {wanted.serving.version}: {result.failure}{log}")
        # Those of an update that failed are none that anybody should go back to.
        self._secrets |= secrets
        return f"{name} is at version {number}"

    def _desired(self) -> Desired:
        wanted, where = self._controller.wanted, self._addresses
        coming = wanted.coming.version if wanted.coming is not None else None
        return Desired(
            engine=self._engine.name,
            is_left=self._engine.outlives_controller,
            listen=where.listen,
            admin=where.admin,
            is_open=where.is_open,
            api_keys=_absolute(where.api_keys),
            admin_key=_absolute(where.admin_key),
            join=self._begin.flags.join,
            base=str(self._recipe.spec.base),
            serving=wanted.serving.version,
            target=wanted.target,
            before=wanted.before,
            coming=coming,
            mode=wanted.mode,
            is_switched=wanted.is_switched and coming is not None,
            balancers=where.balancers,
            versions=self._versions.to_keep(wanted.serving.version, coming),
        )

    def _write(self) -> None:
        """Writes down what the service is meant to be, if that has changed. Without room on the disk it says so."""
        self._versions.note_serving(self._controller.wanted.serving.version)
        desired = self._desired()
        if desired == self._written or self._ended.is_set():
            return
        try:
            self._folder.write_desired(desired)
            # Others are planned with what its replicas have, which an update changes only if it succeeds.
            share = planned_fraction(self._controller.wanted.serving)
            if share and share != self._folder.planned_fraction:
                self._folder.write_planned_fraction(share)
        except BrokenState as failure:
            if not self._is_unwritten:
                self._progress.say(f"if the controller ended now, groundserve up would know an older state: {failure}")
            self._is_unwritten = True
        else:
            self._written, self._is_unwritten = desired, False

    def _write_the_end(self) -> None:
        """The service stays meant to exist unless nothing of it runs, and it was taken down or never came up.

        One that systemd brings up at boot stays so after `down`, too.
        """
        is_left = self._engine.outlives_controller and not self._controller.is_cleared
        try:
            meant = self._desired() if self._is_up or is_left else self._begin.before
            if meant is None or (self._is_wanted_no_more and not is_left and not is_enabled(self._begin.name)):
                self._folder.remove_desired()
            else:
                self._folder.write_desired(replace(meant, is_left=is_left))
        except BrokenState as failure:
            self._progress.say(f"groundserve: {failure}")


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())
