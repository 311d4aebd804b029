"""The database: what it keeps, what it refuses, and how fast it tells a year."""

import contextlib
import os
import sqlite3
import stat
import time
from pathlib import Path

import pytest

from balancer.accounts.store import ADD, FILE, Keeper, Store
from balancer.contract.account import KeyTerms
from balancer.errors import ConfigError
from balancer.spec.local_disk import network_type

TERMS = KeyTerms(tokens_per_minute=200_000, models=("llava", "llama*"), expires="2099-01-01", priority="bulk")
YEAR = 365 * 24


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


def test_keys_are_kept_as_digests_for_their_owner_alone(store: Store) -> None:
    store.add("alice", b"d" * 32, TERMS, now=1_800_000_000)
    (issued,) = Store(store.path.parent).issued()
    assert (issued.name, issued.digest, issued.terms) == ("alice", b"d" * 32, TERMS)
    (row,) = store.keys()
    assert row.to_json()["created"] == "2027-01-15T08:00:00Z"
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700
    for file in store.path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_a_key_is_rotated_revoked_and_given_again(store: Store) -> None:
    store.add("alice", b"1" * 32, KeyTerms(), now=1)
    with pytest.raises(ConfigError, match="there is a key alice already"):
        store.add("alice", b"2" * 32, KeyTerms(), now=1)
    store.rotate("alice", b"3" * 32)
    assert [key.digest for key in store.issued()] == [b"3" * 32]
    store.revoke("alice", now=2)
    assert store.issued() == []
    assert store.has_keys()
    with pytest.raises(ConfigError, match="no key alice in use"):
        store.revoke("alice", now=2)
    with pytest.raises(ConfigError, match="no key alice in use"):
        store.rotate("alice", b"4" * 32)
    store.add("alice", b"5" * 32, TERMS, now=3)
    assert [row.revoked for row in store.keys()] == [None]  # noqa: SIM118


def test_no_two_keys_have_one_secret(store: Store) -> None:
    store.add("alice", b"1" * 32, TERMS, now=1)
    store.add("bob", b"2" * 32, KeyTerms(), now=1)
    for change in (lambda: store.add("carol", b"1" * 32, KeyTerms(), now=2), lambda: store.rotate("bob", b"1" * 32)):
        with pytest.raises(ConfigError, match="another key has this secret already"):
            change()
    assert {key.name: (key.digest, key.terms) for key in store.issued()} == {
        "alice": (b"1" * 32, TERMS),
        "bob": (b"2" * 32, KeyTerms()),
    }


def test_a_figure_beyond_all_sense_stops_no_accounts(store: Store) -> None:
    huge = 2**63 - 1
    store.write([(480_000, "a", "m", 1, 0, 5, huge, 0), (480_001, "a", "m", 1, 0, 5, huge, 0)], {})
    store.write([(480_001, "a", "m", 1, 0, 5, huge, 0), (480_001, "b", "m", 1, 0, 1, 1, 0)], {})
    assert store.used_since(0) == {"a": (3, huge), "b": (1, 2)}
    assert [(row["requests"], row["completion_tokens"]) for row in store.usage(["key"], 0)] == [(3, huge), (1, 1)]


