"""What a generating request asks for."""

import re
from dataclasses import dataclass
from typing import Any, Literal, Self

import orjson

from tests.lab.knobs import Knobs

Kind = Literal["chat", "completion", "generate", "messages"]
ORDINARY_TOKENS = 8
_TOKEN = re.compile(r"</?think>| t\d\d")
THINK, END_OF_THINKING = "<think>", "</think>"
_MADE = re.compile(r"(?:</?think>| t\d\d)*\Z")  # the part at the end of a text that earlier answers generated


class BadRequest(ValueError):
    """Nothing can be generated for this body; the message says why."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One parsed generating request."""

    kind: Kind
    model: str
    stream: bool
    include_usage: bool
    tells_usage_often: bool  # in every event
    tokens: int  # to generate
    begin: int  # tokens of the answer that are in the prompt already; the answer continues from there
    body: dict[str, Any]
    body_length: int  # bytes
    closes_at: int  # the token of the whole answer that closes its reasoning, from 0; -1 without reasoning
    opens_thinking: bool  # the prompt has the opening tag
    is_parsed: bool  # reasoning is told apart

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
        options = body.get("stream_options") or {}
        begin = len(_TOKEN.findall(_MADE.search(_open_text(kind, body))[0]))  # type: ignore[index]
        return cls(
            kind=kind,
            model=str(body.get("model", knobs.served_model)),
            stream=body.get("stream") is True,
            include_usage=bool(options.get("include_usage")),
            tells_usage_often=bool(options.get("continuous_usage_stats")),
            tokens=max(1, knobs.tokens - begin) if knobs.tokens else wanted,
            begin=begin,
            body=body,
            body_length=len(data),
            closes_at=knobs.thinks + (not knobs.opens_thinking) if kind == "chat" and knobs.thinks else -1,
            opens_thinking=kind == "chat" and knobs.opens_thinking,
            is_parsed=bool(knobs.reasoning_parser),
        )


def is_continued(kind: Kind, body: dict[str, Any]) -> bool:
    """Is the last message an answer to continue? On /v1/messages SGLang treats it as a user's message."""
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    is_answer = isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), str)
    return kind == "chat" and body.get("continue_final_message") is True and is_answer


def _open_text(kind: Kind, body: dict[str, Any]) -> str:
    """The text that the model continues; empty if there is none."""
    if is_continued(kind, body):
        return str(body["messages"][-1]["content"])
    told = body.get({"completion": "prompt", "generate": "text"}.get(kind, ""))
    return told if isinstance(told, str) else ""
