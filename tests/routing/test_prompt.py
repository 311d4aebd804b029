"""Request bodies to routing blocks: what shares a prefix, and what must not."""

import base64
import json
import random
import subprocess
import sys
import tracemalloc
from typing import Any

import orjson
import pytest

from balancer.routing.body import HEAVY_BODY, MAX_PARSED
from balancer.routing.prompt import BLOCK_BYTES, IMAGE_BLOCKS, LEAST_BYTES, MAX_BLOCKS, Prompt

SYSTEM = "You are the clerk of a lending library. " * 40
IMAGE = base64.b64encode(random.Random(1).randbytes(60_000)).decode()
OTHER_IMAGE = base64.b64encode(random.Random(2).randbytes(60_000)).decode()
SMALL_IMAGE = base64.b64encode(random.Random(3).randbytes(3_000)).decode()


def blocks(path: str = "/v1/chat/completions", **body: Any) -> list[int]:
    return Prompt(path, [orjson.dumps({"model": "m", **body})]).blocks


def shared(one: list[int], other: list[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content) if len(content) > 1 else content[0]}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def data_url(encoded: str) -> str:
    return f"data:image/png;base64,{encoded}"


SYSTEM_MESSAGE = {"role": "system", "content": SYSTEM}
WHOLE_BLOCKS_OF_SYSTEM = len(SYSTEM) // BLOCK_BYTES


def test_questions_share_their_system_prompt() -> None:
    """Two questions with one system prompt share its blocks and no others."""
    one = blocks(messages=[SYSTEM_MESSAGE, user("When do you open? " * 30)])
    other = blocks(messages=[SYSTEM_MESSAGE, user("May I keep this book? " * 30)])
    assert WHOLE_BLOCKS_OF_SYSTEM <= shared(one, other) <= WHOLE_BLOCKS_OF_SYSTEM + 1
    assert len(one) > shared(one, other)


def test_a_conversation_that_grows_keeps_its_blocks() -> None:
    first = [SYSTEM_MESSAGE, user("A question. " * 60)]
    grown = [*first, {"role": "assistant", "content": "An answer. " * 60}, user("And another.")]
    one, other = blocks(messages=first), blocks(messages=grown)
    assert shared(one, other) == len(one) == 4


def test_a_block_depends_on_all_before_it() -> None:
    one = blocks(messages=[user("a" + SYSTEM)])
    other = blocks(messages=[user("b" + SYSTEM)])
    assert set(one).isdisjoint(other)


APART = [
    *({"model": "other"}, {"lora_path": "adapter"}, {"model": "m:adapter"}, {"lora_path": ["adapter", None]}),
    *({"cache_salt": "tenant a"}, {"extra_key": "k"}, {"cache_salt": ["tenant a"]}),
]
ASKED = {
    "/v1/chat/completions": {"messages": [SYSTEM_MESSAGE]},
    "/v1/messages": {"system": SYSTEM, "messages": []},
    "/v1/responses": {"instructions": SYSTEM},
    "/v1/completions": {"prompt": SYSTEM},
    "/v1/embeddings": {"input": SYSTEM},
    "/generate": {"text": SYSTEM},
}


@pytest.mark.parametrize("change", APART)
@pytest.mark.parametrize("path", ASKED)
def test_other_models_share_nothing(path: str, change: dict[str, Any]) -> None:
    """Another model, adapter or cache name shares nothing."""
    plain, changed, again = (blocks(path, **ASKED[path] | more) for more in ({}, change, change))
    assert shared(plain, changed) == 0
    assert changed == again


