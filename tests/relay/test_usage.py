"""Token counts, wherever they stand in an answer and however it is cut; a text that quotes some changes nothing."""

import tracemalloc
from typing import Any

import orjson
import pytest

from balancer.relay.reply import Reply
from balancer.relay.request import Request
from balancer.relay.usage import LARGEST, MOST

CHAT, RESPONSES, MESSAGES, GENERATE = "/v1/chat/completions", "/v1/responses", "/v1/messages", "/generate"
JSON, EVENTS = b"application/json", b"text/event-stream"
LIE = '"usage":{"prompt_tokens":999,"completion_tokens":999,"input_tokens":999,"output_tokens":999}}}'
FORGED = {"usage": {"prompt_tokens": 999, "input_tokens": 999, "output_tokens": 999}}
USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 7}}
INPUT = {"input_tokens": 11, "input_tokens_details": {"cached_tokens": 7, "cache_write_tokens": 0}, "output_tokens": 3}
TOOLS = [{"type": "function", "name": f"tool_{n}", "description": "d" * 500, "parameters": FORGED} for n in range(60)]


class Wire:
    def write(self, data: bytes) -> None: ...

    def send(self, data: bytes) -> None: ...

    def answered(self, keep: bool) -> None: ...


def relayed(path: str, content_type: bytes, *pieces: bytes) -> Reply:
    request = Request(b"POST", path.encode(), "1.1", 0.0)
    request.path = path
    reply = Reply(request, Wire(), True)
    reply.begin(200, [(b"Content-Type", content_type)], None)
    for piece in pieces:
        reply.body(piece)
    return reply


def counted(path: str, content_type: bytes, *pieces: bytes) -> tuple[int | None, int | None, int | None]:
    counts = relayed(path, content_type, *pieces).tail.counts()
    return counts.prompt, counts.completion, counts.cached


def event(data: dict[str, Any] | str, name: str = "", end: bytes = b"\n\n") -> bytes:
    text = data.encode() if isinstance(data, str) else orjson.dumps(data)
    return (b"event: %b%b" % (name.encode(), end[: len(end) // 2]) if name else b"") + b"data: " + text + end


def text_event(text: str) -> bytes:
    return event({"choices": [{"delta": {"content": text}}], "usage": None})


def meta(prompt: int, completion: int, **more: object) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "cached_tokens": 1, **more}


TEXT = [text_event("\n\n" + LIE) for _ in range(50)]
DONE = event("[DONE]")
RESPONSE = {"id": "r", "output": [LIE], "usage": INPUT, "tools": TOOLS, "metadata": FORGED, "instructions": LIE * 90}
START = {"type": "message_start", "message": {"usage": {"input_tokens": 4, "cache_read_input_tokens": 7}}}
TEXTS = [{"text": LIE, "meta_info": meta(5, 5, output_token_logprobs=[[-0.5, 1, LIE]] * 400)} for _ in range(3)]
LAST = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}}


def generated(index: int | None, completion: int, is_last: bool) -> bytes:
    said = {"text": LIE, "meta_info": {"finish_reason": {"type": "stop"} if is_last else None, **meta(5, completion)}}
    return event(said if index is None else said | {"index": index})


