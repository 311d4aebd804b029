"""Bodies as they are read: images are taken out of any JSON, and nothing is read that would stop the loop."""

import asyncio
import base64
import json
import random
import string
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.routing.admission import Admission, Waiter
from balancer.routing.body import (
    HEAVY_BODY,
    IMAGE_MARK,
    LEAST_IMAGE,
    MAX_NANOSECONDS,
    MAX_PARSED,
    nanoseconds,
    parsed,
    without_images,
)
from balancer.routing.policies import LeastLoad
from balancer.routing.prefix_aware import PrefixAware
from balancer.routing.prompt import MAX_BLOCKS, Prompt
from tests.support.fleets import fleet_of
from tests.wire.running import on_uvloop

CHAT = "/v1/chat/completions"
PNG = base64.b64encode(random.Random(1).randbytes(9_000)).decode()

base64_letters = st.builds(
    lambda size, seed, end: base64.b64encode(random.Random(seed).randbytes(size)).decode() + end,
    st.integers(0, 2_400),
    st.integers(0, 3),
    st.sampled_from(["", "", "\\", "\\\\", '"', "\n", " tail", '" tail', "/", "é"]),
)
texts = st.one_of(
    st.text(max_size=40),
    st.text(alphabet='\\"/,:{}[] abc', max_size=40),
    base64_letters,
    base64_letters.map("data:image/png;base64,{}".format),
    base64_letters.map("data:image/svg+xml;name=a\\b,{}".format),
)


def in_a_string(value: Any) -> str:
    return orjson.dumps(value).decode()


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(texts, inner, max_size=3),
        inner.map(in_a_string),
        inner.map(lambda value: in_a_string(in_a_string(value))),
        inner.map(lambda value: "log: " + json.dumps(value)),
    ),
    max_leaves=12,
)
writers: list[Callable[[Any], str]] = [
    lambda value: orjson.dumps(value).decode(),
    json.dumps,
    lambda value: json.dumps(value, ensure_ascii=False, indent=1),
    lambda value: json.dumps(value).replace("/", "\\/"),  # as PHP does
]


def written(value: Any) -> Any:
    """`value` as `parsed` should give it back: each string that is an image is its mark."""
    if isinstance(value, str):
        return IMAGE_MARK if is_image(value) else value
    if isinstance(value, list):
        return [written(item) for item in value]
    if isinstance(value, dict):
        return {written(key): written(item) for key, item in value.items()}
    return value


def is_image(value: str) -> bool:
    """Said a second time, of the string and not of the bytes."""
    head, comma, data = value.partition(",") if value.startswith("data:") else ("", "", value)
    letters = set(string.ascii_letters + string.digits + "+/=_-")
    is_long = len(data) >= LEAST_IMAGE and set(data[:LEAST_IMAGE]) <= letters
    return is_long and not set(value) & set(' "\\\n') and "é" not in value and (bool(comma) or not head)


def without_digests(value: Any) -> Any:
    if isinstance(value, str):
        return IMAGE_MARK if value.startswith(IMAGE_MARK) else value
    if isinstance(value, list):
        return [without_digests(item) for item in value]
    if isinstance(value, dict):
        return {without_digests(key): without_digests(item) for key, item in value.items()}
    return value


@settings(max_examples=400, deadline=None)
@given(values, st.sampled_from(writers), st.integers(0, 600))
def test_rest_of_any_json(value: Any, write: Callable[[Any], str], space: int) -> None:
    """What is left of any JSON is the same JSON without its images."""
    raw = (" " * space + write(value)).encode("utf-8", "surrogatepass")
    try:
        before = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return  # half of a pair of surrogates
    left = without_images(raw)
    assert left is not None
    if write is writers[3] or "é" in write(value) or "\\u00e9" in write(value):
        return  # slashes and é make a string longer or shorter: what is at the edge is an image in one form only
    assert without_digests(orjson.loads(left)) == written(before)


