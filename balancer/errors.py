"""Every error that a user can meet: its HTTP status, its body in the shape that clients of the path expect."""

import math
from collections.abc import Sequence

import orjson

# Anthropic's error types, by HTTP status.
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def is_anthropic(path: str) -> bool:
    """Does this path belong to Anthropic's API, whose clients expect errors in a different shape?"""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def is_ollama(path: str) -> bool:
    """Does this path belong to Ollama's API, whose clients expect a text as the error?"""
    return path.startswith("/api/")


class ConfigError(Exception):
    """A setting, file or command line that cannot be used. The message is one line that says what to change."""


class ServeError(Exception):
    """A request that the balancer answers itself instead of a replica.

    `status` is the HTTP status. `retry_after` is in seconds, or None where waiting does not help. `closes` means that
    the client's connection cannot be used for another request.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        kind: str | None = None,
        retry_after: int | None = None,
        closes: bool = False,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.retry_after = retry_after
        self.closes = closes
        self.allow = allow

    @property
    def body(self) -> bytes:
        """The JSON body that OpenAI clients expect."""
        error = {"message": self.message, "type": self.kind, "code": self.code, "param": None}
        return orjson.dumps({"error": error})

    def body_at(self, path: str, request_id: bytes) -> bytes:
        """The JSON body that clients of `path` expect: Anthropic's, Ollama's or OpenAI's shape."""
        if is_ollama(path):
            return orjson.dumps({"error": self.message})
        if not is_anthropic(path):
            return self.body
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        error = {"type": kind, "message": self.message}
        return orjson.dumps({"type": "error", "error": error, "request_id": request_id.decode("latin-1")})

    def event(self, path: str, request_id: bytes) -> bytes:
        """The server-sent event that ends a broken stream."""
        name = b"event: error\n" if is_anthropic(path) else b""
        return name + b"data: " + self.body_at(path, request_id) + b"\n\n"


def bad_request(why: str) -> ServeError:
    return ServeError(400, "bad_request", f"{why} Send a well-formed HTTP/1.1 request.", closes=True)


def unauthorized() -> ServeError:
    message = "Incorrect API key. Send one of this service's keys as 'Authorization: Bearer KEY'."
    return ServeError(401, "invalid_api_key", message, kind="authentication_error")


def foreign_page(origin: str) -> ServeError:
    whose = f"A page of {origin[:200]}" if origin else "A page of another site"
    message = f"{whose} may not use this service. Add its origin to cors_origins, or require API keys."
    return ServeError(403, "foreign_page", message)


def foreign_host(host: str) -> ServeError:
    message = (
        f"Without API keys this port serves this machine only, not {host[:200]!r}. Use http://localhost, or, behind a "
        "proxy, list the proxy in trusted_proxies."
    )
    return ServeError(403, "foreign_host", message)


def key_at_limit(limit: float) -> ServeError:
    message = (
        f"This API key has {limit:g} requests in flight, its limit. Wait for one to end, or ask for a higher limit."
    )
    return ServeError(429, "key_at_limit", message, kind="rate_limit_error", retry_after=1)


def rate_limited(what: str, limit: int, wait: float) -> ServeError:
    message = f"This API key may use {limit} {what}. Try again in {wait:.0f} s, or ask for a higher limit."
    seconds = max(1, math.ceil(wait))
    return ServeError(429, "rate_limit_exceeded", message, kind="rate_limit_error", retry_after=seconds)


def model_not_allowed(model: str, allowed: Sequence[str]) -> ServeError:
    message = f"This API key may not use {model[:200]!r}. It may use: {', '.join(allowed)}."
    return ServeError(403, "model_not_allowed", message, kind="permission_error")


def not_found(path: str) -> ServeError:
    message = f"{path} is not served here. Serving paths are /v1/..., /generate and SGLang's other inference paths."
    return ServeError(404, "not_found", message)


def nothing_kept(path: str) -> ServeError:
    message = f"{path} is not served here: nothing is kept between requests. Send what belongs together in one request."
    return ServeError(404, "not_found", message)


def keeper_gone(replica: str) -> ServeError:
    message = f"The replica that keeps the response ({replica}) is leaving or gone. Send the whole conversation."
    return ServeError(400, "previous_response_not_found", message)


def response_not_kept(id_: str, is_built_on: bool) -> ServeError:
    """`is_built_on`: the request goes on from that answer; otherwise it asks for it."""
    message = (
        f"No replica is known to keep the response '{id_[:140]}': replicas keep them with --enable-response-store, "
        "until they end. Send the whole conversation."
    )
    return ServeError(
        400 if is_built_on else 404, "previous_response_not_found" if is_built_on else "not_found", message
    )


