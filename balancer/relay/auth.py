"""API keys: who may use the endpoint, and how many requests at once. Decided by a request's head alone."""

import hmac
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from balancer import errors
from balancer.errors import ConfigError
from balancer.relay.file_watch import MOUNT_ITS_FOLDER, FileWatch
from balancer.spec import text_file

log = logging.getLogger("groundserve")

HASHED = re.compile(r"([\w.-]{1,64}):([0-9a-f]{64})", re.ASCII | re.IGNORECASE)
PLAIN = re.compile(r"[!-9;-~]+")  # printable ASCII but the colon, which would pass for a name's end
LIMIT = re.compile(r"max_in_flight=([1-9]\d{0,8})")
# Whoever checks on the balancer has no key, and learns nothing there but whether it could serve.
OPEN_PATHS = frozenset(("/health", "/ready"))


@dataclass(slots=True, eq=False)
class Key:
    """One caller's key, known by its SHA-256 alone. `limit` is how many requests it may have going at once."""

    name: str
    digest: bytes
    limit: float = math.inf
    in_flight: int = 0

    @property
    def is_at_limit(self) -> bool:
        return self.in_flight >= self.limit


class Keys:
    """The keys of a file: one a line, NAME:SHA256 or the key itself, then max_in_flight=N if it has a limit.

    Raises ConfigError when the file cannot be used at the start; a later mistake in it leaves the keys as they were.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._watch = FileWatch(path)
        self._known = read_keys(path)

    def admit(self, *authorizations: bytes) -> Key:
        """The key that one of these `Authorization` fields bears; raises ServeError for none, or for one at its limit.

        Some clients send what another service gave them, too: one good key is enough.

        Looking up a digest tells nothing about a key by its timing: who guesses does not know which guess has which
        digest's beginning, and the dictionary's own hash is drawn at random in each process.
        """
        busy: Key | None = None
        for authorization in authorizations:
            digest = sha256(bearer_token(authorization)).digest()
            key = self._known.get(digest)
            if key is None or not hmac.compare_digest(key.digest, digest):
                continue
            if not key.is_at_limit:
                return key
            busy = key
        raise errors.unauthorized() if busy is None else errors.key_at_limit(busy.limit)

    def reload(self) -> bool:
        """Takes up what changed in the file; call it now and then. Returns whether something did.

        Requests of a key that is gone are finished.
        """
        if not self._watch.has_changed():
            return False
        if self._watch.is_cut_off:
            # Which of the keys still count cannot be known here, and one of them was perhaps taken back.
            self._known = {}
            log.error("--api-keys %s: nobody is let in until this is mended: %s", self._path, MOUNT_ITS_FOLDER)
            return True
        try:
            fresh = read_keys(self._path, patience=0)
        except ConfigError as error:
            log.warning("%s; the keys stay as they were", error)
            return False
        for digest, key in fresh.items():
            if known := self._known.get(digest):
                known.name, known.limit = key.name, key.limit
                fresh[digest] = known
        self._known = fresh
        log.info("%s: %d keys taken up", self._path, len(fresh))
        return True

    def __iter__(self) -> Iterator[Key]:
        return iter(self._known.values())

    def __repr__(self) -> str:
        return f"<Keys {' '.join(sorted(key.name for key in self._known.values()))}>"


def bearer_token(authorization: bytes) -> bytes:
    """The token of an `Authorization: Bearer TOKEN`, empty for any other scheme."""
    return authorization[7:].strip() if authorization[:7].lower() == b"bearer " else b""


def bears(authorization: bytes, key: str | None) -> bool:
    """Does this `Authorization` field bear that very key? Compared in constant time; never true where there is none."""
    return key is not None and hmac.compare_digest(bearer_token(authorization), key.encode())


def read_keys(path: Path, patience: float = text_file.PATIENCE) -> dict[bytes, Key]:
    """The keys of a file by their digests; raises ConfigError that names the line, and never shows it."""
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
        limit = int(found[1])
    if found := HASHED.fullmatch(secret):
        return Key(found[1], bytes.fromhex(found[2]), limit)
    if PLAIN.fullmatch(secret):
        return Key(f"line-{number}", sha256(secret.encode()).digest(), limit)
    raise ConfigError(f"{where}: write NAME:SHA256 (`printf %s KEY | sha256sum`) or a key in ASCII without a colon")
