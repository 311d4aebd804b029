"""A prompt as routing blocks: hashes, each chained to all before it, that are equal for prompts that begin alike.

SGLang caches what was computed for a prefix, images included, so two requests whose first n blocks are equal share at
least about n blocks of its KV cache. The blocks are cut from what the client sent, not from tokens: routing needs to
know what is equal, not what it means.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import orjson
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from balancer.routing.body import HEAVY_BODY, IMAGE_MARK, SEED, parsed

BLOCK_BYTES = 512  # of text; about 128 tokens
LEAST_BYTES = 128
IMAGE_BLOCKS = 4  # an image counts as much as 2 KiB of text: LLaVA makes 576 to 2,880 tokens of one
MAX_BLOCKS = 1024
MAX_BYTES = MAX_BLOCKS * BLOCK_BYTES  # of text; what follows is cut off

Piece = str | bytes  # text, or an image's digest


class Prompt:
    """One request's prompt; `blocks` are made once, on first use. `body` stays as it is.

    From then on `is_streamed` says whether the request asks for a streamed answer.
    """

    __slots__ = ("_blocks", "body", "is_streamed", "path")

    def __init__(self, path: str, body: list[bytes]) -> None:
        self.path = path
        self.body = body
        self.is_streamed = False
        self._blocks: list[int] | None = None

    @classmethod
    def of(cls, blocks: list[int], is_streamed: bool) -> "Prompt":
        """A prompt that was read elsewhere, and whose body stayed there."""
        prompt = cls("", [])
        prompt._blocks, prompt.is_streamed = blocks, is_streamed
        return prompt

    @property
    def is_heavy(self) -> bool:
        """May making the blocks take milliseconds? Then make them in a turn of their own."""
        return self._blocks is None and self.path in _READERS and sum(map(len, self.body)) > HEAVY_BODY

    @property
    def blocks(self) -> list[int]:
        """Chained 64-bit hashes, at most `MAX_BLOCKS`; empty if there is nothing to route by."""
        return self.read() if self._blocks is None else self._blocks

    def read(self) -> list[int]:
        """Makes the blocks now."""
        reader = _READERS.get(self.path)
        collects = gc.isenabled()
        gc.disable()  # JSON has no cycles, and a search for them in a heavy body can take as long as reading it
        try:
            self._blocks = blocks = self._cut(reader) if reader else []
        finally:
            if collects:
                gc.enable()
        return blocks

    def says_stream(self) -> bool:
        """Does the request ask for a streamed answer, as far as the body can be read?"""
        _ = self.blocks
        return self.is_streamed

    def _cut(self, reader: "Reader") -> list[int]:
        request = parsed(b"".join(self.body))  # a body in one piece is not copied
        if not isinstance(request, dict):
            return []
        self.is_streamed = request.get("stream") is True
        try:
            return _chain(_whose(request), reader(request))
        except (orjson.JSONEncodeError, RecursionError):
            return []  # nested deeper than any real request


def _whose(request: dict[str, Any]) -> str:
    """What makes SGLang keep equal prompts apart: model, adapter, and the two names that clients may give.

    An adapter is named by itself or after the model's name. In a batch each prompt has its own; the first one counts.
    """
    model, adapter = request.get("model"), _first(request.get("lora_path"))
    if isinstance(model, str) and ":" in model:
        model, _, named = model.partition(":")
        adapter = named.strip() or adapter
    names = _first(request.get("extra_key")), _first(request.get("cache_salt"))
    return orjson.dumps([model, adapter or None, *(name or None for name in names)]).decode()


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _chain(whose: str, pieces: Iterator[Piece]) -> list[int]:
    """Cuts text into blocks and gives each image its own; text short of a block only enters the hashes that follow."""
    blocks: list[int] = []
    text, seed = [whose], SEED
    length = 0  # characters of text, each at least a byte
    for piece in pieces:
        if length > MAX_BYTES or len(blocks) > MAX_BLOCKS:
            break  # the rest would be cut off
        if isinstance(piece, str):
            text.append(piece)
            length += len(piece)
            continue
        seed = _chain_text("".join(text), seed, blocks)
        text.clear()
        for _ in range(IMAGE_BLOCKS):
            seed = xxh3_64_intdigest(piece, seed)
            blocks.append(seed)
    seed = _chain_text("".join(text), seed, blocks)
    # A prompt shorter than a block is one block, unless it is too short to be worth finding.
    return blocks[:MAX_BLOCKS] or ([seed] if length >= LEAST_BYTES else [])


def _chain_text(text: str, seed: int, blocks: list[int]) -> int:
    data = text[:MAX_BYTES].encode()
    whole = min(len(data) - len(data) % BLOCK_BYTES, MAX_BYTES)
    for start in range(0, whole, BLOCK_BYTES):
        seed = xxh3_64_intdigest(data[start : start + BLOCK_BYTES], seed)
        blocks.append(seed)
    return xxh3_64_intdigest(data[whole : whole + BLOCK_BYTES], seed)


# Text and images by the format of each path


def _chat(request: dict[str, Any]) -> Iterator[Piece]:
    """OpenAI's chat completions, and Anthropic's messages with their separate `system`."""
    yield from _tools(request)
    system = request.get("system")
    if isinstance(system, str):
        yield _text(system)
    else:
        yield from _parts(system)
    messages = request.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            yield from _message(message)


def _tools(request: dict[str, Any]) -> Iterator[Piece]:
    """The tools come first in the prompt: all, none, or the chosen one."""
    tools, choice = request.get("tools"), request.get("tool_choice")
    if tools and choice != "none" and choice != {"type": "none"}:
        yield orjson.dumps([tools, choice] if isinstance(choice, dict) else tools).decode()


def _message(message: dict[str, Any]) -> Iterator[Piece]:
    yield f"\n{message.get('role')}:"
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, str):
        yield _text(content)
    elif content is not None:
        yield from _parts(content)
    elif not calls:  # in /v1/responses this is a call or its result
        yield orjson.dumps(message).decode()
    if calls:
        yield orjson.dumps(calls).decode()


def _parts(content: Any) -> Iterator[Piece]:
    for part in content if isinstance(content, list) else ():
        if isinstance(part, str):
            yield _text(part)
        if not isinstance(part, dict):
            continue
        if isinstance(text := part.get("text"), str):
            yield _text(text)
        elif image := part.get("image_url"):  # in /v1/responses this is the URL itself
            yield from _image(image.get("url") if isinstance(image, dict) else image)
        elif isinstance(source := part.get("source"), dict):
            yield from _image(source.get("data") or source.get("url"))
        else:
            yield orjson.dumps(part).decode()


def _text(value: str) -> Piece:
    """A text; a long one of base64 letters only was taken for an image, and counts as one."""
    return value.removeprefix(IMAGE_MARK).encode() if value.startswith(IMAGE_MARK) else value


def _image(value: Any) -> Iterator[Piece]:
    """A digest of an image's URL or of its bytes; of a list, one after the other."""
    if isinstance(value, str):
        if value.startswith(IMAGE_MARK):
            yield value.removeprefix(IMAGE_MARK).encode()
        else:
            yield xxh3_64_digest(value.encode(), SEED).hex().encode()
    for item in value if isinstance(value, list) else ():
        yield from _image(item.get("url") if isinstance(item, dict) else item)


