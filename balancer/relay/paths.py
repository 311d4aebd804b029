"""Which paths are served: an allow-list of normalised paths, so that no spelling reaches SGLang's admin routes."""

import enum
import posixpath
import re
from functools import lru_cache
from urllib.parse import quote, unquote_to_bytes


class PathKind(enum.Enum):
    """What a path is to the balancer."""

    GENERATING = "generating"  # a POST there generates tokens: it counts against a replica's limit
    PLAIN = "plain"  # relayed without ever waiting for room
    ADMIN = "admin"  # SGLang's own admin routes: relayed only where the service allows it
    OWN = "own"  # answered by the balancer itself


MODELS = "/v1/models"
GENERATING = {"/generate", "/classify", "/encode", "/rerank", "/score"}
PLAIN = {"/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize", "/v1/messages/count_tokens"}
PLAIN |= {MODELS, "/model_info", "/get_model_info"}
# Worth minutes of waiting while a replica starts, because the answer takes long anyway. All other paths are asked by
# pages and programs that want to know what is there, and would rather hear at once that there is nothing yet.
WAITED_FOR = GENERATING | {
    f"/v1/{name}"
    for name in (
        "chat/completions", "completions", "responses", "messages", "embeddings", "classify", "rerank", "score",
        "audio/transcriptions", "audio/translations", "audio/speech", "images/generations", "images/edits",
    )
}  # fmt: skip
OWN = {"/health", "/ready", "/server_info", "/get_server_info"}
_ENCODED = re.compile(rb"%[0-9A-Fa-f]{2}")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
# Under /v1/, but about one replica's own state: any other replica would give a wrong answer.
NOT_SERVED = re.compile(r"/v1/loads(/.*)?|/v1/responses/.+")


def normalise(raw: bytes) -> str:
    """The path as the most lenient server would see it: decoded, without //, /./, /../ or a trailing slash."""
    path = unquote_to_bytes(raw).decode("latin-1").replace("\\", "/")
    return posixpath.normpath("/" + path.lstrip("/"))


def kind_of(raw: bytes) -> tuple[str, PathKind, bytes]:
    """A raw path (no query) in normalised form, its kind, and how it is sent to replicas; unknown paths are ADMIN."""
    return _remembered(raw) if len(raw) <= 128 else _kind_of(raw)


def _kind_of(raw: bytes) -> tuple[str, PathKind, bytes]:
    path = normalise(raw)
    return *_sorted(path), _sent(raw, path)


def _sent(raw: bytes, path: str) -> bytes:
    """A spelling that a replica decodes to exactly `path`: the client's, less needless encoding, if it does."""
    plain = _ENCODED.sub(_decoded, raw)
    if unquote_to_bytes(plain) == path.encode("latin-1"):
        return plain
    return quote(path.encode("latin-1"), safe="/:@!$&'()*+,;=").encode()


def _decoded(found: re.Match[bytes]) -> bytes:
    byte = int(found[0][1:], 16)
    return bytes((byte,)) if byte in _UNRESERVED else found[0]


def _sorted(path: str) -> tuple[str, PathKind]:
    if not path.isprintable():
        return path, PathKind.ADMIN  # a replica's router may take /v1/loads%0A for /v1/loads
    if path in OWN:
        return path, PathKind.OWN
    if path in PLAIN or path.startswith("/v1/models/"):
        return path, PathKind.PLAIN
    if path in GENERATING or (path.startswith("/v1/") and not NOT_SERVED.fullmatch(path)):
        return path, PathKind.GENERATING
    return path, PathKind.ADMIN


_remembered = lru_cache(maxsize=1024)(_kind_of)
