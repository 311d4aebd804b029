"""What a generating request asks for."""

import re
from dataclasses import dataclass
from typing import Any, Literal, Self

import orjson

from tests.lab.knobs import Knobs

Kind = Literal["chat", "completion", "generate", "messages"]
ORDINARY_TOKENS = 8
_MADE = re.compile(r"(?: t\d\d)*\Z")  # what an earlier answer made of the end of a text


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
    begin: int  # tokens of the answer that stand in the prompt already, which go on from there
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
        begin = len(_MADE.search(_open_text(kind, body))[0]) // 4  # type: ignore[index]
        return cls(
            kind=kind,
            model=str(body.get("model", knobs.served_model)),
            stream=body.get("stream") is True,
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
            tokens=max(1, knobs.tokens - begin) if knobs.tokens else wanted,
            begin=begin,
            body=body,
            body_length=len(data),
        )


def is_continued(kind: Kind, body: dict[str, Any]) -> bool:
    """Is the last message an answer that is to go on? On /v1/messages SGLang takes it for a user's."""
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    is_answer = isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), str)
    return kind == "chat" and body.get("continue_final_message") is True and is_answer


def _open_text(kind: Kind, body: dict[str, Any]) -> str:
    """The text whose end the model goes on from, as far as it is known to it by its own tokens."""
    if is_continued(kind, body):
        return str(body["messages"][-1]["content"])
    told = body.get({"completion": "prompt", "generate": "text"}.get(kind, ""))
    return told if isinstance(told, str) else ""
