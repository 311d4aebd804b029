"""What a generating request asks for."""

from dataclasses import dataclass
from typing import Any, Literal, Self

import orjson

from tests.lab.knobs import Knobs

Kind = Literal["chat", "completion", "generate", "messages"]
ORDINARY_TOKENS = 8


class BadRequest(ValueError):
    """The body asks for nothing that can be generated; the message says why."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One generating request, read."""

    kind: Kind
    model: str
    stream: bool
    include_usage: bool
    tokens: int  # to generate
    body: dict[str, Any]
    body_length: int  # bytes

    @classmethod
    def read(cls, kind: Kind, data: bytes, knobs: Knobs) -> Self:
        """Raises BadRequest."""
        try:
            body = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"JSON decode error: {error}") from None
        if not isinstance(body, dict):
            raise BadRequest("the body is no JSON object")
        sampling = body.get("sampling_params") or {}
        wanted = body.get("max_completion_tokens", body.get("max_tokens", sampling.get("max_new_tokens")))
        if wanted is None:
            wanted = ORDINARY_TOKENS
        if type(wanted) is not int or wanted < 1:
            raise BadRequest(f"max_tokens must be at least 1, got {wanted!r}")
        return cls(
            kind=kind,
            model=str(body.get("model", knobs.served_model)),
            stream=body.get("stream") is True,
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
            tokens=knobs.tokens or wanted,
            body=body,
            body_length=len(data),
        )
