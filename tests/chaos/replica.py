"""A lab replica in a process of its own, which logs each generation to a file that survives the process."""

import asyncio
import contextlib
import ctypes
import dataclasses
import enum
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.lab.process import PR_SET_PDEATHSIG, until_exit
from tests.lab.replica import LabReplica
from tests.lab.seen import Seen, SeenRequest

# Forked from one process that has imported everything, so that a restart takes milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.chaos.replica"])
DRAIN_GRACE = 0.5
INF = float("inf")


class Ill(enum.Enum):
    """How a replica can be unwell."""

    GONE = "gone"  # no process, until the next one listens
    DEAF = "deaf"  # stopped, or its network swallows all: it gives no sign of life
    REFUSING = "refusing"  # it takes no new connection
    CUTTING = "cutting"  # it breaks off connections amid requests and answers
    RESETTING = "resetting"  # it resets its connections, with all that is on its way, just now
    HANGING = "hanging"  # it gives signs of life, but lets requests wait for ever
    ERRING = "erring"  # it answers 500


@dataclasses.dataclass(slots=True)
class Spell:
    """A time in which a replica was unwell. Times are CLOCK_MONOTONIC."""

    how: Ill
    began: float
    ended: float = INF


# The knobs that make it unwell while they are set.
_ILL_BY = {"cut": Ill.CUTTING, "hang": Ill.HANGING, "black_hole": Ill.DEAF, "status": Ill.ERRING}


class Journal(Seen):
    """What the replica sees, logged as it happens: a line for each generation and for each request's end.

    Times are CLOCK_MONOTONIC, which all processes of a machine share. `is_open` tells, by a connection's number,
    whether its client still has it: an answer to one that has closed it reaches nobody.
    """

    def __init__(self, file: int, address: str, is_open: Callable[[int], bool]) -> None:
        super().__init__()
        self.file = file
        self.address = address
        self.is_open = is_open
        self.unread = 0  # index of the first request that is not followed yet
        self.followed: dict[int, SeenRequest] = {}
        self.generating: set[int] = set()

    def changed(self) -> None:
        super().changed()
        for request in self.requests[self.unread :]:
            self.followed[request.number] = request
            self.unread += 1
        for number, request in list(self.followed.items()):
            if request.generated and number not in self.generating:
                self.generating.add(number)
                self._write("generated", request)
            if request.outcome != "open":
                del self.followed[number]
                told = {"outcome": request.outcome, "generated": request.generated}
                self._write("ended", request, **told, is_heard=self.is_open(request.connection))

    def _write(self, what: str, request: SeenRequest, **more: Any) -> None:
        line = {"what": what, "id": request.id, "address": self.address, "process": os.getpid()}
        line |= {"at": time.monotonic(), **more}
        os.write(self.file, json.dumps(line).encode() + b"\n")


def run(host: str, port: int, journal: str, pipe: Connection, knobs: dict[str, Any]) -> None:
    """The main function of the replica's process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a run that is killed leaves no replica behind
    asyncio.run(_serve(host, port, journal, pipe, knobs))


async def _serve(host: str, port: int, journal: str, pipe: Connection, knobs: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    replica = LabReplica(host=host, port=port, **knobs)
    file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    replica.seen = Journal(file, f"{host}:{port}", replica.is_open)
    replica.die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    commands: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
    loop.add_reader(pipe.fileno(), lambda: commands.put_nowait(pipe.recv()))
    await replica.start()
    pipe.send("listening")

    async def obey() -> None:
        while True:
            match await commands.get():
                case "set", changes:
                    replica.set(**changes)
                case "refuse", _:
                    # When the listener closes, asyncio forgets connections that it has accepted but not set up yet.
                    await asyncio.sleep(0)
                    replica.refuse()
                case "accept", _:
                    await replica.accept()
                case "drop", _:
                    replica.drop_connections()
            pipe.send("done")

    obeying = asyncio.ensure_future(obey())
    await stop.wait()
    await until_exit(replica, 0.0, 5.0, DRAIN_GRACE)
    obeying.cancel()
    os._exit(1 if replica.seen.crashes else 0)


@dataclasses.dataclass(slots=True)
class Replica:
    """One address, and the process that listens there, if any."""

    number: int
    host: str
    port: int
    journal: Path
    knobs: dict[str, Any]
    process: Any = None
    pipe: Connection | None = None
    spells: list[Spell] = dataclasses.field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    async def start(self) -> None:
        """Returns when it listens."""
        self.pipe, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(
            target=run, args=(self.host, self.port, str(self.journal), theirs, self.knobs), daemon=True
        )
        await asyncio.to_thread(self.process.start)
        theirs.close()
        await self._hear("listening")
        self.recovers(*Ill)

    async def tell(self, command: str, **changes: Any) -> None:
        """Sends a command (set, refuse, accept, drop); returns when it has taken effect."""
        assert self.pipe is not None
        knobs = {_ILL_BY[name]: value for name, value in changes.items() if name in _ILL_BY and value != 503}
        for how, value in knobs.items():
            if value:
                self.falls(how)
        if command in ("refuse", "drop"):
            self.falls(Ill.REFUSING if command == "refuse" else Ill.RESETTING)
        self.pipe.send((command, changes))
        await self._hear("done")
        self.recovers(*(how for how, value in knobs.items() if not value))
        if command in ("accept", "drop"):
            self.recovers(Ill.REFUSING if command == "accept" else Ill.RESETTING)

    def falls(self, how: Ill) -> None:
        self.spells.append(Spell(how, time.monotonic()))

    def recovers(self, *hows: Ill) -> None:
        for spell in self.spells:
            if spell.how in hows and spell.ended == INF:
                spell.ended = time.monotonic()

    async def _hear(self, word: str) -> None:
        assert self.pipe is not None
        if not await asyncio.to_thread(self.pipe.poll, 20) or self.pipe.recv() != word:
            raise RuntimeError(f"the replica at {self.address} does not say {word!r}")

    def signal(self, number: signal.Signals) -> None:
        if number in (signal.SIGKILL, signal.SIGSTOP):
            self.falls(Ill.GONE if number == signal.SIGKILL else Ill.DEAF)
        os.kill(self.process.pid, number)
        if number == signal.SIGCONT:
            self.recovers(Ill.DEAF)

    async def ended(self) -> None:
        """Wait until the process is gone."""
        await asyncio.to_thread(self.process.join, 20)
        if self.process.exitcode is None:
            raise RuntimeError(f"the replica at {self.address} does not end")
        if self.pipe is not None:
            self.pipe.close()
        self.process.close()
        self.process = None

    async def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # poison has killed it
                self.signal(signal.SIGKILL)
            await self.ended()