@settings(max_examples=300, deadline=None)
@given(st.lists(values, max_size=3), st.lists(values, max_size=3), values, st.sampled_from(writers))
def test_a_string_is_an_image_or_none_wherever_it_stands(
    before: list[Any], after: list[Any], value: Any, write: Callable[[Any], str]
) -> None:
    alone = parsed(write([value]).encode())
    among = parsed(write([*before, value, *after]).encode())
    if among is not None and alone is not None:
        assert among[len(before)] == alone[0]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='"\\/,: ', max_size=12), st.sampled_from([PNG, PNG[:LEAST_IMAGE], "ab" * 3_000]), st.data())
def test_images_that_differ_in_a_letter_differ(lead: str, encoded: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(encoded) - 1))
    other = encoded[:place] + ("B" if encoded[place] == "A" else "A") + encoded[place + 1 :]
    asked = [{"messages": [message(lead + each), message("What is it? " * 60)]} for each in (encoded, encoded, other)]
    one, same, different = (Prompt(CHAT, [orjson.dumps(each)]).blocks for each in asked)
    assert one == same != different


def message(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


@pytest.mark.parametrize(
    "holder",
    [
        {"role": "tool", "content": json.dumps({"png": PNG})},
        {"role": "tool", "content": json.dumps({"result": json.dumps({"png": PNG})})},
        {"role": "tool", "content": json.dumps([f"data:image/png;base64,{PNG}"]).replace("/", "\\/")},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": json.dumps({"file": PNG})}}]},
        {"role": "tool", "content": f'sha: "{"0123456789abcdef" * 100}" ok'},
        {"role": "tool", "content": PNG + '\n"what follows it": 1'},
        {"role": "tool", "content": [{"type": "text", "text": json.dumps({"png": PNG})}]},
        {"role": "tool", "content": PNG},
    ],
)
def test_a_conversation_with_base64_in_it_stays_at_its_member(holder: dict[str, Any]) -> None:
    """Twelve turns of an agent on four members, others' requests in between; small at first, then large."""
    admission = Admission(fleet_of(4, capacity_tokens=400_000), PrefixAware())
    messages = [message("Look at the screen. " * 100), holder]
    homes = []
    for turn in range(12):
        body = [orjson.dumps({"model": "m", "stream": True, "messages": messages})]
        homes.append(asked(admission, body))
        other = {"model": "m", "messages": [message(f"Another question, the {turn}th of its kind. " * 40)]}
        asked(admission, [orjson.dumps(other)])
        messages += [message(f"Step {turn} was done. " * 60), holder | {"turn": turn}]
    assert homes == [homes[0]] * 12


def asked(admission: Admission, body: list[bytes]) -> str:
    prompt = Prompt(CHAT, body)
    claim = admission.claim_now(Waiter(prompt, True))
    assert claim is not None
    with claim as member:
        claim.begun()
        assert prompt.blocks
    return member.name


def filled(unit: bytes, head: bytes = b'{"messages":[', tail: bytes = b"1]}", size: int = MAX_PARSED) -> bytes:
    return head + (unit + b",") * ((size - len(head) - len(tail)) // (len(unit) + 1)) + tail


DEAR = [
    *(b"[]", b"{}", b'{"a":1}', b'{"content":"a"}', b'"ab"', b'""', b"[ ]", b"1.5", b"{ }", b'{"tool_calls":[1]}'),
    *(b"[" * 100 + b"]" * 100, b'{"a":' * 50 + b"1" + b"}" * 50, b'"\\\\"', b"null", b'{"image_url":"a"}', b"{\n}"),
]


@pytest.mark.parametrize("unit", DEAR)
@pytest.mark.parametrize("head", [b'{"messages":[', b'{"tools":[', b'{"messages":[{"role":"user","content":[', b"["])
def test_what_is_dear_to_read_is_not_read(unit: bytes, head: bytes) -> None:
    tail = b"1]}]}" if b"content" in head else b"1]" if head == b"[" else b"1]}"
    raw = filled(unit, head, tail)
    assert nanoseconds(raw) > MAX_NANOSECONDS
    tracemalloc.start()
    try:
        assert Prompt(CHAT, [raw]).blocks == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 10, "else it was parsed"


@pytest.mark.parametrize("unit", [*DEAR, b"12345", b"1.234567e5", b'"a longer one"'])
def test_what_is_read_takes_about_as_long_as_was_said_before(unit: bytes) -> None:
    size = MAX_PARSED
    while nanoseconds(raw := filled(unit, size=size)) > MAX_NANOSECONDS:
        size = size * 9 // 10
    assert best_of(3, lambda: Prompt(CHAT, [raw]).blocks) < 6 * MAX_NANOSECONDS / 1e9  # machines differ, and are busy


def best_of(times: int, call: Callable[[], object]) -> float:
    """Seconds of CPU time."""
    found = []
    for _ in range(times):
        began = time.thread_time()
        call()
        found.append(time.thread_time() - began)
    return min(found)


PROSE = "The quick brown fox, which had been seen before, jumps over the lazy dog. "
TOOLS = [
    {"type": "function", "function": {"name": f"f{n}", "parameters": {"type": "object", "properties": {"a": {}}}}}
    for n in range(100)
]
LOG = json.dumps([{"name": f"file {n}", "size": n, "tags": ["a", "b"], "ok": True} for n in range(8_000)])


@pytest.mark.parametrize(
    "messages",
    [
        [message(PROSE * 55_000)],
        [message(PROSE * 30), {"role": "assistant", "tool_calls": [{"function": {"arguments": LOG[:900]}}]}] * 1_000,
        [message(LOG)] * 5,
        [message(json.dumps(LOG))] * 4,
        [message("图书馆的管理员请回答读者的问题。" * 20_000)] * 2,
    ],
    ids=["prose", "calls", "JSON in a string", "JSON in JSON in a string", "Chinese in escapes"],
)
def test_the_longest_prompts_that_there_are_are_routed_by_prefix(messages: list[dict[str, Any]]) -> None:
    raw = json.dumps({"model": "m", "tools": TOOLS, "messages": messages}).encode()
    assert MAX_PARSED / 2 < len(raw) <= MAX_PARSED
    assert len(Prompt(CHAT, [raw]).blocks) == MAX_BLOCKS


def test_a_quarter_of_a_million_token_ids_are_routed_by_prefix() -> None:
    ids = [random.Random(n).randrange(128_000) for n in range(250_000)]
    one, other = (Prompt("/generate", [orjson.dumps({"input_ids": [*ids, last]})]).blocks for last in (1, 2))
    assert one == other
    assert len(one) == MAX_BLOCKS


@on_uvloop
async def test_expensive_bodies_take_turns() -> None:
    """Thirty expensive bodies at once are read one by one, with all other work in between.

    In CPU time of this thread, so that what else this machine does is not counted.
    """
    admission = Admission(fleet_of(4), PrefixAware())
    raw = filled(b'{"content":"a"}', size=700 << 10)
    assert HEAVY_BODY < nanoseconds(raw) <= MAX_NANOSECONDS
    alone = best_of(3, lambda: Prompt(CHAT, [raw]).blocks)
    prompts = [Prompt(CHAT, [raw]) for _ in range(30)]
    gaps: list[float] = []

    async def others() -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            gaps.append(now - last)
            last = now

    ticking = asyncio.create_task(others())
    await asyncio.gather(*(admission.read(prompt) for prompt in prompts))
    ticking.cancel()
    assert all(len(prompt.blocks) == MAX_BLOCKS or prompt.blocks for prompt in prompts)
    assert sum(gaps) > 10 * alone
    assert max(gaps) < 6 * alone


@on_uvloop
async def test_where_the_policy_does_not_go_by_prompts_none_is_read() -> None:
    prompt = Prompt(CHAT, [filled(b'{"content":"a"}', size=700 << 10)])
    assert not Admission(fleet_of(1), LeastLoad()).must_read(prompt)
    admission = Admission(fleet_of(1), PrefixAware())
    assert admission.must_read(prompt)
    await admission.read(prompt)
    assert not admission.must_read(prompt)


@on_uvloop
async def test_who_leaves_before_its_turn_is_not_read() -> None:
    admission = Admission(fleet_of(1), PrefixAware())
    prompts = [Prompt(CHAT, [filled(b'{"content":"a"}', size=64 << 10)]) for _ in range(3)]
    reading = [asyncio.create_task(admission.read(prompt)) for prompt in prompts]
    await asyncio.sleep(0)
    reading[1].cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    assert [prompt.is_heavy for prompt in prompts] == [False, True, False]
