"""Sends a workload through a URL, a few requests at a time, and times the answers."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import orjson

from tests.bench.workload import ANSWER_TOKENS, Messages

ANSWER_LIMIT = 300.0  # seconds; a cold prompt on a busy CPU takes its time


@dataclass
class Run:
    """What came of one workload: seconds in all, seconds to each first token, tokens, what went wrong."""

    seconds: float = 0.0
    ttft: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    errors: list[str] = field(default_factory=list)


async def ask(url: str, model: str, requests: Sequence[Messages], at_once: int) -> Run:
    """Each of `at_once` clients takes the next request when its last answer is whole."""
    run = Run()
    waiting = iter(requests)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_LIMIT) as client:

        async def work() -> None:
            for messages in waiting:
                try:
                    await answer(client, model, messages, run)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    run.errors.append(f"{type(error).__name__}: {error}")

        start = time.monotonic()
        await asyncio.gather(*(work() for _ in range(at_once)))
        run.seconds = time.monotonic() - start
    return run


async def answer(client: httpx.AsyncClient, model: str, messages: Messages, run: Run) -> None:
    """One streamed answer, added to the run. Raises httpx.HTTPError or ValueError when it is not whole."""
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": ANSWER_TOKENS,
        "ignore_eos": True,  # so that each answer is as much work
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.monotonic()
    first = usage = last = None
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            last = line
            if line == "data: [DONE]":
                continue
            event = orjson.loads(line.removeprefix("data: "))
            if first is None and any(choice["delta"].get("content") for choice in event["choices"]):
                first = time.monotonic() - start
            usage = event.get("usage") or usage
    if first is None or usage is None or last != "data: [DONE]":
        raise ValueError(f"the stream ended without text, usage or [DONE]; its last line: {last}")
    if usage["completion_tokens"] != ANSWER_TOKENS:
        raise ValueError(f"{usage['completion_tokens']} tokens came, not {ANSWER_TOKENS}")
    run.ttft.append(first)
    run.prompt_tokens.append(usage["prompt_tokens"])
    run.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
