"""Clients that ask without a pause, and remember how each request ended."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx

TOKENS = 20


@dataclass
class Outcome:
    """One request. Times in seconds on the monotonic clock; `ended` 0 while it runs."""

    asked: float
    ended: float = 0.0
    status: int = 0
    member: str = ""  # X-Replica-Id
    tokens: int = 0
    is_done: bool = False  # data: [DONE] came
    error: str = ""

    def is_whole(self, tokens: int = TOKENS) -> bool:
        return self.status == 200 and self.is_done and self.tokens == tokens and not self.error


@dataclass
class Traffic:
    """What the clients have met so far."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def ended(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.ended]

    @property
    def lost(self) -> list[Outcome]:
        """Requests that failed or were cut."""
        return [one for one in self.ended if not one.is_whole()]

    async def more(self, count: int, timeout: float = 60) -> None:
        """Waits until `count` more requests have ended."""
        want = len(self.ended) + count
        async with asyncio.timeout(timeout):
            while len(self.ended) < want:  # noqa: ASYNC110 - clients count, they tell nobody
                await asyncio.sleep(0.05)


async def ask(client: httpx.AsyncClient, outcome: Outcome, tokens: int = TOKENS) -> None:
    """One streamed chat completion, read to its end."""
    body = {"model": "any", "stream": True, "max_tokens": tokens, "messages": [{"role": "user", "content": "Hello"}]}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            outcome.status = answer.status_code
            outcome.member = answer.headers.get("x-replica-id", "")
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    outcome.is_done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        outcome.error = str(event["error"])
                    elif any(choice["delta"].get("content") for choice in event["choices"]):
                        outcome.tokens += 1
                elif line and answer.status_code != 200:
                    outcome.error = line
    except httpx.HTTPError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.ended = time.monotonic()


@contextlib.asynccontextmanager
async def traffic(url: str, clients: int, *, pause: float = 0.0, tokens: int = TOKENS) -> AsyncIterator[Traffic]:
    """`clients` ask, each again as soon as it was answered, or `pause` seconds after it asked; at the end all finish."""
    seen = Traffic()
    stopping = asyncio.Event()

    async def one() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            while not stopping.is_set():
                outcome = Outcome(time.monotonic())
                seen.outcomes.append(outcome)
                await ask(client, outcome, tokens)
                if outcome.error or pause:
                    # A client that fails without pausing would fail a thousand times in a moment.
                    with contextlib.suppress(TimeoutError):
                        rest = max(pause - (outcome.ended - outcome.asked), 0.2 if outcome.error else 0.0)
                        await asyncio.wait_for(stopping.wait(), rest)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one())
        try:
            yield seen
        finally:
            stopping.set()
