"""The bodies of SGLang 0.5.23's answers, as bytes: the same field names, order and nesting as the real server's."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import orjson

from tests.lab import anthropic
from tests.lab.asked import END_OF_THINKING, THINK, Asked, Kind
from tests.lab.prompts import text_tokens, token_ids

DATA = b"data: "
DONE = b"data: [DONE]"
QUEUE_FULL = "The request queue is full."
WORDS = tuple(f" t{position:02}" for position in range(100))


@dataclass(frozen=True, slots=True)
class Generation:
    """What one generation makes, and what identifies it in every chunk."""

    asked: Asked
    words: Sequence[str]  # one a token; the continuation of a text begins where the text ends
    rid: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "reasoning_tokens": 0,
        }

    def in_full(self) -> dict[str, Any]:
        """The form used everywhere except at the end of a streamed text completion."""
        return {**self.as_json(), "completion_tokens_details": None}


def words(count: int, begin: int = 0, closes_at: int = -1, is_opened: bool = False) -> list[str]:
    """The text of `count` tokens: four bytes each, as tests/lab/prompts.py reads text, so that an answer sent back in a
    conversation gives the same tokens again. The token at `closes_at` ends the reasoning; if the prompt has not opened
    it (`is_opened`), the first token does."""
    made = [WORDS[position % len(WORDS)] for position in range(begin, begin + count)]
    for position, tag in ((closes_at, END_OF_THINKING), (0 if closes_at > 0 and not is_opened else -1, THINK)):
        if begin <= position < begin + count:
            made[position - begin] = tag
    return made


def error(status: int, message: str, kind: str) -> bytes:
    """An error body, as on the OpenAI paths and in most of SGLang's HTTP errors."""
    return orjson.dumps({"object": "error", "message": message, "type": kind, "param": None, "code": status})


def bad_request(kind: Kind, message: str) -> bytes:
    """The body of a 400."""
    if kind == "messages":
        return anthropic.error("invalid_request_error", message)
    return error(400, message, "BadRequestError")


def queue_full(kind: Kind) -> bytes:
    """The body of the 503 for a request that found the queue full."""
    if kind == "messages":
        return anthropic.error("overloaded_error", "Internal server error")
    return error(503, QUEUE_FULL, "503")


def whole(generation: Generation, usage: Usage, seconds: float) -> bytes:
    """The body of an answer that is not streamed. `seconds`: how long it took."""
    text = "".join(generation.words)
    match generation.asked.kind:
        case "generate":
            return orjson.dumps(_generate(generation, text, usage, seconds))
        case "messages":
            return anthropic.whole(generation, usage)
        case "completion":
            said: dict[str, Any] = {"text": text}
        case "chat":
            said = {"message": {"role": "assistant", "content": text, "reasoning_content": None}}
    body = {
        "id": generation.rid,
        "object": "chat.completion" if generation.asked.kind == "chat" else "text_completion",
        "created": generation.created,
        "model": generation.asked.model,
        "choices": [_choice(said, "length")],
        "usage": usage.in_full(),
        "metadata": {"weight_version": "default", "weight_versions": _weight_versions(usage)},
    }
    return orjson.dumps(body)


# The events of a stream, each without the empty line that ends it.


def first(generation: Generation, usage: Usage) -> list[bytes]:
    """What is streamed just before the first token."""
    match generation.asked.kind:
        case "chat":
            opening = _choice(_delta(role="assistant", content=""), None)
            return [_chunk(generation, [opening], **_so_far(generation, usage))]
        case "messages":
            return anthropic.first(generation, usage)
        case _:
            return []


def token(generation: Generation, position: int, usage: Usage, seconds: float) -> bytes:
    """The token at `position`, from 0; for /generate the event holds the whole text so far."""
    is_last = position + 1 == len(generation.words)
    word = generation.words[position]
    match generation.asked.kind:
        case "chat":
            choice = _choice(_chat_delta(generation, position), None)
            return _chunk(generation, [choice], **_so_far(generation, usage))
        case "messages":
            return anthropic.token(word)
        case "completion":
            choice = _choice({"text": word}, "length" if is_last else None)
            return _chunk(generation, [choice], **({"usage": None} | _so_far(generation, usage)))
        case "generate":
            text = "".join(generation.words[: position + 1])
            return DATA + orjson.dumps(_generate(generation, text, usage, seconds if is_last else None))


