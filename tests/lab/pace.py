"""When the tokens of one generation come: at fixed latencies (plain mode)."""

import asyncio
from typing import Protocol

from tests.lab.answers import Usage
from tests.lab.asked import Asked, BadRequest
from tests.lab.knobs import Knobs
from tests.lab.prompts import prompt_tokens
from tests.lab.radix import TOKEN

IMAGE_TOKENS = 576


class Pace(Protocol):
    """The server waits on this for each token of one generation."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def cached_tokens(self) -> int:
        """Known once the first token has come."""

    async def token(self, position: int) -> None:
        """Return when the token at `position`, from 0, is due."""

    def abort(self) -> bool:
        """Stop generating. False if it was over already."""


class PlainPace:
    """Fixed latencies from the knobs; nothing is ever cached."""

    cached_tokens = 0

    def __init__(self, knobs: Knobs, asked: Asked) -> None:
        self.prompt_tokens = _count(asked)
        self._knobs = knobs

    async def token(self, position: int) -> None:
        delay = self._knobs.token_interval if position else self._knobs.first_token_delay
        if delay:
            await asyncio.sleep(delay)

    def abort(self) -> bool:
        return True


def _count(asked: Asked) -> int:
    """Tokens of the prompt; a plain replica also counts a prompt that no model would accept."""
    try:
        return len(prompt_tokens(asked, IMAGE_TOKENS)) // TOKEN
    except BadRequest:
        return max(1, asked.body_length // TOKEN)


def usage(pace: Pace, completion_tokens: int) -> Usage:
    return Usage(pace.prompt_tokens, completion_tokens, pace.cached_tokens)
