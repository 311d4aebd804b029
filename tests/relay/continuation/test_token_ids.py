"""Answers whose tokens are not those that the tokenizer makes of their text continue by token ids."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest

from balancer.fleet.outcome import Outcome
from balancer.relay.continuation import token_ids
from balancer.relay.continuation.delivered import CannotContinue
from balancer.relay.continuation.going_on import GoingOn
from balancer.relay.receiver import Receiver
from balancer.relay.request import Request
from tests.relay.continuation.answering import request_for

# The model made "hallowness" of hallow and ness; the tokenizer reads hall and owness. An emoji is two tokens.
WORDS = {1: "go", 2: "hallow", 3: "ness", 4: "hall", 5: "owness", 6: " light"}
HALF, REST = 90, 91
READ = {"hallowness": [4, 5], "🎏": [HALF, REST]} | {word: [id] for id, word in WORDS.items()}
MADE = [2, 3, 6]


def read(text: str) -> list[int]:
    ids = []
    while text:
        word = next(word for word in READ if text.startswith(word))
        ids, text = ids + READ[word], text[len(word) :]
    return ids


def written(ids: list[int]) -> str:
    text = "".join({HALF: "½", REST: "+"}.get(id) or WORDS[id] for id in ids)
    return text.replace("½+", "🎏").replace("½", "\ufffd")


def nothing(_: str, __: dict[str, Any]) -> Any:
    return None


@dataclass
class Other:
    """The replica that continues. `says` may answer in place of it."""

    says: Callable[[str, dict[str, Any]], Any] = nothing
    reasoning_parser: str = ""
    asked: list[str] = field(default_factory=list)

    async def continues(self) -> bool:
        return True

    async def exchange(self, request: Request, receiver: Receiver) -> Outcome:
        asked = orjson.loads(b"".join(request.body))
        self.asked.append(request.path)
        answer = self.says(request.path, asked)
        if answer is None and request.path == "/detokenize":
            answer = {"text": [written(ids) for ids in asked["tokens"]]}
        elif answer is None and "messages" in asked:
            assert not {"max_tokens", "stream"} & asked.keys()
            answer = {"tokens": [7, 7, 7]}
        elif answer is None and isinstance(asked["prompt"], str):
            assert asked.get("add_special_tokens", True), "the prompt begins with them"
            answer = {"tokens": read(asked["prompt"])}
        elif answer is None:
            assert not asked["add_special_tokens"]
            answer = {"tokens": [read(text) for text in asked["prompt"]]}
        receiver.on_head(404 if answer == 404 else 200, [], None)
        receiver.on_body(orjson.dumps(answer), 0.0)
        receiver.on_end(0.0)
        return Outcome.ANSWERED


def event(said: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(said) + b"\n\n"


def told(path: str, *pieces: str, ids: list[int] | None = None) -> list[bytes]:
    """The events that the client has."""
    match path:
        case "/generate":
            meta = {"id": "x", "finish_reason": None, "prompt_tokens": 1, "completion_tokens": len(ids or ())}
            return [event({"text": "".join(pieces), "output_ids": ids, "meta_info": meta})]
        case "/v1/completions":
            choices: list[Any] = [{"index": 0, "text": piece, "finish_reason": None} for piece in pieces]
        case "/v1/messages":
            deltas = [{"type": "content_block_delta", "delta": {"text": piece}} for piece in pieces]
            begun = {"type": "content_block_start", "content_block": {"type": "text"}}
            return [
                event(said) for said in ({"type": "message_start", "message": {"id": "x", "model": "m"}}, begun)
            ] + [event(delta) for delta in deltas]
        case _:
            choices = [{"index": 0, "delta": {"content": piece}, "finish_reason": None} for piece in pieces]
    return [event({"id": "x", "choices": [choice]}) for choice in choices]


def followed(path: str, pieces: list[bytes], other: Other, **more: Any) -> tuple[dict[str, Any], Any]:
    """The body that the other replica gets, and how its answer is translated."""
    body = orjson.dumps(request_for(path, 12) | more)
    request = Request(b"POST", path.encode(), "1.1", 0.0)
    request.path, request.body, request.body_size = path, [body], len(body)
    follow, translation = asyncio.run(GoingOn(request, pieces).follow_up(other, other.exchange))  # type: ignore[arg-type]
    return orjson.loads(b"".join(follow.body)), translation


def left(body: dict[str, Any]) -> int:
    return int(body.get("max_tokens") or body["sampling_params"]["max_new_tokens"])


@pytest.mark.parametrize(
    ("path", "field", "prompt"),
    [
        ("/v1/chat/completions", "input_ids", [7, 7, 7]),
        ("/v1/messages", "input_ids", [7, 7, 7]),
        ("/v1/completions", "prompt", [1]),
        ("/generate", "input_ids", [1]),
    ],
)
def test_by_ids(path: str, field: str, prompt: list[int]) -> None:
    """The other replica gets the prompt's ids and those of what the client has."""
    body, _ = followed(path, told(path, "hallow", "ness", " light", ids=MADE), Other())
    assert body[field] == prompt + MADE
    assert left(body) == 12 - 3
    assert "text" not in body
    assert not body.get("continue_final_message")
    if "messages" in body:
        assert body["messages"][-1]["role"] == "user", "they are as the client sent them"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate", "/v1/messages"])
