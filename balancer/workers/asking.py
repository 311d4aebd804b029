"""The relay's end of its link to the coordinator. A coordinator that was restarted is told what the relay holds."""

import asyncio
import contextlib
import itertools
import socket
from typing import Any, Protocol

from balancer import errors
from balancer.errors import ServeError
from balancer.fleet.address import ReplicaAddress
from balancer.workers.known import KnownReplica
from balancer.workers.link import Link, Message
from balancer.workers.messages import Asked, Told, error_of

AGAIN = 0.02  # seconds between two attempts to connect


class Claimed(Protocol):
    """A place that is asked for, then held."""

    @property
    def known(self) -> KnownReplica:
        """Where it is held."""

    @property
    def holding(self) -> list[Any]:
        """What a new coordinator is told of it."""

    def given(self, known: KnownReplica, said: Message) -> None:
        """The coordinator gives it, at this replica."""


class Listener(Protocol):
    """Is told what is not an answer."""

    def greeted(self) -> None:
        """A coordinator is there that was told nothing yet but what is held."""

    def told(self, message: Message) -> None: ...

    def met(self, replica: KnownReplica) -> None: ...

    def left(self, replica: KnownReplica) -> None: ...


class Asking:
    """`address` is the coordinator's Unix address. `listener` must be set before `run`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, address: str) -> None:
        self.held: dict[int, Claimed] = {}
        self.entries: dict[int, str] = {}  # requests with limited keys, by the call that let them in
        self.replicas: dict[int, KnownReplica] = {}
        self.by_address: dict[ReplicaAddress, KnownReplica] = {}
        self.listener: Listener | None = None
        self.is_accepting = False
        self.is_leaving = False
        self.knows_all = asyncio.Event()
        self._loop = loop
        self._address = address
        self._numbers = itertools.count(1)
        self._link: Link | None = None
        self._ended = asyncio.Event()
        # What has not been answered yet: the message, its future, and what takes a place
        self._waiting: dict[int, tuple[Message, asyncio.Future[Any], Claimed | None]] = {}
        self._heard: dict[KnownReplica, float] = {}

    async def run(self) -> None:
        """Keeps the link up until it is cancelled."""
        while True:
            self._ended.clear()
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            try:
                sock.connect(self._address)  # uvloop does not know abstract addresses
            except OSError as error:  # too many connect at once, or nobody is there to come
                sock.close()
                if self.is_leaving and isinstance(error, ConnectionRefusedError):
                    self._give_up()
                    return
                await asyncio.sleep(AGAIN)
                continue
            _, link = await self._loop.create_unix_connection(self._new_link, sock=sock)
            self._greet(link)
            await self._ended.wait()
            self._link = None
            self.knows_all.clear()
            if self.is_leaving:
                self._give_up()
                return
            await asyncio.sleep(AGAIN)  # the next may end as soon

    def _new_link(self) -> Link:
        return Link(self._loop, self._take, self._ended.set)

    def _give_up(self) -> None:
        """The balancer is about to end, and its coordinator has ended already: no other will come."""
        for number in list(self._waiting):
            self._answer(number, errors.shutting_down())

    def _greet(self, link: Link) -> None:
        self._link = link
        for known in self.replicas.values():
            known.number = -1  # until the coordinator of now names it
        self.replicas.clear()
        places = [place.holding for place in self.held.values()]
        link.send([Asked.HELLO, places, list(self.entries.items())])
        if self.is_accepting:
            link.send([Asked.ACCEPTING])
        for message, _, _ in self._waiting.values():
            link.send(message)
        assert self.listener is not None
        self.listener.greeted()

    # Asking

    def new_number(self) -> int:
        return next(self._numbers)

    def send(self, message: Message) -> None:
        """Nobody hears it if there is no coordinator at the moment: the next one is told what is held then."""
        if self._link is not None:
            self._link.send(message)

    def send_later(self, message: Message) -> None:
        """The same for what may wait a moment."""
        if self._link is not None:
            self._link.send_later(message)

    def wait(
        self,
        number: int,
        message: Message,
        answer: "asyncio.Future[Any]",
        place: Claimed | None = None,
    ) -> None:
        """Sends what is asked again should the coordinator be restarted before it answers."""
        self._waiting[number] = (message, answer, place)
        self.send(message)
        if self.is_leaving and self._link is None:
            self._give_up()

    def leave(self, number: int) -> None:
        """Whoever asked for a place has left."""
        if self._waiting.pop(number, None) is not None:
            self.send([Asked.LEAVE, number])

    def forget(self, number: int) -> None:
        """Nobody waits for that answer any more."""
        self._waiting.pop(number, None)

    async def ask(self, kind: Asked, *said: Any) -> Any:
        """The coordinator's answer. Raises ServeError if that is one."""
        number = self.new_number()
        answer = self._loop.create_future()
        self.wait(number, [kind, number, *said], answer)
        try:
            return await answer
        finally:
            self.forget(number)

    def heard(self, known: KnownReplica, at: float) -> None:
        """A replica's bytes came at that loop time; told with the next figures."""
        known.last_byte_at = self._heard[known] = max(at, known.last_byte_at)

    def heard_since(self) -> list[tuple[int, float]]:
        """What `heard` noted since the last call."""
        heard, self._heard = self._heard, {}
        return [(known.number, at) for known, at in heard.items() if known.number >= 0]

    @property
    def is_up(self) -> bool:
        return self._link is not None

    def flush(self) -> None:
        if self._link is not None:
            self._link.flush()

    # What the coordinator says

    def _take(self, message: Message) -> None:
        match message[0]:
            case Told.PLACE:
                self._give(message)
            case Told.REFUSED | Told.ERROR:
                self._answer(message[1], error_of(message[2]))
            case Told.ANSWER:
                self._answer(message[1], message[2])
            case Told.REPLICA:
                self._meet(message)
            case Told.GONE:
                if (gone := self.replicas.pop(message[1], None)) is not None:
                    gone.is_leaving = True
                    self._forget(gone)
            case Told.ALL:
                self.knows_all.set()
            case _:
                assert self.listener is not None
                self.listener.told(message)

    def _give(self, message: Message) -> None:
        number = message[1]
        _, answer, place = self._waiting.pop(number, (None, None, None))
        if answer is None or place is None:
            return
        if answer.done():  # its client has just left
            self.send([Asked.LEAVE, number])
            return
        self.held[number] = place
        place.given(self.replicas[message[2]], message)
        answer.set_result(None)

    def _answer(self, number: int, said: Any) -> None:
        _, answer, _ = self._waiting.pop(number, (None, None, None))
        if answer is None or answer.done():
            return
        if isinstance(said, ServeError):
            answer.set_exception(said)
        else:
            answer.set_result(said)

    def _meet(self, message: Message) -> None:
        _, number, service, name, url, *facts = message
        known = self.replicas.get(number)
        if known is None:
            # One that holds requests of ours may come to this coordinator's knowledge only now.
            earlier = (*self.by_address.values(), *(place.known for place in self.held.values()))
            known = next((one for one in earlier if _is_same(one, service, name, url)), None)
            if known is None:
                known = KnownReplica(number, service, url, ReplicaAddress.of(name, url))
            self.by_address[known.address] = known
            known.number = number
            self.replicas[number] = known
            assert self.listener is not None
            self.listener.met(known)
        known.take(facts)

    def all_met(self, service: str) -> None:
        """The coordinator has told of all replicas of the service: others have left."""
        for known in [one for one in self.by_address.values() if one.number < 0 and one.service == service]:
            self._forget(known)

    def _forget(self, known: KnownReplica) -> None:
        known.number = -1
        if self.by_address.get(known.address) is known:
            del self.by_address[known.address]
        assert self.listener is not None
        self.listener.left(known)

    async def close(self) -> None:
        """Says what is still to be said, and ends the link."""
        if self._link is not None:
            self._link.flush()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await self._ended.wait()
            self._link.close()


def _is_same(known: KnownReplica, service: str, name: str, url: str) -> bool:
    """Is it a replica that another coordinator told of?"""
    is_open = known.number < 0 and not known.is_leaving
    return is_open and (known.service, known.name, known.url) == (service, name, url)
