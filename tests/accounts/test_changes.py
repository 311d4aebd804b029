"""Changes of keys while others change them, and while the disk is slow."""

import asyncio
import sqlite3
import threading
from pathlib import Path

import pytest

from balancer.accounts.accounts import Accounts
from balancer.accounts.store import Store
from balancer.contract.account import KeyTerms
from balancer.errors import ConfigError
from tests.wire.running import on_uvloop


class Hesitant(Store):
    """A database whose changes wait for a moment, or whose keys cannot be read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.cannot_be_read = False

    def revoke(self, name: str, now: float) -> None:
        self.may_go_on.wait(30)
        super().revoke(name, now)

    def issued(self) -> list:  # type: ignore[type-arg]
        if self.cannot_be_read:
            raise sqlite3.OperationalError("disk I/O error")
        return super().issued()


@on_uvloop
async def test_a_revocation_counts_though_nobody_waits_for_it(tmp_path: Path) -> None:
    accounts = Accounts(store := Hesitant(tmp_path / "state"))
    await accounts.add("alice", KeyTerms())
    store.may_go_on.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await accounts.revoke("alice")
    changed = asyncio.Event()
    accounts.when_changed.append(lambda _: changed.set())
    store.may_go_on.set()
    await changed.wait()
    assert accounts.issued == []


@on_uvloop
async def test_a_revocation_that_was_not_taken_up_is_later(tmp_path: Path) -> None:
    accounts = Accounts(store := Hesitant(tmp_path / "state"))
    await accounts.add("alice", KeyTerms())
    store.cannot_be_read = True
    with pytest.raises(ConfigError, match="disk I/O error"):
        await accounts.revoke("alice")
    store.cannot_be_read = False
    with pytest.raises(ConfigError, match="no key alice in use"):
        await accounts.revoke("alice")
    assert accounts.issued == []


@on_uvloop
async def test_counts_outlive_a_write_without_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = Accounts(store := Store(tmp_path / "state"))
    accounts.ledger.note("alice", "m", 1, 0, 10, 5, 0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", _no_thread)
        await accounts.ledger.written()
    await accounts.ledger.written()
    assert [row["requests"] for row in store.usage(["key"], 0)] == [1]


def _no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%41b", "a b"])
def test_any_folder_will_do(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / name)
    store.add("alice", b"d" * 32, KeyTerms(), now=1)
    assert [key.name for key in store.issued()] == ["alice"]
