"""Requests for the simulator: what they share, how many share it, and in which order they come.

A workload is a list of conversations, each a list of turns; a turn can be sent once the one before it is answered.
Every turn has a request body as a client would send it, and the tokens that the replica model makes of it.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from balancer.routing.prompt import Prompt
from tests.lab.radix import TOKEN

IMAGE_TOKENS = 576  # LLaVA-1.5's 24 x 24 patches
ANSWER_TOKENS = 64
QUESTION_TOKENS = 40


class Turn(Prompt):
    """One request of a conversation: its body, which the policies read, and its tokens, which the model reads."""

    __slots__ = ("answer", "answer_tokens", "tokens")

    def __init__(self, content: list[dict[str, Any]], tokens: bytes, answer: bytes) -> None:
        super().__init__("/v1/chat/completions", [orjson.dumps({"model": "m", "stream": True, "messages": content})])
        self.tokens = tokens
        self.answer = answer
        self.answer_tokens = len(answer) // TOKEN


Conversation = Sequence[Turn]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a prompt: what the client sends, and the tokens it becomes."""

    part: dict[str, Any]
    tokens: bytes


class Writer:
    """Writes random pieces, reproducibly."""

    def __init__(self, chance: random.Random, bytes_per_token: int = 4) -> None:
        self.chance = chance
        self.bytes_per_token = bytes_per_token

    def text(self, tokens: int) -> Piece:
        words = self.chance.randbytes(tokens * self.bytes_per_token).hex(" ", 4)[: tokens * self.bytes_per_token]
        return Piece({"type": "text", "text": words}, self.chance.randbytes(tokens * TOKEN))

    def image(self) -> Piece:
        url = f"http://images/{self.chance.getrandbits(64):x}.png"
        return Piece({"type": "image_url", "image_url": {"url": url}}, self.chance.randbytes(IMAGE_TOKENS * TOKEN))

    def turn(self, *pieces: Piece, answer_tokens: int = ANSWER_TOKENS) -> Turn:
        """A turn with a single message."""
        content = [{"role": "user", "content": [piece.part for piece in pieces]}]
        return Turn(content, b"".join(piece.tokens for piece in pieces), self.chance.randbytes(answer_tokens * TOKEN))

    def answer_tokens(self) -> int:
        """Half to one and a half times ANSWER_TOKENS."""
        return self.chance.randint(ANSWER_TOKENS // 2, ANSWER_TOKENS * 3 // 2)


def groups(
    writer: Writer,
    count: int,
    requests: int,
    prefix_tokens: int,
    answer_tokens: int | None = None,
    skew: float = 0.0,
) -> list[Conversation]:
    """Groups, each with its own system prompt. `skew` 0: all equally often; otherwise zipf with this exponent."""
    prefixes = [writer.text(prefix_tokens) for _ in range(count)]
    if skew:
        picked = writer.chance.choices(prefixes, [1 / rank**skew for rank in range(1, count + 1)], k=requests)
    else:
        picked = [prefixes[number % count] for number in range(requests)]
        writer.chance.shuffle(picked)
    return [
        [writer.turn(prefix, writer.text(QUESTION_TOKENS), answer_tokens=answer_tokens or writer.answer_tokens())]
        for prefix in picked
    ]


def requests(replicas: int) -> int:
    """250 per replica, up to what fits into memory."""
    return min(250 * replicas, 20_000)


def chat(writer: Writer, replicas: int) -> list[Conversation]:
    """Conversations of four to twelve turns that begin with one short system prompt and grow by 200 tokens a turn."""
    system = writer.text(100)
    return [_conversation(writer, system, writer.chance.randint(4, 12)) for _ in range(min(40 * replicas, 2_600))]


def _conversation(writer: Writer, system: Piece, turns: int) -> Conversation:
    messages: list[dict[str, Any]] = [{"role": "system", "content": [system.part]}]
    tokens = system.tokens
    conversation = []
    for _ in range(turns):
        asked, answer = writer.text(120), writer.text(80)
        messages.append({"role": "user", "content": [asked.part]})
        tokens += asked.tokens
        conversation.append(Turn(messages, tokens, answer.tokens))
        messages.append({"role": "assistant", "content": [answer.part]})
        tokens += answer.tokens
    return conversation


def images(writer: Writer, replicas: int) -> list[Conversation]:
    """Questions about images, with the same words before each question; the image comes first, as LLaVA wants it."""
    shown = [writer.image() for _ in range(min(60 * replicas, 4_000))]
    common = writer.text(100)
    asks = [(image, writer.text(QUESTION_TOKENS)) for image in shown for _ in range(6)]
    writer.chance.shuffle(asks)
    return [[writer.turn(image, common, asked, answer_tokens=writer.answer_tokens())] for image, asked in asks]


def one_system_prompt(writer: Writer, replicas: int) -> list[Conversation]:
    """60 % of each prompt is one system prompt, shared by all."""
    system = writer.text(1200)
    return [
        [writer.turn(system, writer.text(800), answer_tokens=writer.answer_tokens())] for _ in range(requests(replicas))
    ]


def hot_prompt(writer: Writer, replicas: int) -> list[Conversation]:
    """All prompts share nearly all of their tokens: the replica that has them cached must not get all the requests."""
    return groups(writer, 1, requests(replicas), 1500)


def nothing_shared(writer: Writer, replicas: int) -> list[Conversation]:
    """Prompts of 200 to 2,000 tokens that are all different."""
    return [
        [writer.turn(writer.text(writer.chance.randint(200, 2000)), answer_tokens=writer.answer_tokens())]
        for _ in range(requests(replicas))
    ]


def uniform(writer: Writer, replicas: int) -> list[Conversation]:
    """20 groups per replica, all equally often."""
    return groups(writer, 20 * replicas, requests(replicas), 1500)


def zipf(writer: Writer, replicas: int) -> list[Conversation]:
    """40 groups per replica, some much more often than others."""
    return groups(writer, 40 * replicas, requests(replicas), 1500, skew=1.0)


def unlike(writer: Writer, pools: int, pool_tokens: int) -> Iterator[Conversation]:
    """Prompts that share nothing, one and a half times as many as `pools` KV pools hold."""
    tokens = min(2000, pool_tokens // 8)
    for _ in range(math.ceil(1.5 * pools * pool_tokens / tokens)):
        yield [writer.turn(writer.text(tokens), answer_tokens=1)]


WORKLOADS: dict[str, Callable[[Writer, int], list[Conversation]]] = {
    "uniform": uniform,
    "zipf": zipf,
    "chat": chat,
    "images": images,
    "one prompt": one_system_prompt,
    "hot prompt": hot_prompt,
    "no sharing": nothing_shared,
}
