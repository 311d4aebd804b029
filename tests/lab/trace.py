"""A trace of requests in the format of the trace that Mooncake's authors published, and the requests it stands for.

A line is a JSON object: `timestamp` in milliseconds, `input_length` and `output_length` in tokens, and `hash_ids`:
equal numbers are equal blocks of 512 tokens in the same place of the same prefix. The published file is not part of
this project, because a few of its lines say little (users come back after minutes) and all of it is 3 MB; `likeness`
makes similar requests.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import overload

from tests.lab.radix import TOKEN
from tests.lab.workloads import Conversation, Turn

BLOCK_TOKENS = 512
LONGEST = 125_000


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a trace; `at` in seconds."""

    at: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


def read(path: Path) -> list[Line]:
    """Raises OSError, or ValueError with the number of the line that is invalid."""
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            told = json.loads(text)
            blocks = tuple(int(block) for block in told["hash_ids"])
            line = Line(told["timestamp"] / 1000, int(told["input_length"]), int(told["output_length"]), blocks)
            if not 0 < line.input_tokens <= len(blocks) * BLOCK_TOKENS or line.output_tokens < 1 or line.at < 0:
                raise ValueError("lengths that do not fit each other")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        lines.append(line)
    return lines


def likeness(requests: int, seed: int) -> list[Line]:
    """Requests like those of the published conversation trace, by measurements of it.

    3.4 a second; all begin with the same block; three of five begin a conversation, with a median of 5,000 tokens and a
    mean of 11,000; the others continue one after a median of two minutes, with a few hundred tokens more.
    """
    chance, fresh = random.Random(seed), count(1)
    lines: list[Line] = []
    due: list[tuple[float, list[int], int]] = []  # conversations to continue: when, their blocks and tokens so far
    at = 0.0
    while len(lines) < requests:
        at += chance.expovariate(3.4)
        if due and min(due)[0] <= at:
            _, blocks, tokens = due.pop(due.index(min(due)))
            tokens += min(20_000, int(chance.lognormvariate(5.3, 1.2)))
        else:
            blocks, tokens = [0], int(chance.lognormvariate(8.5, 1.26))
        tokens = min(max(tokens, 200), LONGEST)
        # A last block that was only partly filled is a different block now.
        whole = max(1, min(len(blocks), tokens // BLOCK_TOKENS))
        blocks = blocks[:whole] + [next(fresh) for _ in range(-(-tokens // BLOCK_TOKENS) - whole)]
        output = min(2000, max(1, int(chance.gauss(340, 180))))
        lines.append(Line(at, tokens, output, tuple(blocks)))
        if chance.random() < 0.42:
            due.append((at + chance.lognormvariate(4.8, 0.9), blocks[:-1] or [0], tokens + output))
    return lines


class Played(Sequence[Conversation]):
    """The requests of a trace, each a conversation of its own; generated on access, because they are long.

    `copies` of it run side by side and share only the first block, so that more replicas have more to do.
    """

    def __init__(self, lines: Sequence[Line], copies: int = 1, speed: float = 1.0) -> None:
        self._lines = [(line, copy) for line in lines for copy in range(copies)]
        self.arrivals = [line.at / speed for line, _ in self._lines]

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...

    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        line, copy = self._lines[index]
        blocks = [_block(block, copy) for block in line.blocks]
        tokens = b"".join(blocks)[: line.input_tokens * TOKEN]
        # Four letters a token, as words: a long text without spaces would be taken for an image.
        text = "".join(block.hex(" ", TOKEN)[: BLOCK_TOKENS * 4] for block in blocks)[: line.input_tokens * 4]
        answer = random.Random(f"answer {index}").randbytes(line.output_tokens * TOKEN)
        return [Turn([{"role": "user", "content": [{"type": "text", "text": text}]}], tokens, answer)]


def _block(number: int, copy: int) -> bytes:
    return random.Random(f"{number} {copy if number else 0}").randbytes(BLOCK_TOKENS * TOKEN)
