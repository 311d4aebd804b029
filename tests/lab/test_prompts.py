from typing import Any

import orjson
import pytest

from tests.lab.asked import Asked, Kind
from tests.lab.knobs import Knobs
from tests.lab.prompts import image_tokens, prompt_tokens, text_tokens
from tests.lab.radix import TOKEN


def prompt(kind: Kind, body: dict[str, Any]) -> bytes:
    return prompt_tokens(Asked.read(kind, orjson.dumps(body), Knobs()), tokens_per_image=16)


@pytest.mark.parametrize(("text", "count"), [("", 0), ("abcd", 1), ("abcde", 2), ("äöüß", 2)])
def test_four_bytes_of_text_are_a_token(text: str, count: int) -> None:
    assert len(text_tokens(text)) == count * TOKEN


def test_token_ids_and_their_batches_are_taken_as_they_are() -> None:
    assert prompt("generate", {"input_ids": [1, 2, 3]}) == bytes([0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3])
    assert prompt("completion", {"prompt": [[1], [2]]}) == prompt("completion", {"prompt": [1, 2]})


def test_images_of_a_generate_request_come_before_its_text() -> None:
    body = {"text": "What is it?", "image_data": "a.png"}
    assert prompt("generate", body) == image_tokens("a.png", 16) + text_tokens("What is it?")


def test_messages_that_begin_alike_give_tokens_that_begin_alike() -> None:
    system = {"role": "system", "content": "You answer in one word, always in English."}
    one = prompt("chat", {"messages": [system, {"role": "user", "content": "Hello"}]})
    two = prompt("chat", {"messages": [system, {"role": "user", "content": "What now"}]})
    shared = len(text_tokens("<|system|>") + text_tokens(system["content"]) + text_tokens("<|end|>"))
    assert one[:shared] == two[:shared]
    assert one != two


def test_tools_are_part_of_the_prompt() -> None:
    messages = {"messages": [{"role": "user", "content": "Hello"}]}
    assert prompt("chat", messages | {"tools": [{"name": "a"}]}) != prompt(
        "chat", messages | {"tools": [{"name": "b"}]}
    )
