"""Continues a streamed answer whose replica broke: what the next replica is asked beforehand, and for the rest."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import orjson

from balancer.fleet.address import ReplicaAddress
from balancer.fleet.outcome import Outcome
from balancer.relay.continuation.delivered import CannotContinue, delivered
from balancer.relay.continuation.follow_up import ending, follow_up, read_request
from balancer.relay.continuation.translation import Translation
from balancer.relay.request import Headers, Request
from balancer.relay.upstream import Receiver

LARGEST_COUNT = 16 << 20  # bytes of an answer from /tokenize: it contains the ids, some six bytes each
# For testing a chat template: does an unfinished answer directly follow the opening that the template itself writes?
TRIAL = [{"role": "user", "content": "Hello"}]
TRIAL_TEXT = "So it is"

Exchange = Callable[[Request, Receiver], Awaitable[Outcome]]


class Unasked(Exception):
    """The replica could not be asked; `outcome` says how the attempt ended."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome


# Whether each replica's chat template can continue an answer, for those tested so far.
Templates = dict[ReplicaAddress, bool]


class GoingOn:
    """One broken answer. Raises CannotContinue if it cannot continue; `pieces` are what the client received."""

    def __init__(self, request: Request, pieces: list[bytes], templates: Templates) -> None:
        self._request = request
        self._templates = templates
        if not request.body:
            raise CannotContinue("body")  # it was dropped to make room for others
        self._is_untouched = not pieces  # the client has at most a head, so the same request is sent again
        self.ending: bytes | None = None  # all that the client lacks, if no other replica need be asked
        if self._is_untouched:
            return
        self._so_far = delivered(request.path, pieces)
        self._wish = read_request(request.body)
        self.ending = ending(request.path, self._wish, self._so_far)
        if self.ending is None:
            # Fails now if the answer cannot continue, rather than after a wait for another replica.
            follow_up(request.path, self._wish, self._so_far, 0)

    async def follow_up(self, replica: ReplicaAddress, exchange: Exchange) -> tuple[Request, Translation | None]:
        """What to send to that replica, and how to translate its answer; raises CannotContinue or Unasked."""
        if self._is_untouched:
            return self._request, None
        request, so_far = self._request, self._so_far
        tokens = so_far.completion_tokens
        if so_far.text and request.path != "/generate":
            if request.path != "/v1/completions" and not await self._template_continues(replica, exchange):
                raise CannotContinue("template")
            tokens = len(await self._tokens(exchange, prompt=so_far.text, add_special_tokens=False))
        follow = follow_up(request.path, self._wish, so_far, tokens)
        return _posted(request, follow.path, follow.body), Translation(request.path, so_far, follow)

    async def _template_continues(self, replica: ReplicaAddress, exchange: Exchange) -> bool:
        if replica not in self._templates:
            before = await self._tokens(exchange, messages=TRIAL)
            begun = [*TRIAL, {"role": "assistant", "content": TRIAL_TEXT}]
            after = await self._tokens(exchange, messages=begun, continue_final_message=True)
            text = await self._tokens(exchange, prompt=TRIAL_TEXT, add_special_tokens=False)
            self._templates[replica] = after == before + text
        return self._templates[replica]

    async def _tokens(self, exchange: Exchange, **what: Any) -> list[int]:
        """The replica's token ids for a text or for messages."""
        if model := self._wish.get("model"):
            what["model"] = model
        answer = _Whole()
        outcome = await exchange(_posted(self._request, "/tokenize", orjson.dumps(what)), answer)
        if outcome is not Outcome.ANSWERED:
            raise Unasked(outcome)
        return answer.tokens()


def _posted(request: Request, path: str, body: bytes) -> Request:
    """The same request with another path and body."""
    return replace(
        request,
        target=path.encode(),
        path=path,
        body=[body],
        body_size=len(body),
        length=len(body),
        is_chunked=False,
        held=0,
    )


class _Whole:
    """Collects a small answer whole."""

    def __init__(self) -> None:
        self._status = 0
        self._pieces: list[bytes] = []
        self._size = 0

    def on_head(self, status: int, headers: Headers, length: int | None) -> bool:
        self._status = status
        return True

    def on_body(self, data: bytes, now: float) -> None:
        self._size += len(data)
        if self._size <= LARGEST_COUNT:
            self._pieces.append(data)

    def on_end(self, seconds: float) -> bool:
        return True

    def tokens(self) -> list[int]:
        try:
            tokens = orjson.loads(b"".join(self._pieces))["tokens"] if self._status == 200 else None
        except (orjson.JSONDecodeError, KeyError, TypeError):
            tokens = None
        if not isinstance(tokens, list):
            raise CannotContinue("tokenize")
        return tokens