def _completion(request: dict[str, Any]) -> Iterator[Piece]:
    yield from _text_or_ids(request.get("prompt"))


def _generate(request: dict[str, Any]) -> Iterator[Piece]:
    """SGLang's own format. Images, video and audio come first: only the replica knows where in the text they go."""
    for kind in ("image_data", "video_data", "audio_data"):
        yield from _image(request.get(kind))
    yield from _text_or_ids(request.get("text") or request.get("input_ids"))


def _embedding(request: dict[str, Any]) -> Iterator[Piece]:
    yield from _text_or_ids(request.get("input"))


def _responses(request: dict[str, Any]) -> Iterator[Piece]:
    yield from _tools(request)
    yield from _text_or_ids(request.get("instructions"))
    if before := request.get("previous_response_id"):  # the earlier conversation comes first
        yield f"\n{before}:"
    given = request.get("input")
    if isinstance(given, list) and given and isinstance(given[0], dict):
        yield from _chat({"messages": given})
    else:
        yield from _text_or_ids(given)


def _text_or_ids(value: Any) -> Iterator[Piece]:
    """A text, a list of texts (a batch: the first is as good a guide as any), or token ids."""
    if isinstance(value, str):
        yield _text(value)
    elif isinstance(value, list) and value:
        if isinstance(value[0], int):
            yield orjson.dumps(value[:MAX_BYTES]).decode()
        else:
            yield from _text_or_ids(value[0])


Reader = Callable[[dict[str, Any]], Iterator[Piece]]

_READERS: dict[str, Reader] = {
    "/v1/chat/completions": _chat,
    "/v1/messages": _chat,
    "/v1/responses": _responses,
    "/v1/completions": _completion,
    "/v1/embeddings": _embedding,
    "/generate": _generate,
}
