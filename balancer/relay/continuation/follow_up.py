"""Makes the request for the rest of an answer, from the client's own request and what it has received so far."""

from dataclasses import dataclass
from typing import Any

import orjson

from balancer.relay.asked import LIMITS
from balancer.relay.continuation.anthropic import as_chat
from balancer.relay.continuation.delivered import CannotContinue, Delivered
from balancer.relay.continuation.stops import stop_strings
from balancer.relay.continuation.token_ids import with_ids
from balancer.routing.body import MAX_NANOSECONDS, PER_BYTE, nanoseconds

CHAT = "/v1/chat/completions"
# SGLang's defaults if a request says nothing.
COMPLETION_TOKENS, GENERATE_TOKENS = 16, 128
# Fields that make the remaining tokens depend on more than the text so far, or the events contain more than text.
DEPENDING = {
    "tools": "tools",
    "functions": "tools",
    "json_schema": "guided output",
    "regex": "guided output",
    "ebnf": "guided output",
    "structural_tag": "guided output",
    "logprobs": "logprobs",
    "top_logprobs": "logprobs",
    "return_logprob": "logprobs",
    "echo": "echo",
    "suffix": "suffix",
    "min_tokens": "min_tokens",
    "min_new_tokens": "min_tokens",
    "frequency_penalty": "penalties",
    "presence_penalty": "penalties",
    "stop_regex": "stop_regex",
    "custom_logit_processor": "custom sampling",
    "custom_params": "custom sampling",
    "watermark": "custom sampling",
    "session_id": "session",
    "session_params": "session",
    "input_ids": "token ids",
    "input_embeds": "token ids",
    "audio_data": "audio",
    "audio": "audio",
    "video_data": "video",
}
PARTS = ("text", "image_url")


@dataclass(frozen=True, slots=True)
class FollowUp:
    """What to send, and where. `is_muted`: the client has all of the text, and lacks only how it ended."""

    path: str
    body: bytes
    stops: tuple[str, ...]
    keeps_stop: bool
    tokens: int  # that the client already has
    reasoning_tokens: int  # of these
    most: int | None  # the client's limit on tokens
    is_muted: bool
    tells_usage: bool  # the client gets an event with the usage,
    tells_usage_often: bool  # and has it in every other event


def read_request(pieces: list[bytes]) -> dict[str, Any]:
    """The client's request; raises CannotContinue if it is no JSON object, or if parsing it would block the loop."""
    raw = b"".join(pieces)
    if nanoseconds(raw) - len(raw) * PER_BYTE > MAX_NANOSECONDS:  # images are long, but cheap to parse
        raise CannotContinue("body")
    try:
        request = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise CannotContinue("body") from None
    if not isinstance(request, dict):
        raise CannotContinue("body")
    return request


def follow_up(
    path: str,
    request: dict[str, Any],
    so_far: Delivered,
    tokens: int,
    reasoned: str = "",
    reasoning_tokens: int = 0,
    ids: list[int] | None = None,
) -> FollowUp:
    """`tokens` is how many the client already has, of which `reasoning_tokens` are reasoning; `reasoned` is that, with
    its tags. `ids` are the prompt's and the answer's so far, where the text would be read as others. Raises
    CannotContinue if the answer cannot continue elsewhere.
    """
    try:
        check(path, request, so_far)
        wish = _WISHES[path](request, so_far, reasoned) if not ids else _limited(path, with_ids(path, request, ids))
    except (KeyError, TypeError, AttributeError, IndexError):
        raise CannotContinue("format") from None
    where = CHAT if path == "/v1/messages" else path
    within, names = LIMITS[where]
    holder = wish[within] if within else wish
    limits = [name for name in names if holder.get(name)]
    if any(type(holder[name]) is not int for name in limits):
        raise CannotContinue("format")
    most = holder[limits[0]] if limits else None
    has_all = so_far.finish is not None or (so_far.blocks > 0 and not so_far.is_block_open)
    is_muted = has_all or (most is not None and tokens >= most)
    if is_muted and not limits:
        limits = [names[-1]]
    for name in limits:
        holder[name] = 1 if is_muted else max(1, holder[name] - tokens)
    wish.pop("rid", None)  # the other replica may know this request id already
    keeps_stop = bool(holder.get("no_stop_trim"))
    stops = stop_strings(holder.get("stop"))
    options = wish.get("stream_options")
    options = options if isinstance(options, dict) else {}
    tells_usage, often = bool(options.get("include_usage")), bool(options.get("continuous_usage_stats"))
    if stops and tells_usage:  # at a stop string across the seam, nothing later is waited for
        wish["stream_options"] = options | {"continuous_usage_stats": True}
    body = orjson.dumps(wish)
    return FollowUp(where, body, stops, keeps_stop, tokens, reasoning_tokens, most, is_muted, tells_usage, often)