def method_not_allowed(method: str, allow: str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS") -> ServeError:
    return ServeError(405, "method_not_allowed", f"{method} is not served here. Use one of {allow}.", allow=allow)


def request_timeout(what: str, seconds: float) -> ServeError:
    message = f"The request's {what} did not arrive within {seconds:g} s. Send it again, faster."
    return ServeError(408, "request_timeout", message, closes=True)


def body_too_large(limit: int) -> ServeError:
    message = f"The request body is over {limit} bytes (max_body_bytes). Send a smaller one, or images by URL."
    return ServeError(413, "body_too_large", message, closes=True)


def head_too_large(limit: int) -> ServeError:
    message = f"The request's header fields are over {limit} bytes. Send fewer or shorter ones."
    return ServeError(431, "head_too_large", message, closes=True)


def buffers_full() -> ServeError:
    message = "The balancer holds as many request bodies as it may (max_buffered_bytes). Try again shortly."
    return ServeError(503, "buffers_full", message, retry_after=1, closes=True)


def too_many_connections(limit: int) -> ServeError:
    message = f"Your address has {limit} connections open here (max_connections_per_client). Close some, or reuse them."
    kind = "rate_limit_error"
    return ServeError(429, "too_many_connections", message, kind=kind, retry_after=1, closes=True)


def queue_full(size: int, retry_after: int) -> ServeError:
    message = f"Every replica is at its limit and {size} requests are waiting. Try again shortly, or add replicas."
    return ServeError(429, "queue_full", message, kind="rate_limit_error", retry_after=retry_after)


def wait_too_long(expected: float, timeout: float, retry_after: int) -> ServeError:
    message = (
        f"This request would wait about {expected:.0f} s for a replica, longer than queue_timeout ({timeout:g} s). "
        "Try again later, or add replicas."
    )
    return ServeError(429, "queue_full", message, kind="rate_limit_error", retry_after=retry_after)


def queue_timeout(seconds: float, retry_after: int) -> ServeError:
    message = f"No replica had room within {seconds:g} s. Try again shortly, or add replicas."
    return ServeError(429, "queue_timeout", message, kind="rate_limit_error", retry_after=retry_after)


def model_not_found(model: str, known: Sequence[str]) -> ServeError:
    message = f"There is no model {model[:200]!r} here. There are: {', '.join(known)}."
    return ServeError(404, "model_not_found", message)


def model_not_known_yet(model: str, retry_after: int = 5) -> ServeError:
    message = f"No replica is ready that serves {model[:200]!r}; one that still starts may. Try again shortly."
    return ServeError(503, "no_replica_ready", message, retry_after=retry_after)


def model_not_named(known: Sequence[str]) -> ServeError:
    message = (
        "Several models are served here, and the request names none. Put one into `model` or, where the body has no "
        f"such field, into the header X-Model. There are: {', '.join(known)}."
    )
    return ServeError(400, "model_not_named", message)


def no_replica(retry_after: int = 5, progress: str = "") -> ServeError:
    """`progress`: how far a replica is that starts, in words."""
    message = "No replica is ready. Try again shortly; `groundserve status` shows what the replicas are doing."
    if progress:
        message = f"No replica is ready: {progress}. Try again shortly."
    return ServeError(503, "no_replica_ready", message, retry_after=retry_after)


def not_awake(retry_after: int, why: str = "") -> ServeError:
    """`why`: what keeps the model from its turn."""
    message = (
        f"This model shares its GPU and has not got its turn in time{f' ({why})' if why else ''}. Try again in about "
        f"{retry_after} s; `groundserve status` shows who has it."
    )
    return ServeError(503, "model_not_awake", message, retry_after=retry_after)


def replicas_busy(retry_after: int = 1) -> ServeError:
    message = "Every replica that could be asked is busy. Try again shortly."
    return ServeError(503, "replicas_busy", message, retry_after=retry_after)


def unreachable() -> ServeError:
    message = "No replica could be reached. The request was not processed: it is safe to send it again."
    return ServeError(502, "replica_unreachable", message)


def out_of_sockets(why: str) -> ServeError:
    message = (
        f"The balancer cannot open a connection ({why}). Try again shortly; if it stays, raise `ulimit -n` for it."
    )
    return ServeError(503, "out_of_sockets", message, retry_after=1)


def lost() -> ServeError:
    message = (
        "The replica went away before it answered. The request may have been processed: send it again if that is safe."
    )
    return ServeError(502, "replica_lost", message)


def lost_twice() -> ServeError:
    message = "Two replicas went away before they answered: it is not sent to a third. See the replicas' logs."
    return ServeError(502, "replica_lost", message)


def kills_replicas(seconds: float) -> ServeError:
    message = (
        f"Two replicas died while they had this very request. It is refused for {seconds:g} s, so that no third one "
        "dies of it. Change the request, or see the replicas' logs."
    )
    return ServeError(422, "kills_replicas", message)


def bad_answer() -> ServeError:
    message = "The replica's answer was not valid HTTP. The request may have been processed; see the replica's log."
    return ServeError(502, "replica_bad_answer", message)


def first_byte_timeout(seconds: float) -> ServeError:
    message = f"The replica did not begin to answer within {seconds:g} s. Ask for less, or raise first_byte_timeout."
    return ServeError(504, "first_byte_timeout", message)


def stream_broken(why: str) -> ServeError:
    message = f"The stream ended early: {why} What arrived so far is incomplete; send the request again."
    return ServeError(502, "stream_broken", message)


def shutting_down() -> ServeError:
    message = "The balancer is shutting down. Send the request again."
    return ServeError(503, "shutting_down", message, retry_after=1, closes=True)
