"""Connects to replicas at the last known addresses of their names."""

import asyncio
import errno
import ipaddress
import ssl
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from balancer.fleet.discovery import Resolve, resolve
from balancer.fleet.lateness import Within

# Seconds for which a name's addresses are used without looking them up again.
FRESH = 1.0
# Seconds to wait for a name server while older addresses are known.
PATIENCE = 0.1
# Errors of connect() that come from a shortage on our side and say nothing about the replica.
OUR_OWN_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}

P = TypeVar("P", bound=asyncio.BaseProtocol)


class Unresolved(Exception):
    """The replica's name could not be resolved; the message says why."""


class Located(Protocol):
    """What connecting to a replica needs to know."""

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...


class Dialer:
    """Opens connections to replicas and remembers the addresses of their names.

    A name server that fails or is slow says nothing about a replica: known addresses stay valid until it returns
    others, and its time does not count towards connecting. `within` limits a wait, in seconds.
    """

    def __init__(self, look_up: Resolve = resolve, within: Within = asyncio.timeout) -> None:
        self.within = within
        self._names = _Names(look_up)

    async def addresses(self, replica: Located) -> Sequence[str]:
        """The replica's addresses; raises Unresolved if its name has never been resolved and cannot be now."""
        return (replica.host,) if _is_address(replica.host) else await self._names.addresses(replica.host, replica.port)

    async def connect(
        self,
        replica: Located,
        addresses: Sequence[str],
        make: Callable[[], P],
        tls: ssl.SSLContext | None,
        seconds: float,
    ) -> P:
        """Connects to the first of `addresses` that accepts; `seconds` are divided equally among them.

        If none does, raises TimeoutError if one of them did not answer, else the OSError of the last one.
        """
        loop = asyncio.get_running_loop()
        name = replica.host if tls is not None else None
        troubles: list[OSError] = []
        for address in addresses:
            try:
                async with self.within(seconds / len(addresses)):
                    _, made = await loop.create_connection(make, address, replica.port, ssl=tls, server_hostname=name)
            except OSError as error:
                troubles.append(error)
            else:
                self._names.good(replica.host, address)
                return made
        raise next((error for error in troubles if isinstance(error, TimeoutError)), troubles[-1])

    async def close(self) -> None:
        """Cancels the look-ups in progress."""
        await self._names.close()


class _Names:
    def __init__(self, look_up: Resolve) -> None:
        self._look_up = look_up
        self._known: dict[str, list[str]] = {}
        self._tried_at: dict[str, float] = {}
        self._asking: dict[str, asyncio.Task[str]] = {}

    async def addresses(self, name: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        known = self._known.get(name)
        asking = self._asking.get(name)
        if known and (asking is not None or loop.time() - self._tried_at[name] < FRESH):
            return known
        if asking is None:
            self._tried_at[name] = loop.time()
            asking = self._asking[name] = asyncio.create_task(self._ask(name, port))
        if known:
            await asyncio.wait((asking,), timeout=PATIENCE)
            return self._known[name]
        why = await asyncio.shield(asking)
        if name not in self._known:
            raise Unresolved(f"its name {name} is not known: {why}")
        return self._known[name]

    async def _ask(self, name: str, port: int) -> str:
        """Looks the name up and keeps its addresses. Returns why there are none, empty if there are."""
        try:
            found = await self._look_up(name, port)
        except OSError as error:
            return str(error) or "no answer in time"
        else:
            before = self._known.get(name, [])
            if found and set(found) != set(before):
                self._known[name] = list(found)
            return "" if found else "no such name"
        finally:
            self._tried_at[name] = asyncio.get_running_loop().time()
            del self._asking[name]

    def good(self, name: str, address: str) -> None:
        """Notes that `address` accepted a connection: it is tried first from now on."""
        known = self._known.get(name)
        if known and known[0] != address and address in known:
            known.sort(key=lambda other: other != address)

    async def close(self) -> None:
        asking = list(self._asking.values())
        for question in asking:
            question.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
