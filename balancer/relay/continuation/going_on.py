"""Continues a streamed answer whose replica broke: what the next replica is asked beforehand, and for the rest."""

from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from balancer.fleet.chat_template import QUESTION
from balancer.fleet.outcome import Outcome
from balancer.relay.continuation.delivered import CannotContinue, delivered
from balancer.relay.continuation.follow_up import ending, follow_up, read_request
from balancer.relay.continuation.reasoning import is_opened, tags_of
from balancer.relay.continuation.token_ids import beginnings, different, ids_of, prompt_of
from balancer.relay.continuation.translation import Translation
from balancer.relay.places import Place
from balancer.relay.receiver import Receiver
from balancer.relay.request import Headers, Request

LARGEST_COUNT = 16 << 20  # bytes of an answer from /tokenize: it contains the ids, some six bytes each

TEXTS = ("/v1/completions", "/generate")  # which have no chat template

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
        request = self._request
        if self._is_untouched:
            if not request.body:
                raise CannotContinue("body")  # dropped while it waited for a place
            return _copied(request), None  # of which nothing is dropped while a connection is made
        so_far = self._so_far
        made: list[int] = []
        tokens, reasoned, reasoning_tokens, ids = 0, "", 0, None
        if so_far.text:
            if request.path not in TEXTS and not await place.continues():
                raise CannotContinue("template")
            if so_far.reasoning:
                reasoned, reasoning_tokens = await self._reasoned(place, exchange)
                tokens = await self._count(exchange, reasoned + so_far.text)
            else:
                made, ids = await self._made(exchange)
                tokens = len(made)
        if request.path == "/generate":
            so_far.output_ids, so_far.completion_tokens = made, tokens
        follow = follow_up(request.path, self._wish, so_far, tokens, reasoned, reasoning_tokens, ids)
        return _posted(request, follow.path, follow.body), Translation(request.path, so_far, follow)

    async def _made(self, exchange: Exchange) -> tuple[list[int], list[int] | None]:
        """The tokens of the text so far; and all ids, the prompt's too, if the text would be read as other tokens."""
        so_far = self._so_far
        pieces = different(so_far.pieces)
        read, *each = await self._ids(exchange, so_far.text, *pieces)
        made = so_far.output_ids or ids_of(so_far.pieces, dict(zip(pieces, each, strict=True))) or read
        if made[: len(read)] == read:
            return read, None  # what /generate has made beyond is a part of a character, and is made again
        return await self._by_ids(exchange, made, read)

    async def _by_ids(self, exchange: Exchange, made: list[int], read: list[int]) -> tuple[list[int], list[int] | None]:
        """Those of the ids made that are text by now, and the prompt's with them; else what was read, and the text."""
        prompt = prompt_of(self._request.path, self._wish)
        if prompt is None:
            return read, None
        tried = beginnings(made)
        texts = await self._asked(exchange, "/detokenize", "text", tokens=tried)
        if not isinstance(texts, list) or self._so_far.text not in texts:
            return read, None
        made = tried[texts.index(self._so_far.text)]
        return made, await self._tokens(exchange, **prompt) + made

    async def _reasoned(self, place: Place, exchange: Exchange) -> tuple[str, int]:
        """The reasoning as the model wrote it, with its tags, and how many tokens that is."""
        tags = tags_of(place.reasoning_parser)
        if tags is None:
            raise CannotContinue("reasoning")
        how = {name: self._wish[name] for name in ("chat_template_kwargs", "reasoning_effort") if name in self._wish}
        prompt = await self._tokens(exchange, messages=QUESTION, **how)
        opened = is_opened(prompt, *await self._ids(exchange, tags.start))
        if opened is None:
            raise CannotContinue("reasoning")
        reasoned = ("" if opened else tags.start) + self._so_far.reasoning + tags.end
        return reasoned, await self._count(exchange, reasoned)

    async def _count(self, exchange: Exchange, text: str) -> int:
        (ids,) = await self._ids(exchange, text)
        return len(ids)

    async def _ids(self, exchange: Exchange, *texts: str) -> list[list[int]]:
        """The replica's token ids for each of these texts."""
        each = await self._tokens(exchange, prompt=texts, add_special_tokens=False)
        if len(each) != len(texts) or not all(isinstance(ids, list) for ids in each):
            raise CannotContinue("tokenize")
        return each

    async def _tokens(self, exchange: Exchange, **what: Any) -> list[Any]:
        tokens = await self._asked(exchange, "/tokenize", "tokens", **what)
        if not isinstance(tokens, list):
            raise CannotContinue("tokenize")
        return tokens

    async def _asked(self, exchange: Exchange, path: str, name: str, **what: Any) -> Any:
        """This field of the replica's answer; None if it has none."""
        if model := self._wish.get("model"):
            what["model"] = model
        answer = _Whole()
        outcome = await exchange(_posted(self._request, path, orjson.dumps(what)), answer)
        if outcome is not Outcome.ANSWERED:
            raise Unasked(outcome)
        if answer.status == 503:
            raise Unasked(Outcome.BUSY)
        return answer.field(name)


def _posted(request: Request, path: str, body: bytes) -> Request:
    """The same request with another path and body."""
    posted = _copied(request)
    posted.target, posted.path = path.encode(), path
    posted.body, posted.body_size, posted.length = [body], len(body), len(body)
    posted.is_chunked, posted.held = False, 0
    return posted


def _copied(request: Request) -> Request:
    """The same request, with a list of its own of the same pieces."""
    copied = Request(request.method, b"", request.version, request.received_at)
    for name in Request.__dataclass_fields__:
        setattr(copied, name, getattr(request, name))
    copied.body = list(request.body)
    return copied


class _Whole:
    """Collects a small answer whole."""

    def __init__(self) -> None:
        self.status = 0
        self._pieces: list[bytes] = []
        self._size = 0

    def on_head(self, status: int, headers: Headers, length: int | None) -> bool:
        self.status = status
        return True

    def on_body(self, data: bytes, now: float) -> None:
        self._size += len(data)
        if self._size <= LARGEST_COUNT:
            self._pieces.append(data)

    def on_end(self, seconds: float) -> bool:
        return True

    def field(self, name: str) -> Any:
        """This field of the JSON object; None if there is none."""
        try:
            return orjson.loads(b"".join(self._pieces))[name] if self.status == 200 else None
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return None