def ending(path: str, request: dict[str, Any], so_far: Delivered) -> bytes | None:
    """What the client lacks of an answer whose text is whole; None if another replica has to be asked."""
    if so_far.is_done:
        return b""
    if so_far.finish is None:
        return None
    if path == "/v1/messages":
        return b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    options = request.get("stream_options")
    if path != "/generate" and isinstance(options, dict) and options.get("include_usage") and not so_far.has_usage:
        return None
    return b"data: [DONE]\n\n"


def check(path: str, request: dict[str, Any], so_far: Delivered) -> None:
    """Raises CannotContinue if the rest of the answer depends on more than the text so far."""
    sampling = (request.get("sampling_params") if path == "/generate" else None) or {}
    if not isinstance(sampling, dict):
        raise CannotContinue("several answers")
    asked = request | sampling
    if _is_beyond(asked.get("n"), 1) or _is_beyond(asked.get("best_of"), 1):
        raise CannotContinue("several answers")
    if so_far.is_empty and path != "/v1/messages":
        return  # the answer is generated again from the start
    if so_far.reasoning and not (so_far.text and _keeps_reasoning_apart(request)):
        raise CannotContinue("reasoning")
    for name, reason in DEPENDING.items():
        value = asked.get(name)
        if value and not (reason == "tools" and asked.get("tool_choice") == "none"):
            raise CannotContinue(reason)
    if path == "/v1/completions" and asked.get("logprobs") is not None:
        raise CannotContinue("logprobs")
    if any(value for name, value in request.items() if name.startswith("return_")):
        raise CannotContinue("extras")
    form = asked.get("response_format")
    if form and form["type"] != "text":
        raise CannotContinue("guided output")
    if asked.get("repetition_penalty") not in (None, 1):
        raise CannotContinue("penalties")
    seed = asked.get("seed") if asked.get("seed") is not None else asked.get("sampling_seed")
    if seed is not None and asked.get("temperature") != 0:
        raise CannotContinue("seed")


def _keeps_reasoning_apart(request: dict[str, Any]) -> bool:
    """Is what the client got as reasoning, and nothing else, the model's reasoning?"""
    return not (request.get("chat_template_kwargs") or {}).get("force_nonempty_content")


def _is_beyond(value: Any, most: int) -> bool:
    return value is not None and value != most


def _chat(request: dict[str, Any], so_far: Delivered, reasoned: str) -> dict[str, Any]:
    messages = list(request["messages"])
    if so_far.is_empty:
        return dict(request)
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any(part["type"] not in PARTS for part in content):
            raise CannotContinue("audio")
    text = reasoned + so_far.text
    if messages[-1]["role"] == "assistant":
        # Without continue_final_message SGLang takes a final assistant message for a user message.
        if not request.get("continue_final_message") or not isinstance(messages[-1]["content"], str):
            raise CannotContinue("format")
        text = messages.pop()["content"] + text
    messages.append({"role": "assistant", "content": text})
    return request | {"messages": messages, "continue_final_message": True}


def _completion(request: dict[str, Any], so_far: Delivered, _: str) -> dict[str, Any]:
    if not isinstance(request["prompt"], str) and not so_far.is_empty:
        raise CannotContinue("token ids" if _holds_ids(request["prompt"]) else "several answers")
    wish = dict(request)
    if so_far.text:
        wish["prompt"] += so_far.text
    return _limited("/v1/completions", wish)


def _generate(request: dict[str, Any], so_far: Delivered, _: str) -> dict[str, Any]:
    wish = dict(request)
    if not so_far.is_empty:
        if not isinstance(request.get("text"), str):
            raise CannotContinue("several answers" if request.get("text") else "token ids")
        wish["text"] += so_far.text
    return _limited("/generate", wish)


def _messages(request: dict[str, Any], so_far: Delivered, reasoned: str) -> dict[str, Any]:
    return _chat(as_chat(request), so_far, reasoned)


def _limited(path: str, wish: dict[str, Any]) -> dict[str, Any]:
    """With SGLang's own limit on tokens where the client has set none."""
    if path == "/v1/completions":
        return {"max_tokens": COMPLETION_TOKENS} | wish
    if path == "/generate":
        return wish | {"sampling_params": {"max_new_tokens": GENERATE_TOKENS} | (wish.get("sampling_params") or {})}
    return wish


def _holds_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], str)


_WISHES = {
    CHAT: _chat,
    "/v1/completions": _completion,
    "/generate": _generate,
    "/v1/messages": _messages,
}
