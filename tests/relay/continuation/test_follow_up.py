"""What another replica is asked for."""

from typing import Any

import orjson
import pytest

from balancer.relay.continuation.delivered import CannotContinue, Delivered
from balancer.relay.continuation.follow_up import ending, follow_up
from tests.relay.continuation.answering import MESSAGES, request_for

CHAT, TEXT, OWN = "/v1/chat/completions", "/v1/completions", "/generate"
SO_FAR = Delivered(text=" t00 t01", has_opened=True, is_block_open=True, blocks=1, names={"id": "x"})


def test_chat() -> None:
    """A chat continues its last message, with what is left of its tokens."""
    request = request_for(CHAT, 8) | {"rid": "mine", "max_completion_tokens": 8}
    wish = orjson.loads(follow_up(CHAT, request, SO_FAR, 2).body)
    assert wish["messages"] == [*MESSAGES, {"role": "assistant", "content": " t00 t01"}]
    assert wish["continue_final_message"] is True
    assert (wish["max_tokens"], wish["max_completion_tokens"]) == (6, 6)
    assert "rid" not in wish


def test_continuing_a_clients_own_prefix() -> None:
    """An answer that began with the client's own text is continued with both texts."""
    begun = [*MESSAGES, {"role": "assistant", "content": "So:"}]
    request = request_for(CHAT, 8) | {"messages": begun, "continue_final_message": True}
    wish = orjson.loads(follow_up(CHAT, request, SO_FAR, 2).body)
    assert wish["messages"] == [*MESSAGES, {"role": "assistant", "content": "So: t00 t01"}]


def test_no_limit() -> None:
    """A chat without a limit stays without one."""
    request = request_for(CHAT, 8)
    del request["max_tokens"]
    assert "max_tokens" not in orjson.loads(follow_up(CHAT, request, SO_FAR, 2).body)


@pytest.mark.parametrize(
    "stray", [None, {}, [], {"max_new_tokens": 2, "stop": "t"}], ids=["null", "empty", "list", "set"]
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_sampling_params_belong_to_generate(path: str, stray: Any) -> None:
    """Elsewhere SGLang reads no `sampling_params`: they neither limit the answer nor keep it from continuing."""
    follow = follow_up(path, request_for(path, 8) | {"sampling_params": stray}, SO_FAR, 2)
    wish = orjson.loads(follow.body)
    assert (wish["max_tokens"], wish["sampling_params"], follow.most, follow.stops) == (6, stray, 8, ())


@pytest.mark.parametrize("limit", ["8", 8.0, True, [8]])
def test_limits_that_are_no_numbers(limit: Any) -> None:
    """A limit that cannot be counted down, the second of two included, is not continued."""
    with pytest.raises(CannotContinue, match="format"):
        follow_up(CHAT, request_for(CHAT, 8) | {"max_completion_tokens": 8, "max_tokens": limit}, SO_FAR, 2)


def test_the_lesser_of_two_limits() -> None:
    """The one that SGLang does not hold to may be used up; it stays a limit that SGLang accepts."""
    request = request_for(CHAT, 2) | {"max_completion_tokens": 8}
    wish = orjson.loads(follow_up(CHAT, request, SO_FAR, 3).body)
    assert (wish["max_completion_tokens"], wish["max_tokens"]) == (5, 1)


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_limits_of_other_paths(path: str) -> None:
    """A limit that SGLang does not read on this path is none."""
    stray = {"max_new_tokens": 1} | ({"max_completion_tokens": 1} if path == TEXT else {})
    follow = follow_up(path, request_for(path, 8) | stray, SO_FAR, 2)
    assert follow.most == 8
    assert orjson.loads(follow.body).items() >= (stray | {"max_tokens": 6}).items()


def test_default_limits() -> None:
    """Where the client says nothing, SGLang's own limits hold."""
    text = {"model": "lab", "prompt": "go", "stream": True}
    assert orjson.loads(follow_up(TEXT, text, SO_FAR, 2).body)["max_tokens"] == 16 - 2
    own = {"text": "go", "stream": True}
    so_far = Delivered(text=" t00 t01", completion_tokens=2)
    wish = orjson.loads(follow_up(OWN, own, so_far, 2).body)
    assert wish == own | {"text": "go t00 t01", "sampling_params": {"max_new_tokens": 128 - 2}}


def test_messages() -> None:
    """A request for /v1/messages is continued as a chat."""
    source = {"type": "base64", "media_type": "image/png", "data": "QUJD"}
    content = [{"type": "text", "text": "What is it?"}, {"type": "image", "source": source}]
    request = request_for("/v1/messages", 8) | {"stop_sequences": ["END"], "temperature": 0, "top_k": 1}
    request["messages"] = [{"role": "user", "content": content}]
    follow = follow_up("/v1/messages", request, SO_FAR, 2)
    assert (follow.path, follow.stops) == (CHAT, ("END",))
    wish = orjson.loads(follow.body)
    assert wish["messages"] == [
        {"role": "system", "content": "Count."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
            ],
        },
        {"role": "assistant", "content": " t00 t01"},
    ]
    assert (wish["temperature"], wish["top_k"], wish["stop"], wish["max_tokens"]) == (0, 1, ["END"], 6)
    assert wish["stream_options"]["include_usage"] is True


def test_answer_with_all_its_tokens() -> None:
    """For an answer that has all its tokens, only the end is asked for."""
    follow = follow_up(TEXT, request_for(TEXT, 2), SO_FAR, 2)
    assert follow.is_muted
    assert orjson.loads(follow.body)["max_tokens"] == 1


def test_ending() -> None:
    """An answer that only lacks its last events gets them here."""
    finished = Delivered(text=" t00", finish="length")
    assert ending(CHAT, request_for(CHAT, 1), finished) is None, "its usage is to be told"
    assert ending(CHAT, {"messages": MESSAGES}, finished) == b"data: [DONE]\n\n"
    assert ending(OWN, request_for(OWN, 1), finished) == b"data: [DONE]\n\n"
    assert ending("/v1/messages", {}, finished) == b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    assert ending(TEXT, request_for(TEXT, 1), Delivered(text=" t00", is_done=True)) == b""