def test_names_of_the_cache_are_not_taken_for_each_other() -> None:
    names = [
        *({"cache_salt": "a"}, {"extra_key": "a"}, {"lora_path": "a"}, {"extra_key": "a", "cache_salt": "b"}),
        *({"extra_key": "b", "cache_salt": "a"}, {"extra_key": "a|b"}, {"model": "m|a"}, {}),
    ]
    assert len({blocks(messages=[SYSTEM_MESSAGE], **each)[0] for each in names}) == len(names)


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ({"model": "m:adapter"}, {"lora_path": "adapter"}),
        ({"model": "m:adapter", "lora_path": "other"}, {"lora_path": "adapter"}),
        ({"cache_salt": ""}, {"extra_key": None}),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, {}),
        ({"tools": [{"type": "function"}], "tool_choice": "auto"}, {"tools": [{"type": "function"}]}),
    ],
)
def test_what_comes_to_the_same_for_the_replica_is_the_same(one: dict[str, Any], same: dict[str, Any]) -> None:
    assert blocks(messages=[SYSTEM_MESSAGE], **one) == blocks(messages=[SYSTEM_MESSAGE], **same)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_another_tool_set_or_another_chosen_tool_shares_nothing(path: str) -> None:
    tools, other = ([{"type": "function", "function": {"name": name}}] for name in "fg")
    chosen = {"tool_choice": {"type": "function", "function": {"name": "f"}}}
    asked = [{}, {"tools": tools}, {"tools": other}, {"tools": tools} | chosen]
    firsts = {blocks(path, **ASKED[path] | more)[0] for more in asked}
    assert len(firsts) == len(asked)


def test_each_item_of_a_response_counts() -> None:
    """Calls, their results and reasoning have no content as messages do."""
    call = {"type": "function_call", "call_id": "1", "name": "look", "arguments": json.dumps({"at": "page " * 200})}
    output = {"type": "function_call_output", "call_id": "1", "output": "a result, " * 100}
    asked = [
        *([user(SYSTEM), call], [user(SYSTEM), call | {"name": "find"}], [user(SYSTEM), call, output]),
        [user(SYSTEM), call, output | {"output": "another result, " * 100}],
    ]
    found = [blocks("/v1/responses", input=each) for each in asked]
    assert len({tuple(each) for each in found}) == len(asked)
    assert WHOLE_BLOCKS_OF_SYSTEM <= shared(found[0], found[1]) < len(found[0])
    assert shared(found[0], found[2]) >= len(found[0]) - 1
    one, two, none = (blocks("/v1/responses", input=SYSTEM, previous_response_id=id) for id in ("r1", "r2", None))
    assert shared(one, two) == shared(one, none) == 0


@pytest.mark.parametrize("kind", ["image_data", "video_data", "audio_data"])
def test_what_is_shown_or_played_counts_in_sglangs_own_format(kind: str) -> None:
    one, same, other = (blocks("/generate", text=SYSTEM, **{kind: [seen]}) for seen in (IMAGE, IMAGE, OTHER_IMAGE))
    assert one == same
    assert shared(one, other) == 0


def test_no_two_processes_make_the_same_hashes() -> None:
    """So nobody can find out prompts that look alike here."""
    program = (
        "from balancer.routing.prompt import Prompt\n"
        "body = b'{\"prompt\":[' + b','.join([b'1'] * 500) + b']}'\n"
        'image = b\'{"image_data":"http://a/b.png"}\'\n'
        "print(Prompt('/v1/completions', [body]).blocks, Prompt('/generate', [image]).blocks)\n"
    )
    said = [subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout for _ in range(2)]
    assert said[0].startswith(b"[")
    assert said[0] != said[1]


@pytest.mark.parametrize("encoded", [IMAGE, SMALL_IMAGE], ids=["hashed where it stands", "parsed"])
@pytest.mark.parametrize("form", [data_url, str], ids=["data URL", "bare base64"])
def test_same_image_at_the_same_place(encoded: str, form: Any) -> None:
    """The same image at the same place matches, whatever is asked about it."""
    one = blocks(messages=[user(image(form(encoded)), text("What colour is it? " * 20))])
    other = blocks(messages=[user(image(form(encoded)), text("Describe it. " * 20))])
    assert shared(one, other) >= IMAGE_BLOCKS