def last(generation: Generation, usage: Usage) -> list[bytes]:
    """What is streamed after the last token."""
    match generation.asked.kind:
        case "chat":
            end = _chunk(generation, [_choice(_delta(), "length")], **_so_far(generation, usage))
            return [end, *_ending(generation, usage)]
        case "messages":
            return anthropic.last(usage)
        case _:
            return _ending(generation, usage)


def refused(generation: Generation) -> list[bytes]:
    """What is streamed, with status 200, to a streaming request that found the queue full."""
    if generation.asked.kind == "messages":
        return anthropic.refused(generation, QUEUE_FULL)
    refusal = DATA + b'{"error":' + error(503, QUEUE_FULL, "SERVICE_UNAVAILABLE") + b"}"
    return [refusal, *_ending(generation, Usage(0, 0, 0))]


def _so_far(generation: Generation, usage: Usage) -> dict[str, Any]:
    """The counts in an event of one that asked for them in each."""
    return {"usage": usage.in_full()} if generation.asked.tells_usage_often else {}


def _ending(generation: Generation, usage: Usage) -> list[bytes]:
    if not generation.asked.include_usage or generation.asked.kind == "generate":
        return [DONE]
    said = usage.in_full() if generation.asked.kind == "chat" else usage.as_json()
    reasoned = min(generation.asked.closes_at + 1 - generation.asked.begin, usage.completion_tokens)
    if generation.asked.is_parsed and reasoned > 0:
        said |= {"reasoning_tokens": reasoned, "completion_tokens_details": {"reasoning_tokens": reasoned}}
    return [_chunk(generation, [], usage=said), DONE]


def _chat_delta(generation: Generation, position: int) -> dict[str, Any]:
    asked, word = generation.asked, generation.words[position]
    if not asked.is_parsed or asked.closes_at < 0:
        return _delta(content=word)
    if word in (THINK, END_OF_THINKING):
        return _delta(content="")
    return _delta(reasoning_content=word) if asked.begin + position < asked.closes_at else _delta(content=word)


def _delta(**said: str) -> dict[str, Any]:
    return {"delta": {"reasoning_content": None, **said}}


def _choice(said: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, **said, "logprobs": None, "finish_reason": finish, "matched_stop": None}


def _chunk(generation: Generation, choices: list[Any], **usage: Any) -> bytes:
    return DATA + orjson.dumps(
        {
            "id": generation.rid,
            "object": "chat.completion.chunk" if generation.asked.kind == "chat" else "text_completion",
            "created": generation.created,
            "model": generation.asked.model,
            "choices": choices,
            **usage,
        }
    )


def _weight_versions(usage: Usage) -> list[dict[str, Any]]:
    return [{"version": "default", "start": 0, "end": usage.completion_tokens}]


def _generate(generation: Generation, text: str, usage: Usage, seconds: float | None) -> dict[str, Any]:
    """The body of /generate. `seconds`: how long the generation took, None while it runs."""
    meta: dict[str, Any] = {
        "id": generation.rid,
        "finish_reason": None if seconds is None else {"type": "length", "length": len(generation.words)},
        "prompt_tokens": usage.prompt_tokens,
        "weight_version": "default",
        "num_retractions": 0,
        "reasoning_tokens": 0,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
    }
    if seconds is not None:
        meta["weight_versions"] = _weight_versions(usage)
    meta |= {"cached_tokens_details": {"device": usage.cached_tokens, "host": 0}, "dp_rank": None}
    if seconds is not None:
        meta["e2e_latency"] = seconds
    return {"text": text, "output_ids": token_ids(text_tokens(text)), "meta_info": meta}
