"""Keys, usage, and who keeps which answer, on disk: one SQLite database, in a folder that only its owner can enter.

A row of usage is the sum for a key, a model and an hour (UTC), so its size depends on time and not on traffic. Keys are
stored as digests only. Every method may block on the disk: call them off the event loop.
"""

import contextlib
import logging
import math
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson

from balancer.contract.account import BY, KeyRow, KeyTerms
from balancer.errors import ConfigError
from balancer.spec.local_disk import network_type

log = logging.getLogger("groundserve")

FILE = "accounts.sqlite"
HOUR = 3600
BUSY = 5.0  # seconds that a writer waits for another process's lock
MOST_ROWS = 100_000  # of usage in one answer, which is put together in memory
FIGURES = ("requests", "failed", "prompt_tokens", "completion_tokens", "cached_tokens")
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS keys (
    name TEXT PRIMARY KEY, digest BLOB UNIQUE, created INTEGER NOT NULL, revoked INTEGER, terms TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS reissued (name TEXT PRIMARY KEY, times INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS usage (
    hour INTEGER, key TEXT, model TEXT, {", ".join(f"{name} INTEGER NOT NULL DEFAULT 0" for name in FIGURES)},
    PRIMARY KEY (hour, key, model)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, replica TEXT NOT NULL, address TEXT NOT NULL, key TEXT NOT NULL
);
"""
ADD = f"INSERT INTO usage VALUES (?, ?, ?{', ?' * len(FIGURES)}) ON CONFLICT DO UPDATE SET " + ", ".join(
    f"{name} = {name} + excluded.{name}" for name in FIGURES
)
ISSUE = """
INSERT INTO keys VALUES (?, ?, ?, NULL, ?) ON CONFLICT (name) DO UPDATE
SET digest = excluded.digest, created = excluded.created, revoked = NULL, terms = excluded.terms
"""
# A table of its own, not a column: versions that do not know it go on writing into `keys`.
COUNT_REISSUE = """
INSERT INTO reissued SELECT name, 1 FROM keys WHERE name = ? ON CONFLICT (name) DO UPDATE SET times = times + 1
"""
ISSUED = "SELECT name, digest, terms, times FROM keys LEFT JOIN reissued USING (name) WHERE revoked IS NULL"
# `sum` fails above 2**63, and one figure that large would stop all accounts.
SUM = "CAST(total({}) AS INTEGER)"
USED_SINCE = (
    f"SELECT key, {SUM.format('requests')}, {SUM.format('prompt_tokens + completion_tokens')} FROM usage "
    "WHERE hour >= ? GROUP BY key"
)
UNSTORABLE = (OverflowError, UnicodeError, sqlite3.DataError, sqlite3.IntegrityError)  # a row that no retry could write
MOST_ANSWERS = 100_000  # remembered: the newest
KEEP = """
INSERT INTO answers (id, replica, address, key) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE
SET number = (SELECT max(number) + 1 FROM answers), replica = excluded.replica, address = excluded.address
WHERE key = excluded.key
"""
DROP_OLDEST = "DELETE FROM answers WHERE number <= (SELECT max(number) FROM answers) - ?"
GROUPS = {
    "key": "key",
    "model": "model",
    "day": "strftime('%Y-%m-%d', hour * 3600, 'unixepoch')",
    "hour": "strftime('%Y-%m-%dT%H:00Z', hour * 3600, 'unixepoch')",
}
# The columns to group by. Grouping by the text above would first make a string for each row, at ten times the cost.
_GROUPED = {"key": "key", "model": "model", "day": "hour / 24", "hour": "hour"}

Usage = tuple[int, str, str, int, int, int, int, int]  # hour, key, model, and FIGURES


@dataclass(frozen=True, slots=True)
class Keeper:
    """The replica that keeps an answer of /v1/responses, its HOST:PORT, and the issue of the key that made it."""

    replica: str
    address: str
    key: str


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A key that lets its holder in.

    `issue` stays when the key is rotated, and is another one once the name was revoked and given again.
    """

    name: str
    digest: bytes
    terms: KeyTerms
    issue: str


class Store:
    """The database in `folder`, which is created. Raises ConfigError if it cannot be used there."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._writing = threading.Lock()
        if kind := network_type(folder):
            raise ConfigError(f"--state {folder}: {kind} is a network's file system: give a folder on a local disk")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_folder(folder)
            # SQLite gives its other files the mode of this one.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(self.path, flags, 0o600))
            self._connection = self._opened()
        except OSError as failure:
            raise ConfigError(f"--state {folder}: {failure.strerror}: give a folder of your own") from None
        except sqlite3.Error as failure:
            raise ConfigError(f"--state: {self.path} cannot be used ({failure}): move it away, or mend it") from None

    def _opened(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, BUSY, check_same_thread=False)
        with contextlib.closing(connection.execute("PRAGMA journal_mode=WAL")):
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.executescript(SCHEMA)
        return connection

    def close(self) -> None:
        with self._writing:
            self._connection.close()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing. Raises sqlite3.Error."""
        with self._writing, self._connection as connection:
            yield connection

    @contextlib.contextmanager
    def _changing_keys(self) -> Iterator[sqlite3.Connection]:
        """Raises ConfigError too, for a secret that another key has."""
        try:
            with self._changing() as connection:
                yield connection
        except sqlite3.IntegrityError:
            raise ConfigError("another key has this secret already: draw a new one, or revoke that key") from None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own, so that a long query holds no writer up."""
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(self.path))}?mode=ro", BUSY, uri=True)) as connection:
            yield connection

    # Keys

    def issued(self) -> list[IssuedKey]:
        """The keys that are not revoked."""
        with self._reading() as connection:
            rows = connection.execute(ISSUED).fetchall()
        return [IssuedKey(name, digest, _terms(terms), _issue(name, times)) for name, digest, terms, times in rows]

    def has_keys(self) -> bool:
        """Was there ever a key?"""
        with self._reading() as connection:
            return bool(connection.execute("SELECT 1 FROM keys LIMIT 1").fetchone())

    def keys(self) -> list[KeyRow]:
        with self._reading() as connection:
            rows = connection.execute("SELECT name, created, revoked, terms FROM keys ORDER BY name").fetchall()
        return [
            KeyRow(name=name, created=_iso(created), revoked=revoked and _iso(revoked), terms=_terms(terms))
            for name, created, revoked, terms in rows
        ]

    def add(self, name: str, digest: bytes, terms: KeyTerms, now: float) -> None:
        """A revoked name may be given again. Raises ConfigError for a name or a secret that is in use."""
        row = (name, digest, int(now), orjson.dumps(terms.to_json()).decode())
        with self._changing_keys() as connection:
            if connection.execute("SELECT 1 FROM keys WHERE name = ? AND revoked IS NULL", (name,)).fetchone():
                raise ConfigError(f"there is a key {name} already: change it, rotate it, or choose another name")
            connection.execute(COUNT_REISSUE, (name,))
            connection.execute(ISSUE, row)

    def revoke(self, name: str, now: float) -> None:
        """Raises ConfigError if no such key is in use."""
        self._change("UPDATE keys SET revoked = ?, digest = NULL WHERE name = ? AND revoked IS NULL", int(now), name)

    def rotate(self, name: str, digest: bytes) -> None:
        """Gives the key another secret. Raises ConfigError if no such key is in use, or another has this secret."""
        self._change("UPDATE keys SET digest = ? WHERE name = ? AND revoked IS NULL", digest, name)

    def limit(self, name: str, terms: KeyTerms) -> None:
        """Gives the key other limits. Raises ConfigError if no such key is in use."""
        statement = "UPDATE keys SET terms = ? WHERE name = ? AND revoked IS NULL"
        self._change(statement, orjson.dumps(terms.to_json()).decode(), name)

    def _change(self, statement: str, value: object, name: str) -> None:
        with self._changing_keys() as connection:
            if not connection.execute(statement, (value, name)).rowcount:
                raise ConfigError(f"there is no key {name} in use here; `groundserve keys list` shows them")

    # Usage

    def write(self, rows: Iterable[Usage], answers: Mapping[str, Keeper]) -> None:
        """Adds these figures, and who keeps these answers, by id. Raises sqlite3.Error, and then adds nothing.

        A row that cannot be stored is left out.
        """
        with self._changing() as connection:
            for row in rows:
                try:
                    connection.execute(ADD, row)
                except UNSTORABLE as failure:
                    log.warning("%s: this usage cannot be kept (%s): %r", self.path, failure, row)
            if answers:
                kept = ((id_, one.replica, one.address, one.key) for id_, one in answers.items())
                connection.executemany(KEEP, kept)
                connection.execute(DROP_OLDEST, (MOST_ANSWERS,))

    def keeper(self, id_: str) -> Keeper | None:
        """Who keeps the answer with this id, as far as it is known."""
        with self._reading() as connection:
            row = connection.execute("SELECT replica, address, key FROM answers WHERE id = ?", (id_,)).fetchone()
        return Keeper(*row) if row else None

    def used_since(self, hour: int) -> dict[str, tuple[int, int]]:
        """By key: its requests and its tokens from that hour on."""
        with self._reading() as connection:
            rows = connection.execute(USED_SINCE, (hour,)).fetchall()
        return {key: (requests, tokens) for key, requests, tokens in rows}

    def usage(self, by: Sequence[str], since: float, until: float = math.inf) -> list[dict[str, Any]]:
        """The sums between those times (seconds since 1970), in the order of what they are grouped by.

        Whole hours only, so the first may begin earlier, and the last end later. Raises ConfigError for an unknown
        group and for too many rows.
        """
        if unknown := [name for name in by if name not in GROUPS]:
            raise ConfigError(f"usage is not kept by {unknown[0][:40]!r}: there is {', '.join(BY)}")
        grouped = ", ".join(_GROUPED[name] for name in by)
        columns = [f"{GROUPS[name]} AS {name}" for name in by] + [SUM.format(name) for name in FIGURES]
        query = f"SELECT {', '.join(columns)} FROM usage WHERE hour >= ? AND hour < ?"
        if by:
            query += f" GROUP BY {grouped} ORDER BY {grouped} LIMIT {MOST_ROWS + 1}"
        with self._reading() as connection:
            rows = connection.execute(query, (int(since) // HOUR, until / HOUR)).fetchall()
        if len(rows) > MOST_ROWS:
            raise ConfigError(f"that is over {MOST_ROWS} rows: sum by less, or ask for a shorter time")
        names = (*by, *FIGURES)
        return [dict(zip(names, row, strict=True)) for row in rows if row[len(by)]]


def _check_folder(folder: Path) -> None:
    if (mode := folder.stat().st_mode) & 0o022:
        raise ConfigError(f"--state {folder}: others may write into it (mode {mode & 0o777:o}): chmod 700 it")


def _issue(name: str, times: int | None) -> str:
    """The name alone at first, as earlier versions noted all answers. No name has a colon."""
    return f"{name}:{times}" if times else name


def _terms(text: str) -> KeyTerms:
    said = orjson.loads(text)
    known = {name: said[name] for name in KeyTerms.__dataclass_fields__ if name in said}
    return KeyTerms(**(known | {"models": tuple(known.get("models", ()))}))


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
