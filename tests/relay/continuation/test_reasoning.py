"""Answers of reasoning models: what of them continues, and the model's own text."""

from typing import Any

import orjson
import pytest

from balancer.relay.continuation.delivered import CannotContinue, Delivered, delivered
from balancer.relay.continuation.follow_up import FollowUp, follow_up
from balancer.relay.continuation.reasoning import is_opened, tags_of
from balancer.relay.continuation.translation import Translation
from tests.relay.continuation.answering import request_for

CHAT = "/v1/chat/completions"


def read(*deltas: dict[str, Any]) -> Delivered:
    said = [{"id": "x", "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    return delivered(CHAT, [b"data: " + orjson.dumps(event) + b"\n\n" for event in said])


def followed(so_far: Delivered, **more: Any) -> FollowUp:
    return follow_up(CHAT, request_for(CHAT, 20) | more, so_far, 7, "<think>\nhm\n</think>", 5)


CLOSED = ({"role": "assistant", "content": ""}, {"reasoning_content": "\nhm\n"}, {"content": "\n\nSo"})


def test_closed() -> None:
    """The other replica gets the model's own text, and room for what is left."""
    so_far = read(*CLOSED)
    assert (so_far.reasoning, so_far.text) == ("\nhm\n", "\n\nSo")
    wish = orjson.loads(followed(so_far).body)
    assert wish["messages"][-1] == {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSo"}
    assert (wish["continue_final_message"], wish["max_tokens"]) == (True, 13)


@pytest.mark.parametrize(
    ("deltas", "more"),
    [(CLOSED[:2], {}), (CLOSED, {"chat_template_kwargs": {"force_nonempty_content": True}})],
    ids=["open", "perhaps an answer"],
)
def test_refused(deltas: tuple[dict[str, Any], ...], more: dict[str, Any]) -> None:
    """Reasoning that is open, or may be the answer itself, does not continue."""
    with pytest.raises(CannotContinue) as refusal:
        followed(read(*deltas), **more)
    assert refusal.value.reason == "reasoning"


def test_begun_anew() -> None:
    """Reasoning after the answer has begun is none that could be restored."""
    with pytest.raises(CannotContinue) as refusal:
        read(*CLOSED, {"reasoning_content": "but"})
    assert refusal.value.reason == "reasoning"


def test_counted() -> None:
    """The usage of the whole answer has the reasoning, which the second replica took for its prompt."""
    so_far = read(*CLOSED)
    usage = {"prompt_tokens": 17, "completion_tokens": 4, "total_tokens": 21, "reasoning_tokens": 0}
    event = b"data: " + orjson.dumps({"id": "y", "choices": [], "usage": usage}) + b"\n\n"
    told = orjson.loads(Translation(CHAT, so_far, followed(so_far)).take(event).removeprefix(b"data: "))["usage"]
    assert (told["prompt_tokens"], told["completion_tokens"], told["reasoning_tokens"]) == (10, 11, 5)


def test_tags() -> None:
    assert tags_of("qwen3") == tags_of("deepseek-r1")
    assert tags_of(None) is tags_of("gpt-oss") is tags_of("auto") is None


@pytest.mark.parametrize(
    ("prompt", "tag", "opened"),
    [([1, 2, 9], [9], True), ([1, 9, 2], [9], True), ([9, 1, 2, 3], [9], False), ([1, 9], [9, 8], None)],
)
def test_opened_by_the_template(prompt: list[int], tag: list[int], opened: bool | None) -> None:
    assert is_opened(prompt, tag) is opened
