"""Starts the coordinator and the relays, starts anew what dies of them, and passes on what it is told.

It has neither a loop nor a thread, so that it may fork at any time: a new process is there at once.
"""

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace

import uvloop

from balancer.app import LAST_CALL, LAST_CALL_OF_SHARED
from balancer.config import Config, Reread
from balancer.errors import ConfigError
from balancer.fleet.discovery import Resolve, resolve
from balancer.inherited import ending
from balancer.process import wait_for_no_reader
from balancer.relay import listen
from balancer.workers.board import Board
from balancer.workers.coordinator import Coordinator
from balancer.workers.orders import Order, Orders
from balancer.workers.relay_process import RelayProcess

log = logging.getLogger("groundserve")

COORDINATOR = -1
BACKLOG = 1024
# A process that ends within this many seconds of its start is started anew only after a pause, of this many seconds.
SHORT_LIFE, PAUSE = 1.0, 0.5


@dataclass(slots=True)
class _Child:
    number: int  # of the relay, or COORDINATOR
    orders: int  # the pipe's end to write to
    started_at: float


class Supervisor:
    """The processes of one balancer. `look_up` resolves replicas' names; `reread` returns the configuration anew."""

    def __init__(self, config: Config, look_up: Resolve = resolve, reread: Reread | None = None) -> None:
        self._is_supervised = config.listen_fd is not None
        self._sockets = [
            listen.listening(*config.listen)
            if config.listen_fd is None
            else listen.handed_over(config.listen_fd, "--listen-fd"),
            listen.listening(*config.admin)
            if config.admin_fd is None
            else listen.handed_over(config.admin_fd, "--admin-fd"),
        ]
        endpoint, admin = self._sockets
        self._config = replace(config, listen_fd=endpoint.fileno(), admin_fd=admin.fileno())
        self._look_up = look_up
        self._reread = reread
        self._board = Board(config.workers)
        # An abstract address leaves no file behind; we have it as long as we live, and who connects is checked.
        self._address = f"\0groundserve-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._address)
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        self._ready, self._is_ready = os.pipe()
        os.set_blocking(self._ready, False)
        self._children: dict[int, _Child] = {}
        self._due: list[tuple[float, int]] = []  # when to start which process anew
        self._is_leaving = False
        self._was_ready = False

    def run(self) -> int:
        """Returns the exit status, after all processes have ended."""
        listen.raise_file_limit()
        wait_for_no_reader()
        signals = {*ending(), signal.SIGCHLD}
        if self._is_supervised:
            signals.add(signal.SIGUSR1)
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        gc.freeze()
        self._start(COORDINATOR)
        for number in range(self._config.workers):
            self._start(number)
        status = 0
        while self._children or self._due:
            wait = max(0.0, min((at for at, _ in self._due), default=time.monotonic() + 60.0) - time.monotonic())
            caught = signal.sigtimedwait(signals, wait)
            if caught is not None and caught.si_signo != signal.SIGCHLD:
                self._signalled(signal.Signals(caught.si_signo))
            status = self._reap() or status
            self._start_due()
        return status

    def _signalled(self, number: signal.Signals) -> None:
        if not self._is_leaving:
            self._leave(Order.RELEASE if number == signal.SIGUSR1 else Order.LEAVE)
        elif not (self._is_supervised and number in (signal.SIGTERM, signal.SIGUSR1)):
            self._order(Order.HURRY)

    def _leave(self, order: Order) -> None:
        self._is_leaving = True
        self._due.clear()
        for listener in self._sockets:
            listener.close()
        self._order(order)
        self._take_leave()

    def _order(self, order: Order) -> None:
        for child in self._children.values():
            with contextlib.suppress(OSError):  # it has just ended
                os.write(child.orders, order.value)

    def _take_leave(self) -> None:
        """While leaving: ends the coordinator when no relay is left, and sees that no relay waits for one in vain."""
        if not self._is_leaving:
            return
        are_coordinators = [child.number == COORDINATOR for child in self._children.values()]
        if all(are_coordinators):
            self._order(Order.END)
        if not any(are_coordinators):
            self._listener.close()  # ends the connections that wait there

    # Processes

    def _reap(self) -> int:
        """Notes which processes have ended. Returns the status with which to end, if that is not 0."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return 0
            if not pid:
                return 0
            if (child := self._children.pop(pid, None)) is None:
                continue
            os.close(child.orders)
            code = os.waitstatus_to_exitcode(status)
            if not self._has_been_ready():
                if not self._is_leaving:  # it cannot start, and has said why
                    for other in self._children:
                        os.kill(other, signal.SIGKILL)
                    self._leave(Order.LEAVE)
                    return code or 1
            elif not self._is_leaving:
                self._ended(child, code)
            if child.number != COORDINATOR:
                self._board.clear(child.number)
            self._take_leave()

    def _has_been_ready(self) -> bool:
        if not self._was_ready:
            with contextlib.suppress(BlockingIOError):
                self._was_ready = bool(os.read(self._ready, 1))
        return self._was_ready

    def _ended(self, child: _Child, code: int) -> None:
        name = "the coordinator" if child.number == COORDINATOR else f"relay {child.number}"
        log.error("%s ended (%s); it is started anew", name, code)
        now = time.monotonic()
        is_short = now - child.started_at < SHORT_LIFE
        self._due.append((now + PAUSE if is_short else now, child.number))

    def _start_due(self) -> None:
        now = time.monotonic()
        for at, number in list(self._due):
            if at <= now:
                self._due.remove((at, number))
                self._start(number)

    def _start(self, number: int) -> None:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid:
            os.close(reading)
            self._children[pid] = _Child(number, writing, time.monotonic())
            return
        status = 1
        try:
            os.close(writing)
            for child in self._children.values():
                os.close(child.orders)  # else they would not see the end of it
            self._settle_child()
            status = self._be(number, reading)
        except BaseException:
            log.exception("a process of the balancer failed")
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(status)

    def _settle_child(self) -> None:
        """Signals are the supervisor's: a terminal or a service manager sends them to all processes of a group."""
        for number in (*ending(), signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _be(self, number: int, pipe: int) -> int:
        async def main() -> None:
            loop = asyncio.get_running_loop()
            orders = Orders(loop, pipe)
            if number == COORDINATOR:
                await self._coordinate(loop, orders)
            else:
                await self._relay(number, loop, orders)

        try:
            uvloop.run(main())
        except ConfigError as error:
            print(f"groundserve: {error}", file=sys.stderr)
            return 1
        return 0

    async def _coordinate(self, loop: asyncio.AbstractEventLoop, orders: Orders) -> None:
        coordinator = Coordinator(self._config, loop, self._board, self._look_up, self._reread)
        await coordinator.run(self._listener.dup(), orders, None if self._was_ready else self._note_ready)

    def _note_ready(self) -> None:
        os.write(self._is_ready, b"1")

    async def _relay(self, number: int, loop: asyncio.AbstractEventLoop, orders: Orders) -> None:
        self._sockets[1].close()
        self._listener.close()
        relay = RelayProcess(self._config, loop, number, self._address, self._board, self._look_up)
        last_call = LAST_CALL_OF_SHARED if self._is_supervised else LAST_CALL
        await relay.run(self._sockets[0], orders, last_call)


def run(config: Config, look_up: Resolve = resolve, reread: Reread | None = None) -> int:
    """Serves with several processes until it is told to stop. Returns the exit status. Raises ConfigError."""
    return Supervisor(config, look_up, reread).run()
