"""Issued keys and their usage, as the admin port reads and changes them."""

import asyncio
import logging
import math
import sqlite3
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import TypeVar

import orjson

from balancer.accounts.ledger import Ledger
from balancer.accounts.off_loop import off_loop
from balancer.accounts.store import HOUR, IssuedKey, Keeper, Store
from balancer.contract.account import KeyRow, KeyTerms, new_secret
from balancer.errors import ConfigError

log = logging.getLogger("groundserve")

T = TypeVar("T")
LONGEST_NAMES = 10_000  # keys in use


class Accounts:
    """`when_changed` hooks are called with the keys that are in use now; `before_reading` before usage is read."""

    def __init__(self, store: Store) -> None:
        self.ledger = Ledger(store)
        self.when_changed: list[Callable[[Sequence[IssuedKey]], None]] = []
        self.before_reading: list[Callable[[], None]] = []
        self._store = store
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()
        try:
            self.issued = store.issued()
            self.has_keys = store.has_keys()
            self.used_today = self._used_today()
        except sqlite3.Error as failure:
            raise ConfigError(f"--state: {store.path} cannot be used ({failure}): move it away, or mend it") from None

    async def keys(self) -> list[KeyRow]:
        return await self._asked(self._store.keys)

    async def add(self, name: str, terms: KeyTerms, given: bytes | None = None) -> str:
        """A new key's secret, which is kept nowhere here; empty if the digest of one is given. Raises ConfigError."""
        if len(self.issued) >= LONGEST_NAMES:
            raise ConfigError(f"there are {LONGEST_NAMES} keys: revoke some")
        secret, digest = _drawn() if given is None else ("", given)
        await self._changed(lambda: self._store.add(name, digest, terms, time.time()))
        return secret

    async def rotate(self, name: str, given: bytes | None = None) -> str:
        """The key's new secret, as for `add`; the old one is refused from now on. Raises ConfigError."""
        secret, digest = _drawn() if given is None else ("", given)
        await self._changed(lambda: self._store.rotate(name, digest))
        return secret

    async def limit(self, name: str, terms: KeyTerms) -> None:
        """These are the key's limits from now on; its secret stays. Raises ConfigError."""
        await self._changed(lambda: self._store.limit(name, terms))

    async def revoke(self, name: str) -> None:
        """Requests under way are finished. Raises ConfigError."""
        await self._changed(lambda: self._store.revoke(name, time.time()))

    async def usage(self, by: Sequence[str], since: float, until: float = math.inf) -> bytes:
        """A JSON list of what was used between those times (seconds since 1970). Raises ConfigError."""
        for hook in self.before_reading:
            hook()
        await self.ledger.written()
        return await self._asked(lambda: orjson.dumps(self._store.usage(by, since, until)))

    async def keeper(self, id_: str) -> Keeper | None:
        """Who keeps that answer of /v1/responses, if this process or one before it noted it, and the disk answers."""
        if (noted := self.ledger.noted(id_)) is not None:
            return noted
        try:
            return await off_loop(lambda: self._store.keeper(id_))
        except sqlite3.Error as failure:
            log.warning("%s cannot be read now (%s): who keeps an answer is not known", self._store.path, failure)
            return None

    async def close(self) -> None:
        for hook in self.before_reading:
            hook()
        await self.ledger.close()

    async def _changed(self, change: Callable[[], None]) -> None:
        """Changes the keys, even if whoever asked for it gives up meanwhile: a revoked key must not go on counting."""
        task = asyncio.ensure_future(self._change(change))
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        await asyncio.shield(task)

    async def _change(self, change: Callable[[], None]) -> None:
        async with self._changing:  # so that keys read before another change cannot replace those read after it
            try:
                await self._asked(change)
            finally:  # even after a failure: the keys of an earlier change may not have been read
                self.issued, self.used_today = await self._asked(lambda: (self._store.issued(), self._used_today()))
                self.has_keys = self.has_keys or bool(self.issued)
                for hook in self.when_changed:
                    hook(self.issued)

    def _used_today(self) -> dict[str, tuple[int, int]]:
        """By key: the requests and tokens of the last 24 hours, for limits by the day that begin now."""
        return self._store.used_since(int(time.time()) // HOUR - 23)

    async def _asked(self, work: Callable[[], T]) -> T:
        try:
            return await off_loop(work)
        except sqlite3.Error as failure:
            raise ConfigError(f"{self._store.path} cannot be used now ({failure}): see to its disk") from None


def _drawn() -> tuple[str, bytes]:
    secret = new_secret()
    return secret, sha256(secret.encode()).digest()
