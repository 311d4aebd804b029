"""What cannot go on elsewhere, and what it is called."""

from typing import Any

import orjson
import pytest

from balancer.relay.continuation.delivered import CannotContinue, Delivered, delivered
from balancer.relay.continuation.follow_up import follow_up, read_request
from balancer.relay.continuation.translation import Translation
from tests.relay.continuation.answering import request_for

CHAT, TEXT, OWN, MESSAGES = "/v1/chat/completions", "/v1/completions", "/generate", "/v1/messages"
SO_FAR = Delivered(text=" t00", has_opened=True, is_block_open=True, blocks=1, names={"id": "x"})
TOOL = {"type": "function", "function": {"name": "look"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}

ROWS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"tools": [TOOL]}, "tools"),
    (CHAT, {"response_format": {"type": "json_object"}}, "guided output"),
    (CHAT, {"regex": "a+"}, "guided output"),
    (TEXT, {"json_schema": "{}"}, "guided output"),
    (CHAT, {"n": 2}, "several answers"),
    (TEXT, {"best_of": 2}, "several answers"),
    (CHAT, {"logprobs": True}, "logprobs"),
    (TEXT, {"logprobs": 0}, "logprobs"),
    (OWN, {"return_logprob": True}, "logprobs"),
    (TEXT, {"echo": True}, "echo"),
    (TEXT, {"suffix": "end"}, "suffix"),
    (TEXT, {"prompt": [1, 2]}, "token ids"),
    (TEXT, {"prompt": ["a", "b"]}, "several answers"),
    (OWN, {"text": None, "input_ids": [1]}, "token ids"),
    (OWN, {"text": ["a", "b"]}, "several answers"),
    (CHAT, {"min_tokens": 3}, "min_tokens"),
    (CHAT, {"presence_penalty": 0.5}, "penalties"),
    (CHAT, {"repetition_penalty": 1.1}, "penalties"),
    (OWN, {"sampling_params": {"frequency_penalty": 1}}, "penalties"),
    (OWN, {"sampling_params": {"n": 2}}, "several answers"),
    (OWN, {"sampling_params": [{}]}, "several answers"),
    (CHAT, {"seed": 1}, "seed"),
    (CHAT, {"seed": 1, "temperature": 0.5}, "seed"),
    (CHAT, {"messages": [{"role": "user", "content": [SOUND]}]}, "audio"),
    (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}, "format"),
    (CHAT, {"messages": "go"}, "format"),
    (CHAT, {"return_token_ids": True}, "extras"),
    (CHAT, {"stop_regex": "a+"}, "stop_regex"),
    (MESSAGES, {"thinking": {"type": "adaptive"}}, "reasoning"),
    (MESSAGES, {"output_config": {"format": {}}}, "guided output"),
    (MESSAGES, {"tools": [TOOL], "messages": [{"role": "user", "content": "a"}]}, "tools"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tools"),
    (MESSAGES, {"messages": [{"role": "assistant", "content": "a"}]}, "format"),
]


@pytest.mark.parametrize(("path", "more", "reason"), ROWS)
def test_refused(path: str, more: dict[str, Any], reason: str) -> None:
    """A stream that depends on more than its text does not continue, and each reason has its name."""
    with pytest.raises(CannotContinue) as refusal:
        follow_up(path, request_for(path, 8) | more, SO_FAR, 1)
    assert refusal.value.reason == reason


GOES_ON: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"seed": 1, "temperature": 0}),
    (CHAT, {"tools": [TOOL], "tool_choice": "none"}),
    (CHAT, {"n": 1, "presence_penalty": 0.0, "repetition_penalty": 1.0, "logprobs": False, "tools": []}),
    (CHAT, {"response_format": {"type": "text"}}),
    (CHAT, {"temperature": 0.8, "top_p": 0.9, "stop": ["END"]}),
    (MESSAGES, {"thinking": None}),
]


@pytest.mark.parametrize(("path", "more"), GOES_ON)
def test_not_refused(path: str, more: dict[str, Any]) -> None:
    """A stream that depends on its text alone continues, whatever it says of what it does not want."""
    assert not follow_up(path, request_for(path, 8) | more, SO_FAR, 1).is_muted


@pytest.mark.parametrize("more", [more for path, more, _ in ROWS if path == CHAT and "n" not in more])
def test_undelivered_answer(more: dict[str, Any]) -> None:
    """An answer of which nothing was delivered is requested again unchanged."""
    request = request_for(CHAT, 8) | more
    follow = follow_up(CHAT, request, Delivered(has_opened=True), 0)
    assert orjson.loads(follow.body) == request


@pytest.mark.parametrize(
    ("delta", "reason"),
    [({"tool_calls": [{}]}, "tools"), ({"content": 7}, "unreadable")],
)
def test_delivered_refuses(delta: dict[str, Any], reason: str) -> None:
    """What was delivered may show that the stream cannot continue."""
    event = b"data: " + orjson.dumps({"id": "x", "choices": [{"index": 0, "delta": delta}]}) + b"\n\n"
    with pytest.raises(CannotContinue) as refusal:
        delivered(CHAT, [event])
    assert refusal.value.reason == reason


@pytest.mark.parametrize("event", [b"data: {\n\n", b"data: 7\n\n", b"data: {}\n\n"])
def test_unreadable(event: bytes) -> None:
    """Events in none of the formats are refused."""
    with pytest.raises(CannotContinue) as refusal:
        delivered(CHAT, [event])
    assert refusal.value.reason == "unreadable"


def test_error_delivered() -> None:
    """After an error event of the replica's own nothing continues."""
    with pytest.raises(CannotContinue) as refusal:
        delivered(CHAT, [b'data: {"error": {"message": "no"}}\n\n'])
    assert refusal.value.reason == "error"


def test_incremental_events() -> None:
    """Events that each contain only new text cannot be continued with a prefix."""
    meta = {"id": "x", "finish_reason": None, "prompt_tokens": 3, "completion_tokens": 2}
    event = b"data: " + orjson.dumps({"text": "b", "output_ids": [2], "meta_info": meta}) + b"\n\n"
    with pytest.raises(CannotContinue) as refusal:
        delivered(OWN, [event])
    assert refusal.value.reason == "not cumulative"


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"messages":' + b"[{}," * 400_000])
def test_unreadable_bodies(body: bytes) -> None:
    """A body that is not a request, or would stop the event loop, is not read."""
    with pytest.raises(CannotContinue) as refusal:
        read_request([body])
    assert refusal.value.reason == "body"


def test_reasoning_after_text() -> None:
    """Reasoning after text is no continuation of it."""
    follow = follow_up(CHAT, request_for(CHAT, 8), SO_FAR, 1)
    said = {"id": "y", "choices": [{"index": 0, "delta": {"reasoning_content": "hm"}, "finish_reason": None}]}
    with pytest.raises(CannotContinue) as refusal:
        Translation(CHAT, SO_FAR, follow).take(b"data: " + orjson.dumps(said) + b"\n\n")
    assert refusal.value.reason == "reasoning"
