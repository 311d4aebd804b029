"""The bodies of SGLang 0.5.23's answers on /v1/messages: Anthropic's events, which have names."""

from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from tests.lab.answers import Generation, Usage


def whole(generation: "Generation", usage: "Usage") -> bytes:
    text = "".join(generation.words)
    message = _message(generation, [{"type": "text", "text": text}], {"stop_reason": "max_tokens"}, usage)
    return orjson.dumps(message)


def first(generation: "Generation", usage: "Usage") -> list[bytes]:
    opening = _message(generation, [], {}, usage)
    opening["usage"]["output_tokens"] = 0
    return [
        _event("message_start", message=opening),
        _event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    ]


def token(word: str) -> bytes:
    return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": word})


def last(usage: "Usage") -> list[bytes]:
    return [
        _event("content_block_stop", index=0),
        _event(
            "message_delta",
            delta={"stop_reason": "max_tokens"},
            usage={"output_tokens": usage.completion_tokens},
        ),
        _event("message_stop"),
    ]


def refused(generation: "Generation", message: str) -> list[bytes]:
    """What is streamed to a request that found the queue full."""
    usage = {"input_tokens": 0, "output_tokens": 0}
    return [
        _event("message_start", message=_message(generation, [], {}, None) | {"usage": usage}),
        _event("error", error={"type": "overloaded_error", "message": message}),
        _event("message_stop"),
    ]


def error(kind: str, message: str) -> bytes:
    """The body of an error status."""
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}})


def _event(name: str, **said: Any) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps({"type": name, **said})


def _message(
    generation: "Generation", content: list[Any], stop: dict[str, str], usage: "Usage | None"
) -> dict[str, Any]:
    said: dict[str, Any] = {
        "id": f"msg_{generation.rid}",
        "type": "message",
        "role": "assistant",
        "content": content,
        "model": generation.asked.model,
        **stop,
    }
    if usage is not None:
        said["usage"] = {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
        }
    return said
