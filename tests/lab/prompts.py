"""The prompt of a request as the model's tokens: four bytes of text are one, an image is a given number of them."""

import hashlib
import struct
from collections.abc import Iterator
from typing import Any

import orjson

from tests.lab.asked import END_OF_THINKING, THINK, Asked, BadRequest, is_continued
from tests.lab.radix import TOKEN

SYSTEM = "You are a helpful AI assistant."


def text_tokens(text: str) -> bytes:
    """Four bytes of UTF-8 a token, the last one padded; each tag is one. Equal beginnings give equal tokens."""
    data = text.replace(THINK, "<th>").replace(END_OF_THINKING, "</t>").encode()
    return data + bytes(-len(data) % TOKEN)


def token_ids(tokens: bytes) -> list[int]:
    return [token for (token,) in struct.iter_unpack(">I", tokens)]


def image_tokens(image: str, count: int) -> bytes:
    """`count` equal tokens made from the image's digest: this is how SGLang pads an image, so that its KV is reused."""
    return hashlib.sha256(image.encode()).digest()[:TOKEN] * count


def tokenized(body: bytes, does_continue: bool = True, opens_thinking: bool = False) -> bytes | None:
    """The answer of /tokenize for a text, several, or messages; None if the body has none."""
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(asked, dict):
        return None
    if isinstance(asked.get("prompt"), list):
        each = [token_ids(text_tokens(text)) for text in asked["prompt"]]
        return orjson.dumps({"tokens": each, "count": [len(ids) for ids in each], "max_model_len": 4096})
    if isinstance(asked.get("prompt"), str):
        tokens = text_tokens(asked["prompt"])
    elif asked.get("messages"):
        tokens = b"".join(_chat(asked, 1, does_continue and is_continued("chat", asked), opens_thinking))
    else:
        return None
    ids = token_ids(tokens)
    return orjson.dumps({"tokens": ids, "count": len(ids), "max_model_len": 4096})


def prompt_tokens(asked: Asked, tokens_per_image: int) -> bytes:
    """The whole prompt. Raises BadRequest if there is none."""
    body = asked.body
    if asked.kind in ("chat", "messages"):
        prompt = b"".join(_chat(body, tokens_per_image, is_continued(asked.kind, body), asked.opens_thinking))
    elif asked.kind == "completion":
        prompt = _flat(body.get("prompt"))
    else:
        images = body.get("image_data") or []
        images = images if isinstance(images, list) else [images]
        told = body.get("text") if body.get("text") is not None else body.get("input_ids")
        prompt = b"".join(image_tokens(str(image), tokens_per_image) for image in images) + _flat(told)
    if not prompt:
        raise BadRequest("the prompt is empty")
    return prompt


def _chat(body: dict[str, Any], tokens_per_image: int, is_continued: bool, opens_thinking: bool) -> Iterator[bytes]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise BadRequest("Messages cannot be empty.")
    if body.get("tools"):
        yield text_tokens(orjson.dumps(body["tools"]).decode())
    if messages[0].get("role") != "system":
        yield text_tokens(f"<|system|>{body.get('system', SYSTEM)}<|end|>")
    for message in messages[:-1] if is_continued else messages:
        yield text_tokens(f"<|{message.get('role')}|>")
        content = message.get("content")
        parts: list[dict[str, Any]] = content if isinstance(content, list) else [{"text": content or ""}]
        for part in parts:
            if part.get("type") == "image_url":
                yield image_tokens(str(part["image_url"]["url"]), tokens_per_image)
            else:
                yield text_tokens(str(part.get("text", "")))
        yield text_tokens("<|end|>")
    yield text_tokens("<|assistant|>")
    if opens_thinking:
        yield text_tokens(THINK)
    if is_continued:
        yield text_tokens(messages[-1]["content"])


def _flat(told: Any) -> bytes:
    """A string, token ids, or a list of either."""
    if isinstance(told, str):
        return text_tokens(told)
    if isinstance(told, int):
        return struct.pack(">I", told % 2**32)
    if isinstance(told, list):
        return b"".join(_flat(part) for part in told)
    raise BadRequest(f"a prompt is text or token ids, not {told!r}")
