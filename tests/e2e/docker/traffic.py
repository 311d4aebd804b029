"""Clients that stream answers and remember how each request ended."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx


@dataclass
class Outcome:
    """One request. Times in seconds on the monotonic clock; `ended` is 0 while it runs."""

    asked: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    status: int = 0
    member: str = ""  # X-Replica-Id
    tokens: int = 0
    finish: str = ""  # the last chunk's finish_reason
    is_done: bool = False  # data: [DONE] came
    error: str = ""

    def is_whole(self, tokens: int | None) -> bool:
        """Did it end well? `tokens`: with exactly that many."""
        ended_well = self.status == 200 and self.is_done and bool(self.finish) and not self.error
        return ended_well and self.tokens == (self.tokens if tokens is None else tokens)


async def ask(client: httpx.AsyncClient, outcome: Outcome, tokens: int) -> Outcome:
    """One streamed chat completion, read to its end."""
    message = {"role": "user", "content": "Name the capital of France."}
    body = {"model": "any", "stream": True, "max_tokens": tokens, "messages": [message]}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            outcome.status = answer.status_code
            outcome.member = answer.headers.get("x-replica-id", "")
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    outcome.is_done = True
                elif line.startswith("data: "):
                    _note(outcome, json.loads(line.removeprefix("data: ")))
                elif line and not line.startswith(":"):  # that would be a comment
                    outcome.error = line
    except httpx.HTTPError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.ended = time.monotonic()
    return outcome


def _note(outcome: Outcome, event: dict[str, list[dict[str, dict[str, str]]]]) -> None:
    if "error" in event:
        outcome.error = str(event["error"])
    for choice in event.get("choices", []):
        outcome.tokens += bool(choice["delta"].get("content"))
        outcome.finish = str(choice.get("finish_reason") or outcome.finish)


@dataclass
class Traffic:
    """What the clients have met so far. `tokens`: what each answer has, or None where only the model knows."""

    tokens: int | None
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def ended(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.ended]

    @property
    def lost(self) -> list[Outcome]:
        """Requests that failed or were cut."""
        return [one for one in self.ended if not one.is_whole(self.tokens)]

    async def more(self, count: int, timeout: float = 60) -> None:
        """Waits until `count` more requests have ended."""
        want = len(self.ended) + count
        async with asyncio.timeout(timeout):
            while len(self.ended) < want:  # noqa: ASYNC110 - the clients count, and tell nobody
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def traffic(
    url: str, clients: int, *, tokens: int, pause: float = 0.0, is_exact: bool = True
) -> AsyncIterator[Traffic]:
    """`clients` ask, each again once it was answered and `pause` seconds after it asked; in the end all finish."""
    seen = Traffic(tokens if is_exact else None)
    stopping = asyncio.Event()

    async def one() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            while not stopping.is_set():
                seen.outcomes.append(outcome := Outcome())
                await ask(client, outcome, tokens)
                # A client that is refused waits a moment: else it would be refused a thousand times meanwhile.
                rest = 0.2 if outcome.error else pause - (outcome.ended - outcome.asked)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), max(rest, 0))

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one())
        try:
            yield seen
        finally:
            stopping.set()
