"""What travels in the measurements: known to both ends, so that every relayed byte is checked."""

import random
from functools import cache

import orjson

REQUEST_BYTES = 400
ANSWER_BYTES = 600

DONE = b"data: [DONE]\n\n"
CHAT_PATH = "/v1/chat/completions"
# In the field `seed`: the replica sends one event, then nothing more until the client leaves. sglang-router writes the
# body anew and drops what it has no type for, `user` among it; this field passes everywhere.
IDLE_SEED = 7
SLOW_SEED = 5  # likewise: its events come at SLOW_EVENTS a second
SLOW_EVENTS = 10.0


def _chat_body(**fields: object) -> bytes:
    return orjson.dumps({"model": "bench", "messages": [{"role": "user", "content": "Hello"}], **fields})


def small_request() -> bytes:
    """A chat request of REQUEST_BYTES, asking for a plain JSON answer."""
    turns = [
        {"role": "system", "content": "You are a helpful assistant. Answer in one sentence."},
        {"role": "user", "content": ""},
    ]
    padding = REQUEST_BYTES - len(_chat_body(messages=turns, max_tokens=32, temperature=0.0))
    turns[1]["content"] = ("What is the capital of France, and why? " * 10)[:padding]
    return _chat_body(messages=turns, max_tokens=32, temperature=0.0)


def long_requests(kib: int, seed: int, groups: int = 16, count: int = 512) -> list[bytes]:
    """`count` chat requests with prompts of that many KiB, half of each shared by its group."""
    chance = random.Random(seed)
    half = kib << 9
    systems = [chance.randbytes(half // 2).hex() for _ in range(groups)]
    return [
        _chat_body(
            messages=[
                {"role": "system", "content": systems[number % groups]},
                {"role": "user", "content": chance.randbytes(half // 2).hex()},
            ],
            max_tokens=32,
            temperature=0.0,
        )
        for number in range(count)
    ]


def sized_requests(size: int, seed: int) -> list[bytes]:
    """Chat requests of `size` bytes, whose prompts differ in the second half; fewer the larger they are."""
    chance = random.Random(seed)
    room = size - len(_chat_body(messages=[{"role": "user", "content": ""}], max_tokens=32))
    shared = chance.randbytes(room // 4).hex()
    return [
        _chat_body(
            messages=[{"role": "user", "content": (shared + chance.randbytes(room).hex())[:room]}], max_tokens=32
        )
        for _ in range(min(256, max(8, (16 << 20) // size)))
    ]


def stream_request(events: int, seed: int = 1) -> bytes:
    """A chat request answered by `events` server-sent events and [DONE]; `seed` says at which pace."""
    return _chat_body(stream=True, max_tokens=events, temperature=0.0, seed=seed)


@cache
def small_answer() -> bytes:
    """The JSON body of ANSWER_BYTES that answers `small_request`."""
    answer = {
        "id": "6f1c2a9be0f44d6f9f0d4d8e5a7b3c21",
        "object": "chat.completion",
        "created": 1764000000,
        "model": "bench",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": None,
                    "tool_calls": None,
                },
                "logprobs": None,
                "finish_reason": "stop",
                "matched_stop": 2,
            }
        ],
        "usage": {
            "prompt_tokens": 71,
            "total_tokens": 103,
            "completion_tokens": 32,
            "prompt_tokens_details": {"cached_tokens": 64},
            "reasoning_tokens": 0,
        },
        "metadata": {"weight_version": "default"},
    }
    text = "The capital of France is Paris, because kings lived there. " * 10
    answer["choices"][0]["message"]["content"] = text[: ANSWER_BYTES - len(orjson.dumps(answer))]  # type: ignore[index]
    return orjson.dumps(answer)


def event(number: int) -> bytes:
    """The `number`-th event of each stream; all are equally long, so that an offset tells how many came."""
    return (
        b'data: {"id":"6f1c2a9be0f44d6f9f0d4d8e5a7b3c21","object":"chat.completion.chunk",'
        b'"created":1764000000,"model":"bench","choices":[{"index":0,"delta":{"content":" %06d"},'
        b'"logprobs":null,"finish_reason":null}]}\n\n' % number
    )


EVENT_BYTES = len(event(0))  # about what SGLang 0.5.23 sends for each token


@cache
def stream_body(events: int) -> bytes:
    """The whole body of a stream of `events` events, [DONE] included."""
    return b"".join(event(number) for number in range(events)) + DONE
