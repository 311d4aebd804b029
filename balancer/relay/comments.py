"""Keeps a connection alive until its stream begins, with comment lines, which no client takes for events.

Proxies and load balancers give up on a connection that carries nothing for a minute, and a wait in the queue, a
replica's start or a long prefill can take longer.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from balancer.relay.reply import Reply
from balancer.relay.request import Request
from balancer.routing.prompt import Prompt

STREAMING = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/generate"))


class Comments:
    """Writes a comment every `every` seconds until the stream's first byte or `stop`; the first also sends the head.

    `read` reads a heavy prompt when its owner's turn comes.
    """

    __slots__ = ("_every", "_loop", "_read", "_reply", "_request", "_timer")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        every: float,
        request: Request,
        reply: Reply,
        read: Callable[[Prompt, str | bytes], Coroutine[Any, Any, None]],
    ) -> None:
        self._loop = loop
        self._every = every
        self._request = request
        self._reply = reply
        self._read = read
        self._timer: asyncio.TimerHandle | asyncio.Task[None] = loop.call_later(every, self._due)

    def stop(self) -> None:
        self._timer.cancel()

    def _due(self) -> None:
        if self._reply.has_begun:
            self._comment()
            return
        # The body is read only now, because few requests wait this long.
        prompt = Prompt(self._request.path, self._request.body)
        if prompt.is_heavy:
            self._timer = self._loop.create_task(self._begin_when_read(prompt))
        else:
            self._begin(prompt)

    async def _begin_when_read(self, prompt: Prompt) -> None:
        await self._read(prompt, self._request.owner)
        self._begin(prompt)

    def _begin(self, prompt: Prompt) -> None:
        if not self._reply.has_begun and prompt.says_stream():
            self._reply.begin_early()
        self._comment()

    def _comment(self) -> None:
        if self._reply.comment():
            self._timer = self._loop.call_later(self._every, self._due)