@pytest.mark.parametrize("encoded", [IMAGE, SMALL_IMAGE], ids=["hashed where it stands", "parsed"])
@pytest.mark.parametrize(
    ("path", "key", "part"),
    [
        ("/v1/responses", "input", lambda encoded: {"type": "input_image", "image_url": data_url(encoded)}),
        ("/v1/chat/completions", "messages", lambda encoded: image(data_url(encoded))),
        ("/v1/messages", "messages", lambda encoded: {"type": "image", "source": {"type": "base64", "data": encoded}}),
    ],
    ids=["responses", "chat", "messages"],
)
def test_an_image_counts_in_the_format_of_each_path(path: str, key: str, part: Any, encoded: str) -> None:
    one, same, other = (
        blocks(path, **{key: [user(part(shown), text(asked))]})
        for shown, asked in ((encoded, "Who?"), (encoded, "Where?"), (OTHER_IMAGE, "Who?"))
    )
    assert len(one) == shared(one, same) == IMAGE_BLOCKS
    assert shared(one, other) == 0


def test_an_image_has_one_digest_in_small_and_in_large_requests() -> None:
    small = blocks(messages=[user(image(data_url(SMALL_IMAGE)))])
    large = blocks(messages=[user(image(data_url(SMALL_IMAGE)), image(data_url(IMAGE)), text("Compare."))])
    assert shared(small, large) == len(small)


def test_another_image_shares_only_what_stands_before_it() -> None:
    question = "Describe this image. " * 40
    one = blocks(messages=[user(text(question), image(data_url(IMAGE)))])
    other = blocks(messages=[user(text(question), image(data_url(OTHER_IMAGE)))])
    # An incomplete block before an image counts too, if it is not a mere word or two.
    assert shared(one, other) == len(one) - IMAGE_BLOCKS


def test_the_same_images_in_another_order_do_not_match() -> None:
    one = blocks(messages=[user(image("http://a/1.png"), image("http://a/2.png"))])
    other = blocks(messages=[user(image("http://a/2.png"), image("http://a/1.png"))])
    assert shared(one, other) == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": SYSTEM}),
        ("/v1/completions", {"prompt": [SYSTEM, "another"]}),
        ("/v1/completions", {"prompt": list(range(500))}),
        ("/v1/completions", {"prompt": [list(range(500))]}),
        ("/generate", {"text": SYSTEM}),
        ("/generate", {"input_ids": list(range(500))}),
        ("/generate", {"text": "What is it?", "image_data": IMAGE}),
        ("/generate", {"text": "What is it?", "image_data": [data_url(IMAGE)]}),
        ("/v1/embeddings", {"input": SYSTEM}),
        ("/v1/messages", {"system": SYSTEM, "messages": [user("Hello.")]}),
        ("/v1/responses", {"instructions": SYSTEM, "input": "Hello."}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": SYSTEM}]}]}),
    ],
)
def test_each_path_is_read_in_its_own_format(path: str, body: dict[str, Any]) -> None:
    assert len(blocks(path, **body)) >= IMAGE_BLOCKS or len(blocks(path, **body)) >= WHOLE_BLOCKS_OF_SYSTEM
    assert blocks(path, **body) == blocks(path, **body)


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"null", b"[]", b"7", b"{", b'{"messages": 7}', b'{"messages": [7, null, {}]}', b'{"messages": "text"}'),
        *(b'{"messages":[{"role":"user","content":[7,{"image_url":{"url":7}},{"text":null}]}]}', b"\xff\xfe"),
        *(b'{"a":"data:image/png;base64,' + b"A" * 40_000, b'{"messages":[{"content":"\\ud800"}]}'),
    ],
)
def test_what_is_no_prompt_is_routed_by_load(raw: bytes) -> None:
    assert Prompt("/v1/chat/completions", [raw]).blocks == []


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":%b}' % nested(1000),
        b'{"messages":[{"role":%b}]}' % nested(1000),
        b'{"messages":[{"content":[{"type":%b}]}]}' % nested(300),
        b'{"messages":[],"tools":%b}' % nested(300),
        b'{"prompt":%b,"text":%b,"input":%b}' % (nested(1000), nested(1000), nested(1000)),
        b'{"image_data":%b}' % nested(1000),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/generate"])
def test_what_is_nested_absurdly_is_routed_by_load(path: str, raw: bytes) -> None:
    assert Prompt(path, [raw]).blocks == []


