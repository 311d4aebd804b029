"""A request body as routing blocks: hashes, each chained to all before it, that are equal where prompts share a prefix.

SGLang caches what was computed for a prefix, images included, so two requests whose first n blocks are equal share at
least about n blocks of its KV cache. The blocks are cut from what the client sent, not from tokens: routing needs to
know what is equal, not what it means.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import orjson
from xxhash import xxh3_64_digest, xxh3_64_intdigest

BLOCK_BYTES = 512  # of text; about 128 tokens
LEAST_BYTES = 128
IMAGE_BLOCKS = 4  # an image weighs as much as 2 KiB of text: LLaVA makes 576 to 2,880 tokens of one
MAX_BLOCKS = 1024
# Bodies over this size are searched for embedded images, which are hashed where they stand and never parsed.
LARGE_BODY = 16 << 10
# What is left then is parsed at up to 0.07 s and 45 MiB of memory a MiB, while all else waits. 4 MiB are a million
# tokens of English; a body with more is routed by load.
MAX_PARSED = 4 << 20
IMAGE_MARK = "\x00image:"
# How the string of one begins. Of backslashes only those before a slash: else a text of \u4e2d and its like is one.
EMBEDDED = re.compile(rb'"(?:data:[^",]{0,200},)?(?:[A-Za-z0-9+/=]|\\/){256}')

Piece = str | bytes  # text, or an image's digest


class Prompt:
    """One request's prompt; `blocks` are made when first asked for, and once.

    From then on `is_streamed` says whether the answer is to come as it is made.
    """

    __slots__ = ("_blocks", "body", "is_streamed", "path")

    def __init__(self, path: str, body: list[bytes]) -> None:
        self.path = path
        self.body = body
        self.is_streamed = False
        self._blocks: list[int] | None = None

    @property
    def blocks(self) -> list[int]:
        """Chained 64-bit hashes, at most `MAX_BLOCKS`; empty when there is nothing to route by."""
        if self._blocks is None:
            reader = _READERS.get(self.path)
            self._blocks = self._cut(reader) if reader else []
        return self._blocks

    def says_stream(self) -> bool:
        """Is the answer to come as it is made, as far as the body can be read?"""
        _ = self.blocks
        return self.is_streamed

    def _cut(self, reader: "Reader") -> list[int]:
        try:
            request = _parsed(self.body)
            if not isinstance(request, dict):
                return []
            self.is_streamed = request.get("stream") is True
            return _chain(_whose(request), reader(request))
        except (orjson.JSONDecodeError, orjson.JSONEncodeError, RecursionError):
            return []  # no JSON, or nested deeper than anybody means it


def _parsed(body: list[bytes]) -> Any:
    if len(body) > 1:
        body[:] = [b"".join(body)]  # one piece from here on, for the way to the replica too
    raw = body[0] if body else b""
    if len(raw) > LARGE_BODY:
        raw = _without_embedded(raw)
    return orjson.loads(raw)


def _without_embedded(raw: bytes) -> bytes:
    """The same JSON with each embedded image replaced by a digest of its bytes, which are read once and not copied.

    Empty where more than `MAX_PARSED` bytes would be left.
    """
    pieces: list[bytes | memoryview] = []
    view, done, room = memoryview(raw), 0, MAX_PARSED
    while begin := EMBEDDED.search(raw, done, done + room):
        end = raw.find(b'"', begin.end())
        if end < 0:
            break  # cut off in the middle: whoever parses it will say so
        digest = xxh3_64_digest(view[begin.start() + 1 : end]).hex().encode()
        pieces += view[done : begin.start()], b'"\\u0000image:%b"' % digest
        room -= begin.end() - done
        done = end + 1
    if len(raw) - done > room:
        return b""
    return b"".join([*pieces, view[done:]]) if done else raw


def _whose(request: dict[str, Any]) -> str:
    """Prompts for different models or adapters share nothing."""
    return f"{request.get('model')}|{request.get('lora_path')}"


def _chain(first: str, pieces: Iterator[Piece]) -> list[int]:
    """Cuts text into blocks, and gives each image its own; what is left of a text only chains on."""
    blocks: list[int] = []
    text, seed = [first], 0
    length = 0  # characters of text, each a byte at least
    for piece in pieces:
        if length > MAX_BLOCKS * BLOCK_BYTES or len(blocks) > MAX_BLOCKS:
            break  # what follows would be cut off
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
    # A prompt shorter than a block is one, unless it is hardly worth finding.
    return blocks[:MAX_BLOCKS] or ([seed] if length >= LEAST_BYTES else [])


def _chain_text(text: str, seed: int, blocks: list[int]) -> int:
    data = text.encode("utf-8", "surrogatepass")
    whole = min(len(data) - len(data) % BLOCK_BYTES, MAX_BLOCKS * BLOCK_BYTES)
    for start in range(0, whole, BLOCK_BYTES):
        seed = xxh3_64_intdigest(data[start : start + BLOCK_BYTES], seed)
        blocks.append(seed)
    return xxh3_64_intdigest(data[whole : whole + BLOCK_BYTES], seed)


# What is text and what is an image, by the path's own format


def _chat(request: dict[str, Any]) -> Iterator[Piece]:
    """OpenAI's chat completions, and Anthropic's messages with their `system` apart."""
    if tools := request.get("tools"):
        yield orjson.dumps(tools).decode()
    system = request.get("system")
    if isinstance(system, str):
        yield _text(system)
    else:
        yield from _parts(system)
    messages = request.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            yield f"\n{message.get('role')}:"
            content = message.get("content")
            if isinstance(content, str):
                yield _text(content)
            else:
                yield from _parts(content)
            if calls := message.get("tool_calls"):
                yield orjson.dumps(calls).decode()


def _parts(content: Any) -> Iterator[Piece]:
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict):
            continue
        if isinstance(text := part.get("text"), str):
            yield _text(text)
        elif image := part.get("image_url"):  # in /v1/responses the URL itself
            yield from _image(image.get("url") if isinstance(image, dict) else image)
        elif isinstance(source := part.get("source"), dict):
            yield from _image(source.get("data") or source.get("url"))
        else:
            yield orjson.dumps(part).decode()


def _text(value: str) -> Piece:
    """A text; a long one without a space was taken for an image, and counts as one."""
    return value.removeprefix(IMAGE_MARK).encode() if value.startswith(IMAGE_MARK) else value


def _image(value: Any) -> Iterator[Piece]:
    """An image by its URL or by a digest of its bytes; a list of them one after the other."""
    if isinstance(value, str):
        if value.startswith(IMAGE_MARK):
            yield value.removeprefix(IMAGE_MARK).encode("utf-8", "surrogatepass")
        else:
            yield xxh3_64_digest(value.encode("utf-8", "surrogatepass")).hex().encode()
    for item in value if isinstance(value, list) else ():
        yield from _image(item.get("url") if isinstance(item, dict) else item)


def _completion(request: dict[str, Any]) -> Iterator[Piece]:
    yield from _text_or_ids(request.get("prompt"))


def _generate(request: dict[str, Any]) -> Iterator[Piece]:
    """SGLang's own format. Its images come first: where the text names them is the replica's business."""
    yield from _image(request.get("image_data"))
    yield from _text_or_ids(request.get("text") or request.get("input_ids"))


def _embedding(request: dict[str, Any]) -> Iterator[Piece]:
    yield from _text_or_ids(request.get("input"))


def _responses(request: dict[str, Any]) -> Iterator[Piece]:
    yield from _text_or_ids(request.get("instructions"))
    given = request.get("input")
    if isinstance(given, list) and given and isinstance(given[0], dict):
        yield from _chat({"messages": given})
    else:
        yield from _text_or_ids(given)


def _text_or_ids(value: Any) -> Iterator[Piece]:
    """A text, a list of texts (a batch: its first is as good a guide as any), or token ids."""
    if isinstance(value, str):
        yield _text(value)
    elif isinstance(value, list) and value:
        if isinstance(value[0], int):
            yield orjson.dumps(value).decode()
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