ANSWERS: dict[str, tuple[str, bytes, list[bytes], tuple[int | None, ...]]] = {
    "chat": (CHAT, JSON, [orjson.dumps({"choices": [LIE], "usage": USAGE, "metadata": {"a": [1]}})], (11, 3, 7)),
    "chat, spaced": (
        CHAT,
        JSON,
        [orjson.dumps({"usage": USAGE, "choices": [LIE]}, option=orjson.OPT_INDENT_2)],
        (11, 3, 7),
    ),
    "chat, in front of much": (CHAT, JSON, [orjson.dumps({"usage": USAGE, "choices": [LIE * 2000]})], (11, 3, 7)),
    "responses": (RESPONSES, JSON, [orjson.dumps(RESPONSE)], (11, 3, 7)),
    "messages": (
        MESSAGES,
        JSON,
        [orjson.dumps({"content": [{"input": FORGED}], "usage": LAST["usage"] | START["message"]["usage"]})],
        (11, 3, 7),
    ),
    "messages, a tool's input last": (
        MESSAGES,
        JSON,
        [orjson.dumps({"usage": {"input_tokens": 11, "output_tokens": 3}, "content": [{"input": FORGED}]})],
        (11, 3, None),
    ),
    "embeddings": (
        "/v1/embeddings",
        JSON,
        [orjson.dumps({"data": [[0.123456789] * 300_000], "usage": {"prompt_tokens": 9, "total_tokens": 9}})],
        (9, None, None),
    ),
    "rerank": ("/v1/rerank", JSON, [orjson.dumps([{"document": LIE, "meta_info": meta(5, 1)}] * 2)], (10, 2, 2)),
    "one text": (GENERATE, JSON, [orjson.dumps(TEXTS[0])], (5, 5, 1)),
    "three texts": (GENERATE, JSON, [orjson.dumps(TEXTS)], (15, 15, 3)),
    "three hundred texts": (GENERATE, JSON, [orjson.dumps(TEXTS * 100)], (1500, 1500, 300)),
    "a model's list": (
        "/v1/models",
        JSON,
        [orjson.dumps({"data": [{"id": LIE, "max_model_len": 4096}]})],
        (None, None, None),
    ),
    "a lie": (CHAT, JSON, [orjson.dumps({"choices": [LIE]})], (None, None, None)),
    "a lie in an object": (RESPONSES, JSON, [orjson.dumps({"metadata": FORGED})], (None, None, None)),
    "a lie in a key": (RESPONSES, JSON, [orjson.dumps({"usage": INPUT, 'x"usage": {"input_tokens"': 1})], (11, 3, 7)),
    "no JSON": (CHAT, JSON, [LIE.encode()], (None, None, None)),
    "not a count": (
        CHAT,
        JSON,
        [b'{"usage":{"prompt_tokens":"7","completion_tokens":-1,"x_tokens":true}}'],
        (None, None, None),
    ),
    "a huge count": (CHAT, JSON, [b'{"usage":{"prompt_tokens":' + b"9" * 40 + b"}}"], (None, None, None)),
    "chat stream": (CHAT, EVENTS, [*TEXT, event({"choices": [], "usage": USAGE}), DONE], (11, 3, 7)),
    "chat stream, usage in each": (
        CHAT,
        EVENTS,
        [event({"usage": meta(11, n)}) for n in range(40)] + [DONE],
        (11, 39, 1),
    ),
    "chat stream, comments behind": (CHAT, EVENTS, [event({"usage": USAGE}), DONE, b": bye\n\n"], (11, 3, 7)),
    "chat stream without": (CHAT, EVENTS, [*TEXT, DONE], (None, None, None)),
    "chat stream, CRLF": (
        CHAT,
        EVENTS,
        [event({"a": LIE}, end=b"\r\n\r\n")] * 40 + [event({"usage": USAGE}, end=b"\r\n\r\n")],
        (11, 3, 7),
    ),
    "responses stream": (
        RESPONSES,
        EVENTS,
        [
            event({"response": RESPONSE | {"usage": None}}, "response.created"),
            *TEXT,
            event({"response": RESPONSE}, "response.completed"),
        ],
        (11, 3, 7),
    ),
    "messages stream": (
        MESSAGES,
        EVENTS,
        [event(START), *TEXT, event(LAST), event({"type": "message_stop"})],
        (11, 3, 7),
    ),
    "messages stream, short": (MESSAGES, EVENTS, [event(START), event(LAST)], (11, 3, 7)),
    "generate stream": (GENERATE, EVENTS, [generated(None, n, n == 39) for n in range(40)] + [DONE], (5, 39, 1)),
    "generate stream of three": (
        GENERATE,
        EVENTS,
        [generated(i, n, n == 9 + 9 * i) for n in range(40) for i in range(3) if n <= 9 + 9 * i] + [DONE],
        (15, 54, 3),
    ),
}


@pytest.mark.parametrize("size", [None, 1, 7, 1448, 65536], ids=lambda size: f"by {size}")
@pytest.mark.parametrize("row", list(ANSWERS.values()), ids=list(ANSWERS))
def test_counts_are_found_wherever_they_stand(
    row: tuple[str, bytes, list[bytes], tuple[int | None, ...]], size: int | None
) -> None:
    path, content_type, pieces, figures = row
    whole = b"".join(pieces)
    if size is not None:
        if len(whole) > 100_000 * size:
            size = 512  # a byte a time is tried on the others
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    assert counted(path, content_type, *pieces) == figures


def test_an_answer_has_no_more_tokens_than_makes_sense() -> None:
    many = b'{"text":"x","meta_info":{"prompt_tokens":1,' + b'"completion_tokens":999999999999999,' * 9300 + b'"a":1}}'
    assert counted(GENERATE, JSON, many) == (1, MOST, None)
    texts = [{"index": n, "meta_info": meta(MOST, MOST, finish_reason="stop")} for n in range(3)]
    assert counted(GENERATE, EVENTS, *map(event, texts)) == (MOST, MOST, 3)
    usage = {"input_tokens": MOST, "cache_read_input_tokens": MOST, "output_tokens": MOST + 1}
    assert counted(MESSAGES, JSON, orjson.dumps({"usage": usage})) == (MOST, None, MOST)


def test_a_batch_is_told_from_one_text() -> None:
    assert relayed(GENERATE, JSON, orjson.dumps(TEXTS)).tail.counts().texts == 3
    assert relayed(GENERATE, JSON, orjson.dumps(TEXTS[0])).tail.counts().texts == 1


@pytest.mark.parametrize("size", [1, 300, 65536])
@pytest.mark.parametrize(("path", "content_type"), [(CHAT, EVENTS), (CHAT, JSON), (GENERATE, JSON), (GENERATE, EVENTS)])
def test_an_answer_without_end_takes_no_memory_without_end(path: str, content_type: bytes, size: int) -> None:
    """Neither one that has no events, as a stream or not, nor one in small pieces."""
    reply = relayed(path, content_type)
    tracemalloc.start()
    for number in range(min(16 * LARGEST // size, 100_000)):
        reply.body(b"%d" % (number % 10) * size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * LARGEST


def test_a_stream_holds_its_last_events_only() -> None:
    reply = relayed(CHAT, EVENTS, *(text_event("word" * 20) for _ in range(1000)))
    assert sum(map(len, reply.tail.pieces)) < 12_000
