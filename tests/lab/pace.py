"""When the tokens of one generation come: at fixed latencies (plain mode)."""

import asyncio
from typing import Protocol

from tests.lab.answers import Usage
from tests.lab.asked import Asked
from tests.lab.knobs import Knobs


class Pace(Protocol):
    """Waited on by the server for each token of one generation."""

    prompt_tokens: int
    cached_tokens: int  # known once the first token came

    async def token(self, position: int) -> None:
        """Return when the token at `position`, from 0, is due."""

    def leave(self) -> None:
        """The generation is over: finished, cut or left by its client."""


class PlainPace:
    """Fixed latencies from the knobs; nothing is ever cached."""

    def __init__(self, knobs: Knobs, asked: Asked) -> None:
        self.prompt_tokens = max(1, asked.body_length // 4)
        self.cached_tokens = 0
        self._knobs = knobs

    async def token(self, position: int) -> None:
        delay = self._knobs.token_interval if position else self._knobs.first_token_delay
        if delay:
            await asyncio.sleep(delay)

    def leave(self) -> None:
        return


def usage(pace: Pace, completion_tokens: int) -> Usage:
    return Usage(pace.prompt_tokens, completion_tokens, pace.cached_tokens)
