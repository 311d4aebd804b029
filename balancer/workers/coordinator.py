"""The composition root of the coordinator: a balancer without doors, whose relays have them."""

import asyncio
import gc
import socket
import sys
from collections.abc import Callable, Sequence, Sized

from balancer.app import Balancer
from balancer.config import Config, Reread
from balancer.fleet.discovery import Resolve
from balancer.inherited import tell
from balancer.observe.metrics import Clients
from balancer.workers.answering import Answering
from balancer.workers.board import CONNECTIONS, HELD, Board
from balancer.workers.orders import Orders


class Coordinator(Balancer):
    """Owns fleet, queue, policies, keys, usage and the admin port of `config.workers` relays."""

    def __init__(
        self, config: Config, loop: asyncio.AbstractEventLoop, board: Board, look_up: Resolve, reread: Reread | None
    ) -> None:
        self._board = board
        super().__init__(config, loop, look_up=look_up, reread=reread)
        self._sockets[0].close()  # the relays accept there
        self.relays_changed = asyncio.Event()
        self.answering = Answering(
            loop,
            self.services,
            self.tallies,
            self.keys,
            self.meter,
            self.own_app,
            self.relays_changed.set,
            self.accounts,
        )
        self.services.jobs["what relays are told"] = self.answering.tick
        if self.accounts is not None:
            self.answering.telling.keys_changed(self.accounts.issued)
            self.accounts.when_changed.append(self.answering.telling.keys_changed)

    def _clients(self) -> Clients:
        return _Everywhere(self._board)

    async def _open_doors(self, leaving: asyncio.Event) -> None:
        """The relays open them."""

    async def run(self, listener: socket.socket, orders: Orders, when_ready: Callable[[], None] | None) -> None:
        """Serves the relays that connect to `listener` until no relay is left.

        Once all of them accept, says where it listens and calls `when_ready`, if there is one.
        """
        await self.answering.start(listener)
        await self.start(orders.leaving)
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)
        accepting = asyncio.ensure_future(self._announce(when_ready)) if when_ready is not None else None
        await orders.leaving.wait()
        if orders.released.is_set():
            self.release_ports()
        self.services.leave()
        await orders.end.wait()
        if accepting is not None:
            accepting.cancel()
        self.answering.close()
        await self.stop()

    async def _announce(self, when_ready: Callable[[], None]) -> None:
        while sum(relay.is_accepting for relay in self.answering.relays) < self.config.workers:
            self.relays_changed.clear()
            await self.relays_changed.wait()
        tell(sys.stderr, f"listening on {self.endpoint}\nadmin on {self.admin_endpoint}")
        when_ready()


class _Everywhere:
    """Implements balancer.observe.metrics.Clients for all relays together."""

    def __init__(self, board: Board) -> None:
        self._board = board

    @property
    def connections(self) -> Sized:
        return _Count(self._board.all(CONNECTIONS))

    @property
    def buffered(self) -> int:
        return sum(self._board.all(HELD))


class _Count:
    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = counts

    def __len__(self) -> int:
        return sum(self._counts)
