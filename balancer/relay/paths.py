"""Which paths are served: an allow-list of normalised paths, so that no spelling reaches SGLang's admin routes."""

import enum
import posixpath
import re
from functools import lru_cache
from typing import Final
from urllib.parse import quote, unquote_to_bytes


class PathKind(enum.Enum):
    """What a path is to the balancer."""

    GENERATING = "generating"  # a POST or PUT there generates tokens: it counts against a replica's limit
    PLAIN = "plain"  # relayed without ever waiting for room
    ADMIN = "admin"  # SGLang's own admin routes: relayed only where the service allows it
    OWN = "own"  # answered by the balancer itself


MODELS: Final = "/v1/models"
OLLAMA_MODELS: Final = "/api/tags"
LISTS: Final = (MODELS, OLLAMA_MODELS)  # of models: those of all services, where there are several
REALTIME = "/v1/realtime"
# Of SGLang 0.5.23, and of other servers that speak OpenAI's API. Whatever else is under /v1/ may change a server, as
# vLLM's /v1/load_lora_adapter does, or would be answered by no replica.
GENERATING = {"/generate", "/classify", "/encode", "/rerank", "/score", "/api/chat", "/api/generate"} | {
    f"/v1/{name}"
    for name in (
        "chat/completions", "completions", "responses", "messages", "embeddings", "classify", "rerank", "score",
        "decisions", "systemone", "realtime", "audio/transcriptions", "audio/translations", "audio/speech",
        "images/generations", "images/edits", "images/variations", "videos", "moderations",
    )
}  # fmt: skip
PLAIN = {"/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize", "/v1/messages/count_tokens"}
PLAIN |= {MODELS, "/model_info", "/get_model_info", OLLAMA_MODELS, "/api/show"}
# Worth minutes of waiting while a replica starts, because the answer takes long anyway. All other paths are asked by
# pages and programs that want to know what is there, and would rather hear at once that there is nothing yet.
WAITED_FOR: Final = GENERATING - {"/v1/realtime", "/v1/moderations"}
OWN = {"/health", "/ready", "/server_info", "/get_server_info", "/api/version"}
_ENCODED = re.compile(rb"%[0-9A-Fa-f]{2}")
# SGLang asks for ids of this form. It has nothing else beside an answer, such as its input items.
_RESPONSE = re.compile(r"/v1/responses/resp_[A-Za-z0-9_-]{1,128}(/cancel)?")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
# What OpenAI's servers keep for their clients, and replicas do not.
_KEPT = re.compile(
    r"/v1/(files|uploads|batches|conversations|responses/.+|assistants|threads|vector_stores|fine_tuning|evals|containers)"
    r"(/.*)?"
)


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


def is_of_a_store(path: str) -> bool:
    """Does OpenAI keep something under this path: files, batches, conversations, answers?"""
    return _KEPT.fullmatch(path) is not None


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
    if path in PLAIN or path.startswith("/v1/models/") or _RESPONSE.fullmatch(path):
        return path, PathKind.PLAIN
    if path in GENERATING:
        return path, PathKind.GENERATING
    return path, PathKind.ADMIN


_remembered = lru_cache(maxsize=1024)(_kind_of)