def test_a_row_that_cannot_be_stored_is_left_out(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    kept = (480_000, "a", "m", 1, 0, 5, 7, 0)
    store.write([(480_000, "b", "m", 1, 0, 0, 2**63, 0), kept, (480_000, "b", "\ud800", 1, 0, 0, 1, 0)], {})
    assert store.used_since(0) == {"a": (1, 12)}
    assert caplog.text.count("this usage cannot be kept") == 2


def test_usage_adds_up_by_whatever_is_asked(store: Store) -> None:
    store.write([(480_000, "a", "m", 1, 0, 10, 5, 2), (480_000, "b", "m", 1, 1, 1, 1, 0)], {})
    store.write([(480_000, "a", "m", 2, 0, 20, 5, 2), (480_030, "a", "n", 1, 0, 100, 1, 0)], {})
    assert store.usage(["key"], 0) == [
        {"key": "a", "requests": 4, "failed": 0, "prompt_tokens": 130, "completion_tokens": 11, "cached_tokens": 4},
        {"key": "b", "requests": 1, "failed": 1, "prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0},
    ]
    days = store.usage(["day", "model"], 0)
    assert [(row["day"], row["model"], row["prompt_tokens"]) for row in days] == [
        ("2024-10-04", "m", 31),
        ("2024-10-05", "n", 100),
    ]
    assert [row["requests"] for row in store.usage([], 480_001 * 3600)] == [1]
    assert store.usage([], 490_000 * 3600) == []
    for until, requests in ((480_000 * 3600 + 1, [4]), (480_030 * 3600, [4]), (480_030 * 3600 + 1, [5])):
        assert [row["requests"] for row in store.usage([], 0, until)] == requests
    assert store.used_since(480_001) == {"a": (1, 101)}
    with pytest.raises(ConfigError, match="not kept by 'name; DROP"):
        store.usage(["name; DROP TABLE usage"], 0)


def test_a_year_of_use_is_told_within_a_second(store: Store) -> None:
    """Ten requests a second: by whom does not matter, as a row is a key's, model's and hour's sum."""
    first = int(time.time()) // 3600 - YEAR
    rows = [
        (first + hour, f"key-{key}", f"model-{model}", 1800, 1, 900_000, 300_000, 100_000)
        for hour in range(YEAR)
        for key in range(10)
        for model in range(2)
    ]
    connection = sqlite3.connect(store.path)
    connection.executemany(ADD, rows)
    connection.commit()
    connection.close()
    took = []
    for _ in range(3):
        began = time.process_time()
        told = store.usage(["key", "model", "day"], 0)
        took.append(time.process_time() - began)
    assert len(told) == pytest.approx(20 * 366, abs=20)
    assert sum(row["requests"] for row in told) == len(rows) * 1800
    assert min(took) < 1.0
    with pytest.raises(ConfigError, match="over 100000 rows: sum by less"):
        store.usage(["key", "model", "hour"], 0)
    assert sum(file.stat().st_size for file in store.path.parent.iterdir()) < 64 << 20


def test_who_keeps_an_answer_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balancer.accounts.store.MOST_ANSWERS", 3)
    for number in range(5):
        store.write([], {f"resp_{number}": Keeper("a", "127.0.0.1:1", "alice")})
    store.write([], {"resp_2": Keeper("b", "127.0.0.1:2", "alice"), "resp_3": Keeper("b", "127.0.0.1:2", "mallory")})
    assert [store.keeper(f"resp_{number}") is not None for number in range(5)] == [False, False, True, True, True]
    assert store.keeper("resp_2") == Keeper("b", "127.0.0.1:2", "alice")
    assert store.keeper("resp_3") == Keeper("a", "127.0.0.1:1", "alice"), "another key's answer stays that key's"


def test_a_database_of_an_earlier_version_is_taken_up(store: Store) -> None:
    """Keys in use keep what they made; a name that was revoked there and is issued again gets nothing of it."""
    for name in ("alice", "bob"):
        store.add(name, name.encode(), KeyTerms(), now=1)
    store.revoke("bob", now=2)
    store.write([], {"resp_hers": Keeper("a", "127.0.0.1:1", "alice"), "resp_his": Keeper("a", "127.0.0.1:1", "bob")})
    store.close()
    with contextlib.closing(sqlite3.connect(store.path)) as earlier:
        earlier.execute("DROP TABLE IF EXISTS reissued")
    again = Store(store.path.parent)
    again.add("bob", b"another", KeyTerms(), now=3)
    issues = {key.name: key.issue for key in again.issued()}
    assert issues["alice"] == again.keeper("resp_hers").key  # type: ignore[union-attr]
    assert issues["bob"] != again.keeper("resp_his").key  # type: ignore[union-attr]
    again.rotate("bob", b"a third")
    assert {key.name: key.issue for key in again.issued()} == issues


def test_a_folder_that_others_may_write_into_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        Store(folder)


def test_a_link_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    os.symlink(tmp_path / "elsewhere", folder / FILE)  # noqa: PTH211
    with pytest.raises(ConfigError, match="give a folder of your own"):
        Store(folder)


def test_a_broken_file_is_refused_with_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    (folder / FILE).write_bytes(b"no database at all, by no means" * 100)
    with pytest.raises(ConfigError, match=r"accounts\.sqlite cannot be used"):
        Store(folder)


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/srv/state", "nfs4"), ("/srv/local/state", ""), ("/srv/a b", "fuse.sshfs"), ("/home/x", ""), ("/srvant", "")],
)
def test_a_network_file_system_is_known_by_its_type(folder: str, kind: str, tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "40 22 0:40 / /srv rw,relatime shared:2 - nfs4 server:/srv rw\n"
        "41 40 8:1 / /srv/local rw,relatime - xfs /dev/sda rw\n"
        "42 40 0:41 / /srv/a\\040b rw,relatime - fuse.sshfs host: rw\n"
    )
    assert network_type(Path(folder), mounts) == kind


def test_the_store_refuses_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balancer.accounts.store.network_type", lambda _: "nfs4")
    with pytest.raises(ConfigError, match="nfs4 is a network's file system: give a folder on a local disk"):
        Store(tmp_path / "state")
    assert not (tmp_path / "state").exists()