def test_by_text(path: str) -> None:
    """Where the text is read as what the model made, it is all that the other replica gets, after one question."""
    other = Other()
    body, _ = followed(path, told(path, "hall", "owness", " light", ids=[4, 5, 6]), other)
    assert other.asked == ["/tokenize"]
    assert "input_ids" not in body
    assert (body.get("prompt") or body.get("text") or body["messages"][-1]["content"]).endswith("hallowness light")
    assert left(body) == 12 - 3


@pytest.mark.parametrize(
    ("text", "ids", "kept"),
    [
        ("hall", [4, HALF], [4]),
        ("hallowness", [2, 3, HALF], [2, 3]),
        ("", [HALF], []),
        ("hall🎏", [4, HALF, REST], [4, HALF, REST]),
    ],
    ids=["read so", "read otherwise", "nothing else", "whole"],
)
def test_part_of_a_character(text: str, ids: list[int], kept: list[int]) -> None:
    """A token that is no text yet is made again, so it is not counted, and not in output_ids twice."""
    body, translation = followed("/generate", told("/generate", text, ids=ids), Other())
    assert left(body) == 12 - len(kept)
    assert body.get("input_ids") == ([1, *kept] if text == "hallowness" else None)
    meta = {"id": "y", "finish_reason": None, "prompt_tokens": 9, "completion_tokens": 2}
    said = orjson.loads(translation.take(event({"text": "🎏", "output_ids": [HALF, REST], "meta_info": meta}))[6:])
    assert (said["text"], said["output_ids"]) == (text + "🎏", [*kept, HALF, REST])
    assert said["meta_info"]["completion_tokens"] == len(kept) + 2


def with_spaces(path: str, asked: dict[str, Any]) -> Any:
    """A tokenizer that puts a space before whatever it is given."""
    return {"text": [" hallow ness light"] * len(asked["tokens"])} if path == "/detokenize" else None


def without_detokenize(path: str, _: dict[str, Any]) -> Any:
    return 404 if path == "/detokenize" else None


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.example/x.png"}}]}]


@pytest.mark.parametrize(
    ("says", "more"),
    [(with_spaces, {}), (without_detokenize, {}), (nothing, {"messages": IMAGE})],
    ids=["spaces", "404", "an image"],
)
def test_text_after_all(says: Any, more: dict[str, Any]) -> None:
    """If ids cannot say it, or it is not sure that they are right, the text is what there is."""
    path = "/v1/chat/completions"
    body, _ = followed(path, told(path, "hallow", "ness", " light"), Other(says), **more)
    assert "input_ids" not in body
    assert body["messages"][-1] == {"role": "assistant", "content": "hallowness light"}


def test_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer is not kept busy with thousands of pieces; those that come again are asked for once."""
    path = "/v1/completions"
    pieces = told(path, "hallow", "ness", *["hallow", "ness"] * 50)
    assert followed(path, pieces, Other())[0]["prompt"][:3] == [1, 2, 3]
    monkeypatch.setattr(token_ids, "MOST_PIECES", 1)
    assert followed(path, pieces, Other())[0]["prompt"] == "go" + "hallowness" * 51


@pytest.mark.parametrize("answer", [404, {}, {"tokens": 3}, {"tokens": []}, {"tokens": [1, 2, 3]}])
def test_no_answer(answer: Any) -> None:
    """A replica that does not tell the tokens cannot continue."""
    path = "/v1/completions"
    with pytest.raises(CannotContinue, match="tokenize"):
        followed(path, told(path, "hall", "owness"), Other(lambda _, __: answer))