@pytest.mark.parametrize("piece", [b"{}", b'{"content":"a"}', b'{"content":[{"image_url":{"url":"a"}}]}', b"[]", b'""'])
def test_what_would_stop_all_else_to_be_parsed_is_routed_by_load(piece: bytes) -> None:
    count = MAX_PARSED // len(piece + b",")
    raw = b'{"messages":[%b{}]}' % ((piece + b",") * (count + 1))
    tracemalloc.start()
    try:
        assert Prompt("/v1/chat/completions", [raw]).blocks == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 10


def test_body_large_by_its_images() -> None:
    """A body that is large only because of its images is parsed."""
    large = data_url("iVBORw0K" * (MAX_PARSED // 4))
    assert len(blocks(messages=[user(image(large), text(SYSTEM))])) >= IMAGE_BLOCKS + WHOLE_BLOCKS_OF_SYSTEM
    assert len(blocks(messages=[user(image(large), text("a word " * (MAX_PARSED // 8)))])) == MAX_BLOCKS


def test_a_path_without_prompts_is_not_even_parsed() -> None:
    assert Prompt("/v1/models", [b"{"]).blocks == []


def test_a_body_in_pieces_is_read_as_one_and_stays_as_it_is() -> None:
    raw = orjson.dumps({"model": "m", "messages": [SYSTEM_MESSAGE]})
    pieces = [raw[:100], raw[100:300], raw[300:]]
    body = pieces.copy()
    assert Prompt("/v1/chat/completions", body).blocks == blocks(messages=[SYSTEM_MESSAGE])
    assert list(map(id, body)) == list(map(id, pieces))


def test_a_huge_prompt_makes_a_bounded_number_of_blocks() -> None:
    assert len(blocks(messages=[user("word " * 400_000)])) == MAX_BLOCKS


def test_images_are_not_copied() -> None:
    """An image's bytes are read in place and not copied."""
    messages = [user(image(data_url("iVBORw0K" * (2 << 20))), text("What is it?"))]  # 16 MiB
    prompt = Prompt("/v1/chat/completions", [orjson.dumps({"model": "m", "messages": messages})])
    tracemalloc.start()
    try:
        assert len(prompt.blocks) >= IMAGE_BLOCKS
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 10


CHINESE = "图书馆的管理员请回答读者的问题。" * 300


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
def test_a_long_text_in_escapes_is_no_image(path: str) -> None:
    """As Python's json.dumps writes it unless told otherwise."""

    def cut(ending: str) -> list[int]:
        said = CHINESE + ending
        body = {"messages": [user(said)], "prompt": said, "text": said}
        raw = json.dumps(body).encode()
        assert len(raw) > HEAVY_BODY
        return Prompt(path, [raw]).blocks

    one, other = cut("开馆时间?" * 40), cut("谁写的?" * 40)
    assert len(CHINESE.encode()) // BLOCK_BYTES <= shared(one, other) + 1 <= len(one)


def test_long_text_without_a_space() -> None:
    """A long text without a space counts as an image, and matches only an equal one."""
    random_text = random.Random(4).randbytes(20_000).hex()
    one, other = (blocks(messages=[user(random_text), user(SYSTEM + ending)]) for ending in ("a" * 300, "b" * 300))
    assert shared(one, other) >= IMAGE_BLOCKS + WHOLE_BLOCKS_OF_SYSTEM - 1
    assert len(blocks(prompt=random_text, path="/v1/completions")) == IMAGE_BLOCKS


def test_an_image_with_escaped_slashes_is_an_image() -> None:
    """As PHP writes it."""
    slashed = json.dumps({"messages": [user(image(data_url(IMAGE)), text("a"))]}).replace("/", "\\/").encode()
    plain = slashed.replace(b"\\/", b"/")
    assert len(Prompt("/v1/chat/completions", [slashed]).blocks) == IMAGE_BLOCKS
    assert len(Prompt("/v1/chat/completions", [plain]).blocks) == IMAGE_BLOCKS


def test_prompt_shorter_than_a_block() -> None:
    """A prompt shorter than a block is one block, and a greeting is none."""
    short = "Answer in one word. " * 10
    assert LEAST_BYTES < len(short) < BLOCK_BYTES
    assert len(blocks(messages=[user(short)])) == 1
    assert blocks(messages=[user(short)]) != blocks(messages=[user(short + "!")])
    assert blocks(messages=[user("Hello!")]) == []
