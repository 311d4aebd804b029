"""Signs of life for a client whose stream has not begun: comment lines, which no client takes for events.

Proxies and load balancers give up on a connection that carries nothing for a minute, and a queue, a start or a long
prefill takes longer.
"""

import asyncio

from balancer.relay.reply import Reply
from balancer.relay.request import Request
from balancer.routing.prompt import Prompt

STREAMING = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/generate"))


class Comments:
    """Writes one each `every` seconds until the stream's first byte or `stop`; the first one sends the head, too."""

    __slots__ = ("_every", "_loop", "_reply", "_request", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, every: float, request: Request, reply: Reply) -> None:
        self._loop = loop
        self._every = every
        self._request = request
        self._reply = reply
        self._timer = loop.call_later(every, self._due)

    def stop(self) -> None:
        self._timer.cancel()

    def _due(self) -> None:
        reply = self._reply
        if not reply.has_begun and self._is_streamed():
            reply.begin_early()
        if reply.comment():
            self._timer = self._loop.call_later(self._every, self._due)

    def _is_streamed(self) -> bool:
        """Read only now: few requests wait for so long."""
        prompt = Prompt(self._request.path, self._request.body)
        return prompt.says_stream()
