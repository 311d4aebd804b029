"""API keys: who may use the endpoint, and with how many requests at once. A request's head alone decides."""

import hmac
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from balancer import errors
from balancer.accounts.quota import NO_LIMITS, Quota, limits_of
from balancer.accounts.store import IssuedKey
from balancer.errors import ConfigError
from balancer.relay.file_watch import MOUNT_ITS_FOLDER, FileWatch
from balancer.spec import text_file

log = logging.getLogger("groundserve")

HASHED = re.compile(r"([\w.-]{1,64}):([0-9a-f]{64})", re.ASCII | re.IGNORECASE)
PLAIN = re.compile(r"[!-9;-~]+")  # printable ASCII except the colon, which would look like the end of a name
LIMIT = re.compile(r"max_in_flight=([1-9]\d{0,8})")
# Health checkers have no key, and learn nothing here except whether the balancer could serve.
OPEN_PATHS = frozenset(("/health", "/ready"))


@dataclass(slots=True, eq=False)
class Key:
    """One caller's key, stored only as its SHA-256. `limit` is how many requests it may have in progress at once,
    `share` the part of it that is ours beside other balancers.

    `expires` is in seconds since 1970; `models` are globs, empty for all models. What is kept for the key belongs to
    its `issue`: its name may come to be another's.
    """

    name: str
    digest: bytes
    issue: str
    limit: float = math.inf
    in_flight: int = 0
    quota: Quota | None = None
    is_bulk: bool = False
    models: tuple[str, ...] = ()
    expires: float | None = None
    share: float = 1.0

    @property
    def is_at_limit(self) -> bool:
        return self.in_flight >= self.limit * self.share


class Keys:
    """The keys that are issued on the admin port, and those of a file, one per line: NAME:SHA256 or the key itself,
    then max_in_flight=N if it has a limit.

    `are_wanted`: without a key, nobody is let in. That is so from the start, or from the first key that is issued; not
    any more if it was ever so. Raises ConfigError if the file cannot be used at startup; a later mistake in it leaves
    the keys as they were.
    """

    def __init__(self, path: Path | None, are_wanted: bool = True) -> None:
        self.are_wanted = are_wanted
        self._path = path
        self._watch = FileWatch(path) if path is not None else None
        self._in_file = read_keys(path) if path is not None else {}
        # Keys that were taken out of the file while they had requests: those still count if they come back.
        self._leaving: dict[bytes, Key] = {}
        self._issued: dict[bytes, Key] = {}
        self._share = 1.0
        self._gather()

    def admit(self, *authorizations: bytes) -> Key:
        """The key that one of these `Authorization` fields carries; raises ServeError for none or one at its limit.

        Some clients also send another service's credentials: one good key is enough.

        The timing of a digest's lookup reveals nothing about a key: an attacker cannot steer a guess's digest step by
        step, and the dictionary's own hash is seeded at random in each process.
        """
        busy: Key | None = None
        for authorization in authorizations:
            digest = sha256(bearer_token(authorization)).digest()
            key = self._known.get(digest)
            if key is None or not hmac.compare_digest(key.digest, digest):
                continue
            if key.expires is not None and time.time() >= key.expires:
                continue
            if not key.is_at_limit:
                return key
            busy = key
        raise errors.unauthorized() if busy is None else errors.key_at_limit(busy.limit)

    def reload(self) -> bool:
        """Rereads the file if it has changed; call it now and then. Returns whether the keys were replaced.

        Requests in progress under a removed key are finished.
        """
        if self._watch is None or self._path is None or not self._watch.has_changed():
            return False
        if self._watch.is_cut_off:
            # There is no way to know which keys are still valid, and one of them may have been revoked.
            self._replace({})
            log.error("--api-keys %s: none of its keys counts until this is mended: %s", self._path, MOUNT_ITS_FOLDER)
            return True
        try:
            fresh = read_keys(self._path, patience=0)
        except ConfigError as error:
            log.warning("%s; the keys stay as they were", error)
            return False
        self._replace(fresh)
        log.info("%s: %d keys taken up", self._path, len(fresh))
        return True

    def _replace(self, fresh: dict[bytes, Key]) -> None:
        """These are the file's keys now; one that was known keeps its count of requests."""
        before = self._leaving | self._in_file
        for digest, key in fresh.items():
            if known := before.pop(digest, None):
                known.name, known.issue, known.limit = key.name, key.issue, key.limit
                fresh[digest] = known
        self._leaving = {digest: key for digest, key in before.items() if key.in_flight}
        self._in_file = fresh
        self._gather()

    def take_up(
        self, issued: Sequence[IssuedKey], now: float, used_today: Mapping[str, tuple[int, int]] | None = None
    ) -> None:
        """These are the keys that are issued now (loop time, seconds); each keeps its counts if it was known before."""
        before = {key.issue: key for key in self._issued.values()}
        self._issued = {}
        for one in issued:
            key = before.get(one.issue) or Key(one.name, one.digest, one.issue)
            key.digest, key.limit = one.digest, one.terms.max_in_flight or math.inf
            key.is_bulk, key.models = one.terms.priority == "bulk", one.terms.models
            key.expires = one.terms.expires_at()
            if limits_of(one.terms) != (key.quota.limits if key.quota else NO_LIMITS):
                quota = Quota(one.terms, now, (used_today or {}).get(one.name, (0, 0)), key.quota)
                key.quota = quota if quota.buckets else None
            self._issued[one.digest] = key
        self.are_wanted = self.are_wanted or bool(issued)
        self._gather()

    def take_share(self, share: float) -> None:
        """This part of each key's limit is ours from now on."""
        if share != self._share:
            self._share = share
            self._gather()

    def named(self, name: str) -> Key | None:
        """The key of that name; of two, the issued one."""
        return self._by_name.get(name)

    def _gather(self) -> None:
        self._known = self._issued | self._in_file
        self._by_name = {key.name: key for key in (*self._in_file.values(), *self._issued.values())}
        for key in self._known.values():
            key.share = self._share
            if key.quota is not None:
                key.quota.take_share(self._share)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._known.values())

    def __repr__(self) -> str:
        return f"<Keys {' '.join(sorted(key.name for key in self._known.values()))}>"


