"""Steady load: clients that send one request after the other, streamed or not, and sometimes leave early."""

import asyncio
import json
import random
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.client import Got, Wish, ask
from tests.lab.answers import words

GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/generate")
THINK = (0.01, 0.08)  # seconds between two requests of a client


@dataclass(slots=True)
class Load:
    """`got`: the results so far. While `runs` is unset, clients finish their current request and wait.

    `paths`: what they ask. `others`: the share of requests that generate nothing.
    """

    port: int
    seed: str
    clients: int
    paths: tuple[str, ...] = GENERATING
    others: float = 0.12
    got: list[Got] = field(default_factory=list)
    runs: asyncio.Event = field(default_factory=asyncio.Event)
    busy: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        self._idle.set()
        self.runs.set()
        self._tasks = [asyncio.ensure_future(self._client(number)) for number in range(self.clients)]

    async def pause(self) -> None:
        """Pauses the clients; returns when nothing is in flight any more."""
        self.runs.clear()
        await self._idle.wait()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def ask(self, wish: Wish) -> Got:
        """Sends one request on top of the clients', and has it judged with theirs."""
        self.busy += 1
        self._idle.clear()
        got = await ask(self.port, wish)
        self.got.append(got)
        self.busy -= 1
        if not self.busy:
            self._idle.set()
        return got

    async def _client(self, number: int) -> None:
        chance = random.Random(f"{self.seed} client {number}")
        count = 0
        while True:
            while not self.runs.is_set():  # it may have been unset again before this task was woken
                await self.runs.wait()
            count += 1
            await self.ask(wish(chance, f"c{number}-{count}", self.paths, self.others))
            await asyncio.sleep(chance.uniform(*THINK))


def wish(chance: random.Random, id: str, paths: tuple[str, ...], others: float) -> Wish:
    """A random request of a client."""
    kind = chance.random()
    if kind < others:
        return Wish(id, chance.choice(["GET", "HEAD"]), "/v1/models/whatever")
    path = chance.choice(paths)
    stream = chance.random() < 0.65
    tokens = chance.choice([1, 3, 8, 8, 20, 40])
    leaves_after = chance.choice([1, 400]) if stream and tokens >= 8 and chance.random() < 0.1 else None
    return Wish(
        id, "POST", path, body_for(path, f"go {id}", tokens, stream), stream, leaves_after, "".join(words(tokens))
    )


def body_for(path: str, prompt: str, tokens: int, stream: bool) -> bytes:
    """The body of a request for that many tokens. Prompts must differ: a request might be refused if an equal one was
    there when replicas died."""
    body: dict[str, Any] = {"model": "lab", "stream": stream}
    if path == "/generate":
        body |= {"text": prompt, "sampling_params": {"max_new_tokens": tokens}}
    elif path == "/v1/completions":
        body |= {"prompt": prompt, "max_tokens": tokens}
    else:
        body |= {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
    return json.dumps(body).encode()
