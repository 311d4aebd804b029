"""Records how a real SGLang answers, for comparison with the lab in tests/lab/test_shapes.py.

    python -m tests.lab.record http://127.0.0.1:8000 > tests/lab/recorded.json

The server needs --enable-metrics --enable-cache-report, and for the queue's refusals --max-running-requests 1
--max-queued-requests 1. Anything that names a machine is left out: in most places only the type of a string is kept.
"""

import asyncio
import json
import sys
from typing import Any

import httpx

CHAT = {"model": "any", "messages": [{"role": "user", "content": "Count to nine."}], "max_tokens": 3, "temperature": 0}
TEXT = {"model": "any", "prompt": "One, two, three", "max_tokens": 3, "temperature": 0}
GENERATE = {"text": "One, two, three", "sampling_params": {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True}}
STREAM = {"stream": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}

# Name, method, path, body.
REQUESTS: list[tuple[str, str, str, dict[str, Any] | None]] = [
    ("chat", "POST", "/v1/chat/completions", CHAT),
    ("chat stream", "POST", "/v1/chat/completions", CHAT | STREAM),
    ("chat stream with usage", "POST", "/v1/chat/completions", CHAT | USAGE),
    ("completion", "POST", "/v1/completions", TEXT),
    ("completion stream with usage", "POST", "/v1/completions", TEXT | USAGE),
    ("generate", "POST", "/generate", GENERATE),
    ("generate stream", "POST", "/generate", GENERATE | STREAM),
    ("messages", "POST", "/v1/messages", CHAT),
    ("messages stream", "POST", "/v1/messages", CHAT | STREAM),
    ("chat without messages", "POST", "/v1/chat/completions", {"model": "any", "messages": []}),
    ("ready", "GET", "/ready", None),
    ("health", "GET", "/health", None),
    ("health_generate", "GET", "/health_generate", None),
    ("models", "GET", "/v1/models", None),
    ("model_info", "GET", "/model_info", None),
    ("server_info", "GET", "/server_info", None),
    ("loads", "GET", "/v1/loads?include=core", None),
    ("metrics", "GET", "/metrics", None),
]
LONG = 120  # tokens of the requests that occupy the one running and the one queued place
ABORTED_AFTER = 3.0  # seconds: a real SGLang takes two
REFUSED = [("refused chat", CHAT), ("refused chat stream with usage", CHAT | USAGE)]


def shape(value: Any) -> Any:
    """A JSON value with its scalars replaced by the names of their types; null stays."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return None if value is None else type(value).__name__


def answer_shape(answer: httpx.Response) -> dict[str, Any]:
    """Status, header names and the body's shape: of JSON, of each SSE event, or of each metric."""
    kind = answer.headers.get("content-type", "")
    body: Any = len(answer.content)
    if kind.startswith("application/json"):
        body = shape(answer.json())
    elif kind.startswith("text/event-stream"):
        body = [_event(event) for event in answer.text.strip().split("\n\n")]
    elif kind.startswith("text/plain"):
        body = sorted({_metric(line) for line in answer.text.splitlines() if line and line[0] != "#"})
    return {"status": answer.status_code, "content-type": kind, "headers": sorted(answer.headers), "body": body}


def _event(event: str) -> Any:
    """The name of an SSE event, where it has one, and the shape of its data."""
    name, _, data = event.rpartition("data: ")
    said = data if data == "[DONE]" else shape(json.loads(data))
    return [name.strip(), said] if name else said


def _metric(line: str) -> str:
    """A metric's name and the names of its labels."""
    name, _, labels = line.rpartition(" ")[0].partition("{")
    return f"{name}{{{','.join(label.partition('=')[0] for label in labels.rstrip('}').split(',') if label)}}}"


async def ask(client: httpx.AsyncClient, patience: float) -> dict[str, Any]:
    """The shapes of all answers, by name.

    The first client leaves early, so that the metrics count an abort; `patience` is how long that may take, in seconds.
    """
    shapes: dict[str, Any] = {}
    leaver = CHAT | STREAM | {"max_tokens": LONG, "ignore_eos": True}
    async with client.stream("POST", "/v1/chat/completions", json=leaver) as answer:
        await anext(answer.aiter_raw())
    await asyncio.sleep(patience)
    for name, method, path, body in REQUESTS:
        shapes[name] = answer_shape(await client.request(method, path, json=body))
    return shapes | await _refusals(client)


async def _refusals(client: httpx.AsyncClient) -> dict[str, Any]:
    long = CHAT | {"max_tokens": LONG, "ignore_eos": True}
    takers = []
    for _ in range(2):
        takers.append(asyncio.create_task(client.post("/v1/chat/completions", json=long)))
        await asyncio.sleep(1.0)
    shapes = {name: answer_shape(await client.post("/v1/chat/completions", json=body)) for name, body in REFUSED}
    for taker in takers:
        taker.cancel()
    await asyncio.gather(*takers, return_exceptions=True)
    return shapes


async def main() -> None:
    async with httpx.AsyncClient(base_url=sys.argv[1], timeout=120.0) as client:
        shapes = await ask(client, ABORTED_AFTER)
    print("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(shapes[name])}" for name in shapes) + "\n}")


if __name__ == "__main__":
    asyncio.run(main())
