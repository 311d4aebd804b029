"""Which paths are served: an allow-list, asked after normalising, so that no spelling reaches SGLang's admin routes."""

import enum
import posixpath
import re
from functools import lru_cache
from urllib.parse import unquote_to_bytes


class Kind(enum.Enum):
    """What a path is to the balancer."""

    GENERATING = "generating"  # a POST there makes tokens: it counts against a member's limit
    PLAIN = "plain"  # relayed, and never waits for room
    ADMIN = "admin"  # SGLang's own admin routes: relayed only where the service allows it
    OWN = "own"  # answered by the balancer itself


GENERATING = {"/generate", "/classify", "/encode", "/rerank", "/score"}
PLAIN = {"/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize", "/v1/messages/count_tokens"}
PLAIN |= {"/v1/models", "/model_info", "/get_model_info"}
# What is worth minutes of waiting while a replica starts: its answer takes long anyway. All else is asked by pages and
# programs that want to know what there is, and would rather hear at once that there is nothing yet.
WAITED_FOR = GENERATING | {
    f"/v1/{name}"
    for name in (
        "chat/completions", "completions", "responses", "messages", "embeddings", "classify", "rerank", "score",
        "audio/transcriptions", "audio/translations", "audio/speech", "images/generations", "images/edits",
    )
}  # fmt: skip
OWN = {"/health", "/ready", "/server_info", "/get_server_info"}
# Under /v1/, yet about one replica's own state: asked of any other, the answer would be wrong.
NOT_SERVED = re.compile(r"/v1/loads(/.*)?|/v1/responses/.+")


def normalise(raw: bytes) -> str:
    """The path that the most generous server would see: decoded, without //, /./ or /../, and no slash at its end."""
    path = unquote_to_bytes(raw).decode("latin-1").replace("\\", "/")
    return posixpath.normpath("/" + path.lstrip("/"))


def kind_of(raw: bytes) -> tuple[str, Kind]:
    """The normalised form of a raw path (no query) and what it is; everything not known is ADMIN."""
    return _remembered(raw) if len(raw) <= 128 else _kind_of(raw)


def _kind_of(raw: bytes) -> tuple[str, Kind]:
    path = normalise(raw)
    if not path.isprintable():
        return path, Kind.ADMIN  # a replica's router may take /v1/loads%0A for /v1/loads
    if path in OWN:
        return path, Kind.OWN
    if path in PLAIN or path.startswith("/v1/models/"):
        return path, Kind.PLAIN
    if path in GENERATING or (path.startswith("/v1/") and not NOT_SERVED.fullmatch(path)):
        return path, Kind.GENERATING
    return path, Kind.ADMIN


_remembered = lru_cache(maxsize=1024)(_kind_of)
