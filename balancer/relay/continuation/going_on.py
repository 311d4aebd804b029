"""Continues a streamed answer whose replica broke: what the next replica is asked beforehand, and for the rest."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import orjson

from balancer.fleet.chat_template import QUESTION
from balancer.fleet.outcome import Outcome
from balancer.relay.continuation.delivered import CannotContinue, delivered
from balancer.relay.continuation.follow_up import ending, follow_up, read_request
from balancer.relay.continuation.reasoning import is_opened, tags_of
from balancer.relay.continuation.translation import Translation
from balancer.relay.places import Place
from balancer.relay.receiver import Receiver
from balancer.relay.request import Headers, Request

LARGEST_COUNT = 16 << 20  # bytes of an answer from /tokenize: it contains the ids, some six bytes each

Exchange = Callable[[Request, Receiver], Awaitable[Outcome]]


class Unasked(Exception):
    """The replica could not be asked; `outcome` says how the attempt ended."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome


class GoingOn:
    """One broken answer. Raises CannotContinue if it cannot continue; `pieces` are what the client received.

    `hides_usage`: the client does not get the token counts, so it does not lack them either.
    """

    def __init__(self, request: Request, pieces: list[bytes], hides_usage: bool = False) -> None:
        self._request = request
        if not request.body:
            raise CannotContinue("body")  # it was dropped to make room for others
        self._is_untouched = not pieces  # the client has at most a head, so the same request is sent again
        self.ending: bytes | None = None  # all that the client lacks, if no other replica need be asked
        if self._is_untouched:
            return
        self._so_far = delivered(request.path, pieces)
        self._so_far.has_usage |= hides_usage
        self._wish = read_request(request.body)
        self.ending = ending(request.path, self._wish, self._so_far)
        if self.ending is None:
            # Fails now if the answer cannot continue, rather than after a wait for another replica.
            follow_up(request.path, self._wish, self._so_far, 0)

    async def follow_up(self, place: Place, exchange: Exchange) -> tuple[Request, Translation | None]:
        """What to send to that replica, and how to translate its answer; raises CannotContinue or Unasked."""
        if self._is_untouched:
            return self._request, None
        request, so_far = self._request, self._so_far
        tokens, reasoned, reasoning_tokens = so_far.completion_tokens, "", 0
        if so_far.text and request.path != "/generate":
            if request.path != "/v1/completions" and not await place.continues():
                raise CannotContinue("template")
            reasoned, reasoning_tokens = await self._reasoned(place, exchange) if so_far.reasoning else ("", 0)
            tokens = len(await self._ids(exchange, reasoned + so_far.text))
        follow = follow_up(request.path, self._wish, so_far, tokens, reasoned, reasoning_tokens)
        return _posted(request, follow.path, follow.body), Translation(request.path, so_far, follow)

    async def _reasoned(self, place: Place, exchange: Exchange) -> tuple[str, int]:
        """The reasoning as the model wrote it, with its tags, and how many tokens that is."""
        tags = tags_of(place.reasoning_parser)
        if tags is None:
            raise CannotContinue("reasoning")
        how = {name: self._wish[name] for name in ("chat_template_kwargs", "reasoning_effort") if name in self._wish}
        prompt = await self._tokens(exchange, messages=QUESTION, **how)
        opened = is_opened(prompt, await self._ids(exchange, tags.start))
        if opened is None:
            raise CannotContinue("reasoning")
        reasoned = ("" if opened else tags.start) + self._so_far.reasoning + tags.end
        return reasoned, len(await self._ids(exchange, reasoned))

    async def _ids(self, exchange: Exchange, text: str) -> list[int]:
        return await self._tokens(exchange, prompt=text, add_special_tokens=False)

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