def bearer_token(authorization: bytes) -> bytes:
    """The token of `Authorization: Bearer TOKEN`; empty for any other scheme."""
    return authorization[7:].strip() if authorization[:7].lower() == b"bearer " else b""


def bears(authorization: bytes, key: str | None) -> bool:
    """Does this `Authorization` field carry exactly this key? Compared in constant time; False if there is no key."""
    return key is not None and hmac.compare_digest(bearer_token(authorization), key.encode())


def read_keys(path: Path, patience: float = text_file.PATIENCE) -> dict[bytes, Key]:
    """The keys of a file by their digests; raises ConfigError, which gives the line's number but never its text."""
    lines = text_file.read(path, f"--api-keys {path}", "a file of keys", patience).split("\n")
    keys: dict[bytes, Key] = {}
    names: set[str] = set()
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key = _read_line(words, f"--api-keys {path}: line {number}", number)
        if key.digest in keys or key.name in names:
            raise ConfigError(f"--api-keys {path}: line {number}: a key or a name stands there that came before")
        keys[key.digest] = key
        names.add(key.name)
    if not keys:
        raise ConfigError(f"--api-keys {path}: no key in it; write one a line, NAME:SHA256 or the key itself")
    return keys


def _read_line(words: list[str], where: str, number: int) -> Key:
    secret, *options = words
    limit = math.inf
    for option in options:
        if not (found := LIMIT.fullmatch(option)):
            raise ConfigError(f"{where}: after the key only max_in_flight=N may stand")
        limit = float(found[1])
    if found := HASHED.fullmatch(secret):
        return Key(found[1], bytes.fromhex(found[2]), found[1], limit)
    if PLAIN.fullmatch(secret):
        digest = sha256(secret.encode())
        return Key(f"line-{number}", digest.digest(), digest.hexdigest(), limit)  # lines move, and with them the names
    raise ConfigError(f"{where}: write NAME:SHA256 (`printf %s KEY | sha256sum`) or a key in ASCII without a colon")
